"""Matrix scaling: its optimum, its invariances, what its ridge is for, and when it gives way to the temperature."""

import math

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional.matrix_scaling import (
    _EXACT,
    _Columns,
    _Coordinates,
    _minimise,
    apply_matrix_scaling,
    fit_matrix_scaling,
)
from lightning_uq.functional.temperature import fit_temperature

nll = torch.nn.functional.cross_entropy


def rows(seed, n, c, confused=0.4):
    """Logits of which a share ``confused`` of class 0 is class 1."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), seen] += 4
    moves = (torch.rand(n, generator=generator) < confused) & (seen == 0)
    return 2 * logits, seen.where(~moves, 1)


def calibrated_rows(seed, n, c, T=2.0):
    """Logits whose probabilities are right at temperature T."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return T * logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def test_it_wins_where_classes_are_confused():
    fit = fit_matrix_scaling(*rows(0, 2000, 5))
    logits, target = rows(1, 5000, 5)
    assert fit.strength < math.inf
    assert fit.weight.dtype == fit.bias.dtype == torch.float64
    gain = nll(logits / fit.temperature, target) - nll(apply_matrix_scaling(logits, fit.class_matrix), target)
    assert gain > 0.01


def test_the_temperature_is_recovered_where_it_is_right():
    logits, target = calibrated_rows(2, 4000, 4)
    fit = fit_matrix_scaling(logits, target)
    assert fit.strength == math.inf
    assert fit.floor == -1e4
    assert torch.equal(fit.temperature, fit_temperature(logits, target))
    assert abs(fit.temperature - 2) < 0.1
    expected = (logits / fit.temperature).log_softmax(1)
    torch.testing.assert_close(apply_matrix_scaling(logits, fit.class_matrix), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("c", [3, 60])
def test_few_rows_do_no_harm(c):
    fit = fit_matrix_scaling(*calibrated_rows(3, 150, c))
    logits, target = calibrated_rows(4, 4000, c)
    assert nll(apply_matrix_scaling(logits, fit.class_matrix), target) < nll(logits / fit.temperature, target) + 0.002


@pytest.mark.parametrize("strength", [0.1, 10.0])
@pytest.mark.parametrize("columns", [5, 2])
def test_the_minimum_is_stationary(strength, columns):
    logits, target = rows(5, 300, 4)
    x = logits.log_softmax(1)
    data = _Columns([x.T.contiguous()], target, columns)

    def minimum(start):
        return _minimise(data, _Coordinates.at(data, start), strength, start, _EXACT)

    found = minimum(torch.zeros(4, columns, dtype=torch.float64))
    weight = (found[:, :4] if columns == 5 else found[:, 0].diag()).requires_grad_()
    bias = found[:, -1].clone().requires_grad_()
    diagonal = weight.diagonal().square().sum()
    penalty = strength * 4 / 300 * (diagonal + bias.square().sum() + 3 * (weight.square().sum() - diagonal))
    gradients = torch.autograd.grad(nll(x + x @ weight.T + bias, target) + penalty, [weight, bias])
    kept = gradients[0] if columns == 5 else gradients[0].diagonal()
    assert max(kept.abs().max(), gradients[1].abs().max()) < 1e-6
    other = minimum(torch.randn(4, columns, dtype=torch.float64))
    torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-5)


def test_it_ignores_shifts_and_follows_the_scale_and_the_names_of_classes():
    logits, target = rows(6, 600, 4)
    base = apply_matrix_scaling(logits, fit_matrix_scaling(logits, target).class_matrix)

    def same(changed, labels=target, order=slice(None)):
        found = apply_matrix_scaling(changed, fit_matrix_scaling(changed, labels).class_matrix)[:, order]
        torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-5)

    same(logits + torch.randn(600, 1))
    same(logits.log_softmax(1))
    same(100 * logits)
    order = torch.tensor([3, 1, 0, 2])
    same(logits[:, order.argsort()], order[target], order)


