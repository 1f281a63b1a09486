"""What all predictions are: frozen sets of tensors that move, slice, concatenate and export as one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError, NotFittedError

_P = TypeVar("_P", bound="Prediction")


class Prediction(ABC):
    """Base of all predictions: a frozen set of tensors that moves, concatenates and exports as one.

    Subclasses name their tensors and each one's batch axis in ``_batch_axis`` (None: shared by the batch) and pass
    them to :meth:`_set`; an absent optional tensor is None.
    """

    _batch_axis: ClassVar[dict[str, int | None]]

    def _set(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, Tensor):
                raise InputError(f"Expected argument `{name}` to be a tensor, but got {type(tensor).__name__}.")
        object.__setattr__(self, "_tensors", tensors)

    @classmethod
    def _from_tensors(cls: type[_P], tensors: dict[str, Tensor | None]) -> _P:
        """An instance from its raw tensors; they were checked when they were first given."""
        new = cls.__new__(cls)
        object.__setattr__(new, "_tensors", tensors)
        return new

    def _get(self, name: str) -> Tensor:
        tensor: Tensor | None = self.__dict__["_tensors"][name]
        if tensor is None:
            raise InputError(f"This prediction holds no `{name}`.")
        return tensor

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen; make a new one instead of setting `{name}`.")

    def __len__(self) -> int:
        return next(t.shape[a] for t, a in self._tensors_and_axes() if a is not None)

    def __repr__(self) -> str:
        shapes = {name: list(t.shape) for name, t in self.__dict__["_tensors"].items() if t is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={shape}' for name, shape in shapes.items())})"

    def __getstate__(self) -> dict[str, Tensor | None]:
        return dict(self.__dict__["_tensors"])

    def __setstate__(self, state: dict[str, Tensor | None]) -> None:
        object.__setattr__(self, "_tensors", state)

    def _tensors_and_axes(self) -> list[tuple[Tensor, int | None]]:
        tensors = self.__dict__["_tensors"]
        return [(tensors[name], axis) for name, axis in self._batch_axis.items() if tensors.get(name) is not None]

    def to(self: _P, *args: Any, **kwargs: Any) -> _P:
        """A copy on another device or in another dtype; takes what ``Tensor.to`` takes. Lightning moves predictions so."""
        tensors = self.__dict__["_tensors"]
        return self._from_tensors({k: None if t is None else t.to(*args, **kwargs) for k, t in tensors.items()})

    def replace(self: _P, **tensors: Tensor) -> _P:
        """A copy with other tensors in the place of those named, as ``temperature`` or ``log_density``."""
        unknown = set(tensors) - set(self._batch_axis)
        if unknown:
            raise InputError(f"Expected names among {sorted(self._batch_axis)}, but got {sorted(unknown)}.")
        return self._from_tensors({**self.__dict__["_tensors"], **tensors})

    @classmethod
    def cat(cls: type[_P], predictions: Sequence[_P]) -> _P:
        """Concatenate batches: what ``trainer.predict`` returned becomes one prediction.

        Raises:
            InputError: The list is empty, mixes types or holds no predictions, or its parts disagree on what they hold.
        """
        if not predictions:
            raise InputError("Expected argument `predictions` to hold at least one prediction, but got none.")
        kind = type(predictions[0])
        if not issubclass(kind, Prediction):
            raise InputError(
                f"Expected argument `predictions` to hold predictions, but it holds a {kind.__name__}. Of several loaders "
                "`trainer.predict` returns a list each: concatenate one of them."
            )
        if any(type(p) is not kind for p in predictions):
            names = sorted({type(p).__name__ for p in predictions})
            raise InputError(f"Expected argument `predictions` to be of one type, but got {', '.join(names)}.")
        joined: dict[str, Tensor | None] = {}
        for name, axis in kind._batch_axis.items():
            parts = [p.__dict__["_tensors"][name] for p in predictions]
            present = [part for part in parts if part is not None]
            if present and len(present) < len(parts):
                raise InputError(f"Expected all or none of `predictions` to hold `{name}`, but only some do.")
            if not present:
                joined[name] = None
            elif axis is None:
                if any(not torch.equal(part, present[0]) for part in present):
                    raise InputError(f"Expected `{name}` to be the same in all of `predictions`, but it differs.")
                joined[name] = present[0]
            else:
                joined[name] = torch.cat(present, axis)
        return kind._from_tensors(joined)

    @abstractmethod
    def to_dict(self) -> dict[str, Tensor]:
        """Named per-input results, the batch on axis 0: what a table or a file takes."""

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability, or log-density, of ``target`` under the prediction."""

    @property
    def log_density(self) -> Tensor:
        """Log-density [B] of the input's features under the density that was fitted after training.

        Raises:
            NotFittedError: No density was fitted.
        """
        tensor: Tensor | None = self.__dict__["_tensors"].get("log_density")
        if tensor is None:
            raise NotFittedError("This prediction carries no `log_density`: no feature density was fitted.")
        return tensor

    def _optional(self) -> dict[str, Tensor]:
        density = self.__dict__["_tensors"].get("log_density")
        return {} if density is None else {"log_density": density}
