"""Losses away from the data: the trained part is pulled to zero on fake inputs, so that the prior dominates there."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.entropy import log_softmax, mean_log_probs
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import (
    check_at_least,
    check_choice,
    check_floating,
    check_integer,
    check_shape,
    describe,
)
from lightning_uq.losses.gaussian import split_gaussian
from lightning_uq.losses.index import place_index
from lightning_uq.losses.penalty import Penalty


def l2_training_penalty(train: Tensor) -> Tensor:
    """Half the mean square of the trained part of the outputs, without the priors: mean(train^2) / 2.

    Args:
        train: [Z, B, ...].

    Example:
        >>> l2_training_penalty(torch.full((2, 3, 1), 2.0))
        tensor(2.)
    """
    check_floating("train", train, 1, "[Z, B, ...]")
    return 0.5 * upcast(train).square().mean()


def distill_mean_classification(logits: Tensor, distilled: Tensor) -> Tensor:
    """KL(mean_z p_z || p_distilled) in nats, averaged over the batch: one output learns the mean of all hypotheses.

    Args:
        logits: Logits [Z, B, C] over indices.
        distilled: Logits [B, C] of the output that learns, for example at the index ``mean_index``.

    Raises:
        InputError: The shapes do not match.

    Example:
        >>> distill_mean_classification(torch.zeros(4, 3, 2), torch.zeros(3, 2))
        tensor(0.)
    """
    _check_distilled(logits, distilled)
    log_mean = mean_log_probs(logits)
    mean = log_mean.exp()
    gap = log_mean - log_softmax(distilled, -1)
    return (mean * gap.where(mean > 0, 0.0)).sum(-1).mean()  # a class of probability 0 adds nothing


def distill_mean_regression(output: Tensor, distilled: Tensor) -> Tensor:
    """Mean square of f_distilled - mean_z f_z.

    The original squeezes one of the two to [B], so with one target dimension every sample is paired with every other. Here the
    shapes must be equal.

    Args:
        output: Means [Z, B, D] over indices.
        distilled: Means [B, D] of the output that learns.

    Raises:
        InputError: The shapes do not match.

    Example:
        >>> distill_mean_regression(torch.ones(4, 3, 1), torch.zeros(3, 1))
        tensor(1.)
    """
    _check_distilled(output, distilled)
    return (upcast(distilled) - upcast(output).mean(0)).square().mean()


def distill_var_regression(output: Tensor, log_variance: Tensor) -> Tensor:
    """:func:`variance_kl` between Var_z f_z and a predicted variance, averaged. Var_z divides by Z.

    Args:
        output: Means [Z, B, D] over indices.
        log_variance: Logarithms [B, D] of the predicted variances.

    Raises:
        InputError: The shapes do not match.

    Example:
        >>> distill_var_regression(torch.tensor([[[1.0]], [[-1.0]]]), torch.zeros(1, 1))
        tensor(0.)
    """
    _check_distilled(output, log_variance, "log_variance")
    return variance_kl(upcast(output).var(0, correction=0), log_variance).mean()


def distill_var_classification(logits: Tensor, log_variance: Tensor) -> Tensor:
    """:func:`variance_kl` between Var_z p_z of each sample and class and a predicted variance, averaged.

    The original computes one variance for the batch, over samples and classes too.

    Args:
        logits: Logits [Z, B, C] over indices.
        log_variance: Logarithms [B, C] of the predicted variances.

    Raises:
        InputError: The shapes do not match.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
        >>> distill_var_classification(logits, torch.ones(1, 2).log()).round(decimals=4)
        tensor(0.3181)
    """
    _check_distilled(logits, log_variance, "log_variance")
    return variance_kl(upcast(logits).softmax(-1).var(0, correction=0), log_variance).mean()


def variance_kl(variance: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, variance) || N(m, exp(log_variance))) of Gaussians with the same mean, element by element, in nats.

    Args:
        variance: Variances; zero is replaced by the smallest normal number.
        log_variance: Log-variances of the second Gaussian, of the same shape.

    Raises:
        InputError: The shapes differ.

    Example:
        >>> variance_kl(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([0.])
    """
    check_shape("log_variance", log_variance, variance.shape)
    variance, log_variance = upcast(variance), upcast(log_variance)
    log_ratio = variance.clamp_min(torch.finfo(variance.dtype).tiny).log() - log_variance
    return 0.5 * (variance * (-log_variance).exp() - 1 - log_ratio)


