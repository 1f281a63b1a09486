"""Infers the task of a foreign module from the targets of its batches, if none was given."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.running.ranks import first_of_ranks, gather_objects
from lightning_uq.tasks import Binary, Classification, Multilabel, Regression, Task, describe

INFERABLE: dict[str, Task] = {
    "mean": Regression(head="mean"),
    "binary": Binary(),
    "multilabel": Multilabel(),
}
"""The tasks that a batch can imply, by the names that a checkpoint stores."""


def inferred_task(outputs: Tensor, target: object) -> str | None:
    """The name in :data:`INFERABLE` of the task that outputs [B, ...] and targets of the same shape imply, or None.

    Targets that are 0 or 1 are labels, if the outputs are not probabilities. Other targets are numbers, unless they sum to one.
    A last axis of size 1 makes no difference.

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
            return None  # outputs may be probabilities rather than logits
        return "multilabel" if per_input else "binary"
    if not target.is_floating_point() or (sums_to_one and bool((known >= 0).all())):
        return None
    return "mean"


class InferredTask:
    """The task that a model's batches imply, if none was given, and any contradiction.

    The first batch that implies a task, or matches the default, decides. Every later batch must agree with it.

    Args:
        name: The name of a task already known from a checkpoint.
        doubt: A known contradiction.

    Attributes:
        name: The name in :data:`INFERABLE` of the task that a batch implied; None is the default, one label per input.
        doubt: The reason why the batches contradict the task, or None.
        is_open: Whether the next batch may still decide.
    """

    def __init__(self, name: str | None = None, doubt: str | None = None) -> None:
        self.name = name
        self.doubt = doubt
        self.is_open = name is None
        self._deviations: dict[
            str | None, Tensor
        ] = {}  # the largest deviation of noted targets from each kind of labels

    @property
    def task(self) -> Task:
        """The meaning of the outputs."""
        return Classification() if self.name is None else INFERABLE[self.name]

    @property
    def contradiction(self) -> str | None:
        """The doubt about a decided task; None while a later batch may still decide."""
        return None if self.is_open else self.doubt

    def look(
        self, model: nn.Module, outputs: Callable[[], Tensor | None], target: object, *, doubts_default: bool = False
    ) -> bool:
        """Check whether a batch implies another task than the default. A contradiction becomes the ``doubt``.

        Args:
            model: The model, which a report names.
            outputs: Returns the outputs [Z, B, ...] of the batch, or None if it has none. It is called until a batch has decided.
            target: Its targets [B, ...].
            doubts_default: Whether a batch that neither implies a task nor matches the default is a contradiction. A later batch may still decide.
        """
        if not isinstance(target, Tensor):
            return False
        self.note(target)
        if not self.is_open:
            self.review(model)
            return False
        found = outputs()
        if found is None:
            return False
        self.name = inferred_task(found[0], target)
        misfit = None if self.name is not None else _misfit(found, target)
        self.is_open = misfit is not None
        if doubts_default or not self.is_open:
            self.doubt = misfit
        if self.name is not None:
            report_guess(f"{self._reading(model)}. If they mean something else, pass `task`.", model)
        return self.name is not None

    def note(self, target: Tensor) -> None:
        """Record the targets of a batch, without waiting for the GPU."""
        for name in (None, "binary"):
            found = _deviation(name, target)
            if found is not None:
                before = self._deviations.get(name, torch.zeros_like(found)).to(found.device)
                self._deviations[name] = torch.where(found.abs() > before.abs(), found, before)

    def review(self, model: nn.Module) -> None:
        """Check the task against the noted targets."""
        if self.is_open:
            return
        kind = None if self.name is None else "binary"
        found = None if self.name == "mean" else self._deviations.get(kind)  # a regression accepts any numbers
        value = 0.0 if found is None else float(found)
        self._deviations = {}
        if value and self.doubt is None:
            came = f"rows that sum to {1 + value:g}" if self.name is None else f"the target {value:g}"
            other = "Multilabel()" if self.name is None else "Regression(head='mean')"
            self.doubt = (
                f"{self._reading(model)} so far, but a later batch holds {came}. Pass argument `task`, for example `task={other}`, or "
                f"`task={describe(self.task)}` if that is right."
            )

    def agree(self, model: nn.Module, trainer: Trainer) -> bool:
        """Share the findings of all ranks, and return whether this rank now has another task. A collective.

        Ranks with different tasks are in doubt, and if one rank is in doubt, all are.
        """
        before = self.name
        decided = [name for name, is_open in gather_objects((self.name, self.is_open), trainer) if not is_open]
        if decided:
            self.doubt = None if self.is_open else self.doubt  # if no batch of this rank decided, those of others did
            self.name, self.is_open = decided[0], False
            self.review(model)
        if len(set(decided)) > 1:
            tasks = " and ".join(sorted({describe(INFERABLE[name] if name else Classification()) for name in decided}))
            self.doubt = f"The ranks infer different tasks of {type(model).__name__} from their batches: {tasks}. Pass argument `task`."
        (self.doubt,) = first_of_ranks([self.doubt], trainer)
        return self.name != before

    def _reading(self, model: nn.Module) -> str:
        shows = {
            None: "its targets are one label, or probabilities of classes, per input",
            "mean": "its outputs have the shape of its targets, which are numbers",
        }.get(self.name, "its outputs have the shape of its targets, which are 0 or 1")
        return f"{type(model).__name__} is read with `task={describe(self.task)}`, because {shows}"


def _misfit(outputs: Tensor, target: Tensor) -> str | None:
    """The reason why outputs [Z, B, ...] and targets do not belong to the default task, or None."""
    try:
        Classification().check_output(outputs)
        Classification().check_target(target, outputs)
    except InputError as error:
        return str(error)
    return None


def _deviation(name: str | None, target: Tensor) -> Tensor | None:
    """The target's largest deviation from a task, 0 if it agrees. For classes, it is the deviation of a row's sum from one."""
    if name == "mean" or not target.numel() or target.is_complex():
        return None
    if name is not None:
        values = target.flatten().float()
        values = torch.where((values == 1) | values.isnan(), 0.0, values)
    elif target.ndim == 2 and target.shape[1] > 1:
        values = target.float().sum(1) - 1
        values = torch.where((values.abs() < 1e-2) | values.isnan(), 0.0, values)
    else:
        return None
    return values.index_select(0, values.abs().argmax().reshape(1)).squeeze(0)  # indexing would wait for the GPU
