"""Vector scaling: its optimum, what its ridge is for, and when it gives way to the temperature."""

import math

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional.temperature import fit_temperature
from lightning_uq.functional.vector_scaling import _minimise, _Rows, apply_vector_scaling, fit_vector_scaling

nll = torch.nn.functional.cross_entropy


def rows(seed, n, c, miscalibrated=1.0):
    """Logits whose scale and bias are wrong class by class, by as much as ``miscalibrated``."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), target] += 3
    ramp = miscalibrated * torch.linspace(-1, 1, c, dtype=torch.float64)
    return 3 * logits * (1 + ramp / 3) + 2 * ramp, target


def test_it_wins_where_classes_are_miscalibrated():
    fit = fit_vector_scaling(*rows(0, 2000, 5))
    logits, target = rows(1, 5000, 5)
    assert fit.strength < math.inf
    assert fit.scale.dtype == fit.bias.dtype == torch.float64
    assert nll(apply_vector_scaling(logits, fit.scale, fit.bias), target) < nll(logits / fit.temperature, target) - 0.01


def test_it_is_the_temperature_where_nothing_is_to_be_won():
    logits, target = rows(2, 2000, 5, miscalibrated=0.0)
    fit = fit_vector_scaling(logits, target)
    assert fit.strength == math.inf
    assert torch.equal(fit.temperature, fit_temperature(logits, target))
    torch.testing.assert_close(fit.scale, (1 / fit.temperature).expand(5))
    assert torch.equal(fit.bias, torch.zeros(5, dtype=torch.float64))
    tempered = apply_vector_scaling(logits, fit.scale, fit.bias).softmax(1)
    torch.testing.assert_close(tempered, (logits / fit.temperature).softmax(1))


@pytest.mark.parametrize("miscalibrated", [0.0, 0.5])
def test_few_rows_of_many_classes_do_no_harm_as_they_do_without_a_ridge(miscalibrated):
    logits, target = rows(3, 500, 100, miscalibrated)
    with pytest.warns(UserWarning, match=r"500 rows of 100 classes, fewer than 20 per class\. A temperature is safer"):
        fit = fit_vector_scaling(logits, target)
    test, classes = rows(4, 5000, 100, miscalibrated)
    tempered = nll(test / fit.temperature, classes)
    assert nll(apply_vector_scaling(test, fit.scale, fit.bias), classes) < tempered + 0.01
    held_out = _Rows.of(logits, logits.mean(1, keepdim=True), target, fit.temperature, torch.arange(500))
    (a, b), _ = _minimise(held_out, 1e-9, torch.zeros(2, 100, dtype=torch.float64), None)
    assert nll(apply_vector_scaling(test, (1 + a) / fit.temperature, b), classes) > tempered + 0.5


@pytest.mark.parametrize("strength", [1e-4, 0.1])
def test_the_minimum_is_stationary(strength):
    logits, target = rows(5, 300, 4)
    x = logits - logits.mean(1, keepdim=True)
    one = torch.ones((), dtype=torch.float64)
    held_out = _Rows.of(logits, logits.mean(1, keepdim=True), target, one, torch.arange(300))
    found = _minimise(held_out, strength, torch.zeros(2, 4, dtype=torch.float64), None)[0].requires_grad_()
    loss = nll((1 + found[0]) * x + found[1], target) + strength / 2 * found.square().sum()
    assert torch.autograd.grad(loss, found)[0].abs().max() < 1e-7
    other, _ = _minimise(held_out, strength, torch.randn(2, 4, dtype=torch.float64), None)
    torch.testing.assert_close(other, found.detach(), rtol=1e-5, atol=1e-6)


def test_it_follows_the_scale_of_logits_and_ignores_shifts_and_a_change_of_names():
    logits, target = rows(6, 600, 4)
    base = fit_vector_scaling(logits, target)
    scaled = fit_vector_scaling(100 * logits, target)
    torch.testing.assert_close(100 * scaled.scale, base.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.bias, base.bias, rtol=1e-5, atol=1e-7)
    shifted = fit_vector_scaling(logits + torch.randn(600, 1), target)
    torch.testing.assert_close(shifted.scale, base.scale, rtol=1e-5, atol=0)
    order = torch.tensor([3, 1, 0, 2])
    renamed = fit_vector_scaling(logits[:, order.argsort()], order[target])
    torch.testing.assert_close(renamed.scale[order], base.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(renamed.bias[order], base.bias, rtol=1e-5, atol=1e-7)
    again = fit_vector_scaling(logits, target)
    assert torch.equal(again.scale, base.scale)


@pytest.mark.parametrize("c", [5, 50])
def test_a_fit_takes_few_passes_and_the_second_derivatives_once(monkeypatch, c):
    """Of the 25 fits to four fifths of the rows, each begins at another one's minimum, and with its second derivatives."""
    passes = []
    for name in ("loss", "losses", "hessian"):
        method = getattr(_Rows, name)
        monkeypatch.setattr(
            _Rows, name, lambda self, *args, name=name, method=method: passes.append(name) or method(self, *args)
        )
    logits, target = rows(10, 4000, c, 0.3)
    fit = fit_vector_scaling(logits.float(), target)
    assert fit.strength < math.inf
    assert passes.count("losses") == 26
    assert passes.count("hessian") <= 4
    assert passes.count("loss") < 110


def test_a_weak_ridge_and_autocast_leave_float32_logits_their_minimum():
    logits, target = rows(12, 300, 4, 0.5)
    fit = fit_vector_scaling(logits.float(), target, [1e-9])
    expected = fit_vector_scaling(logits, target, [1e-9])
    torch.testing.assert_close(fit.scale, expected.scale, rtol=1e-4, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fit_vector_scaling(logits.float(), target, [1e-9]).scale, fit.scale)


def test_logits_in_float32_end_at_the_minimum_of_float64():
    logits, target = rows(11, 300, 4, 0.5)
    found, expected = fit_vector_scaling(logits.float(), target), fit_vector_scaling(logits, target)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.bias, expected.bias, rtol=0, atol=1e-5)


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    fit_vector_scaling(*rows(7, 200, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_pixels_are_rows():
    logits, target = rows(8, 240, 3)
    image = logits.reshape(10, 24, 3).movedim(-1, 1).reshape(10, 3, 4, 6)
    fit, flat = fit_vector_scaling(image, target.reshape(10, 4, 6)), fit_vector_scaling(logits, target)
    torch.testing.assert_close(fit.scale, flat.scale)
    applied = apply_vector_scaling(image, fit.scale, fit.bias)
    expected = apply_vector_scaling(logits, fit.scale, fit.bias)
    torch.testing.assert_close(applied.movedim(1, -1).reshape(-1, 3), expected)


def test_bad_arguments_are_named():
    logits, target = rows(9, 100, 3)
    with pytest.raises(InputError, match="at least 5 rows, one per fold, but it holds 4"):
        fit_vector_scaling(logits[:4], target[:4])
    with pytest.raises(InputError, match="`num_folds` must be an integer of at least 2"):
        fit_vector_scaling(logits, target, num_folds=1)
    for strengths in ([], [0.0], [-1.0], [math.inf], [math.nan]):
        with pytest.raises(InputError, match="`strengths` must hold positive numbers"):
            fit_vector_scaling(logits, target, strengths)
    with pytest.raises(InputError, match=r"class indices in \[0, 3\)"):
        fit_vector_scaling(logits, target + 1)
