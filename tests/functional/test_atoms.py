import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.atoms import atom_moments, check_atoms, two_hot

UNEVEN = torch.tensor([-3.0, -1.0, -0.5, 2.0, 10.0], dtype=torch.float64)


@settings(max_examples=60)
@given(st.floats(-20, 20))
def test_a_two_hot_target_is_a_distribution_whose_mean_is_the_clipped_target(y):
    hot = two_hot(torch.tensor(y, dtype=torch.float64), UNEVEN)
    assert (hot >= 0).all()
    assert hot.sum().item() == pytest.approx(1)
    assert (hot > 0).sum() <= 2
    assert (hot * UNEVEN).sum().item() == pytest.approx(min(max(y, -3.0), 10.0))
    used = hot.nonzero().flatten()
    assert used[-1] - used[0] <= 1


def test_an_atom_itself_is_one_hot():
    assert torch.equal(two_hot(UNEVEN, UNEVEN), torch.eye(5, dtype=torch.float64))


def test_any_shape_and_dtype():
    y = torch.randn(2, 0, 3)
    assert two_hot(y, UNEVEN.float()).shape == (2, 0, 3, 5)
    assert two_hot(y.bfloat16(), UNEVEN.bfloat16()).dtype == torch.float32
    assert two_hot(torch.tensor([1, 3]), torch.tensor([0.0, 4.0])).tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert two_hot(torch.tensor([torch.nan]), UNEVEN).isnan().any()
    transposed = torch.randn(3, 2).T
    assert torch.equal(two_hot(transposed, UNEVEN), two_hot(transposed.contiguous(), UNEVEN))


def test_moments_are_those_of_the_distribution():
    logits = torch.randn(4, 3, 5, dtype=torch.float64)
    mean, variance = atom_moments(logits, UNEVEN)
    draws = torch.distributions.Categorical(logits=logits).sample((200_000,))
    torch.testing.assert_close(mean, UNEVEN[draws].mean(0), rtol=0.02, atol=0.05)
    torch.testing.assert_close(variance, UNEVEN[draws].var(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(atom_moments(logits + 7, UNEVEN)[1], variance)
    far = atom_moments(logits.float(), UNEVEN.float() + 1e4)[1]
    assert (far > 0).all()
    torch.testing.assert_close(far, variance.float(), rtol=1e-2, atol=1e-2)


def test_a_certain_distribution_has_no_variance():
    mean, variance = atom_moments(torch.tensor([0.0, 1e4, 0.0, 0.0, 0.0], dtype=torch.float16), UNEVEN)
    assert (mean, variance) == (-1.0, 0.0)


@pytest.mark.parametrize(
    "atoms", [[1.0], [], [0.0, 0.0], [1.0, 0.0], [0.0, float("inf")], [[0.0, 1.0]], [0.0, float("nan")]]
)
def test_atoms_have_to_ascend(atoms):
    with pytest.raises(InputError, match="`atoms` must be at least two finite numbers"):
        check_atoms(atoms)


def test_integer_atoms_are_numbers():
    assert check_atoms(torch.arange(3)).dtype == torch.float32
