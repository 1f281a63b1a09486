"""Infers the task from the targets of a user's batches, without a network."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_uq.batches import num_rows
from lightning_uq.errors import InputError
from lightning_uq.running.marks import Marker

NAMES = ("classification", "binary", "multilabel", "segmentation", "regression")
VOID = 255
"""The conventional label of positions that do not count in a segmentation."""


@dataclass
class Rows:
    """The findings of one pass over a loader.

    Attributes:
        num: Number of rows.
        input_shape: Shape of one input; None if inputs are not tensors.
        targets: The targets of all rows; for maps, and if the shapes of batches differ, the distinct values of each batch.
        target_shape: Shape of the targets of a batch.
        mark: The mark of all batches.
    """

    num: int
    input_shape: tuple[int, ...] | None
    targets: Tensor
    target_shape: tuple[int, ...]
    mark: str = ""


def read_rows(loader: Iterable[Any], unpack: Callable[[Any], Any], name: str) -> Rows:
    """Read all batches of a loader once.

    Raises:
        InputError: There are no batches, or no targets.
    """
    num = 0
    inputs: list[tuple[int, ...] | None] = []
    found: list[Tensor] = []
    marker = Marker()
    for batch in loader:
        x, y = unpack(batch)
        if not isinstance(y, Tensor) or not y.ndim:
            raise InputError(
                f"The batches of the {name} loader must have targets [B, ...], but their targets are {type(y).__name__}. Pass "
                "`unpack_batch`, a function that returns the input and the target."
            )
        num += num_rows(x, y) or len(y)
        marker.add((batch, y))  # a marker skips batches that are other objects, so add the target too
        inputs = inputs or [tuple(x.shape[1:]) if isinstance(x, Tensor) else None]
        found.append(y)
    if not found:
        raise InputError(f"The {name} loader must hold batches, but it is empty.")
    is_map = found[0].ndim > 2 or len({y.shape[1:] for y in found}) > 1
    targets = torch.cat([torch.unique(y) if is_map else y for y in found])
    return Rows(num, inputs[0], targets, tuple(found[0].shape), marker.mark)


def shown_task(rows: Rows, name: str) -> str:
    """The task that the training targets imply.

    Floats that are 0 or 1 are labels; other floats [B] or [B, D] are numbers. Integers [B] are always classes, since losses of torch
    take integers as labels and floats as numbers. Integers [B, L] of 0 and 1 are labels, and integers at the positions of images
    [B, C, *P] are maps of classes.

    Raises:
        InputError: The targets do not determine a task.
    """
    y, shape = rows.targets, rows.target_shape
    per_input = len(shape) == 2 and shape[1] > 1
    one_each = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    are_flags = bool(((y == 0) | (y == 1)).all())
    is_map = rows.input_shape is not None and len(shape) > 1 and shape[1:] == rows.input_shape[1:]
    if not y.is_floating_point() and is_map:
        return "segmentation"
    if one_each and (y.dtype == torch.bool or (y.is_floating_point() and are_flags)):
        return "binary"
    if one_each:
        return "regression" if y.is_floating_point() else "classification"
    is_share = y.is_floating_point() and per_input and bool(((y.sum(1) - 1).abs() < 1e-3).all() and (y >= 0).all())
    if per_input and are_flags and not bool((y.sum(1) == 1).all()):
        return "multilabel"
    if per_input and y.is_floating_point() and not is_share:
        return "regression"
    raise InputError(
        f"The task of {name} is unclear from its training targets, which are {y.dtype} of shape {list(shape)}, from {y.min():g} to {y.max():g}. Pass "
        f"`task`, one of {', '.join(NAMES)}."
    )


def with_target(batch: Any, old: Any, new: Any) -> Any:
    """A copy of a batch in plain containers with another target.

    Raises:
        InputError: The batch is another object, in which the target was not found.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.tensor([4, 5])
        >>> with_target({"input": x, "target": y}, y, y.float())["target"]
        tensor([4., 5.])
    """
    if isinstance(batch, Mapping):
        found: Any = {key: new if value is old else value for key, value in batch.items()}
        is_there = any(value is old for value in batch.values())
    elif isinstance(batch, list | tuple):
        parts = [new if value is old else value for value in batch]
        found = type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        is_there = any(value is old for value in batch)
    else:
        found, is_there = None, False
    if not is_there:
        raise InputError(
            f"A regression needs floating-point targets, but those in a batch of type {type(batch).__name__} are {old.dtype}. Convert them "
            "with `.float()`."
        )
    return found


def facts(task: str, rows: Rows, others: Mapping[str, Rows], name: str) -> tuple[dict[str, Any], int]:
    """The arguments of the task, and the number of outputs that a network needs.

    Args:
        task: Name of the task.
        rows: The training rows.
        others: Rows of the other parts, whose labels also count.
        name: The data's name, for errors.

    Raises:
        InputError: The targets contradict the task.
    """
    y, shape = rows.targets, rows.target_shape
    width = (*shape, 1)[1]
    fits = {"classification": len(shape) == 1, "segmentation": len(shape) > 1, "multilabel": len(shape) == 2}
    fits |= {"binary": width == 1 and len(shape) < 3, "regression": len(shape) < 3}
    if not fits[task]:
        raise InputError(
            f"task={task!r} does not match the targets of {name}, whose shape is {list(shape)}. Pass another `task`."
        )
    if task == "regression":
        mean, std = _moments(y.double().reshape(len(y), -1))
        if not bool((std > 0).all()):
            raise InputError(f"The training targets of {name} must vary, but one of their dimensions is constant.")
        return {"target_scale": (tuple(mean.tolist()), tuple(std.tolist()))}, width
    values = torch.unique(torch.cat([y.flatten(), *(one.targets.flatten().to(y.dtype) for one in others.values())]))
    if task in ("binary", "multilabel"):
        wrong = values[(values != 0) & (values != 1)]
        if len(wrong):
            raise InputError(f"task={task!r} needs targets 0 and 1, but those of {name} hold {wrong[0]:g}.")
        return ({}, 1) if task == "binary" else ({"num_labels": width}, width)
    void = [int(label) for label in values.tolist() if label < 0 or label == VOID][:1] if task == "segmentation" else []
    counted = [label for label in values.tolist() if label not in void]
    if y.is_floating_point() or len(counted) < 2 or counted[0] < 0:
        raise InputError(
            f"task={task!r} needs integer labels 0 ... C-1 of at least 2 classes, but the targets of {name} are {y.dtype} from {values[0]:g} to "
            f"{values[-1]:g}. Pass another `task`, or relabel them."
        )
    num_classes = int(counted[-1]) + 1
    return {"num_classes": num_classes, **({"ignore_index": void[0]} if void else {})}, num_classes


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of targets [N, D], without missing ones."""
    mean = y.nanmean(0)
    return mean, (y - mean).square().nanmean(0).sqrt()
