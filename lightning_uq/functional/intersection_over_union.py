"""The overlap of predicted and true regions, by class."""

import torch
from torch import Tensor

from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import check_class_indices, check_integer, check_target, check_target_values


def class_overlaps(label: Tensor, target: Tensor, num_classes: int, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Sizes of the intersection and of the union of the predicted and the true region of each class.

    I_c = #{i: label_i = target_i = c} and U_c = #{i: label_i = c or target_i = c}. Their sums over batches give the overlap of a whole
    data set.

    Args:
        label: Predicted class indices [N, ...].
        target: Class indices of the same shape.
        num_classes: C.
        validate: Whether to check the values as well as shapes and dtypes.

    Returns:
        Intersections [C] and unions [C], as integers.

    Raises:
        InputError: The shapes differ, or a value is not a class index.

    Example:
        >>> class_overlaps(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3)
        (tensor([1, 1, 0]), tensor([2, 2, 0]))
    """
    check_integer("num_classes", num_classes, 1)
    check_class_indices("label", label)
    check_target(target, label.shape)
    if validate:
        check_target_values(target, num_classes)
        check_target_values(label, num_classes, "label")
    label, target = label.reshape(-1).long(), target.reshape(-1).long()
    counts = torch.zeros(2, num_classes, dtype=torch.long, device=label.device)
    hits = (label == target).long()
    # `bincount` would wait for a GPU.
    intersection = counts[0].index_add(0, target, hits)
    return intersection, counts[1].index_add(0, target, torch.ones_like(hits)).index_add(0, label, 1 - hits)


def intersection_over_union(intersection: Tensor, union: Tensor) -> Tensor:
    """IoU of each class [C] in float64: I / U; NaN for a class that is neither predicted nor among the targets.

    Args:
        intersection: Sizes [C] of the intersections from :func:`class_overlaps`.
        union: Sizes [C] of the unions.

    Example:
        >>> intersection_over_union(torch.tensor([1, 1, 0]), torch.tensor([2, 4, 0]))
        tensor([0.5000, 0.2500,    nan], dtype=torch.float64)
    """
    return widen(intersection) / widen(union)
