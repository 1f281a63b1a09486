"""Reads the raw outputs of any model for a batch, and their meaning."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from lightning_uq.running.trial import explaining_failure
from lightning_uq.tasks import Classification, Task, describe, task_of

UnpackBatch = Callable[[Any], tuple[Any, Tensor | None]]
"""``unpack_batch(batch) -> (x, target)``."""


def is_uncertainty_module(model: object) -> bool:
    """Whether a module is an ``UncertaintyModule``, whose ``forward`` returns [Z, B, ...].

    A user's own module may contain an ``EpistemicNetwork``, but has its own ``forward`` and batches.
    """
    return transforms_of(model) is not None


class LogitReader:
    """The raw outputs [Z, B, ...] of any model for a batch, such as the logits [Z, B, C] of a classifier.

    They come from ``predict_fn`` if given, or from the ``forward`` of a module of this package, [Z, B, ...], or from the
    ``forward`` of another model, [B, ...]. Half precision is upcast to float32.

    Args:
        predict_fn: ``predict_fn(model, x)`` returns the input of ``output``: outputs [B, ...], or [Z, B, ...] for an ensemble.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``; by default the module's own, or else ``(x, y)``, a bare ``x`` or a
            mapping with ``input``.
        output: What the model (or ``predict_fn``) returns; not needed for a module of this package.
        task: What the outputs of a foreign model mean: a Task or its name. None: one label per input, or numbers if the
            targets of a batch are numbers in the shape of the outputs.
        infers_task: Whether a batch may decide that; False if outputs of batches without targets are read too.

    ``predict_fn`` and ``unpack_batch`` may be import paths, and have the same meaning as in a module of this package.
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
        if self.given_task is not None:
            self.given_task.check_kind(self.read.output)
        self.infers_task = infers_task and task is None
        self._inferred = InferredTask()
        self._inferred_of: type | None = None  # the class of the model whose batches implied it; None for any
        self._log_probs_of: type | None = None  # a class of models whose outputs turned out not to be logits
        self._is_trial = False  # whether a batch is tried before a training
        self._indexed: bool | None = None  # whether ``predict_fn`` returns [Z, B, ...], if shapes do not show it

    @property
    def predict_fn(self) -> PredictFn | None:
        """The function that calls the model, if given."""
        return self.read.predict_fn

    def task(self, model: nn.Module) -> Task:
        """The meaning of the outputs, from a module of this package, or from argument ``task`` for any other.

        Raises:
            InputError: Argument ``task`` was given for a module of this package.
        """
        if not self._is_own(model):
            return self._of(model).task if self.given_task is None else self.given_task
        own: Task = model.task  # type: ignore[assignment]  # a Module's attribute is untyped
        if self.given_task not in (None, own):
            raise InputError(
                f"`task` is only for modules of other packages, but {type(model).__name__} is one of this package and has the task "
                f"{describe(own)}. Leave argument `task` out."
            )
        return own

    def unpack(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        """The input and the target of a batch."""
        if self.unpack_batch is not None:
            x, target = self.unpack_batch(batch)
        elif is_uncertainty_module(model):
            x, target = model.unpack_batch(batch)  # type: ignore[operator]  # a Module's attribute is untyped
        else:
            signature = signature_of(model) if isinstance(batch, Mapping) else None
            x, target = batches.unpack_batch(batch, signature, allows_whole=self.predict_fn is not None, about=model)
        return x, target

    def __call__(self, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, check: bool = True) -> Tensor:
        """Outputs [Z, B, ...] of a batch on the model's device; ``check`` also checks their values.

        Raises:
            InputError: The outputs cannot belong to the task; the message names the argument to pass.
        """
        x, target = self.unpack(model, batch)
        outputs = self._indexed_outputs(model, self._outputs(model, x, trainer), lambda: batches.num_rows(x, target))
        if not self._is_own(model):
            task = self.task(model)
            task.check_kind(self.read.output)
            task.check_output(outputs, values=check)
        self._check_for_log_probs(model, outputs, check)
        return upcast(outputs)

    def outputs_if_any(
        self, model: nn.Module, batch: Any, trainer: Trainer | None = None
    ) -> tuple[Tensor | None, int | None]:
        """Unchecked outputs [Z, B, ...] of a batch, and B. The outputs are None for a model without any of its task, such as a detector.

        Features and their scores need no outputs. B is unknown if only another object holds the rows.
        """
        x, target = self.unpack(model, batch)
        num_rows = batches.num_rows(x, target)
        outputs = self._outputs_in(model, self._run(model, x, trainer), num_rows)
        return outputs, num_rows if outputs is None else outputs.shape[1]

    def run(self, model: nn.Module, batch: Any, trainer: Trainer | None = None) -> Any:
        """The outputs of a batch, or the model's return value if outputs cannot be read from it."""
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
        """The model's return value for an input, to be read by ``output``."""
        return self._read(model, self._run(model, x, trainer))

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A context before a training, in which an error of a user's network for a batch names the arguments to pass.

        In a training or a fit, the network's own error is raised unchanged.
        """
        self._is_trial = True
        try:
            yield
        finally:
            self._is_trial = False

    def _run(self, model: nn.Module, x: Any, trainer: Trainer | None) -> Any:
        if not torch.compiler.is_compiling():
            x = batches.own_batch(x)  # the model may change its input in place, and the batch is read again
        if trainer is None:
            return self.read.raw(model, x)
        is_explained = self._is_trial and not is_uncertainty_module(model)
        explaining = explaining_failure(model, x, has_predict_fn=self.predict_fn is not None)
        # Only the model runs here: under `bf16-true`, this context makes new tensors bfloat16.
        with explaining if is_explained else nullcontext(), trainer.precision_plugin.forward_context():
            return self.read.raw(model, x)

    def _read(self, model: nn.Module, raw: Any) -> Tensor:
        return raw if self._is_own(model) and isinstance(raw, Tensor) else self.read(raw, model)

    def _reader_of(self, model: nn.Module) -> OutputReader:
        """The reader of a model's outputs; a module of this package contains its own."""
        own: Any = model
        reader: OutputReader = own.network.read_output if self._is_own(model) else self.read
        return reader

    def _check_for_log_probs(self, model: nn.Module, outputs: Tensor, check: bool) -> None:
        if check and self.task(model).takes_probabilities:
            found = self._reader_of(model).reports_log_probs(outputs, model)
            self._log_probs_of = type(model) if found else None

    def lacks_logits(self, model: nn.Module) -> bool:
        """Whether the outputs of a model are probabilities or log-probabilities, as ``output`` says or as their values have shown."""
        return self._reader_of(model).output in ("probs", "log_probs") or self._log_probs_of is type(model)

    def is_task_open(self, model: nn.Module) -> bool:
        """Whether the batches of a model may still determine its task."""
        return self._is_own(model) or (self.infers_task and self._of(model).is_open)

    def look_at_task(
        self, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, is_first: bool = True
    ) -> bool:
        """Check a batch of the model's own data, if no task was given, and return whether it implies another task.

        Until a batch has decided, each batch whose targets may imply a task costs a forward pass on a copy.

        Args:
            model: The model.
            batch: The batch.
            trainer: The Trainer, if there is one.
            is_first: Whether no outputs were read under the default task so far.

        Raises:
            InputError: The batch contradicts the task of an earlier batch, or the default under which earlier ones were read.
        """
        x, target = self.unpack(model, batch)
        if self._is_own(model):
            look = getattr(model, "look_at_task", None)  # an ensemble of LightningModules has its own
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
                if not self.read.can_read(raw):  # a later reader of outputs raises the error
                    return None
                found = self._read(model, raw)
                has_index = self.predict_fn is not None and found.ndim == 3 and found.shape != target.shape
                return found if has_index else found.unsqueeze(0)

            changed = inferred.look(model, outputs, target)
            self._raise_doubt(inferred)
        if changed and not is_first:
            raise self._late_contradiction(model)
        return changed

    def check_inferred_task(self, model: nn.Module, target: Tensor) -> None:
        """Reject targets of the model's own data that contradict those from which the task was inferred.

        Raises:
            InputError: The targets contradict them.
        """
        if not self._is_own(model) and self.infers_task:
            inferred = self._of(model)
            inferred.note(target)
            inferred.review(model)
            self._raise_doubt(inferred)

    def agree_on_task(self, model: nn.Module, trainer: Trainer, *, is_first: bool = True) -> bool:
        """Share the task that the batches of one rank implied, and return whether it differs from this rank's. A collective.

        Raises:
            InputError: The batches of the ranks contradict each other, or the default under which this rank has read some.
        """
        if self._is_own(model) or not self.infers_task:
            return False
        self._inferred = self._of(model)
        changed = self._inferred.agree(model, trainer)
        self._raise_doubt(self._inferred)
        raise_on_all_ranks(self._late_contradiction(model) if changed and not is_first else None, trainer)
        return changed

    @staticmethod
    def _late_contradiction(model: nn.Module) -> InputError:
        return InputError(
            f"The first batches of {type(model).__name__} do not imply the task that later ones do. Pass argument `task`."
        )

    @staticmethod
    def _raise_doubt(inferred: InferredTask) -> None:
        if inferred.contradiction is not None:
            raise InputError(inferred.contradiction)

    def check_default_task(self, model: nn.Module, batch: Any) -> None:
        """Reject reading a model as a classifier if no task was given and the targets of a batch contradict it.

        Raises:
            InputError: The targets contradict it.
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
        """The inferred task of such a model."""
        return self._inferred if self._inferred_of in (None, type(model)) else InferredTask()

    @property
    def inferred_task(self) -> str | None:
        """The name of the inferred task, for a checkpoint. Setting it applies to any model."""
        return self._inferred.name

    @inferred_task.setter
    def inferred_task(self, name: str | None) -> None:
        self._inferred, self._inferred_of = InferredTask(name), None

    def prediction(self, model: nn.Module, outputs: Tensor, *, to_members: bool = True) -> Prediction:
        """The prediction from outputs [Z, B, ...], before any pooled calibration.

        Args:
            model: The model.
            outputs: The outputs of the model.
            to_members: Whether to apply changes to the members, such as a temperature for each.
        """
        if not self._is_own(model):
            return self.task(model).predict(outputs)
        raw: Prediction = model.prediction(outputs)  # type: ignore[operator]  # a Module's attribute is untyped
        if not to_members:
            return raw
        transforms: PredictionTransforms = model.prediction_transforms  # type: ignore[assignment]
        return transforms.apply(model, raw, to_members_only=True)

    def _is_own(self, model: nn.Module) -> bool:
        """Whether the outputs come from a module of this package, which knows their meaning."""
        return self.predict_fn is None and is_uncertainty_module(model)

    def _has_index(self, outputs: Tensor, task: Task, num_rows: int | None) -> bool:
        """Whether ``predict_fn`` returns [Z, B, ...]. If both shapes match the task, the size of the first batch decides.

        Raises:
            InputError: The size of the first batch matches both axes of its outputs.
        """
        with_index, without = outputs.ndim > 1 and _fits(task, outputs), _fits(task, outputs.unsqueeze(0))
        if with_index != without:
            return with_index
        if not with_index:
            return outputs.ndim > 2  # raises later in either case
        first, second = (size == num_rows for size in outputs.shape[:2])
        if first != second:
            self._indexed = second
        elif self._indexed is None and num_rows is None:
            raise InputError(
                f"`predict_fn` returned shape {list(outputs.shape)}, which {describe(task)} can read as [B, ...] or as [Z, B, ...], and "
                "neither the input nor a target shows B. Make `unpack_batch` return the target too."
            )
        elif self._indexed is None and first and num_rows != 1:
            raise InputError(
                f"`predict_fn` returned shape {list(outputs.shape)} for a batch of {num_rows}, which {describe(task)} can read as "
                "[B, ...] or as [Z, B, ...]. Use another batch size."
            )
        return bool(self._indexed)


def _may_show_task(target: Tensor) -> bool:
    """Whether a forward pass could determine the task, because the targets are not clearly those of several classes."""
    if target.is_floating_point() or target.dtype == torch.bool or target.ndim == 2:
        return True
    return target.ndim == 1 and bool(((target == 0) | (target == 1)).all())


def _fits(task: Task, outputs: Tensor) -> bool:
    try:
        task.check_output(outputs, values=False)
    except InputError:
        return False
    return True
