import pytest
import torch
import torch.nn.functional as F

from lightning_uq.errors import InputError
from lightning_uq.functional.atoms import atom_moments, two_hot
from lightning_uq.losses import Cat2HotRegression, categorical_regression_loss
from lightning_uq.losses.categorical_regression import join_atoms, split_atoms

ATOMS = torch.linspace(-2, 2, 9)


def test_the_loss_is_cross_entropy_of_soft_targets():
    logits, y, prior = torch.randn(4, 6, 2, 9), torch.randn(6, 2), torch.randn(4, 6, 2)
    loss = categorical_regression_loss(logits, y, ATOMS, prior, reduction="none")
    expected = F.cross_entropy(logits.reshape(-1, 9), two_hot((y - prior).flatten(), ATOMS), reduction="none")
    torch.testing.assert_close(loss, expected.reshape(4, 6, 2))
    torch.testing.assert_close(categorical_regression_loss(logits, y, ATOMS, prior), loss.mean())
    torch.testing.assert_close(categorical_regression_loss(logits, y, ATOMS, prior, "sum"), loss.sum())
    torch.testing.assert_close(Cat2HotRegression(ATOMS.tolist())(logits, y, prior), loss.mean())
    one = categorical_regression_loss(logits[0], y, ATOMS, prior[0], reduction="none")
    torch.testing.assert_close(one, loss[0])


def test_without_a_prior_all_indices_see_the_target():
    logits, y = torch.randn(4, 6, 1, 9), torch.randn(6, 1)
    nothing = torch.zeros(4, 6, 1)
    ours = categorical_regression_loss(logits, y, ATOMS, reduction="none")
    torch.testing.assert_close(ours, categorical_regression_loss(logits, y, ATOMS, nothing, reduction="none"))


def test_its_minimum_predicts_the_target():
    y = torch.tensor([[0.13], [-1.9]])
    logits = torch.zeros(2, 1, 9, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.5)
    for _ in range(400):
        optimizer.zero_grad()
        categorical_regression_loss(logits, y, ATOMS).backward()
        optimizer.step()
    mean, variance = atom_moments(logits.detach(), ATOMS)
    torch.testing.assert_close(mean, y, rtol=0, atol=1e-3)
    # What the encoding adds: the product of the distances to the two atoms around.
    torch.testing.assert_close(variance, torch.tensor([[0.13 * 0.37], [0.1 * 0.4]]), rtol=0, atol=1e-2)


def test_a_single_row_works():  # the original squeezes its axis away
    assert categorical_regression_loss(torch.zeros(1, 1, 9), torch.zeros(1, 1), ATOMS) > 0


def test_no_gradient_reaches_the_prior():
    prior = torch.zeros(2, 3, 1, requires_grad=True)
    logits = torch.zeros(2, 3, 1, 9, requires_grad=True)
    categorical_regression_loss(logits, torch.ones(3, 1), ATOMS, prior).backward()
    assert prior.grad is None
    assert logits.grad.any()


def test_half_precision_is_upcast_and_float64_stays():
    logits, y = torch.randn(5, 1, 9), torch.randn(5, 1)
    half = categorical_regression_loss(logits.bfloat16(), y.bfloat16(), ATOMS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, categorical_regression_loss(logits.bfloat16().float(), y.bfloat16().float(), ATOMS)
    )
    assert categorical_regression_loss(logits.double(), y.double(), ATOMS.double()).dtype == torch.float64
    huge = categorical_regression_loss(1e4 * logits, y, ATOMS)
    assert huge.isfinite()


def test_layout():
    logits, prior = torch.randn(4, 6, 2, 9), torch.randn(4, 6, 2)
    packed = join_atoms(logits, prior)
    assert packed.shape == (4, 6, 20)
    back = split_atoms(packed, 9)
    assert torch.equal(back[0], logits)
    assert torch.equal(back[1], prior)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(5, 9), torch.zeros(5)),
            r"`logits` must be \[B, D, 9\] or \[Z, B, D, 9\], but its shape is \[5, 9\]",
        ),
        ((torch.zeros(5, 1, 8), torch.zeros(5, 1)), "but its shape is"),
        ((torch.zeros(5, 1, 9), torch.zeros(5)), r"`target` must have shape \[5, 1\], but its shape is \[5\]"),
        (
            (torch.zeros(2, 5, 1, 9), torch.zeros(3, 5, 1)),
            r"`target` must have shape \[5, 1\] or \[2, 5, 1\], but its shape is \[3, 5, 1\]",
        ),
    ],
)
def test_shapes_that_do_not_meet_are_reported(arguments, message):
    with pytest.raises(InputError, match=message):
        categorical_regression_loss(*arguments, ATOMS)


def test_other_misuse_is_reported():
    with pytest.raises(InputError, match=r"`prior` must have shape \[5, 1\], but its shape is \[5\]"):
        categorical_regression_loss(torch.zeros(5, 1, 9), torch.zeros(5, 1), ATOMS, torch.zeros(5))
    with pytest.raises(InputError, match="'mean', 'sum', 'none', but it is 'median'"):
        categorical_regression_loss(torch.zeros(5, 1, 9), torch.zeros(5, 1), ATOMS, reduction="median")
    with pytest.raises(InputError, match=r"D x 9 \+ D\], .* but its shape is \[5, 19\]"):
        split_atoms(torch.zeros(5, 19), 9)
