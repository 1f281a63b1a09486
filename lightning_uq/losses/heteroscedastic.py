"""Losses of a mean and a variance other than the Gaussian likelihood, which can neglect targets with a large variance."""

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.mixture import mixture_crps
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_shape
from lightning_uq.losses.gaussian import MIN_VARIANCE, gaussian_nll_loss
from lightning_uq.losses.reduction import Reduction, reduce

MAX_LOG_VARIANCE = 80.0
"""Upper bound of the log-variance: above it, the exponential would come close to the largest float32."""


def split_log_gaussian(output: Tensor, min_variance: float = MIN_VARIANCE) -> tuple[Tensor, Tensor]:
    """Mean and variance, each [..., D], of a regression output [..., 2 D]: the means, then the log-variances.

    variance = exp(min(raw, 80)) + ``min_variance``. Half precision is upcast to float32 first.

    Args:
        output: Output [..., 2 D] of a network with mean and log-variance heads.
        min_variance: The smallest variance, in squared units of the target.

    Raises:
        InputError: The last axis is not even.

    Source: Kendall & Gal, NeurIPS 2017 (arXiv 1703.04977), equation 8.

    Example:
        >>> import torch
        >>> split_log_gaussian(torch.zeros(1, 2))
        (tensor([[0.]]), tensor([[1.0000]]))
    """
    if output.ndim < 1 or output.shape[-1] == 0 or output.shape[-1] % 2:
        raise InputError(
            "`output` must have shape [..., 2 D], D means and then D log-variances, but its shape is "
            f"{list(output.shape)}."
        )
    mean, raw = upcast(output).chunk(2, dim=-1)
    return mean, raw.clamp_max(MAX_LOG_VARIANCE).exp() + min_variance


def beta_nll_loss(
    mean: Tensor, variance: Tensor, target: Tensor, beta: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    """Gaussian negative log-likelihood of each target, times its variance to the power of ``beta`` (without gradient).

    The likelihood's gradient with respect to the mean is divided by the variance, so targets whose variance is large early in the
    training may stay badly fitted. ``beta = 0`` is the likelihood; with ``beta = 1`` the mean has the gradient of a squared error.

    Args:
        mean: Means [B, D].
        variance: Variances of the same shape, above zero.
        target: Targets of the same shape.
        beta: The power, in [0, 1].
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"``.

    Raises:
        InputError: The shapes differ, ``beta`` is out of range, or ``reduction`` is unknown.

    Source: Seitzer et al., ICLR 2022 (arXiv 2203.09168).

    Example:
        >>> import torch
        >>> beta_nll_loss(torch.zeros(3, 1), 4 * torch.ones(3, 1), torch.zeros(3, 1))  # 2 * log(4) / 2
        tensor(1.3863)
    """
    if not 0 <= beta <= 1:
        raise InputError(f"`beta` must lie in [0, 1], but it is {beta!r}.")
    losses = gaussian_nll_loss(mean, variance, target, reduction="none")
    return reduce(losses * upcast(variance).detach() ** beta, reduction)


def faithful_gaussian_loss(mean: Tensor, variance: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Half the squared error of the mean, plus the Gaussian negative log-likelihood of the variance with the mean held fixed.

    0.5 (y - mu)^2 + 0.5 (log sigma^2 + (y - stop(mu))^2 / sigma^2): the mean has the gradient of a squared error, whatever the
    variance. In the paper, the variance's gradient is also stopped at the layers that both heads share. A loss sees only outputs
    and cannot do that; instead, let the network detach the features from which it computes the variance.

    Args:
        mean: Means [B, D].
        variance: Variances of the same shape, above zero.
        target: Targets of the same shape.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"``.

    Raises:
        InputError: The shapes differ, or ``reduction`` is unknown.

    Source: Stirn et al., AISTATS 2023 (arXiv 2212.09184).

    Example:
        >>> import torch
        >>> faithful_gaussian_loss(torch.zeros(3, 1), torch.ones(3, 1), torch.ones(3, 1))
        tensor(1.)
    """
    likelihood = gaussian_nll_loss(mean.detach(), variance, target, reduction="none")
    squared = 0.5 * (upcast(target) - upcast(mean)).square()
    return reduce(squared + likelihood, reduction)


def gaussian_crps_loss(mean: Tensor, variance: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Continuous ranked probability score of a Gaussian, in closed form and in the target's units.

    sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = (y - mu) / sigma. It grows linearly with the error, so outlying
    targets weigh less than under the likelihood.

    Args:
        mean: Means [B, D].
        variance: Variances of the same shape, above zero.
        target: Targets of the same shape.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"``.

    Raises:
        InputError: The shapes differ, or ``reduction`` is unknown.

    Source: Gneiting et al., Monthly Weather Review 133 (2005).

    Example:
        >>> import torch
        >>> gaussian_crps_loss(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
        tensor(0.2337)
    """
    check_shape("variance", variance, mean.shape)
    check_shape("target", target, mean.shape)
    return reduce(mixture_crps(mean.unsqueeze(0), variance.unsqueeze(0), target), reduction)
