"""The base class of all predictions: frozen sets of tensors that move, slice, concatenate and export together."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.errors import InputError
from lightning_uq.predictions.fields import Field, ScoreNames
from lightning_uq.predictions.rows import Rows, joined_field, selected_rows, take_rows

_P = TypeVar("_P", bound="Prediction")

DENSITY_FIELDS = ("log_density", "ood_score")
"""Fields that a score of features adds to a prediction of any type: a density adds both, other scores only the second."""


class Prediction(ABC):
    """Base class of all predictions: a frozen set of tensors that move, slice, concatenate and export together.

    A subclass declares its tensors as class attributes, each a :class:`~lightning_uq.predictions.fields.Field`. The
    constructor takes required tensors by position or by name, and optional ones by name.

    Args:
        args: The required tensors, in the order of their declaration.
        kwargs: Tensors by name.

    Attributes:
        score_names: The names that :meth:`score` takes, besides ``ood_score`` for a score of features, and ``log_density`` for a density.
        has_logits: Whether the prediction holds the logits [Z, B, C] of every hypothesis.

    Raises:
        InputError: An argument is not a tensor, or its shape or values are out of range.
    """

    score_names: ClassVar[tuple[str, ...]] = ()
    has_logits: ClassVar[bool] = False
    _fields: ClassVar[dict[str, Field]] = {}

    log_density = Field(
        "Log-density [B] of the input's features under the density that was fitted after training.",
        batch_axis=0,
        fitted_by="feature density",
        note=" If several callbacks score features, predictions carry the score of the last.",
    )

    ood_score = Field(
        "Out-of-distribution score [B]: higher is further out. It comes from the callback that scores features, or is the score that an alarm judges.",
        batch_axis=0,
        fitted_by="score of features",
    )

    score_summary = Field("Numbers that distinguish one fitted score of features from another.", optional=True)

    ood_p_value = Field(
        'P-value [B] of "the input has the distribution of the rows that the alarm was fitted to"; 0 for a non-finite input.',
        batch_axis=0,
        fitted_by="OOD alarm",
    )

    ood_alarm = Field(
        "Whether the score is so high that at most the requested share of in-distribution inputs exceeds it: bool [B].",
        batch_axis=0,
        fitted_by="OOD alarm",
    )

    prior_precision = Field(
        "Prior precisions [M, R] of the last layers' posteriors from which the members were drawn, or whose variance was added.",
        fitted_by="last layer's posterior",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found: dict[str, Field] = {}
        for kind in reversed(cls.__mro__):
            for name in list(found):
                if name in vars(kind) and not isinstance(vars(kind)[name], Field):
                    del found[name]
            found.update({name: value for name, value in vars(kind).items() if isinstance(value, Field)})
        declared = vars(cls).get("score_names")
        if isinstance(declared, tuple):
            cls.score_names = ScoreNames(declared)  # type: ignore[assignment]  # a descriptor that returns such a tuple
        cls._fields = dict(sorted(found.items(), key=lambda item: item[1].optional))
        required, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # for `inspect` and `help`
            [
                inspect.Parameter(name, named, default=None, annotation=Tensor | None)
                if field.optional
                else inspect.Parameter(name, required, annotation=Tensor)
                for name, field in cls._fields.items()
            ]
        )

    def __init__(self, *args: Tensor | None, **kwargs: Tensor | None) -> None:
        required = [name for name, field in self._fields.items() if not field.optional]
        given = {**dict(zip(required, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(given) or not set(required) <= given.keys() <= self._fields.keys():
            inspect.signature(type(self)).bind(*args, **kwargs)  # raises a TypeError that names the wrong argument
        tensors = {name: given.get(name) for name in self._fields}
        self._check_tensors(tensors)
        object.__setattr__(self, "_tensors", tensors)
        self._check()
        if not torch.compiler.is_compiling():  # a graph has no values to check
            self._check_values()

    @classmethod
    def of_checked(cls, **tensors: Tensor | None) -> Self:
        """A prediction from tensors whose values are known to be in range: checking them would wait for a GPU.

        Shapes are checked as usual.
        """
        given = {name: tensors.get(name) for name in cls._fields}
        cls._check_tensors(given)
        new = cls._from_tensors(given)
        new._check()
        return new

    # ------------------------------------------------------------------ checks

    @classmethod
    def _check_tensors(cls, tensors: dict[str, Tensor | None]) -> None:
        """Refuse arguments that are not tensors."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) and (tensor is not None or not cls._fields[name].optional):
                raise InputError(f"`{name}` must be a tensor, but it is a {type(tensor).__name__}.")

    def _check(self) -> None:
        """Refuse shapes that do not fit together. A subclass checks its own tensors before it calls this."""
        sizes: dict[str, int] = {}
        for name, tensor, axis in self._present():
            if axis is not None and tensor.ndim <= axis:
                raise InputError(f"`{name}` must have its batch in axis {axis}, but its shape is {list(tensor.shape)}.")
            if axis is not None:
                sizes[name] = tensor.shape[axis]
        (first, num_rows), *others = sizes.items()
        for name, size in others:
            if size != num_rows:
                raise InputError(f"`{name}` must have as many rows as `{first}`: {num_rows}, but it has {size}.")

    def _check_values(self) -> None:  # noqa: B027  # some types do not limit their values
        """Refuse values that are out of range. Called once, when the tensors are first passed."""

    # ------------------------------------------------------------------ a set of tensors

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor | None]) -> Self:
        """A prediction from tensors that were checked when they were first passed."""
        new = cls.__new__(cls)
        object.__setattr__(new, "_tensors", tensors)
        return new

    def _get(self, name: str) -> Tensor | None:
        tensor: Tensor | None = self.__dict__["_tensors"][name]
        return tensor

    def has(self, name: str) -> bool:
        """Whether the prediction carries an optional tensor, such as ``ood_score``."""
        return self._get(name) is not None

    @property
    def calibrations(self) -> dict[str, Tensor]:
        """The fitted tensors that all rows share, by name: a ``temperature``, say."""
        shared = [name for name, field in self._fields.items() if field.fitted_by and field.batch_axis is None]
        found = {name: self._get(name) for name in shared}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _fitted(self, *without: str) -> dict[str, Tensor | None]:
        """The tensors that callbacks have fitted, except for some fields: a pooled prediction keeps them."""
        is_fitted = {
            name: field.fitted_by is not None or name == "score_summary" for name, field in self._fields.items()
        }
        names = [name for name in self._fields if is_fitted[name] and name not in without]
        return {name: self._get(name) for name in names}

    def _present(self) -> list[tuple[str, Tensor, int | None]]:
        """Name, tensor and batch axis of the tensors that are present."""
        tensors = ((name, self._get(name), field.batch_axis) for name, field in self._fields.items())
        return [(name, tensor, axis) for name, tensor, axis in tensors if tensor is not None]

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The result of ``compute``, cached for calls under the same autograd mode."""
        if torch.compiler.is_compiling():
            return compute()
        kept: dict[Any, Tensor] = self.__dict__.setdefault("_kept", {})
        key = (name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__} is frozen: instead of setting `{name}`, make a copy with `replace`."
        )

    def __getstate__(self) -> dict[str, Tensor | None]:
        return dict(self.__dict__["_tensors"])

    def __setstate__(self, state: dict[str, Tensor | None]) -> None:
        object.__setattr__(self, "_tensors", state)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor, _ in self._present())
        return f"{type(self).__name__}({shapes})"

    # ------------------------------------------------------------------ rows

    def __len__(self) -> int:
        return next(tensor.shape[axis] for _, tensor, axis in self._present() if axis is not None)

    def __getitem__(self, index: Rows) -> Self:
        """The prediction for some rows: an integer (one row), a slice, a mask [B] or positions [N].

        Raises:
            InputError: The index has another type, or a mask has another length.
            IndexError: A position is out of range.
        """
        rows = selected_rows(index, len(self))
        taken = {name: t if axis is None else take_rows(t, axis, rows) for name, t, axis in self._present()}
        return self._from_tensors({name: taken.get(name) for name in self._fields})

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy on another device or in another dtype, with the arguments of ``Tensor.to``. Lightning moves predictions with it."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor, _ in self._present()}
        masks = {name: moved[name].to(torch.bool) for name, tensor, _ in self._present() if tensor.dtype == torch.bool}
        return self._from_tensors({name: {**moved, **masks}.get(name) for name in self._fields})

    def replace(self, **tensors: Tensor | None) -> Self:
        """A copy in which some tensors are replaced, such as ``temperature`` or ``log_density``; None removes an optional one.

        Raises:
            InputError: A name is unknown, or a tensor does not fit the others.
        """
        unknown = sorted(tensors.keys() - self._fields.keys())
        if unknown:
            raise InputError(f"{type(self).__name__} has no tensors {unknown}. It has {', '.join(self._fields)}.")
        self._check_tensors(tensors)
        new = self._from_tensors({**self.__dict__["_tensors"], **tensors})
        new._check()
        if not torch.compiler.is_compiling() and any(not self._fields[name].optional for name in tensors):
            new._check_values()
        return new

    @classmethod
    def cat(cls: type[_P], predictions: Sequence[_P]) -> _P:
        """Concatenate batches, such as the list from ``trainer.predict``, to one prediction.

        Raises:
            InputError: The list is empty, mixes types or holds other objects, or its parts differ in the tensors that they hold.
        """
        if not predictions:
            raise InputError("`predictions` must hold at least one prediction, but it is empty.")
        kind = type(predictions[0])
        if not issubclass(kind, Prediction):
            raise InputError(
                f"`predictions` must hold predictions, but it holds a {kind.__name__}. With several loaders "
                "`trainer.predict` returns one list per loader: concatenate one of them."
            )
        if any(type(p) is not kind for p in predictions):
            names = sorted({type(p).__name__ for p in predictions})
            raise InputError(f"`predictions` must be of one type, but it holds {', '.join(names)}.")
        return kind._from_tensors(
            {name: joined_field(name, field.batch_axis, predictions) for name, field in kind._fields.items()}
        )

    # ------------------------------------------------------------------ properties and results

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the required tensors."""
        return self._present()[0][1].dtype

    @property
    def device(self) -> torch.device:
        """The device of the required tensors."""
        return self._present()[0][1].device

    @property
    def num_indices(self) -> int | None:
        """Z, the number of hypotheses in the prediction; None if they were pooled."""
        return None

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of the positions of each input, such as (H, W) of a segmentation; empty if there is one result per input."""
        return ()

    @property
    def logits(self) -> Tensor:
        """Raw logits [Z, B, C, ...] of every hypothesis.

        Raises:
            InputError: The prediction does not hold them; check ``has_logits`` first.
        """
        raise InputError(self._no_logits())

    def map_logits(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy whose ``logits`` were transformed by a function before they are pooled.

        Raises:
            InputError: The prediction holds no logits.
        """
        raise InputError(self._no_logits())

    def _no_logits(self) -> str:
        return f"A {type(self).__name__} has no member `logits`."

    def pool(self) -> "Prediction":
        """The prediction without its members: only pooled results and moments, Z times smaller."""
        return self

    def score(self, name: str) -> Tensor:
        """A score [B] ([B, ...] for a map) by its name: higher is more uncertain, or further out of distribution.

        ``score("log_density")`` is therefore **minus** ``log_density`` [B], if a density was fitted. ``score("ood_score")`` comes from
        the callback that scores features; by default FitGMM's score combines raw and polar features. NaN scores, such as those of an
        input with NaN, become plus infinity, so that ``score > threshold`` holds.

        Raises:
            InputError: ``name`` is neither among ``score_names`` nor ``log_density`` or ``ood_score``.
            NotFittedError: The prediction carries no ``log_density`` or no ``ood_score``.
        """
        fitted = self._fitted_scores()
        if name in DENSITY_FIELDS:  # reading an absent field raises
            return self._nan_as_infinity(fitted[name] if name in fitted else self._score(name))
        own = type(
            self
        ).score_names  # a name that only other predictions of this type have raises an error with the reason
        if name not in self.score_names and not (isinstance(own, tuple) and name in own):
            names = (*self.score_names, *fitted)
            listed = f"Its scores are {', '.join(names)}." if names else "It has none."
            raise InputError(f"{type(self).__name__} has no score {name!r}. {listed}{self._hint}")
        return self._nan_as_infinity(self._score(name))

    def _fitted_scores(self) -> dict[str, Tensor]:
        """The scores of features in the prediction, by name."""
        log_density, score = self._get("log_density"), self._get("ood_score")
        found = {} if log_density is None else {"log_density": -log_density, "ood_score": -log_density}
        return found if score is None else {**found, "ood_score": score}

    def _listed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the type's score names that this prediction supports."""
        return names

    def _nan_as_infinity(self, score: Tensor) -> Tensor:
        """A score [B, *P] with plus infinity where the score or the prediction is NaN: a vote of NaN would be a label like any other."""
        bad = score.isnan()
        num = len(self.map_shape) if score.ndim > 1 else 0
        for name, field in self._fields.items():
            tensor: Tensor | None = vars(self)["_tensors"][name]
            if tensor is not None and not field.optional and field.batch_axis is not None:
                axis = field.batch_axis
                first = axis + 1 + (tensor.ndim > axis + 1 + num)  # after the axis of classes or targets, if any
                others = [one for one in range(tensor.ndim) if one != axis and not first <= one < first + num]
                rows = tensor.isnan()
                bad = bad | (rows.any(others) if others else rows)
        return torch.where(bad, torch.inf, score)

    _hint: ClassVar[str] = ""
    """A further sentence for the error about an unknown score."""

    def _score(self, name: str) -> Tensor:
        score: Tensor = getattr(self, name)
        return score

    @abstractmethod
    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """Named results per input, with the batch on axis 0, for a table or a file.

        Args:
            interval: Level of a central interval in (0, 1), whose bounds are added for numeric predictions.

        They include ``ood_score`` if a score of features was fitted, and ``log_density`` for a density. NaN scores become plus
        infinity, as in :meth:`score`, and the ``label`` of such an input is -1.
        """

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability, or log-density, of ``target`` under the prediction."""

    def _columns(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and those of a fitted score of features, with plus infinity for NaN: a filter by score must find such rows."""
        names = {*self.score_names, *(name for name in results if name.startswith("uncalibrated_"))}
        found = {name: _infinite(values) if name in names else values for name, values in results.items()}
        per_row = [name for name, field in self._fields.items() if field.fitted_by and field.batch_axis is not None]
        found |= {name: tensor for name in per_row if (tensor := self._get(name)) is not None}
        return found | {name: self.score(name) for name in self._fitted_scores() if name == "ood_score"}


def _infinite(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), torch.inf, values)
