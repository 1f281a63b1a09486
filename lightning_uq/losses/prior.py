"""Losses where there are no data: the trained part is drawn to zero on fake inputs, so that the prior speaks there."""

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
    """KL(mean_z p_z || p_distilled) in nats, averaged over the batch: one output learns the mean of all.

    Args:
        logits: Logits [Z, B, C] over indices.
        distilled: Logits [B, C] of the output that learns, as under the index of the mean.

    Raises:
        InputError: The shapes do not go together.

    Example:
        >>> distill_mean_classification(torch.zeros(4, 3, 2), torch.zeros(3, 2))
        tensor(0.)
    """
    _check_distilled(logits, distilled)
    log_mean = mean_log_probs(logits)
    mean = log_mean.exp()
    gap = log_mean - log_softmax(distilled, -1)
    return (mean * gap.where(mean > 0, 0.0)).sum(-1).mean()  # a class without probability adds nothing


def distill_mean_regression(output: Tensor, distilled: Tensor) -> Tensor:
    """Mean square of f_distilled - mean_z f_z.

    The original squeezes one of the two to [B], so that targets of one dimension pair every sample with every other; here
    the shapes must be equal.

    Args:
        output: Means [Z, B, D] over indices.
        distilled: Means [B, D] of the output that learns.

    Raises:
        InputError: The shapes do not go together.

    Example:
        >>> distill_mean_regression(torch.ones(4, 3, 1), torch.zeros(3, 1))
        tensor(1.)
    """
    _check_distilled(output, distilled)
    return (upcast(distilled) - upcast(output).mean(0)).square().mean()


def distill_var_regression(output: Tensor, log_variance: Tensor) -> Tensor:
    """:func:`variance_kl` of Var_z f_z and a predicted variance, averaged; the variance divides by Z.

    Args:
        output: Means [Z, B, D] over indices.
        log_variance: Logarithms [B, D] of the variances that learn it.

    Raises:
        InputError: The shapes do not go together.

    Example:
        >>> distill_var_regression(torch.tensor([[[1.0]], [[-1.0]]]), torch.zeros(1, 1))
        tensor(0.)
    """
    _check_distilled(output, log_variance, "log_variance")
    return variance_kl(upcast(output).var(0, correction=0), log_variance).mean()


def distill_var_classification(logits: Tensor, log_variance: Tensor) -> Tensor:
    """:func:`variance_kl` of Var_z p_z, of each sample and class, and a predicted variance, averaged.

    The original takes the variance over samples and classes too, which is one number for the batch.

    Args:
        logits: Logits [Z, B, C] over indices.
        log_variance: Logarithms [B, C] of the variances that learn it.

    Raises:
        InputError: The shapes do not go together.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
        >>> distill_var_classification(logits, torch.ones(1, 2).log()).round(decimals=4)
        tensor(0.3181)
    """
    _check_distilled(logits, log_variance, "log_variance")
    return variance_kl(upcast(logits).softmax(-1).var(0, correction=0), log_variance).mean()


def variance_kl(variance: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, variance) || N(m, exp(log_variance))) of Gaussians with one mean, element by element, in nats.

    Args:
        variance: Variances; zero counts as the smallest normal number.
        log_variance: Logarithms of the others', of the same shape.

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

    Inputs have the shape of the batch's. A network is penalised for what is trained in its output
    (``network.learned_and_prior(x, index)``). It runs in eval mode, so that fake inputs move none of its statistics;
    gradients flow as ever.

    With ``distill`` the output under the indexer's ``mean_index`` also learns the mean of the others:
    :func:`distill_mean_classification`, or :func:`distill_mean_regression` of the means of outputs [Z, B, 2 D].

    Args:
        scale: Factor of the penalty.
        num_samples: Indices drawn from an infinite set; all of a finite one are taken.
        input_scale: Standard deviation of the fake inputs, in units of the network's input.
        distill: None, ``"classification"`` or ``"regression"``.
        heads: ``"gaussian"`` where outputs are [Z, B, 2 D], means then raw variances: the means alone are penalised, as the
            original's, which have no variance. None: all outputs.

    Raises:
        InputError: The settings are out of range, the input is no floating-point tensor, or no index is that of the mean.
        UnsupportedError: Members of an ensemble have priors of their own, which cannot be told from the rest.

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
        """The loss, a scalar, of an epistemic network; of ``x`` [B, ...] only shape, dtype and device matter."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"PriorLoss needs a floating-point tensor as input, but it is {describe(x)}.")
        fake = torch.randn_like(x) * self.input_scale
        index = place_index(network.training_index(self.num_samples), x)  # type: ignore[operator]  # EpistemicNetwork's
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
                    f"{type(network).__name__} has none. Leave `distill` out."
                )
            distilled = _learned(network, fake, place_index(mean_index[None], x))[1][0]
        finally:
            for module in trained_modules:
                module.training = True
        if self.distill == "classification":
            return loss + distill_mean_classification(output, distilled)
        return loss + distill_mean_regression(split_gaussian(output)[0], split_gaussian(distilled)[0])


def _learned(network: nn.Module, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The trained part of the outputs, and the whole."""
    learned, prior = network.learned_and_prior(x, index)  # type: ignore[operator]  # EpistemicNetwork's
    return learned, learned + prior


def _check_distilled(output: Tensor, distilled: Tensor, name: str = "distilled") -> None:
    check_floating("output", output, 2, "[Z, B, ...]")
    check_shape(name, distilled, output.shape[1:])
