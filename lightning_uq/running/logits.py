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
from lightning_uq.running.inferred_task import InferredTask
from lightning_uq.running.ranks import raise_on_all_ranks
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
        self.infers_task = infers_task and task is None
        self._inferred = InferredTask()
        self._inferred_of: type | None = None  # the class of the model whose batches showed it; None for any
        self._log_probs_of: type | None = None  # a class of model whose outputs turned out to be no logits
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
            return self._of(model).task if self.given_task is None else self.given_task
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
            x, target = batches.unpack_batch(batch, signature, allows_whole=self.predict_fn is not None, about=model)
        return x, target

    def __call__(self, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, check: bool = True) -> Tensor:
        """Outputs [Z, B, ...] of a batch on the model's device; ``check`` looks at their values too.

        Raises:
            InputError: The outputs cannot belong to the task; the message names the argument that helps.
        """
        x, target = self.unpack(model, batch)
        outputs = self._indexed_outputs(model, self._outputs(model, x, trainer), lambda: batches.num_rows(x, target))
        if not self._is_own(model):
            self.task(model).check_output(outputs, values=check)
        self._look_for_log_probs(model, outputs, check)
        return upcast(outputs)

    def outputs_if_any(
        self, model: nn.Module, batch: Any, trainer: Trainer | None = None
    ) -> tuple[Tensor | None, int | None]:
        """Outputs [Z, B, ...] of a batch, unchecked, and B; None for the outputs of a model, such as a detector, that has none of its task.

        Features and their scores need none. B is unknown where only an object holds the rows.
        """
        x, target = self.unpack(model, batch)
        num_rows = batches.num_rows(x, target)
        outputs = self._outputs_in(model, self._run(model, x, trainer), num_rows)
        return outputs, num_rows if outputs is None else outputs.shape[1]

    def run(self, model: nn.Module, batch: Any, trainer: Trainer | None = None) -> Any:
        """The outputs of a batch, or what the model returns, if they are not in it."""
        x, target = self.unpack(model, batch)
        raw = self._run(model, x, trainer)
        outputs = self._outputs_in(model, raw, batches.num_rows(x, target))
        return raw if outputs is None else outputs

    def _outputs_in(self, model: nn.Module, raw: Any, num_rows: int | None) -> Tensor | None:
        if not self._is_own(model) and not self.read.can_read(raw):
            return None
        outputs = self._indexed_outputs(model, self._read(model, raw), lambda: num_rows)
        return upcast(outputs) if self._is_own(model) or _fits(self.task(model), outputs) else None

    def _indexed_outputs(self, model: nn.Module, outputs: Tensor, num_rows: Callable[[], int | None]) -> Tensor:
        if self._is_own(model):
            return outputs
        has_index = self.predict_fn is not None and self._has_index(outputs, self.task(model), num_rows())
        return outputs if has_index else outputs.unsqueeze(0)

    def _outputs(self, model: nn.Module, x: Any, trainer: Trainer | None) -> Tensor:
        """What the model returns for an input, as ``output`` reads it."""
        return self._read(model, self._run(model, x, trainer))

    def _run(self, model: nn.Module, x: Any, trainer: Trainer | None) -> Any:
        if not torch.compiler.is_compiling():
            x = batches.own_batch(x)  # the model may write into its input, and this batch is read again
        if trainer is None:
            return self.read.raw(model, x)
        # The model alone: under `bf16-true` tensors made in this context are bfloat16.
        with trainer.precision_plugin.forward_context():
            return self.read.raw(model, x)

    def _read(self, model: nn.Module, raw: Any) -> Tensor:
        return raw if self._is_own(model) and isinstance(raw, Tensor) else self.read(raw, model)

    def _reader_of(self, model: nn.Module) -> OutputReader:
        """What reads the outputs of a model: that of one of our modules is inside."""
        own: Any = model
        reader: OutputReader = own.network.read_output if self._is_own(model) else self.read
        return reader

    def _look_for_log_probs(self, model: nn.Module, outputs: Tensor, check: bool) -> None:
        if check and self.task(model).takes_probabilities:
            found = self._reader_of(model).reports_log_probs(outputs, model)
            self._log_probs_of = type(model) if found else None

    def lacks_logits(self, model: nn.Module) -> bool:
        """Whether the outputs of a model are probabilities or their logarithms, as ``output`` says, or as their values have shown."""
        return self._reader_of(model).output in ("probs", "log_probs") or self._log_probs_of is type(model)

    def is_task_open(self, model: nn.Module) -> bool:
        """Whether the batches of a model may still show its task."""
        return self._is_own(model) or (self.infers_task and self._of(model).is_open)

    def look_at_task(
        self, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, is_first: bool = True
    ) -> bool:
        """Look at a batch of the model's own data, if nobody said its task: whether it now shows another task.

        Until a batch has decided, one whose targets may show a task costs a forward pass, on a copy.

        Args:
            model: The model.
            batch: The batch.
            trainer: Its Trainer, if there is one.
            is_first: Whether no outputs were read under the default task before.

        Raises:
            InputError: The batch contradicts what an earlier one showed, or the default under which earlier ones were read.
        """
        x, target = self.unpack(model, batch)
        if self._is_own(model):
            look = getattr(model, "look_at_task", None)  # of an ensemble of LightningModules
            changed = look is not None and bool(look(x, target))
        elif not self.infers_task or not isinstance(target, Tensor):
            return False
        else:
            inferred = self._inferred = self._of(model)
            self._inferred_of = type(model)
            if inferred.is_open and not _may_show_task(target):
                inferred.note(target)
                return False

            def outputs() -> Tensor | None:
                raw = self._run(model, x, trainer)
                if not self.read.can_read(raw):  # whoever needs outputs says so
                    return None
                found = self._read(model, raw)
                has_index = self.predict_fn is not None and found.ndim == 3 and found.shape != target.shape
                return found if has_index else found.unsqueeze(0)

            changed = inferred.look(model, outputs, target)
            self._raise_doubt(inferred)
        if changed and not is_first:
            raise self._came_late(model)
        return changed

    def check_inferred_task(self, model: nn.Module, target: Tensor) -> None:
        """Refuse targets of the model's own data that contradict those that have shown its task.

        Raises:
            InputError: They do.
        """
        if not self._is_own(model) and self.infers_task:
            inferred = self._of(model)
            inferred.note(target)
            inferred.review(model)
            self._raise_doubt(inferred)

    def agree_on_task(self, model: nn.Module, trainer: Trainer, *, is_first: bool = True) -> bool:
        """Take the task that a batch of one rank showed on all ranks; whether it is another than this rank's. A collective.

        Raises:
            InputError: The batches of the ranks contradict each other, or the default under which this rank has read some.
        """
        if self._is_own(model) or not self.infers_task:
            return False
        self._inferred = self._of(model)
        changed = self._inferred.agree(model, trainer)
        self._raise_doubt(self._inferred)
        raise_on_all_ranks(self._came_late(model) if changed and not is_first else None, trainer)
        return changed

    @staticmethod
    def _came_late(model: nn.Module) -> InputError:
        return InputError(
            f"The first batches of {type(model).__name__} do not show the task that others show. Pass argument `task`."
        )

    @staticmethod
    def _raise_doubt(inferred: InferredTask) -> None:
        if inferred.contradiction is not None:
            raise InputError(inferred.contradiction)

    def check_default_task(self, model: nn.Module, batch: Any) -> None:
        """Refuse to read a model as a classifier if nobody said its task and the targets of a batch contradict it.

        Raises:
            InputError: They do.
        """
        if self._is_own(model) or self.given_task is not None or self._of(model).name is not None:
            return
        _, target = self.unpack(model, batch)
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

    def _of(self, model: nn.Module) -> InferredTask:
        """What the batches of such a model have shown."""
        return self._inferred if self._inferred_of in (None, type(model)) else InferredTask()

    @property
    def inferred_task(self) -> str | None:
        """The name of the task that batches have shown, which a checkpoint holds; setting it says so of any model."""
        return self._inferred.name

    @inferred_task.setter
    def inferred_task(self, name: str | None) -> None:
        self._inferred, self._inferred_of = InferredTask(name), None

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


def _may_show_task(target: Tensor) -> bool:
    """Whether a forward pass could tell the task: the targets are not plainly those of several classes."""
    if target.is_floating_point() or target.dtype == torch.bool or target.ndim == 2:
        return True
    return target.ndim == 1 and bool(((target == 0) | (target == 1)).all())


def _fits(task: Task, outputs: Tensor) -> bool:
    try:
        task.check_output(outputs, values=False)
    except InputError:
        return False
    return True
