"""Lightning's hooks of an ensemble: members that are LightningModules replace some and receive the others."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

Module = TypeVar("Module", bound=type[LightningModule])

REPLACED = {
    "training_step": "steps",
    "configure_optimizers": "optimization",
    "optimizer_step": "optimization",
    "optimizer_zero_grad": "optimization",
    "configure_gradient_clipping": "optimization",
    "lr_scheduler_step": "optimization",
    "on_validation_model_zero_grad": "optimization",
    "on_validation_model_eval": "modes",
    "on_test_model_eval": "modes",
    "on_predict_model_eval": "modes",
}
"""Hooks that the members replace, each with the part of :class:`Members` that holds the replacement."""

_STAGES = ("train", "validation", "test", "predict")

PASSED_ON = (
    "configure_callbacks",
    "setup",
    *(f"on_{stage}_{when}" for stage in ("fit", *_STAGES) for when in ("start", "end")),
    *(f"on_{stage}_epoch_{when}" for stage in _STAGES for when in ("start", "end")),
    *(f"on_{stage}_batch_{when}" for stage in _STAGES for when in ("start", "end")),
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
"""Hooks that the ensemble runs first, then passes on to every member."""

PASSED_ON_FIRST = ("teardown",)
"""Hooks that are passed on to the members before the ensemble runs its own."""

FROM_FIRST_MEMBER = (
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
)
"""Hooks of the first member that apply to all: data loaders, and the changes to a batch before it reaches the device."""


def with_members(module_class: Module) -> Module:
    """Pass the hooks of an ensemble's class on to its ``members``. If ``members`` is None, the hooks stay the class's own."""
    for name, part in REPLACED.items():
        setattr(module_class, name, _replacement_hook(module_class, name, part))
    for name in PASSED_ON + PASSED_ON_FIRST:
        setattr(module_class, name, _propagating_hook(module_class, name))
    return module_class


def _replacement_hook(module_class: type[LightningModule], name: str, part: str) -> Callable[..., Any]:
    own = _own_hook(module_class, name)

    @functools.wraps(getattr(module_class, name))  # Lightning inspects the signature, and whether a hook is overridden
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.members is None:
            return own(self)(*args, **kwargs)
        return getattr(getattr(self.members, part), name)(*args, **kwargs)

    return hook


def _propagating_hook(module_class: type[LightningModule], name: str) -> Callable[..., Any]:
    own = _own_hook(module_class, name)

    @functools.wraps(getattr(module_class, name))
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.members is None:
            return own(self)(*args, **kwargs)
        if name in PASSED_ON_FIRST:
            self.members.pass_on(name, *args, *kwargs.values())
            return own(self)(*args, **kwargs)
        result = own(self)(*args, **kwargs)
        answer = self.members.pass_on(name, *args, *kwargs.values())
        return result if answer is None else answer

    return hook


def _own_hook(module_class: type[LightningModule], name: str) -> Callable[[Any], Callable[..., Any]]:
    """The hook that the class itself defines, bound to an instance; otherwise the inherited one."""
    defined = vars(module_class).get(name)
    if defined is None:
        return lambda module: getattr(super(module_class, module), name)
    return lambda module: defined.__get__(module)
