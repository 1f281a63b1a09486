"""A member's view of the Trainer: the values that it would see if it trained alone."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_uq.lightning_trees import in_tree_of

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class MemberTrainer:
    """The ensemble's Trainer with a member's own model, optimizers and logged values.

    Everything else belongs to the Trainer, and attributes are set on the Trainer. There is one loop: the first member that sets
    ``should_stop`` stops all, and a warning names it when the training ends.

    Args:
        members: The members.
        i: Number of the member.
    """

    _members: "Members"
    _i: int
    _shared: Trainer

    def __init__(self, members: "Members", i: int) -> None:
        vars(self).update(_members=members, _i=i, _shared=members.ensemble.trainer)

    @property
    def model(self) -> LightningModule:
        """The member."""
        return self._members.modules[self._i]

    @property
    def lightning_module(self) -> LightningModule:
        """The member."""
        return self._members.modules[self._i]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The member's optimizer, after it is configured."""
        return self._members.optimization.optimizers[self._i : self._i + 1]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The member's schedulers."""
        return [
            config for configs in self._members.optimization.schedulers[self._i : self._i + 1] for config in configs
        ]

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The Trainer's values, and the member's logged values under their original names."""
        return self._own_names(self._shared.callback_metrics)

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The Trainer's values, and the member's logged values under their original names."""
        return self._own_names(self._shared.logged_metrics)

    def _own_names(self, values: dict[str, Any]) -> dict[str, Any]:
        prefix = f"member_{self._i}/"
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        return {**values, **own}

    @property  # type: ignore[misc]  # makes `isinstance(self.trainer, Trainer)` true, in the member's class tree
    def __class__(self) -> type:
        kind = in_tree_of(self.model, Trainer)
        return type(self._shared) if kind is Trainer else kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "should_stop":
            stopping = self._members.stopping
            (stopping.add if value else stopping.discard)(self._i)
            value = bool(stopping)
        setattr(self._shared, name, value)


class ReleaseOnException(Callback):
    """Restores the members' original state when a run fails: Lightning reports exceptions to callbacks only, not to modules.

    Args:
        members: The members.
    """

    def __init__(self, members: "Members") -> None:
        self._members = members

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove what ``setup`` gave to the members."""
        self._members.release()