def test_a_class_that_is_ruled_out_stays_so_and_nan_stays_nan():
    logits, target = rows(7, 400, 4)
    matrix = fit_matrix_scaling(logits, target).class_matrix
    row = torch.tensor([[1.0, -math.inf, 2.0, 0.0], [1.0, math.nan, 2.0, 0.0]], dtype=torch.float64)
    out = apply_matrix_scaling(row, matrix)
    assert out[0, 1] == -math.inf
    torch.testing.assert_close(out[0].exp().sum(), torch.ones((), dtype=torch.float64))
    assert out[1].isnan().all()
    temperature = fit_matrix_scaling(*calibrated_rows(2, 4000, 4)).class_matrix
    torch.testing.assert_close(
        apply_matrix_scaling(row[:1], temperature), (row[:1] * temperature[-1]).log_softmax(1), equal_nan=True
    )


def test_pixels_are_rows_and_autocast_does_not_round():
    logits, target = rows(8, 240, 3)
    image = logits.reshape(10, 24, 3).movedim(-1, 1).reshape(10, 3, 4, 6)
    matrix = fit_matrix_scaling(image, target.reshape(10, 4, 6)).class_matrix
    flat = fit_matrix_scaling(logits, target).class_matrix
    torch.testing.assert_close(matrix, flat)
    expected = apply_matrix_scaling(logits, flat)
    torch.testing.assert_close(apply_matrix_scaling(image, flat).movedim(1, -1).reshape(-1, 3), expected)
    single = apply_matrix_scaling(logits.float(), flat.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_matrix_scaling(logits.float(), flat.float()), single)


@pytest.mark.parametrize("c", [3, 20])
def test_a_fit_takes_few_passes(monkeypatch, c):
    """Of the 15 fits to four fifths of the rows, each begins at another one's minimum, and ends where the noise is far larger than its error."""
    passes, method = [], _Columns.loss
    monkeypatch.setattr(_Columns, "loss", lambda self, *args: passes.append(self) or method(self, *args))
    fit_matrix_scaling(*calibrated_rows(10, 2000, c))
    assert len(passes) < 300


def test_the_choice_is_that_of_exact_fits(monkeypatch):
    logits, target = rows(11, 1000, 4)
    found = fit_matrix_scaling(logits, target)
    monkeypatch.setattr("lightning_uq.functional.matrix_scaling._SHARE_OF_NOISE", 1e-8)
    expected = fit_matrix_scaling(logits, target)
    assert found.strength == expected.strength < math.inf
    torch.testing.assert_close(found.class_matrix, expected.class_matrix, rtol=1e-4, atol=1e-4)


def test_many_classes_for_few_rows_have_no_weights_between_classes():
    logits, target = rows(9, 150, 50)
    fit = fit_matrix_scaling(logits, target, strengths=[1e-3])
    assert torch.equal(fit.weight, fit.weight.diagonal().diag())


def test_the_global_random_state_is_left_alone_and_two_fits_are_equal():
    state = torch.get_rng_state()
    fits = [fit_matrix_scaling(*rows(7, 200, 4)).class_matrix for _ in range(2)]
    assert torch.equal(*fits)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_are_named():
    logits, target = rows(9, 100, 3)
    with pytest.raises(InputError, match="at least 5 rows, one per fold, but it holds 4"):
        fit_matrix_scaling(logits[:4], target[:4])
    with pytest.raises(InputError, match="`num_folds` must be an integer of at least 2"):
        fit_matrix_scaling(logits, target, num_folds=1)
    for strengths in ([], [0.0], [-1.0], [math.inf], [math.nan]):
        with pytest.raises(InputError, match="`strengths` must hold positive numbers"):
            fit_matrix_scaling(logits, target, strengths)
    with pytest.raises(InputError, match=r"class indices in \[0, 3\)"):
        fit_matrix_scaling(logits, target + 1)
