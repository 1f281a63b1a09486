"""Every number of uncertainty-loss 0.1.2 that is not one of its faults, values and gradients.

The faults: the KL pairs every sample with every other, so that its unreduced form is [N, N] and its sum N times too large
(and the evidential loss's with it); shapes [N, C, 1] are squeezed; ``evidence_to_proba`` does not sum to one; float32
log-gammas cancel on large evidence. ``rowwise`` arrays are the original called with one sample at a time.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq import losses
from lightning_uq.functional import dirichlet, entropy

SMALL = Path(__file__).parents[1] / "reference" / "evidential.npz"
WHOLE = Path(__file__).parents[2] / ".." / "shared" / "reference" / "evidential" / "evidential.npz"
SHAPES = ["n1c2", "n4c2", "n5c3", "n3c4d5", "n2c3d4d5", "n4c3d1", "extreme_c2", "extreme_c3"]
PARTS = {
    "dirichlet_mse_loss": losses.dirichlet_mse_loss,
    "uniform_dirichlet_kl": losses.uniform_dirichlet_kl,
    "dirichlet_pnorm_loss": losses.dirichlet_pnorm_loss,
    "dirichlet_fisher_regulizer": losses.dirichlet_fisher_regularizer,
}


@pytest.fixture(scope="module")
def arrays():
    with np.load(WHOLE if WHOLE.exists() else SMALL) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def is_fault(shape, name, way):
    if way == "rowwise":
        return False
    if shape.endswith("d1") and name.startswith(("dirichlet_pnorm", "maxnorm")):
        return True
    kl = name == "uniform_dirichlet_kl" or (name.startswith("evidential_loss") and not name.endswith("reg0"))
    return kl and way != "mean"


def loss_of(name, evidence, target, reduction):
    if name in PARTS:
        return PARTS[name](evidence, target, reduction=reduction)
    function, factor = name.split("/reg")
    if function == "evidential_loss":
        return losses.evidential_loss(evidence, target, float(factor), reduction)
    return losses.maxnorm_loss(evidence, target, float(factor), int(function.split("_p")[1]), reduction)


def cases(arrays, dtype, shape):
    """(name, way, value, gradient) of every loss of a shape; way is a reduction or "rowwise"."""
    prefix = f"{dtype}/{shape}/"
    for key in arrays:
        if not key.startswith(prefix) or not key.endswith("/value"):
            continue
        parts = key[len(prefix) :].split("/")[:-1]
        way, name = ("rowwise", parts[1:]) if parts[0] == "rowwise" else (parts[-1], parts[:-1])
        yield "/".join(name), way, arrays[key], arrays[key[: -len("value")] + "grad"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_losses_and_gradients(arrays, dtype, shape):
    # The originals round in float32, on large evidence beyond use: the truth of both is float64.
    if f"f64/{shape}/evidence" not in arrays or f"f64/{shape}/target" not in arrays:
        pytest.skip("the whole reference file is not here")
    base = arrays[f"f64/{shape}/evidence"]
    target = arrays[f"f64/{shape}/target"]
    rtol = 1e-6 if dtype == "f64" else 1e-4
    compared = set()
    for name, way, value, gradient in cases(arrays, "f64", shape):
        if is_fault(shape, name, way):
            continue
        evidence = base.clone().to(torch.float64 if dtype == "f64" else torch.float32).requires_grad_()
        loss = loss_of(name, evidence, target, "none" if way == "rowwise" else way)
        loss.sum().backward()
        assert loss.dtype == evidence.dtype
        atol = 1e-8  # even in float64 the original takes log Gamma(C) in float32
        torch.testing.assert_close(loss.double(), value.reshape(loss.shape), rtol=rtol, atol=atol)
        gradient = gradient.reshape(base.shape)
        # A component is compared with its row: what cancels in one of them is known to that precision alone.
        scale = gradient.abs().amax(1, keepdim=True).clamp_min(1e-12)
        torch.testing.assert_close(evidence.grad.double() / scale, gradient / scale, rtol=rtol, atol=rtol)
        compared.add(way)
    assert compared >= {"rowwise", "mean"}


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_the_originals_where_they_do_not_cancel(arrays, shape):
    if f"f32/{shape}/evidence" not in arrays or shape.startswith("extreme"):
        pytest.skip("the whole reference file is not here, or the original's rounding is the larger error")
    target = arrays[f"f32/{shape}/target"]
    for name, way, value, gradient in cases(arrays, "f32", shape):
        if is_fault(shape, name, way):
            continue
        evidence = arrays[f"f32/{shape}/evidence"].clone().requires_grad_()
        loss = loss_of(name, evidence, target, "none" if way == "rowwise" else way)
        loss.sum().backward()
        torch.testing.assert_close(loss, value.reshape(loss.shape), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(evidence.grad, gradient.reshape(evidence.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_uncertainties(arrays, dtype, shape):
    if f"{dtype}/{shape}/evidence" not in arrays or f"{dtype}/{shape}/uncertainty" not in arrays:
        pytest.skip("the whole reference file is not here")
    alpha = arrays[f"{dtype}/{shape}/evidence"] + 1
    rtol = 1e-6 if dtype == "f64" else 1e-4
    atol = 1e-9 if dtype == "f64" else 2e-4  # the original's mutual information, a difference of float32 digammas
    for name, ours in {
        "uncertainty": dirichlet.dirichlet_predictive_entropy(alpha),
        "uncertainty_normalized": dirichlet.dirichlet_predictive_entropy(alpha, normalize=True),
        "model_uncertainty": dirichlet.dirichlet_mutual_information(alpha),
        "data_uncertainty": dirichlet.dirichlet_expected_entropy(alpha),
    }.items():
        torch.testing.assert_close(ours, arrays[f"{dtype}/{shape}/{name}"].double(), rtol=rtol, atol=atol, msg=name)
    logits = f"{dtype}/{shape}/cross_entropy_uncertainty"
    if logits in arrays:
        value = entropy.predictive_entropy(
            arrays[f"{dtype}/{shape}/evidence"].log().unsqueeze(0)
        )  # softmax of log evidence
        torch.testing.assert_close(value, arrays[logits].to(value.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("clamp", [1, 5, 10])
def test_clamped_exp_and_its_gradient(arrays, dtype, clamp):
    if f"{dtype}/clamped_exp/x" not in arrays:
        pytest.skip("the whole reference file is not here")
    x = arrays[f"{dtype}/clamped_exp/x"].clone().requires_grad_()
    y = losses.clamped_exp(x, clamp)
    y.sum().backward()
    rtol = 1e-12 if dtype == "f64" else 1e-6
    torch.testing.assert_close(y, arrays[f"{dtype}/clamped_exp/clamp{clamp}/y"], rtol=rtol, atol=0, equal_nan=True)
    torch.testing.assert_close(
        x.grad, arrays[f"{dtype}/clamped_exp/clamp{clamp}/grad"], rtol=rtol, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", ["dirichlet_mse_loss", "uniform_dirichlet_kl"])
def test_soft_targets(arrays, name):
    evidence = arrays["f64/soft/evidence"].clone().requires_grad_()
    loss = PARTS[name](evidence, arrays["f64/soft/target"])
    loss.backward()
    torch.testing.assert_close(loss, arrays[f"f64/soft/{name}/mean/value"], rtol=1e-6, atol=0)
    torch.testing.assert_close(evidence.grad, arrays[f"f64/soft/{name}/mean/grad"], rtol=1e-9, atol=1e-12)


def test_the_sum_of_the_kl_is_the_sum_of_its_rows(arrays):
    evidence, target = arrays["f64/n5c3/evidence"], arrays["f64/n5c3/target"]
    rows = arrays["f64/n5c3/rowwise/uniform_dirichlet_kl/value"]
    torch.testing.assert_close(losses.uniform_dirichlet_kl(evidence, target, "sum"), rows.sum())
    assert losses.uniform_dirichlet_kl(evidence, target, "none").shape == (5,)
