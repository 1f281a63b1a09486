"""The training and evaluation steps of LightningModules as members."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_uq._lightning import trainer_of
from lightning_uq.batches import own_batch
from lightning_uq.errors import InputError
from lightning_uq.modules.lightning_ensemble.checks import layout_problem, overrides
from lightning_uq.modules.lightning_ensemble.part import Part
from lightning_uq.running.evaluation import is_in_own_pass
from lightning_uq.running.step_input import StepInput

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class MemberSteps(Part):
    """The members' steps for the current batch.

    Attributes:
        outputs: The result of each member's step, as Lightning would pass it to ``on_*_batch_end``.
        losses: Each member's loss divided by the number of accumulated batches; None if it skipped the step.
    """

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self.outputs: list[Any] = []
        self.losses: list[Tensor | None] = []
        self._batches: dict[int, Any] = {}
        self._step_input = StepInput()
        self._evaluated: tuple[Any, int] | None = None  # the batch before the transfer hooks, and the loader's number

    def forget(self) -> None:
        """Drop the results for the last batch."""
        self.outputs, self.losses, self._batches = [], [], {}

    def end(self) -> None:
        """Drop the results for a batch, and the batch itself."""
        self.forget()
        self._evaluated = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Run every member's training step. The sum of their losses gives each its own gradient."""
        self.outputs, self.losses = [], []
        accumulated = self.members.ensemble.trainer.accumulate_grad_batches
        losses = []
        for i in range(len(self.members.modules)):
            with self.members.using_stream(i) as member:
                output = self._training_output(member, self.batch_of(i, batch), batch_idx)
            self._release(i, "on_train_batch_end")
            loss, extra = _loss_and_rest(output, member)
            if loss is None:
                self.losses.append(None)
                self.outputs.append({})
            else:
                losses.append(loss)
                self.losses.append(loss / accumulated)
                self.outputs.append({"loss": loss.detach() / accumulated, **extra})
        self.members.logs.log_means()
        return sum(losses[1:], losses[0]) if losses else None

    def evaluation_step(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run ``validation_step`` or ``test_step`` of every member that has it; ``stage`` is ``"val"`` or ``"test"``."""
        step = "validation_step" if stage == "val" else "test_step"
        self.outputs = [None] * len(self.members.modules)
        for i, member in enumerate(self.members.modules):
            if overrides(member, step):
                with self.members.using_stream(i):
                    own = self.batch_of(i, batch)
                    if i == 0:
                        self._watch(member, own)
                    self.outputs[i] = call_step(getattr(member, step), own, batch_idx, dataloader_idx)
                if i == 0:
                    self._step_input.end(member, step)
                self._release(i, f"on_{step.removesuffix('_step')}_batch_end")
        self.members.logs.log_means()

    def _watch(self, member: LightningModule, batch: Any) -> None:
        """Start to record whether a member's step uses the input that the ensemble's metrics read from the batch."""
        ensemble = self.members.ensemble
        if ensemble.network.read_output.predict_fn is None and layout_problem(ensemble, batch) is None:
            self._step_input.start(member, *ensemble.unpack_batch(batch))

    def _training_output(self, member: LightningModule, batch: Any, batch_idx: int) -> Any:
        """The result of a member's ``training_step``. With adversarial training, its loss is averaged with the adversarial one."""
        ensemble = self.members.ensemble
        if ensemble.adversary is None:
            return call_step(member.training_step, batch, batch_idx)
        x, _ = ensemble.unpack_batch(batch)
        outputs: list[Any] = []

        def loss(inputs: Tensor) -> Tensor:
            outputs.append(call_step(member.training_step, _with_input(batch, x, inputs), batch_idx))
            value = outputs[-1]["loss"] if isinstance(outputs[-1], Mapping) else outputs[-1]
            if not isinstance(value, Tensor):
                raise InputError(
                    f"Adversarial training needs a loss for every batch, but `training_step` returned {value!r}."
                )
            return value

        value = ensemble.adversary.loss(
            loss,
            x,
            list(member.parameters()),
            scaler=ensemble.gradient_scaler,
            second_pass=self.members.logs.quiet(member),
        )
        return {**outputs[0], "loss": value} if isinstance(outputs[0], Mapping) else value

    # ------------------------------------------------------------------ batches

    def batch_of(self, i: int, batch: Any) -> Any:
        """Member i's own copy of the current batch, which it may change in place.

        In training, validation and test, the member's own ``on_after_batch_transfer`` is applied to it. A single member that trains
        is the only user of the batch, and gets the batch itself. In evaluation the ensemble's metrics use the batch too.
        """
        if i not in self._batches:
            member = self.members.modules[i]
            if self.members.ensemble.trainer.training:
                own = batch if len(self.members.modules) == 1 else own_batch(batch)
                self._batches[i] = member.on_after_batch_transfer(own, 0) if self._transfers_by_member() else own
            elif i and self._evaluated is not None:
                raw, dataloader_idx = self._evaluated
                self._batches[i] = member.on_after_batch_transfer(own_batch(raw), dataloader_idx)
            else:
                self._batches[i] = own_batch(batch)
        return self._batches[i]

    def _release(self, i: int, last_hook: str) -> None:
        """Drop member i's batch after its step, unless a later hook of the member gets it."""
        if not overrides(self.members.modules[i], last_hook):
            del self._batches[i]

    def after_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The ensemble's ``on_after_batch_transfer``. Outside of training, it applies the first member's.

        The ensemble's metrics, its predictions and the callbacks read one input. In validation and test, the other members get
        the batch as it was before.
        """
        ensemble, first = self.members.ensemble, self.members.modules[0]
        trainer = trainer_of(ensemble)
        if trainer is not None and trainer.training:
            return batch
        if trainer is None or trainer.predicting or is_in_own_pass(ensemble):
            return first.on_after_batch_transfer(batch, dataloader_idx)
        self._evaluated = own_batch(batch), dataloader_idx
        with self.members.using_stream(0):
            return first.on_after_batch_transfer(batch, dataloader_idx)

    def _transfers_by_member(self) -> bool:
        datamodule = getattr(self.members.ensemble.trainer, "datamodule", None)
        by_datamodule = datamodule is not None and is_overridden("on_after_batch_transfer", datamodule)
        return not by_datamodule and overrides(self.members.modules[0], "on_after_batch_transfer")


def call_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """Call a step with as many of ``(batch, batch_idx, dataloader_idx)`` as it takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return step(*arguments)
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return step(*arguments[: len(taken)])


def _loss_and_rest(output: Any, member: LightningModule) -> tuple[Tensor | None, dict[str, Any]]:
    """The loss that a ``training_step`` returned, and the rest of its result."""
    if not isinstance(output, Mapping):
        return output, {}
    if output.get("loss") is None:
        raise InputError(
            f"The mapping that `training_step` of {type(member).__name__} returns must hold `loss`, but its keys are "
            f"{sorted(map(str, output))}."
        )
    return output["loss"], {key: value for key, value in output.items() if key != "loss"}


def _with_input(batch: Any, old: Any, new: Tensor) -> Any:
    """The batch with its input replaced, in the same place.

    Raises:
        InputError: The batch does not hold that very object.
    """
    if batch is old:
        return new
    values = (
        list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, list | tuple) else []
    )
    if not any(value is old for value in values):
        raise InputError(
            f"Adversarial training replaces the input inside a batch, but the {type(batch).__name__} does not hold what `unpack_batch` "
            "returns. Let `unpack_batch` return the tensor itself, as it lies in the batch."
        )
    changed = [new if value is old else value for value in values]
    if isinstance(batch, Mapping):
        return dict(zip(batch, changed, strict=True))
    return type(batch)(*changed) if hasattr(batch, "_fields") else type(batch)(changed)
