"""Values at the true class, which every log-likelihood of labels needs."""

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_floating, check_no_nan, check_target, check_target_values

_CHUNK = 1 << 22  # logits converted to float64 at a time: 32 MB


def at_class(values: Tensor, target: Tensor, dim: int) -> Tensor:
    """The entries of ``values`` at the classes ``target`` along the axis ``dim``, which is dropped.

    Args:
        values: Values of all classes, such as log-probabilities [Z, B, C, ...].
        target: Class indices of the shape of ``values`` without ``dim``; leading axes such as the members' may be missing.
        dim: The class axis.

    Example:
        >>> at_class(torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]]]), torch.tensor([1]), dim=2)
        tensor([[1.],
                [3.]])
    """
    dim %= values.ndim
    index = target.long().expand(values.shape[:dim] + values.shape[dim + 1 :]).unsqueeze(dim)
    return torch.gather(values, dim, index).squeeze(dim)


def true_class_log_probs(logits: Tensor, target: Tensor, dim: int = -1, *, validate: bool = True) -> Tensor:
    """log p_z(y | x) in float64, a few members at a time, so that a large Z needs no float64 copy of all logits.

    Args:
        logits: Member logits [Z, ...] with a class axis, such as [Z, B, C].
        target: Class indices, of the shape of ``logits`` without Z and the class axis.
        dim: The class axis.
        validate: Whether to check the values as well as shapes and dtypes.

    Returns:
        [Z, ...], without the class axis.

    Raises:
        InputError: Shapes or dtypes differ from these, a target is out of range, or a logit is NaN.

    Example:
        >>> true_class_log_probs(torch.zeros(1, 2, 2), torch.tensor([0, 1]))
        tensor([[-0.6931, -0.6931]], dtype=torch.float64)
    """
    check_floating("logits", logits, 2, "[Z, ..., C]")
    dim %= logits.ndim
    if len(logits) == 0 or dim == 0:
        raise InputError(f"`logits` must be [Z, ..., C] with Z > 0, but its shape is {list(logits.shape)}.")
    check_target(target, logits.shape[1:dim] + logits.shape[dim + 1 :])
    if validate:
        check_target_values(target, logits.shape[dim])
    step = max(1, _CHUNK // max(1, logits[0].numel()))
    log_probs = torch.cat([_log_probs(part, target, dim) for part in torch.split(logits, step)])
    if validate:
        check_no_nan("logits", log_probs)
    return log_probs


def _log_probs(logits: Tensor, target: Tensor, dim: int) -> Tensor:
    logits = widen(logits)
    return at_class(logits, target, dim) - logits.logsumexp(dim)
