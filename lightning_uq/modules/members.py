"""LightningModules as members of an ensemble, unmodified: each takes the steps that it would take alone.

One composite optimizer steps the members' own under automatic optimization, so that ``global_step``, accumulation,
clipping, precision plugins and DDP stay Lightning's. What a member asks of its Trainer (logging, optimizers, schedulers,
hooks) is answered for that member.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.modules.member_optimization import MemberOptimization, check_member, maps_one_input, overrides
from lightning_uq.networks._calling import takes_by_name
from lightning_uq.running.streams import RandomStream, from_plain, to_plain
from lightning_uq.tasks import Task, describe

# What the first member answers for all: where the data come from, and what happens to a batch before the device.
_ANSWERED_BY_FIRST = (
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "configure_callbacks",
)
_STAGES = ("train", "validation", "test", "predict")
# What every member hears in its turn.
_HEARD_BY_ALL = (
    *(f"on_{stage}_{when}" for stage in ("fit", *_STAGES) for when in ("start", "end")),
    *(f"on_{stage}_epoch_{when}" for stage in _STAGES for when in ("start", "end")),
    *(f"on_{stage}_batch_{when}" for stage in _STAGES for when in ("start", "end")),
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


class MemberHooks(MemberOptimization):
    """A LightningModule around members: what it does for those that are LightningModules themselves.

    A subclass hands its members to :meth:`adopt`, and calls :meth:`training_steps` and :meth:`evaluation_steps`. As long as
    nothing is adopted, all of this is Lightning's default.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outputs: list[Any] = []
        self._losses: list[Tensor | None] = []

    def adopt(self, members: Sequence[LightningModule], streams: Sequence[RandomStream]) -> None:
        """Take the members in, each with its random stream."""
        self.lightning_members = tuple(members)
        self.streams = list(streams)
        if not all(member.strict_loading for member in members):
            self.strict_loading = False
        # As attributes of this instance, so that Lightning sees them overridden where the member's class overrides them.
        first = members[0]
        self.__dict__.update({name: getattr(first, name) for name in _ANSWERED_BY_FIRST if overrides(first, name)})
        if overrides(first, "on_after_batch_transfer"):
            self.__dict__["on_after_batch_transfer"] = self._after_transfer
        if overrides(first, "configure_model"):
            self.__dict__["configure_model"] = partial(self.each_member, "configure_model")

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one run stays behind: the Trainer's optimizers, and losses with their graphs.
        of_a_run: dict[str, Any] = {"_composite": None, "_schedulers": [], "_outputs": [], "_losses": [], "_logged": {}}
        return {**super().__getstate__(), **of_a_run}

    # ------------------------------------------------------------------ hooks

    def setup(self, stage: str) -> None:
        """Give the members what they ask of their Trainer.

        Raises:
            InputError: A member optimizes by hand, or otherwise takes the training loop over, and a fit begins.
        """
        super().setup(stage)
        for i, member in enumerate(self.lightning_members):
            if stage == "fit":
                check_member(member)
            member.trainer = self.trainer
            # Bound methods and partials, no lambdas: a spawned process gets them by pickle.
            member.__dict__.update(
                log=partial(self.log_for, i),
                optimizers=partial(self.optimizers_of, i),
                lr_schedulers=partial(self.schedulers_of, i),
            )
        self.each_member("setup", stage)

    def teardown(self, stage: str) -> None:
        """Leave the members as they came."""
        self.each_member("teardown", stage)
        for member in self.lightning_members:
            for name in ("log", "optimizers", "lr_schedulers"):
                member.__dict__.pop(name, None)
        super().teardown(stage)

    def each_member(self, hook: str, *args: Any, own: Sequence[Any] | None = None) -> list[Any]:
        """Call a hook of every member whose class has one; ``own[i]`` takes the place of member i's first argument."""
        results = []
        for i, member in enumerate(self.lightning_members):
            skipped = hook == "on_before_backward" and own is not None and own[i] is None
            if overrides(member, hook) and not skipped:
                with self.speaking(i):
                    results.append(getattr(member, hook)(*(args if own is None else (own[i], *args[1:]))))
        self.log_means()
        return results

    # ------------------------------------------------------------------ steps

    def training_steps(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Every member's training step; returns the sum of their losses, so that each gets its own gradient."""
        self._outputs, self._losses = [], []
        for i, member in enumerate(self.lightning_members):
            with self.speaking(i):
                mine = member.on_after_batch_transfer(batch, 0) if self._transfers_by_member() else batch
                output = self.member_training_step(member, mine, batch_idx)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None and isinstance(output, Mapping):
                raise InputError(
                    f"Expected the mapping that `training_step` of {type(member).__name__} returns to hold `loss`, but got "
                    f"keys {sorted(map(str, output))}."
                )
            self._losses.append(loss)
            extra = (
                {key: value for key, value in output.items() if key != "loss"} if isinstance(output, Mapping) else {}
            )
            accumulated = self.trainer.accumulate_grad_batches
            self._outputs.append({} if loss is None else {"loss": loss.detach() / accumulated, **extra})
        self.log_means()
        losses = [loss for loss in self._losses if loss is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def member_training_step(self, member: LightningModule, batch: Any, batch_idx: int) -> Any:
        """What one member's ``training_step`` returns; a subclass may add to its loss."""
        return call_step(member.training_step, batch, batch_idx)

    def evaluation_steps(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Every member's ``validation_step`` or ``test_step``, where it has one."""
        self._outputs = [None] * len(self.lightning_members)
        for i, member in enumerate(self.lightning_members):
            if overrides(member, step):
                with self.speaking(i):
                    self._outputs[i] = call_step(getattr(member, step), batch, batch_idx, dataloader_idx)
        self.log_means()

    def _transfers_by_member(self) -> bool:
        datamodule = getattr(self.trainer, "datamodule", None)
        by_datamodule = datamodule is not None and is_overridden("on_after_batch_transfer", datamodule)
        return "on_after_batch_transfer" in self.__dict__ and not by_datamodule

    def _after_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Augmentation on the device: in training every member does its own, in its step.
        return (
            batch if self.trainer.training else self.lightning_members[0].on_after_batch_transfer(batch, dataloader_idx)
        )

    # ------------------------------------------------------------------ checkpoint

    def save_members(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What the members add to a checkpoint: their random streams, and what their own hooks put in."""
        own: list[dict[str, Any]] = [{} for _ in self.lightning_members]
        self._call_with_own_checkpoints("on_save_checkpoint", checkpoint, own)
        return {"members": own, "streams": [None if s.state is None else to_plain(s.state) for s in self.streams]}

    def load_members(self, checkpoint: dict[str, Any], saved: Mapping[str, Any], *, resuming: bool) -> None:
        """The inverse; the streams go on only where a training is resumed."""
        self._call_with_own_checkpoints("on_load_checkpoint", checkpoint, saved["members"])
        if resuming:
            for stream, state in zip(self.streams, saved["streams"], strict=True):
                stream.state = None if state is None else from_plain(state)

    def _call_with_own_checkpoints(self, hook: str, checkpoint: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Show every member a checkpoint of its own, with its weights under their own names."""
        state = checkpoint["state_dict"]
        for i, member in enumerate(self.lightning_members):
            if overrides(member, hook):
                prefix = f"network.members.{i}."
                names = [name for name in state if name.startswith(prefix)]
                mine = {**own[i], "state_dict": {name.removeprefix(prefix): state.pop(name) for name in names}}
                getattr(member, hook)(mine)
                state.update({prefix + name: value for name, value in mine.pop("state_dict").items()})
                own[i] = mine

    def _own_arguments(self, hook: str) -> Sequence[Any] | None:
        """Each member's own first argument of a hook, where it has one."""
        if hook.endswith("_batch_end") and hook != "on_predict_batch_end":
            return self._outputs
        if hook in ("on_before_zero_grad", "on_before_optimizer_step"):
            return self.member_optimizers
        return self._losses if hook == "on_before_backward" else None


def _heard_by_all(name: str) -> Callable[..., Any]:
    def hook(self: MemberHooks, *args: Any) -> Any:
        result = getattr(super(MemberHooks, self), name)(*args)
        if not self.lightning_members:
            return result
        results = self.each_member(name, *args, own=self._own_arguments(name))
        if name.endswith("_batch_end"):
            self._outputs, self._losses = [], []
        # -1 from `on_train_batch_start` skips the rest of an epoch: for all members or for none.
        return -1 if results and all(r == -1 for r in results) else result

    hook.__name__ = hook.__qualname__ = name
    hook.__doc__ = f"Let every member hear ``{name}``."
    return hook


for _name in _HEARD_BY_ALL:
    if _name not in vars(MemberHooks):
        setattr(MemberHooks, _name, _heard_by_all(_name))


def call_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """Call a step with as many of ``(batch, batch_idx, dataloader_idx)`` as it takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return step(*arguments)
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return step(*arguments[: len(taken)])


def misfit_of(member: LightningModule, batch: Any, unpack_batch: Callable[[Any], Any], task: Task) -> str | None:
    """Why metrics of the ensemble cannot score a batch of this member's, or None where they can."""
    try:
        x, y = unpack_batch(batch)
    except InputError:
        return "the batches are no pairs (x, y); override `unpack_batch` to say what they hold"
    by_name = overrides(member, "forward") and takes_by_name(member, x)
    if not by_name and not maps_one_input(member):
        return f"{type(member).__name__}.forward does not map one input to an output"
    if not isinstance(y, Tensor) or not y.ndim:
        return "the batches hold no target"
    misfit = task.accepts(y)
    return None if misfit is None else f"{misfit}, as {describe(task)} expects"
