"""The base of all predictions: frozen sets of tensors that move, slice, concatenate and export as one."""

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
"""What a score of features adds to a prediction of any type: both of a density, and the latter of any other."""


class Prediction(ABC):
    """Base of all predictions: a frozen set of tensors that moves, slices, concatenates and exports as one.

    A subclass declares its tensors as class attributes, each a :class:`~lightning_uq.predictions.fields.Field`. The
    constructor takes the required ones by position or by name and the optional ones by name.

    Args:
        args: The required tensors, in the order of their declaration.
        kwargs: Tensors by name.

    Attributes:
        score_names: The names that :meth:`score` takes, besides ``ood_score`` of fitted features, and ``log_density`` of a density.
        has_logits: Whether the prediction holds the logits [Z, B, C] of every hypothesis.

    Raises:
        InputError: A tensor is not one, or its shape or values are out of range.
    """

    score_names: ClassVar[tuple[str, ...]] = ()
    has_logits: ClassVar[bool] = False
    _fields: ClassVar[dict[str, Field]] = {}

    log_density = Field(
        "Log-density [B] of the input's features under the density that was fitted after training.",
        batch_axis=0,
        fitted_by="feature density",
        note=" Of several callbacks that score features, predictions carry the score of the last.",
    )

    ood_score = Field(
        "Out-of-distribution score [B], the higher the further out: that of the callback that fitted one to features, or the one that an alarm judges.",
        batch_axis=0,
        fitted_by="score of features",
    )

    score_summary = Field("Numbers that tell one fitted score of features from another.", optional=True)

    ood_p_value = Field(
        'P-value [B] of "the input has the distribution of the rows that the alarm was fitted to"; 0 for an input that is not finite.',
        batch_axis=0,
        fitted_by="OOD alarm",
    )

    ood_alarm = Field(
        "Whether the score is so high that at most the asked share of in-distribution inputs has such a one: bool [B].",
        batch_axis=0,
        fitted_by="OOD alarm",
    )

    prior_precision = Field(
        "Prior precisions [M, R] of the last layer's posteriors that the members were drawn from, or widened by.",
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
            cls.score_names = ScoreNames(declared)  # type: ignore[assignment]  # which gives such a tuple
        cls._fields = dict(sorted(found.items(), key=lambda item: item[1].optional))
        required, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what `inspect` and `help` show
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
            inspect.signature(type(self)).bind(*args, **kwargs)  # raises a TypeError that names what is wrong
        tensors = {name: given.get(name) for name in self._fields}
        self._check_tensors(tensors)
        object.__setattr__(self, "_tensors", tensors)
        self._check()
        if not torch.compiler.is_compiling():  # a graph holds no values
            self._check_values()

    @classmethod
    def of_checked(cls, **tensors: Tensor | None) -> Self:
        """A prediction of tensors whose values are known to be in range: a look at them would wait for a GPU.

        Shapes are checked as always.
        """
        given = {name: tensors.get(name) for name in cls._fields}
        cls._check_tensors(given)
        new = cls._from_tensors(given)
        new._check()
        return new

    # ------------------------------------------------------------------ checks

    @classmethod
    def _check_tensors(cls, tensors: dict[str, Tensor | None]) -> None:
        """Refuse what is no tensor."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) and (tensor is not None or not cls._fields[name].optional):
                raise InputError(f"`{name}` must be a tensor, but it is a {type(tensor).__name__}.")

    def _check(self) -> None:
        """Refuse shapes that do not fit together; a subclass adds those of its own tensors before it calls this."""
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

    def _check_values(self) -> None:  # noqa: B027  # not every type limits its values
        """Refuse values that are out of range; called once, when the tensors are first given."""

    # ------------------------------------------------------------------ a set of tensors

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor | None]) -> Self:
        """A prediction of tensors that were checked when they were first given."""
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
        """What callbacks have fitted, but for some fields: a pooled prediction carries it on."""
        is_fitted = {
            name: field.fitted_by is not None or name == "score_summary" for name, field in self._fields.items()
        }
        names = [name for name in self._fields if is_fitted[name] and name not in without]
        return {name: self._get(name) for name in names}

    def _present(self) -> list[tuple[str, Tensor, int | None]]:
        """Name, tensor and batch axis of the tensors that are there."""
        tensors = ((name, self._get(name), field.batch_axis) for name, field in self._fields.items())
        return [(name, tensor, axis) for name, tensor, axis in tensors if tensor is not None]

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The value of ``compute``, kept for the next call under the same autograd mode."""
        if torch.compiler.is_compiling():
            return compute()
        kept: dict[Any, Tensor] = self.__dict__.setdefault("_kept", {})
        key = (name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen; make a new one instead of setting `{name}`.")

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
        """The prediction of some rows: an integer (one row), a slice, a mask [B] or positions [N].

        Raises:
            InputError: The index is none of these, or a mask has another length.
            IndexError: A position is out of range.
        """
        rows = selected_rows(index, len(self))
        taken = {name: t if axis is None else take_rows(t, axis, rows) for name, t, axis in self._present()}
        return self._from_tensors({name: taken.get(name) for name in self._fields})

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy on another device or in another dtype; takes what ``Tensor.to`` takes. Lightning moves predictions so."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor, _ in self._present()}
        masks = {name: moved[name].to(torch.bool) for name, tensor, _ in self._present() if tensor.dtype == torch.bool}
        return self._from_tensors({name: {**moved, **masks}.get(name) for name in self._fields})

    def replace(self, **tensors: Tensor | None) -> Self:
        """A copy with other tensors in place of those named, as ``temperature`` or ``log_density``; None removes an optional one.

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
        """Concatenate batches: what ``trainer.predict`` returned becomes one prediction.

        Raises:
            InputError: The list is empty, mixes types or holds no predictions, or its parts disagree on what they hold.
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

    # ------------------------------------------------------------------ what a prediction says

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors that the prediction is made of."""
        return self._present()[0][1].dtype

    @property
    def device(self) -> torch.device:
        """The device of these tensors."""
        return self._present()[0][1].device

    @property
    def num_indices(self) -> int | None:
        """Z, the number of hypotheses that the prediction holds; None if they were pooled."""
        return None

    @property
    def map_shape(self) -> tuple[int, ...]:
        """The axes of positions behind each input, as (H, W) of a segmentation; empty if there is one result per input."""
        return ()

    @property
    def logits(self) -> Tensor:
        """Raw logits [Z, B, C, ...] of every hypothesis.

        Raises:
            InputError: The prediction does not hold them; ``has_logits`` says so beforehand.
        """
        raise InputError(self._no_logits())

    def map_logits(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy whose ``logits`` went through a function before they are pooled.

        Raises:
            InputError: The prediction does not hold any.
        """
        raise InputError(self._no_logits())

    def _no_logits(self) -> str:
        return f"A {type(self).__name__} has no member `logits`."

    def pool(self) -> "Prediction":
        """The prediction without its members: pooled results and moments alone, Z times smaller."""
        return self

    def score(self, name: str) -> Tensor:
        """A score [B] (or [B, ...] of a map) by its name: the higher, the more uncertain or out of distribution.

        So ``score("log_density")`` is **minus** ``log_density`` [B], where a density was fitted; ``score("ood_score")`` is that of the
        callback that scores the features, by default FitGMM's of raw and polar features together. A score that is NaN, as that of an
        input with NaN, is plus infinity, so that ``score > threshold`` holds.

        Raises:
            InputError: ``name`` is neither among ``score_names`` nor ``log_density`` or ``ood_score``.
            NotFittedError: The prediction carries no ``log_density``, or no ``ood_score``.
        """
        fitted = self._fitted_scores()
        if name in DENSITY_FIELDS:  # reading an absent one raises
            return self._alarming(fitted[name] if name in fitted else self._score(name))
        own = type(self).score_names  # a name that only other predictions of the type have is an error that says why
        if name not in self.score_names and not (isinstance(own, tuple) and name in own):
            names = (*self.score_names, *fitted)
            listed = f"Its scores are {', '.join(names)}." if names else "It has none."
            raise InputError(f"{type(self).__name__} has no score {name!r}. {listed}{self._hint}")
        return self._alarming(self._score(name))

    def _fitted_scores(self) -> dict[str, Tensor]:
        """The scores of features that the prediction carries, by name."""
        log_density, score = self._get("log_density"), self._get("ood_score")
        found = {} if log_density is None else {"log_density": -log_density, "ood_score": -log_density}
        return found if score is None else {**found, "ood_score": score}

    def _listed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the type's names under which this prediction has scores."""
        return names

    def _alarming(self, score: Tensor) -> Tensor:
        """A score [B, *P] with plus infinity where it, or what was predicted there, is NaN: a vote of NaN is a label like any other."""
        bad = score.isnan()
        num = len(self.map_shape) if score.ndim > 1 else 0
        for name, field in self._fields.items():
            tensor: Tensor | None = vars(self)["_tensors"][name]
            if tensor is not None and not field.optional and field.batch_axis is not None:
                axis = field.batch_axis
                first = axis + 1 + (tensor.ndim > axis + 1 + num)  # behind the classes or targets, where there are any
                others = [one for one in range(tensor.ndim) if one != axis and not first <= one < first + num]
                rows = tensor.isnan()
                bad = bad | (rows.any(others) if others else rows)
        return torch.where(bad, torch.inf, score)

    _hint: ClassVar[str] = ""
    """A further sentence of the error for an unknown score."""

    def _score(self, name: str) -> Tensor:
        score: Tensor = getattr(self, name)
        return score

    @abstractmethod
    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """Named per-input results, the batch on axis 0: what a table or a file takes.

        Args:
            interval: The share of a central interval in (0, 1), whose bounds are added where numbers are predicted.

        Where a score of features was fitted, ``ood_score`` is among them, and of a density ``log_density``. A score that is NaN is plus
        infinity, as :meth:`score` gives it, and the ``label`` of such an input is -1.
        """

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability, or log-density, of ``target`` under the prediction."""

    def _columns(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results, with those of a fitted score of features; whoever filters a table by a score finds the rows that have none."""
        names = {*self.score_names, *(name for name in results if name.startswith("uncalibrated_"))}
        found = {name: _infinite(values) if name in names else values for name, values in results.items()}
        per_row = [name for name, field in self._fields.items() if field.fitted_by and field.batch_axis is not None]
        found |= {name: tensor for name in per_row if (tensor := self._get(name)) is not None}
        return found | {name: self.score(name) for name in self._fitted_scores() if name == "ood_score"}


def _infinite(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), torch.inf, values)
