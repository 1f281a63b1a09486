"""Changes to a module's predictions after training: the calibrations and densities that are attached to it."""

from abc import ABC
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_uq.errors import NotFittedError
from lightning_uq.guessing import report_guess
from lightning_uq.predictions import Prediction
from lightning_uq.running.weights import WeightsCheck, weights_mark

Change = Callable[[Prediction], Prediction]


class PredictionTransform(ABC):
    """A change to a module's predictions.

    It is copied and pickled together with the module, so it holds only plain data, and neither a callback nor a loader.

    Attributes:
        kind: What it changes. A module carries one transform per kind, the one that was attached last.
        of_members: Whether it changes the members, and thereby the scores that use them.
        is_last: Whether it reads the results of the others, like an interval, and so acts after them.
        makes_members: Whether it makes the members from observations of the forward pass. It then acts before all others, and also in the metrics of a
            validation or a test.
        reads_scores: Whether it reads scores that others observe, such as a density's. The metrics of a validation or a test, which observe no
            scores, skip it.
    """

    kind: ClassVar[str]
    of_members: bool = False
    is_last: ClassVar[bool] = False
    makes_members: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    def apply(self, prediction: Prediction) -> Prediction:
        """The changed prediction, in ``predict`` and in the metrics."""
        return prediction

    @contextmanager
    def observing(self, module: nn.Module) -> Iterator[Change]:
        """A context for one forward pass of ``predict``; the function that it yields then changes the prediction."""
        yield lambda prediction: prediction

    def of_input(self, x: Any) -> "PredictionTransform":
        """The transform for the prediction of an input, if it depends on it."""
        return self


@dataclass(frozen=True)
class _Attached:
    transform: PredictionTransform
    owner: str
    check: WeightsCheck
    path: str | None


class PredictionTransforms:
    """The transforms of one module, in the order in which they were attached.

    Each belongs to the weights of its fit and is never applied to others. Transforms are not part of the module's
    ``state_dict``, so they do not change its checkpoints. A copy of the module has copies of them.

    Example:
        >>> import torch
        >>> from lightning_uq import DeterministicModule, TemperatureScaling
        >>> network = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(network.weight)
        >>> module, x = DeterministicModule(network), torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]])
        >>> scaling = TemperatureScaling().fit(module, [(x, torch.tensor([0, 1, 1, 0]))])
        >>> "temperature" in str(module.predict(x)), len(module.prediction_transforms)
        (True, 1)
        >>> scaling.handle.remove()
        >>> len(module.prediction_transforms)
        0
    """

    def __init__(self) -> None:
        self._attached: OrderedDict[int, _Attached] = OrderedDict()

    def __len__(self) -> int:
        return len(self._attached)

    def attach(
        self, transform: PredictionTransform, owner: str, check: WeightsCheck, path: str | None = None
    ) -> RemovableHandle:
        """Attach a transform, which replaces one of the same kind.

        Args:
            transform: The transform to attach.
            owner: Name of the callback that fitted it, for errors and :meth:`detach`.
            check: Whether the module has the weights of the fit.
            path: A checkpoint with these weights, if there is one.

        Returns:
            A handle whose ``remove()`` detaches it.
        """
        others = [
            one.owner for one in self._attached.values() if one.transform.kind == transform.kind and one.owner != owner
        ]
        if others:
            report_guess(
                f"Predictions carry only one {transform.kind}: that of {owner}, which comes after {others[0]} in the Trainer's callbacks.",
                self,
            )
        self._keep(lambda one: one.transform.kind != transform.kind)
        handle = RemovableHandle(self._attached)
        self._attached[handle.id] = _Attached(transform, owner, check, path)
        return handle

    def detach(self, owner: str) -> None:
        """Detach the transform of an owner."""
        self._keep(lambda one: one.owner != owner)

    def note_path(self, owner: str, path: str) -> None:
        """Note a file with the weights of an owner's transform; does nothing if the owner has none."""
        for key, one in self._attached.items():
            if one.owner == owner:
                self._attached[key] = replace(one, path=path)

    def clear(self) -> None:
        """Detach all transforms."""
        self._attached.clear()

    def _keep(self, keeps: Callable[[_Attached], bool]) -> None:
        for key in [key for key, one in self._attached.items() if not keeps(one)]:
            del self._attached[key]

    def apply(self, module: nn.Module, prediction: Prediction, *, to_members_only: bool = False) -> Prediction:
        """The prediction changed by all transforms, or only by those that change the members.

        Raises:
            NotFittedError: A transform was fitted on other weights than the module's.
        """
        ordered = sorted(self._attached.values(), key=lambda one: _place(one.transform))
        used = [one for one in ordered if one.transform.of_members or not to_members_only]
        _check(used, module)
        for one in used:
            prediction = one.transform.apply(prediction)
        return prediction

    @contextmanager
    def observing(self, module: nn.Module, x: Any, *, for_metrics: bool = False) -> Iterator[Change]:
        """A context for one forward pass of x; the function that it yields then changes the prediction.

        Args:
            module: The module.
            x: The input.
            for_metrics: Whether only metrics use the prediction. A transform that only adds a score then does not observe the pass.

        Raises:
            NotFittedError: A transform was fitted on other weights than the module's.
        """
        used = list(self._attached.values())
        _check(used, module)
        with observing_all([one.transform for one in used], module, x, for_metrics=for_metrics) as change:
            yield change

    def before(self, owner: str, module: nn.Module, without: Collection[str] = ()) -> list[PredictionTransform]:
        """The transforms whose results an owner's transform reads: the earlier ones, or all if it has none.

        Args:
            owner: Name of the callback that fits to these results.
            module: The module.
            without: Owners whose transforms are excluded.

        Raises:
            NotFittedError: A transform was fitted on other weights than the module's.
        """
        ordered = sorted(self._attached.values(), key=lambda one: _place(one.transform))
        own = next((i for i, one in enumerate(ordered) if one.owner == owner), len(ordered))
        used = [one for one in ordered[:own] if one.owner not in without and not one.transform.is_last]
        _check(used, module)
        return [one.transform for one in used]


