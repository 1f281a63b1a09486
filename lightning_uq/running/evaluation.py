"""One pass over a model inside a hook: in evaluation mode, on its device, and with everything restored afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_uq._lightning import before_transfer, transferred
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.sharding import gathered
from lightning_uq.running.unchanged import unchanged


@contextmanager
def evaluating(model: nn.Module, trainer: Trainer | None = None, *, fitting: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients, an isolated random state, and a silent ``log``; everything is restored at the end.

    Args:
        model: The module whose train/eval modes are set and restored, for each submodule.
        trainer: The Trainer inside whose hook this runs.
        fitting: For a pass over fitting data. The trainer's stage is set to validating, so that a user's
            ``on_after_batch_transfer`` does not augment. Inference mode is off, since fitted tensors outlive the pass. The parameters of a
            sharded model are gathered, since ranks may have different numbers of batches. Buffers and attributes that ``forward`` changes
            are restored too, so that a training is the same with and without the pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    logs = (
        {name: model.__dict__.get(name) for name in ("log", "log_dict")} if is_instance(model, LightningModule) else {}
    )
    stage = trainer.state.stage if trainer is not None else None
    # Before CUDA is initialized no model is on it, and asking whether there is a device takes longer than a small network.
    rng = isolate_rng(include_cuda=torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    rng.__enter__()
    try:
        with (
            torch.inference_mode(torch.is_inference_mode_enabled() and not fitting),
            torch.no_grad(),
            gathered(model) if fitting else nullcontext(),
        ):
            model.eval()
            for name in logs:  # a `forward` that logs would log again, under this hook's name
                model.__dict__[name] = _silent
            if trainer is not None and fitting:
                trainer.state.stage = RunningStage.VALIDATING
            with unchanged(model) if fitting else nullcontext():
                yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, own in logs.items():
            if own is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = own
        if trainer is not None:
            trainer.state.stage = stage
        rng.__exit__(None, None, None)  # hides errors from isolate_rng, which restores only on a normal exit


def is_in_own_pass(model: LightningModule) -> bool:
    """Whether a LightningModule runs inside :func:`evaluating` now, rather than in Lightning's own loop."""
    return model.__dict__.get("log") is _silent


def _silent(*args: Any, **kwargs: Any) -> None:
    """Replaces a module's ``log``."""


def to_device(batch: Any, model: nn.Module, trainer: Trainer | None = None) -> Any:
    """A loader's batch as Lightning passes it to a step: converted by the precision plugin and the transfer hooks.

    Without a Trainer, it moves to the model's device, and takes the dtype of a half- or double-precision model.
    """
    if trainer is not None:
        batch = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(before_transfer(trainer.lightning_module, batch))
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if weight.dtype != torch.float32:
        batch = apply_to_collection(batch, Tensor, lambda t: t.to(weight.dtype) if t.is_floating_point() else t)
    if is_instance(model, LightningModule):
        return transferred(model, batch, weight.device)
    return move_data_to_device(batch, weight.device)
