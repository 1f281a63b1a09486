"""A module that is not ours and says no task: whether the targets of its batches show what it predicts."""

from functools import cache

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_uq.tasks import Binary, Multilabel, Regression, Task, describe

INFERABLE: dict[str, Task] = {
    "mean": Regression(head="mean"),
    "binary": Binary(),
    "multilabel": Multilabel(),
}
"""The tasks that a batch can show, by the names under which a checkpoint holds them."""


def inferred_task(outputs: Tensor, target: object) -> str | None:
    """The name in :data:`INFERABLE` of the task that outputs [B, ...] and targets of one shape show, or None.

    Targets that are 0 or 1 are labels, if the outputs are no probabilities; other numbers are numbers, unless they sum to one.
    An axis of size 1 at the end of one of them makes no difference.

    Example:
        >>> import torch
        >>> inferred_task(torch.tensor([[2.0], [-1.0]]), torch.tensor([0.3, -1.2]))
        'mean'
        >>> inferred_task(torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
        'binary'
        >>> inferred_task(torch.tensor([[2.0, 1.0], [-1.0, 3.0]]), torch.tensor([[1, 1], [0, 1]]))
        'multilabel'
        >>> inferred_task(torch.zeros(2, 3), torch.tensor([0, 2])) is None
        True
    """
    if not isinstance(target, Tensor) or not target.numel() or not target.ndim or target.is_complex():
        return None
    shapes = [tuple(x.shape[:-1] if x.ndim > 1 and x.shape[-1] == 1 else x.shape) for x in (outputs, target)]
    if shapes[0] != shapes[1]:
        return None
    known = target[~target.isnan()]
    if not len(known):
        return None
    per_input = len(shapes[0]) > 1
    sums_to_one = per_input and bool(((target.sum(1) - 1).abs() < 1e-3).all())
    if bool(((known == 0) | (known == 1)).all()):
        values = outputs.detach()
        is_label = not per_input and not target.is_floating_point()
        if sums_to_one or len(shapes[0]) > 2 or not (is_label or bool((known == 0).any() and (known == 1).any())):
            return None  # one of several classes, maps, or numbers that happen to be equal
        if bool(((values >= 0) & (values <= 1)).all()):
            return None  # probabilities, perhaps, in place of logits
        return "multilabel" if per_input else "binary"
    if not target.is_floating_point() or (sums_to_one and bool((known >= 0).all())):
        return None
    return "mean"


@cache
def tell_task(kind: str, name: str) -> None:
    """Report once how modules of such a class are read."""
    shows = "numbers" if name == "mean" else "0 or 1"
    rank_zero_info(
        f"{kind} is read with `task={describe(INFERABLE[name])}`, because its outputs have the shape of its targets, which are "
        f"{shows}. If they mean something else, pass `task`."
    )
