"""Gaussian negative log-likelihood, and the layout of means and variances in one output tensor."""

import torch.nn.functional as F
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_shape
from lightning_uq.losses.reduction import Reduction, reduce

MIN_VARIANCE = 1e-6
"""Added to the softplus of a raw variance, which can underflow to zero."""


def split_gaussian(output: Tensor, min_variance: float = MIN_VARIANCE) -> tuple[Tensor, Tensor]:
    """Mean and variance, each [..., D], of a regression output [..., 2D]: the means, then the raw variances.

    variance = softplus(raw) + ``min_variance``. Half precision is upcast to float32 first.

    Args:
        output: Output [..., 2D] of a network with mean and variance heads.
        min_variance: The smallest variance, in squared units of the target.

    Raises:
        InputError: The last axis is not even.

    Source: Lakshminarayanan et al., arXiv 1612.01474, section 2.2.1.

    Example:
        >>> import torch
        >>> mean, variance = split_gaussian(torch.tensor([[1.0, 0.0]]))
        >>> mean, variance
        (tensor([[1.]]), tensor([[0.6931]]))
    """
    if output.ndim < 1 or output.shape[-1] == 0 or output.shape[-1] % 2:
        raise InputError(
            "`output` must have shape [..., 2 D], D means and then D raw variances, but its shape is "
            f"{list(output.shape)}."
        )
    mean, raw = upcast(output).chunk(2, dim=-1)
    return mean, F.softplus(raw) + min_variance


def gaussian_nll_loss(
    mean: Tensor,
    variance: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    full: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of a Gaussian: 0.5 * (log variance + (target - mean)^2 / variance).

    Args:
        mean: Means [B, D], or [Z, B, D] over an index.
        variance: Variances of the same shape, above zero.
        target: Targets of the same shape; [B, D] also fits means [Z, B, D]. Nothing else is broadcast: a target [B] against
            means [B, 1] would pair every sample with every other.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"`` for the shape of ``mean``.
        full: Whether to add the constant log(2 pi) / 2, which makes it the negative log-density.

    Raises:
        InputError: The shapes do not match, or ``reduction`` is unknown.

    Source: Lakshminarayanan et al., arXiv 1612.01474, equation 1.

    Example:
        >>> import torch
        >>> gaussian_nll_loss(torch.zeros(3, 1), torch.ones(3, 1), torch.ones(3, 1))
        tensor(0.5000)
    """
    check_shape("variance", variance, mean.shape)
    check_shape("target", target, mean.shape, *([mean.shape[1:]] if mean.ndim == 3 else []))
    mean, variance, target = upcast(mean), upcast(variance), upcast(target)
    loss = -log_density((target - mean).square() / variance, variance.log(), dims=int(full))
    return reduce(loss, reduction)
