import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.mixture import gaussian_log_prob
from lightning_uq.losses import gaussian_nll_loss, split_gaussian

REFERENCE = Path(__file__).parents[1] / "reference" / "ensembles.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("dims", ["D1", "D3"])
def test_nll_and_its_gradients_are_the_original_s(reference, dtype, dims):
    case = {
        k: reference[f"nll/{dtype}/{dims}/{k}"]
        for k in ("mean", "log_var", "target", "value", "grad_mean", "grad_log_var")
    }
    mean, log_var = case["mean"].clone().requires_grad_(), case["log_var"].clone().requires_grad_()
    loss = gaussian_nll_loss(mean, log_var.exp(), case["target"])
    loss.backward()
    rtol = 1e-5 if dtype == "f32" else 1e-12
    assert loss.dtype == case["value"].dtype
    torch.testing.assert_close(loss, case["value"], rtol=rtol, atol=0)
    torch.testing.assert_close(mean.grad, case["grad_mean"], rtol=rtol, atol=rtol)
    torch.testing.assert_close(log_var.grad, case["grad_log_var"], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("min_variance", [1e-6, 1e-3])
def test_variances_are_the_original_s(reference, min_variance):
    case = f"softplus/min{min_variance:g}/"
    raw = reference[case + "raw"]
    _, variance = split_gaussian(torch.cat([torch.zeros_like(raw), raw], -1), min_variance)
    torch.testing.assert_close(variance.log(), reference[case + "log_var"], rtol=1e-5, atol=1e-6)


def test_split_takes_means_first_and_keeps_leading_axes():
    output = torch.arange(24.0).reshape(2, 3, 4)
    mean, variance = split_gaussian(output)
    torch.testing.assert_close(mean, output[..., :2])
    torch.testing.assert_close(variance, F.softplus(output[..., 2:]) + 1e-6)


def test_variance_never_reaches_zero():
    _, variance = split_gaussian(torch.tensor([[0.0, -1e4]]))
    assert variance.item() == pytest.approx(1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_first(dtype):
    output = torch.tensor([[1.5, -12.0]], dtype=dtype)
    mean, variance = split_gaussian(output)
    assert mean.dtype == variance.dtype == torch.float32
    assert variance.item() == pytest.approx(math.log1p(math.exp(-12.0)) + 1e-6, rel=1e-5)
    assert gaussian_nll_loss(mean.to(dtype), variance.to(dtype), mean.to(dtype)).dtype == torch.float32


def test_float64_stays_float64():
    mean, variance = split_gaussian(torch.zeros(2, 4, dtype=torch.float64))
    assert gaussian_nll_loss(mean, variance, torch.zeros(2, 2, dtype=torch.float64)).dtype == torch.float64


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([(1, 1), (4, 2), (3, 4, 2)]))
def test_full_loss_is_the_negative_log_density(seed, shape):
    g = torch.Generator().manual_seed(seed)
    mean, target = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    variance = torch.rand(shape, generator=g, dtype=torch.float64) + 0.01
    full = gaussian_nll_loss(mean, variance, target, reduction="none", full=True)
    torch.testing.assert_close(full, -gaussian_log_prob(mean, variance, target))
    torch.testing.assert_close(
        full - gaussian_nll_loss(mean, variance, target, "none"), torch.full_like(mean, 0.5 * math.log(2 * math.pi))
    )
    torch.testing.assert_close(gaussian_nll_loss(mean, variance, target, "sum", True), full.sum())
    torch.testing.assert_close(gaussian_nll_loss(mean, variance, target, "mean", True), full.mean())


def test_gradient_is_right():
    g = torch.Generator().manual_seed(0)
    output = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 2, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda o: gaussian_nll_loss(*split_gaussian(o), target), output)


def test_one_target_serves_all_indices():
    g = torch.Generator().manual_seed(0)
    mean, target = torch.randn(5, 3, 2, generator=g), torch.randn(3, 2, generator=g)
    each = gaussian_nll_loss(mean, torch.ones(5, 3, 2), target, reduction="none")
    torch.testing.assert_close(each, gaussian_nll_loss(mean, torch.ones(5, 3, 2), target.expand(5, 3, 2), "none"))


@pytest.mark.parametrize(
    ("mean", "target"),
    [((3, 1), (3,)), ((3, 1), (1,)), ((3, 1), (3, 2)), ((2, 3, 1), (3,)), ((3,), (3, 1)), ((3, 1), (1, 3, 1))],
)
def test_a_target_of_another_shape_is_reported(mean, target):
    with pytest.raises(InputError, match=r"`target` must have shape \[.*\], but its shape is \["):
        gaussian_nll_loss(torch.zeros(mean), torch.ones(mean), torch.zeros(target))


def test_other_errors_are_reported():
    with pytest.raises(InputError, match=r"`variance` must have shape \[3, 1\], but its shape is \[3\]"):
        gaussian_nll_loss(torch.zeros(3, 1), torch.ones(3), torch.zeros(3, 1))
    with pytest.raises(InputError, match=r"`output` must have shape \[..., 2 D\].* but its shape is \[4, 3\]"):
        split_gaussian(torch.zeros(4, 3))
    with pytest.raises(InputError, match="`output`"):
        split_gaussian(torch.zeros(4, 0))
    with pytest.raises(InputError, match=r"`reduction` must be one of 'mean', 'sum', 'none', but it is 'batch'"):
        gaussian_nll_loss(torch.zeros(1), torch.ones(1), torch.zeros(1), reduction="batch")
