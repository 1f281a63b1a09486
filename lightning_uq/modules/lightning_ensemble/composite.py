"""The optimizers and schedulers of several LightningModules as one, for Lightning's automatic optimization."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import LBFGS, Optimizer

from lightning_uq._lightning import (
    check_optimizers_attached,
    check_scheduler_api,
    configure_optimizers,
    configure_schedulers,
)
from lightning_uq.errors import InputError, UnsupportedError

APART = "Train such modules separately and collect them with `EnsembleModule.from_checkpoints`."


class CompositeOptimizer(Optimizer):
    """The members' optimizers as one, which Lightning steps, saves and restores.

    Args:
        optimizers: One per member; each keeps its parameter groups.

    Example:
        >>> import torch
        >>> members = [torch.nn.Linear(1, 1) for _ in range(2)]
        >>> composite = CompositeOptimizer([torch.optim.SGD(m.parameters(), lr=0.1 * (i + 1)) for i, m in enumerate(members)])
        >>> [group["lr"] for group in composite.param_groups]
        [0.1, 0.2]
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # The base class would build its own parameter groups and state, beside the members'.
        self.optimizers = list(optimizers)
        self.defaults: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the base class would restore its own groups

    @property
    def param_groups(self) -> list["MemberGroup"]:  # type: ignore[override]  # an attribute in the base class
        """The members' own groups in order, under names that include the member's number."""
        groups = []
        for i, optimizer in enumerate(self.optimizers):
            for j, group in enumerate(optimizer.param_groups, 1):
                own = f"/{group.get('name', f'pg{j}')}" if len(optimizer.param_groups) > 1 else ""
                groups.append(MemberGroup(group, f"member_{i}{own}"))
        return groups

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]  # an attribute in the base class
        """The members' states, merged."""
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        step_member: Callable[[int], None] | None = None,
    ) -> Any:
        """Run the closure once, then step every member's optimizer, with ``step_member(i)`` if given."""
        loss = None if closure is None else closure()
        for i, optimizer in enumerate(self.optimizers):
            optimizer.step() if step_member is None else step_member(i)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the members' gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The members' state dicts, in order."""
        return {"members": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`.

        Raises:
            InputError: The state comes from another kind of optimizer, or from another number of members.
        """
        states = state_dict.get("members", [])
        if len(states) != len(self.optimizers):
            raise InputError(
                f"The checkpoint holds the optimizer states of {len(states)} LightningModules, but the ensemble has "
                f"{len(self.optimizers)}: an ensemble of another kind or size wrote it."
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise an error: each group belongs to a member's optimizer."""
        raise UnsupportedError("Add parameter groups to a member's own optimizer, `CompositeOptimizer.optimizers[i]`.")

    def __repr__(self) -> str:
        return f"CompositeOptimizer({self.optimizers!r})"


class MemberGroup(MutableMapping[str, Any]):
    """A member's parameter group under a unique ``name``, which ``LearningRateMonitor`` needs. All other keys are the group's own."""

    def __init__(self, group: dict[str, Any], name: str) -> None:
        self.group = group
        self.name = name

    def __getitem__(self, key: str) -> Any:
        return self.name if key == "name" else self.group[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.group[key] = value

    def __delitem__(self, key: str) -> None:
        del self.group[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.group, "name": self.name})

    def __len__(self) -> int:
        return len(self.group | {"name": self.name})


class MemberOptimizer(LightningOptimizer):
    """A member's optimizer as Lightning would pass it to the member.

    It only steps: Lightning's wrapper would run the hooks before a step once more, for all members.

    Args:
        optimizer: The member's optimizer.
        scaler: The gradient scaler that the step uses, or None.
    """

    def __init__(self, optimizer: Optimizer, scaler: Any) -> None:
        super().__init__(optimizer)
        self._scaler = scaler

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the closure and step. With a scaler, skip the step if a gradient is infinite."""
        if self._scaler is None:
            return self.optimizer.step(closure, **kwargs)
        if closure is not None:
            closure()
        return self._scaler.step(self.optimizer, **kwargs)


def configure_member(member: LightningModule, name: str, returned: Any) -> tuple[Optimizer, list[LRSchedulerConfig]]:
    """Read and check the result of a member's ``configure_optimizers``, as Lightning does for one module.

    Args:
        member: The member.
        name: The member's prefix, ``"member_3"``. Monitors and scheduler names get it, like the member's logged values.
        returned: The result of its ``configure_optimizers``.

    Raises:
        InputError: The result is not one optimizer that steps without a closure.
    """
    optimizers, schedulers, monitor = ([], [], None) if returned is None else configure_optimizers(returned)
    if len(optimizers) != 1:
        raise InputError(
            f"`configure_optimizers` of {type(member).__name__} must return one optimizer, but it returned {len(optimizers)}. "
            f"{APART}"
        )
    if isinstance(optimizers[0], LBFGS):
        raise InputError(
            f"{type(member).__name__} must use an optimizer that evaluates the loss once per step, but LBFGS evaluates it several "
            f"times. {APART}"
        )
    configs = configure_schedulers(schedulers, monitor)
    check_optimizers_attached(optimizers, configs)
    check_scheduler_api(configs, member)
    for config in configs:
        config.name = f"{name}/{config.name or f'lr-{type(optimizers[0]).__name__}'}"
        if config.monitor is not None:
            config.monitor = f"{name}/{config.monitor}"
    return optimizers[0], configs
