"""A member's view of the Trainer: what it would see if it trained alone."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_uq.lightning_trees import in_tree_of

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class MemberTrainer:
    """The ensemble's Trainer, whose model, optimizers and logged values are a member's own.

    Everything else is the Trainer's, and attributes are set on it. It has one loop: the first member that sets
    ``should_stop`` stops all, and a warning names it when the training ends.

    Args:
        members: The members.
        i: The member whose view it is.
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
        """The member's optimizer, once it is configured."""
        return self._members.optimization.optimizers[self._i : self._i + 1]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The member's schedulers."""
        return [
            config for configs in self._members.optimization.schedulers[self._i : self._i + 1] for config in configs
        ]

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The Trainer's values, with those that the member logged under the names that it used."""
        return self._own_names(self._shared.callback_metrics)

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The Trainer's values, with those that the member logged under the names that it used."""
        return self._own_names(self._shared.logged_metrics)

    def _own_names(self, values: dict[str, Any]) -> dict[str, Any]:
        prefix = f"member_{self._i}/"
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        return {**values, **own}

    @property  # type: ignore[misc]  # so that `isinstance(self.trainer, Trainer)` holds, in the member's tree
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
    """Leaves the members as they came when a run fails: Lightning tells callbacks of an exception, but no module.

    Args:
        members: The members.
    """

    def __init__(self, members: "Members") -> None:
        self._members = members

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take back what ``setup`` gave to the members."""
        self._members.release()