@dataclass(frozen=True)
class PriorLoss(Penalty):
    """scale * :func:`l2_training_penalty` on fake inputs x ~ N(0, input_scale^2), as a module's ``regularizer``.

    Fake inputs have the shape of the batch's. The penalty is on the trained part of the network's output
    (``network.learned_and_prior(x, index)``). The network runs in eval mode, so that fake inputs do not update its statistics;
    gradients flow as usual.

    With ``distill``, the output at the indexer's ``mean_index`` also learns the mean of the others:
    :func:`distill_mean_classification`, or :func:`distill_mean_regression` of the means of outputs [Z, B, 2 D].

    Args:
        scale: Factor of the penalty.
        num_samples: Number of indices drawn from an infinite set; a finite set is used completely.
        input_scale: Standard deviation of the fake inputs, in units of the network's input.
        distill: None, ``"classification"`` or ``"regression"``.
        heads: ``"gaussian"`` if outputs are [Z, B, 2 D], means then raw variances: only the means are penalised, as in the
            original, which has no variances. None: all outputs.

    Raises:
        InputError: The settings are out of range, the input is not a floating-point tensor, or there is no ``mean_index``.
        UnsupportedError: Members of an ensemble have priors of their own, which cannot be separated from the rest.

    Source: ``ClassificationPriorLoss`` and ``RegressionPriorLoss`` of google-deepmind/enn, which fail with
    ``distill_index=True`` and on networks with BatchNorm.

    Example:
        >>> from lightning_uq.networks import DeterministicNetwork
        >>> network = DeterministicNetwork(nn.Linear(2, 3))
        >>> PriorLoss(scale=0.5)(network, torch.zeros(4, 2)).shape
        torch.Size([])
    """

    scale: float = 1.0
    num_samples: int = 1
    input_scale: float = 1.0
    distill: Literal["classification", "regression"] | None = None
    heads: Literal["gaussian"] | None = None

    def __post_init__(self) -> None:
        check_integer("num_samples", self.num_samples, 1)
        for name in ("scale", "input_scale"):
            check_at_least(name, getattr(self, name), 0)
        if self.distill is not None:
            check_choice("distill", self.distill, ("classification", "regression"))
        if self.heads is not None:
            check_choice("heads", self.heads, ("gaussian",))

    def __call__(self, network: nn.Module, x: Any) -> Tensor:
        """The loss, a scalar, of an epistemic network. Only shape, dtype and device of ``x`` [B, ...] matter."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"PriorLoss needs a floating-point tensor as input, but it is {describe(x)}.")
        fake = torch.randn_like(x) * self.input_scale
        index = place_index(network.training_index(self.num_samples), x)  # type: ignore[operator]  # an EpistemicNetwork has it
        trained_modules = [module for module in network.modules() if module.training]
        network.eval()
        try:
            train, output = _learned(network, fake, index)
            loss = self.scale * l2_training_penalty(train.chunk(2, -1)[0] if self.heads == "gaussian" else train)
            if self.distill is None:
                return loss
            mean_index: Tensor | None = network.indexer.mean_index  # type: ignore[union-attr, assignment]  # as above
            if mean_index is None:
                raise InputError(
                    f"distill={self.distill!r} needs a network whose indexer has a `mean_index`, but that of "
                    f"{type(network).__name__} does not. Leave `distill` out."
                )
            distilled = _learned(network, fake, place_index(mean_index[None], x))[1][0]
        finally:
            for module in trained_modules:
                module.training = True
        if self.distill == "classification":
            return loss + distill_mean_classification(output, distilled)
        return loss + distill_mean_regression(split_gaussian(output)[0], split_gaussian(distilled)[0])


def _learned(network: nn.Module, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The trained part of the outputs, and the whole outputs."""
    learned, prior = network.learned_and_prior(x, index)  # type: ignore[operator]  # an EpistemicNetwork has it
    return learned, learned + prior


def _check_distilled(output: Tensor, distilled: Tensor, name: str = "distilled") -> None:
    check_floating("output", output, 2, "[Z, B, ...]")
    check_shape(name, distilled, output.shape[1:])