@contextmanager
def observing_all(
    transforms: Sequence[PredictionTransform], module: nn.Module, x: Any, *, for_metrics: bool = False
) -> Iterator[Change]:
    """A context for a module's forward pass of x; the function that it yields then changes the prediction by all transforms.

    Transforms that make the members act first, and those that read the others' results last. See :meth:`PredictionTransforms.observing`.
    """
    used = [one.of_input(x) for one in sorted(transforms, key=_place) if not (for_metrics and one.reads_scores)]
    with ExitStack() as stack:
        observed = [one for one in used if one.makes_members or not for_metrics]
        changes = {one: stack.enter_context(one.observing(module)) for one in observed}

        def change(prediction: Prediction) -> Prediction:
            for one in used:
                prediction = one.apply(prediction)
                prediction = changes[one](prediction) if one in changes else prediction
            return prediction

        yield change


def _place(transform: PredictionTransform) -> tuple[bool, bool]:
    """The position of a transform among others."""
    return not transform.makes_members, transform.is_last


def transforms_of(module: object) -> PredictionTransforms | None:
    """The transforms of a module of this package, or None for any other object."""
    found = getattr(module, "prediction_transforms", None)
    return found if isinstance(found, PredictionTransforms) else None


def _check(attached: Collection[_Attached], module: nn.Module) -> None:
    mark = weights_mark(module) if attached else None
    for one in attached:
        if not one.check.holds(module, mark):
            raise _other_weights(one)


def _other_weights(one: _Attached) -> NotFittedError:
    weights = "the weights of the fit" + (f" ({one.path})" if one.path else "")
    return NotFittedError(
        f"{one.owner} was fitted on other weights than this module's. Load {weights}, fit it again, or remove it with "
        f"`module.prediction_transforms.clear()`."
    )
