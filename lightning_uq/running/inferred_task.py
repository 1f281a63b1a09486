"""A module that is not ours and says no task: whether the targets of its batches show that it predicts numbers."""

from functools import cache

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn


def looks_like_regression(outputs: Tensor, target: object) -> bool:
    """Whether a target is numbers of the shape of outputs [B, ...], and neither probabilities nor labels that are on or off.

    An axis of size 1 at the end of one of them makes no difference.

    Example:
        >>> import torch
        >>> looks_like_regression(torch.zeros(2, 1), torch.tensor([0.3, -1.2])), looks_like_regression(torch.zeros(2), torch.ones(2))
        (True, False)
    """
    if not isinstance(target, Tensor) or not target.is_floating_point() or not target.numel() or not target.ndim:
        return False
    shapes = [tuple(x.shape[:-1] if x.ndim > 1 and x.shape[-1] == 1 else x.shape) for x in (outputs, target)]
    if shapes[0] != shapes[1]:
        return False
    known = target[~target.isnan()]
    if not len(known) or bool(((known == 0) | (known == 1)).all()):
        return False
    sums_to_one = target.ndim > 1 and target.shape[1] > 1 and bool(((target.sum(1) - 1).abs() < 1e-3).all())
    return not (sums_to_one and bool((known >= 0).all()))


@cache
def tell_regression(kind: type[nn.Module]) -> None:
    """Report once how modules of such a class are read."""
    rank_zero_info(
        f"{kind.__name__} is read as a regressor of means, `task=Regression(head='mean')`, because its outputs have the shape "
        "of its targets, which are floating-point numbers. If they mean something else, pass `task`."
    )
