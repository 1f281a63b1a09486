"""The joint log-loss as a training loss: hypotheses are trained to predict several labels together, not each alone."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.joint import Sampling, block_losses, block_size, check_joint, joint_log_probs
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.validation import check_choice, check_target_values
from lightning_uq.functional.waiting import is_free
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.losses.index import IndexLoss

Likelihood = Literal["categorical", "gaussian"]


def joint_nll_loss(
    output: Tensor,
    target: Tensor,
    tau: int = 10,
    kappa: int = 2,
    sampling: Sampling = "consecutive",
    likelihood: Likelihood = "categorical",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log mean_z prod_t p_z(y_t | x_t), averaged over the blocks of a batch, in nats and not divided by tau.

    Its gradient weights each hypothesis by the joint probability that it gives to all labels of a block, so that hypotheses
    specialise. A sum of their separate losses would pull all to the same mean. With tau = 1 it is the log-loss of the mixture.

    All sums are computed in log space and in float64. Rows that do not fill a block at a batch's end are left out, so shuffle. A
    batch smaller than a block is one shorter block (for ``"dyadic"`` and ``"sampled"`` its rows are repeated).

    Args:
        output: Outputs [Z, B, ...]: logits [Z, B, C], or means and raw variances [Z, B, 2 D].
        target: Class indices [B], or values [B, D] (or [Z, B, D]).
        tau: Number of labels predicted together.
        kappa: Number of distinct inputs among them, for ``"sampled"``; ``"dyadic"`` has two.
        sampling: ``"consecutive"``: each tau rows of the batch form a block. ``"dyadic"``: the exact expectation over tau
            draws from each two rows. ``"sampled"``: tau draws from each ``kappa`` rows.
        likelihood: ``"categorical"`` or ``"gaussian"``.
        generator: Source of the random numbers for ``"sampled"``.

    Returns:
        A scalar in the outputs' dtype, but at least float32.

    Raises:
        InputError: The shapes do not match, a label is out of range, or the batch is empty.

    Source: the open request in google-deepmind/neural_testbed#1 to train on it. The joint log-loss is from Osband et al., arXiv
    2110.04629, and the sampling of anchors from Osband et al., arXiv 2202.13509.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0]] * 4, [[-9.0, 9.0]] * 4])  # two members, each sure of its own label
        >>> joint_nll_loss(logits, torch.tensor([0, 0, 0, 0]), tau=4)
        tensor(0.6931)
    """
    check_joint(tau, kappa, sampling)
    check_choice("likelihood", likelihood, ("categorical", "gaussian"))
    log_probs = _categorical(output, target) if likelihood == "categorical" else _gaussian(output, target)
    rows = log_probs.shape[1]
    if rows == 0:
        raise InputError("`output` must hold at least one sample, but the batch is empty.")
    size = block_size(tau, kappa, sampling)
    if rows < size and sampling == "consecutive":
        tau = size = rows
    elif rows < size:
        log_probs = log_probs[:, torch.arange(size, device=log_probs.device) % rows]
    selected = None
    if sampling == "sampled":
        device = None if generator is None else generator.device
        groups = max(1, rows // size)
        selected = torch.randint(kappa, (groups, tau), generator=generator, device=device).to(log_probs.device)
    return block_losses(log_probs, tau, kappa, sampling, selected).mean().to(upcast(output).dtype)


def _categorical(logits: Tensor, target: Tensor) -> Tensor:
    if isinstance(target, Tensor) and is_free(target) and not target.is_floating_point():
        check_target_values(target, logits.shape[-1])
    return joint_log_probs(logits, target, validate=False)


def _gaussian(output: Tensor, target: Tensor) -> Tensor:
    mean, variance = split_gaussian(output)
    if mean.ndim != 3 or len(mean) == 0:
        raise InputError(f"`output` must be [Z, B, 2 D] with Z > 0, but its shape is {list(output.shape)}.")
    return -gaussian_nll_loss(widen(mean), widen(variance), target, reduction="none", full=True).sum(2)


@dataclass(frozen=True)
class JointLoss(IndexLoss):
    """:func:`joint_nll_loss` as the ``loss`` of a module, which passes it the outputs of all indices at once.

    With few drawn indices it is biased: training lowers it below the loss of the infinite mixture. Ensembles use all members in
    every step; an epinet should draw tens of indices (``num_train_samples``).

    Args:
        tau: Number of labels predicted together.
        kappa: Number of distinct inputs among them, for ``"sampled"``.
        sampling: ``"consecutive"``, ``"dyadic"`` or ``"sampled"``.
        likelihood: ``"categorical"``, or ``"gaussian"`` for regression.

    Raises:
        InputError: The settings are invalid.

    Example:
        >>> from lightning_uq import EnsembleModule
        >>> module = EnsembleModule(lambda: torch.nn.Linear(4, 3), loss=JointLoss(tau=5))
        >>> x, y = torch.zeros(10, 4), torch.zeros(10, dtype=torch.long)
        >>> module.training_loss(x, y, (x, y)).shape
        torch.Size([])
    """

    tau: int = 10
    kappa: int = 2
    sampling: Sampling = "consecutive"
    likelihood: Likelihood = "categorical"

    def __post_init__(self) -> None:
        check_joint(self.tau, self.kappa, self.sampling)
        check_choice("likelihood", self.likelihood, ("categorical", "gaussian"))

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The joint log-loss, a scalar, of outputs [Z, B, ...] and targets [B, ...]."""
        return joint_nll_loss(output, target, **dataclasses.asdict(self))
