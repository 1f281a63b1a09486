"""The raw outputs that any model gives for a batch, and what they mean."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq import batches
from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.importing import as_function
from lightning_uq.networks.calling import signature_of
from lightning_uq.networks.output import Output, OutputReader, PredictFn
from lightning_uq.predictions import Prediction
from lightning_uq.running.inferred_task import INFERABLE, inferred_task, tell_task
from lightning_uq.running.transforms import PredictionTransforms, transforms_of
from lightning_uq.tasks import Classification, Task, describe, task_of

UnpackBatch = Callable[[Any], tuple[Any, Tensor | None]]
"""``unpack_batch(batch) -> (x, target)``."""


def is_uncertainty_module(model: object) -> bool:
    """Whether a module is an ``UncertaintyModule``, whose ``forward`` gives [Z, B, ...].

    A user's own module may hold an ``EpistemicNetwork`` too, but its ``forward`` and its batches are its own.
    """
    return transforms_of(model) is not None


class LogitReader:
    """The raw outputs [Z, B, ...] that any model gives for a batch: the logits [Z, B, C] of a classifier.

    They come from ``predict_fn`` if there is one, else from the ``forward`` of one of our modules, [Z, B, ...], else from the
    model's own ``forward``, [B, ...]. Half precision is upcast to float32.

    Args:
        predict_fn: ``predict_fn(model, x)`` gives what ``output`` reads: outputs [B, ...], or [Z, B, ...] of an ensemble.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``; default the module's own, else ``(x, y)``, a bare ``x`` or a
            mapping with ``input``.
        output: What the model (or ``predict_fn``) returns; one of our modules knows that itself.
        task: What the outputs of a model that is not ours mean: a Task or its name. None: one label per input, or numbers if the
            targets of a batch are numbers of the outputs' shape.
        infers_task: Whether a batch may decide that; not where outputs are also read of batches without targets.

    ``predict_fn`` and ``unpack_batch`` may be import paths, and mean what they mean in a module of this package.
    """

    def __init__(
        self,
        predict_fn: PredictFn | str | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        output: Output = "logits",
        task: Task | str | None = None,
        infers_task: bool = True,
    ) -> None:
        self.unpack_batch = None if unpack_batch is None else as_function(unpack_batch, "unpack_batch")
        self.read = OutputReader(output, predict_fn)
        self.given_task = None if task is None else task_of(task)
        self.infers_task = infers_task
        self._inferred: tuple[type | None, str] | None = None  # a class of model, or any, and what its batches showed
        self._with_classes: type | None = None  # a class of model whose outputs have several numbers
        self._indexed: bool | None = None  # whether ``predict_fn`` gives [Z, B, ...], where shapes alone do not tell

    @property
    def predict_fn(self) -> PredictFn | None:
        """The function that calls the model, where one was given."""
        return self.read.predict_fn

    def task(self, model: nn.Module) -> Task:
        """What the outputs mean: a module of ours says it; argument ``task`` says it of any other.

        Raises:
            InputError: Argument ``task`` contradicts one of our modules.
        """
        if not self._is_own(model):
            if self.given_task is not None:
                return self.given_task
            name = self._inferred_of(model)
            return Classification() if name is None else INFERABLE[name]
        own: Task = model.task  # type: ignore[assignment]  # a Module's attribute is untyped
        if self.given_task not in (None, own):
            raise InputError(
                f"`task` is for modules that are not of this package, but {type(model).__name__} is one and has the task "
                f"{describe(own)}. Leave argument `task` out."
            )
        return own

    def unpack(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        """Input and target of a batch."""
        if self.unpack_batch is not None:
            x, target = self.unpack_batch(batch)
        elif is_uncertainty_module(model):
            x, target = model.unpack_batch(batch)  # type: ignore[operator]  # a Module's attribute is untyped
        else:
            signature = signature_of(model) if isinstance(batch, Mapping) else None
            x, target = batches.unpack_batch(batch, signature, allows_whole=self.predict_fn is not None)
        return x, target

    def __call__(self, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, check: bool = True) -> Tensor:
        """Outputs [Z, B, ...] of a batch on the model's device; ``check`` looks at their values too.

        Raises:
            InputError: The outputs cannot belong to the task; the message names the argument that helps.
        """
        x, target = self.unpack(model, batch)
        if not torch.compiler.is_compiling():
            x = batches.own_batch(x)  # the model may write into its input, and this batch is read again
        if self._is_own(model):
            self.infer_task(model, batch)
        if trainer is not None:
            # The model alone: under `bf16-true` tensors made in this context are bfloat16.
            with trainer.precision_plugin.forward_context():
                raw = self.read.raw(model, x)
        else:
            raw = self.read.raw(model, x)
        if self._is_own(model):
            return upcast(raw if isinstance(raw, Tensor) else self.read(raw))
        outputs = self.read(raw)
        self._infer_task(model, outputs, target)
        task = self.task(model)
        if self.predict_fn is None or not self._has_index(outputs, task, batches.num_rows(x, target)):
            outputs = outputs.unsqueeze(0)
        task.check_output(outputs, values=check)
        return upcast(outputs)

    def infer_task(self, model: nn.Module, batch: Any, trainer: Trainer | None = None) -> bool:
        """Look at a batch of a model whose task nobody said: whether it now showed one other than one label per input.

        Only a batch whose targets are no class labels costs a forward pass, on a copy.
        """
        if self._is_own(model):
            infer = getattr(model, "infer_task", None)  # of an ensemble of LightningModules
            return infer is not None and bool(infer(*self.unpack(model, batch)))
        before = self._inferred
        if not self._knows_task(model) and self.infers_task:
            _, target = self.unpack(model, batch)
            if isinstance(target, Tensor) and self._may_show_task(model, target):
                self(model, batches.own_batch(batch), trainer)
        return self._inferred is not before

    def agree_on_task(self, model: nn.Module, trainer: Trainer) -> bool:
        """Take the task that a batch of one rank showed on all ranks; whether it is another than this rank's. A collective."""
        if trainer.world_size == 1 or self._is_own(model) or self.given_task is not None:
            return False
        mine = self._inferred_of(model)
        of_ranks: list[str | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(of_ranks, mine)
        first = next((name for name in of_ranks if name is not None), None)
        if first is not None:
            self._inferred = type(model), first
        return first != mine

    def check_default_task(self, model: nn.Module, batch: Any) -> None:
        """Refuse to read a model as a classifier if nobody said its task and the targets of a batch contradict it.

        Raises:
            InputError: They do.
        """
        target = None if self._knows_task(model) else self.unpack(model, batch)[1]
        if not isinstance(target, Tensor) or not target.ndim:
            return
        several = target.ndim > 1 and target.shape[1] > 1
        if several and target.is_floating_point() and bool(((target.sum(1) - 1).abs() < 1e-2).all()):
            return  # probabilities of classes
        reason = "the targets are not one label per input" if several else Classification().accepts(target)
        if reason is not None:
            raise InputError(
                f"The outputs of {type(model).__name__} would be read as logits of classes, but {reason}. Pass argument `task`."
            )

    def _knows_task(self, model: nn.Module) -> bool:
        """Whether the task was given or inferred."""
        return self._is_own(model) or self.given_task is not None or self._inferred_of(model) is not None

    def _inferred_of(self, model: nn.Module) -> str | None:
        """The name of the task that the batches of such a model have shown."""
        is_of_it = self._inferred is not None and self._inferred[0] in (None, type(model))
        return self._inferred[1] if self._inferred is not None and is_of_it else None

    @property
    def inferred_task(self) -> str | None:
        """The name of the task that batches have shown, which a checkpoint holds; setting it says so of any model."""
        return None if self._inferred is None else self._inferred[1]

    @inferred_task.setter
    def inferred_task(self, name: str | None) -> None:
        self._inferred = None if name is None else (None, name)

    def _may_show_task(self, model: nn.Module, target: Tensor) -> bool:
        """Whether a forward pass could tell the task: the target is not plainly one of several classes."""
        if target.is_floating_point() or target.dtype == torch.bool or target.ndim == 2:
            return True
        if self._with_classes is type(model) or target.ndim != 1:
            return False
        return bool(((target == 0) | (target == 1)).all())

    def _infer_task(self, model: nn.Module, outputs: Tensor, target: object) -> None:
        name = inferred_task(outputs, target) if self.infers_task and not self._knows_task(model) else None
        if name is None and outputs.shape[1:2] != (1,) and outputs.ndim > 1:
            self._with_classes = type(model)
        if name is not None:
            self._inferred = type(model), name
            tell_task(type(model).__name__, name)

    def prediction(self, model: nn.Module, outputs: Tensor, *, to_members: bool = True) -> Prediction:
        """The prediction of outputs [Z, B, ...] before any pooled calibration.

        Args:
            model: The model.
            outputs: What it gave.
            to_members: Whether changes inside the members, as a temperature of each, are applied.
        """
        if not self._is_own(model):
            return self.task(model).predict(outputs)
        raw: Prediction = model.prediction(outputs)  # type: ignore[operator]  # a Module's attribute is untyped
        if not to_members:
            return raw
        transforms: PredictionTransforms = model.prediction_transforms  # type: ignore[assignment]
        return transforms.apply(model, raw, to_members_only=True)

    def _is_own(self, model: nn.Module) -> bool:
        """Whether the outputs are those of one of our modules, which knows what they mean."""
        return self.predict_fn is None and is_uncertainty_module(model)

    def _has_index(self, outputs: Tensor, task: Task, num_rows: int | None) -> bool:
        """Whether ``predict_fn`` gives [Z, B, ...]: only one shape may fit the task, else the first batch's size tells.

        Raises:
            InputError: The first batch has as many rows as its outputs have in both axes.
        """
        with_index, without = outputs.ndim > 1 and _fits(task, outputs), _fits(task, outputs.unsqueeze(0))
        if with_index != without:
            return with_index
        if not with_index:
            return outputs.ndim > 2  # an error either way
        first, second = (size == num_rows for size in outputs.shape[:2])
        if first != second:
            self._indexed = second
        elif self._indexed is None and num_rows is None:
            raise InputError(
                f"`predict_fn` returned shape {list(outputs.shape)}, which {describe(task)} can read as [B, ...] and as [Z, B, ...], and "
                "neither the input nor a target tells B. Let `unpack_batch` return the target as well."
            )
        elif self._indexed is None and first and num_rows != 1:
            raise InputError(
                f"`predict_fn` returned shape {list(outputs.shape)} for a batch of {num_rows}, which {describe(task)} can read as "
                "[B, ...] and as [Z, B, ...]. Use another batch size."
            )
        return bool(self._indexed)


def _fits(task: Task, outputs: Tensor) -> bool:
    try:
        task.check_output(outputs, values=False)
    except InputError:
        return False
    return True
