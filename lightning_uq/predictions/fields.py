"""The tensors of a prediction, declared once: name, batch axis, and whether they are optional."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lightning_uq.errors import InputError, NotFittedError


class Field:
    """A tensor of a prediction, declared as a class attribute of its type.

    Args:
        doc: Description of the tensor, with its shape.
        batch_axis: The axis of the batch; None if all rows share the tensor.
        class_axis: The axis of the classes, if there is one.
        optional: Whether a prediction may lack the tensor. It can then be passed only by name.
        default: The value of an absent tensor.
        fitted_by: The object that fits an optional tensor; reading an absent one then raises a :class:`NotFittedError`.
        note: A further sentence of that error.
        unit: Kind of number in the target's units: a location, a scale, or a variance. None if it has no unit.
    """

    name: str

    def __init__(
        self,
        doc: str,
        *,
        batch_axis: int | None = None,
        class_axis: int | None = None,
        optional: bool = False,
        default: float | None = None,
        fitted_by: str | None = None,
        note: str = "",
        unit: Literal["location", "scale", "variance"] | None = None,
    ) -> None:
        self.__doc__ = doc
        self.batch_axis = batch_axis
        self.class_axis = class_axis
        self.optional = optional or default is not None or fitted_by is not None
        self.default = default
        self.fitted_by = fitted_by
        self.note = note
        self.unit = unit

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: Any = None) -> "Field": ...

    @overload
    def __get__(self, instance: object, owner: Any = None) -> Tensor: ...

    def __get__(self, instance: object | None, owner: Any = None) -> "Field | Tensor":
        if instance is None:
            return self
        tensor: Tensor | None = instance.__dict__["_tensors"][self.name]
        if tensor is not None:
            return tensor
        if self.default is not None:
            return torch.tensor(self.default)
        if self.fitted_by is not None:
            raise NotFittedError(
                f"This prediction carries no `{self.name}`: no {self.fitted_by} was fitted.{self.note}"
            )
        raise InputError(f"This prediction holds no `{self.name}`.")


class ScoreNames:
    """The ``score_names`` of a type. A single prediction may have fewer or other scores."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __get__(self, prediction: Any, kind: type) -> tuple[str, ...]:
        return self.names if prediction is None else prediction._listed(self.names)
