"""The divergence of a method's joint predictions from the environment of a Neural Testbed problem.

Source: Osband et al., arXiv 2110.04629, and ``neural_testbed.likelihood``.
"""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_uq.data import TestbedDataModule
from lightning_uq.errors import InputError
from lightning_uq.functional import (
    clustered_log_likelihood,
    expected_calibration_error,
    joint_log_likelihood,
    kl_estimate,
    random_projection,
    uniform_kl,
)
from lightning_uq.functional.precision import widen
from lightning_uq.modules.base import UncertaintyModule

NUM_INDICES = 1000
"""The number of indices z for estimating a divergence, if there are infinitely many."""

EXACT_UP_TO = 10
"""The number of joint labels above which the testbed groups hypotheses into cells."""

Estimator = Literal["auto", "exact", "projection"]
"""How to compute the mean over z of a product of probabilities: exactly, or over cells of similar hypotheses."""

_ROWS_AT_ONCE = 50_000


def divergences(module: LightningModule, data: TestbedDataModule, estimator: Estimator = "auto") -> dict[str, float]:
    """``kl_tau1``, ``kl_tau10`` ..., each also divided by the uniform agent's, and the number of infinite draws.

    Args:
        module: A trained module, on any device.
        data: The problem, of which only the joint draws are used.
        estimator: See :func:`model_log_likelihood`.
    """
    values: dict[str, float] = {}
    infinite = 0
    for tau in data.taus:
        draws = data.joint_draws(tau)
        if not bool(draws.true_log_likelihood.isfinite().all()):
            warnings.warn(
                f"Array true_ll_tau{tau} of {data.path} is not finite, so kl_tau{tau} is undefined.",
                stacklevel=2,
            )
        model = model_log_likelihood(module, draws.x, draws.y, estimator=estimator)
        estimate = kl_estimate(draws.true_log_likelihood, model)
        values[f"kl_tau{tau}"] = kl = float(estimate.mean)
        values[f"kl_tau{tau}_normalized"] = kl / float(uniform_kl(draws.true_log_likelihood, data.num_classes, tau))
        infinite += estimate.num_infinite
        if estimate.num_infinite:
            warnings.warn(
                f"{estimate.num_infinite} of {estimate.num_draws} draws of kl_tau{tau} were infinite, because "
                f"{type(module).__name__} gave their labels no probability. Each counts as the largest finite one, as in the testbed.",
                stacklevel=2,
            )
    return {**values, "kl_infinite": infinite}


@torch.inference_mode()
def model_log_likelihood(
    module: LightningModule,
    x: Tensor,
    y: Tensor,
    num_indices: int = NUM_INDICES,
    rows: int = _ROWS_AT_ONCE,
    estimator: Estimator = "auto",
    seed: int = 0,
) -> Tensor:
    """log of the mean over z of prod_t p_z(y_t | x_t): [S] in float64.

    Repeated inputs, such as polyadic ones, are predicted once. A finite index set is enumerated; from an infinite
    set, ``num_indices`` are drawn, the same for all draws, and processed in parts, each with one call of the base.

    Args:
        module: An :class:`UncertaintyModule`, or a module whose ``predict_step`` makes predictions.
        x: Inputs [S, tau, d].
        y: Labels [S, tau].
        num_indices: Indices drawn from an infinite set.
        rows: Number of rows per part: indices times distinct inputs.
        estimator: ``"exact"``: the exact mean (:func:`~lightning_uq.functional.joint_log_likelihood`);
            ``"projection"``: over cells of hypotheses with similar predictions
            (:func:`~lightning_uq.functional.clustered_log_likelihood`, seven hyperplanes); ``"auto"``: the testbed's choice,
            which is the exact mean up to ten labels and cells above.
        seed: Seed of the hyperplanes.

    Raises:
        InputError: ``estimator`` is unknown.
    """
    if estimator not in ("auto", "exact", "projection"):
        raise InputError(f"`estimator` must be 'auto', 'exact' or 'projection', but it is {estimator!r}.")
    module.eval()
    distinct, position = torch.unique(x.flatten(0, 1), dim=0, return_inverse=True)
    distinct = distinct.to(module.device)
    parts = _logits(module, distinct, num_indices, max(1, rows // len(distinct)))
    if estimator == "projection" or (estimator == "auto" and y.shape[1] > EXACT_UP_TO):
        first = next(parts)
        planes = random_projection(y.shape[1], first.shape[-1], generator=torch.Generator().manual_seed(seed))
        return clustered_log_likelihood(itertools.chain([first], parts), y, planes, position.reshape(y.shape))

    def log_probs() -> Iterator[Tensor]:
        for logits in parts:
            table = F.log_softmax(widen(logits), dim=-1).flatten(1)  # for every input and class
            yield table[:, position * logits.shape[-1] + y.flatten()].reshape(len(logits), *y.shape)

    return joint_log_likelihood(log_probs())


@torch.inference_mode()
def accuracy_and_calibration(
    module: LightningModule, data: TestbedDataModule, tau: int = 1, num_indices: int = 100, num_bins: int = 10
) -> dict[str, float]:
    """``train_acc``, ``test_acc``, ``train_ece`` and ``test_ece`` of the mean over z of probabilities, as defined by the testbed.

    The test inputs are those of the first 1000 / tau + 1 draws of ``tau`` labels, or fewer if the file has fewer; every label
    counts. The comparison's columns ``accuracy`` and ``ece`` are those of any data: all draws of one label, 15 bins.

    Args:
        module: A trained module, on any device.
        data: The problem.
        tau: Number of labels per draw.
        num_indices: Number of indices drawn from an infinite set.
        num_bins: Number of bins of equal width.

    Source: ``ClassificationSampleAccEce`` of ``neural_testbed.likelihood``.
    """
    module.eval()
    draws, count = data.joint_draws(tau), 1000 // tau + 1
    train = data.dataset("train").tensors
    test = draws.x[:count].flatten(0, 1), draws.y[:count].flatten()
    values: dict[str, float] = {}
    for part, (x, y) in (("train", train), ("test", test)):
        parts = _logits(module, x.to(module.device), num_indices, max(1, _ROWS_AT_ONCE // len(x)))
        mean = torch.cat([widen(logits).softmax(-1) for logits in parts]).mean(0)
        values[f"{part}_acc"] = float(widen(mean.argmax(1) == y).mean())
        values[f"{part}_ece"] = float(expected_calibration_error(mean, y, num_bins=num_bins))
    return values


def _logits(module: LightningModule, x: Tensor, num_indices: int, at_once: int) -> Iterator[Tensor]:
    """Logits [z, N, C] for consecutive parts of the indices."""
    if not isinstance(module, UncertaintyModule):
        yield _members(module.predict_step((x,), 0))
        return
    index = module.network.evaluation_index(num_indices)
    for part in torch.split(index, at_once):
        output = module.network(x, part if module.network.num_indices is not None else part.to(module.device))
        yield _members(module.prediction(output))


def _members(prediction: Any) -> Tensor:
    logits: Tensor = prediction.calibration_logits
    return logits.cpu()
