"""The tensors of a prediction, declared once: what each is called, where its batch axis is, whether it may be absent."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lightning_uq.errors import InputError, NotFittedError


class Field:
    """A tensor that a prediction holds, declared as a class attribute of its type.

    Args:
        doc: What the tensor is, with its shape.
        batch_axis: The axis of the batch; None if all rows share the tensor.
        class_axis: The axis of the classes, where there is one.
        optional: Whether a prediction may lack the tensor. It is then passed by name only.
        default: The number that an absent tensor stands for.
        fitted_by: What fits an optional tensor; reading an absent one is then a :class:`NotFittedError`.
        note: A further sentence of that error.
        unit: What a predicted number is in the target's units: a location, a scale, or a variance. None if it has no unit.
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
    """The ``score_names`` of a type; those of a prediction may be fewer, or others."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __get__(self, prediction: Any, kind: type) -> tuple[str, ...]:
        return self.names if prediction is None else prediction._listed(self.names)
