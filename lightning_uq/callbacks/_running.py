"""Running a model correctly inside a hook: what every post-training callback stands on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_uq import batches
from lightning_uq.errors import InputError, UQError
from lightning_uq.functional.precision import upcast
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.calling import call_network
from lightning_uq.networks.output import Output, OutputReader
from lightning_uq.tasks import Classification, Task

UnpackBatch = Callable[[Any], tuple[Any, Tensor | None]]
PredictFn = Callable[[Any, Any], Any]
"""``predict_fn(model, x) -> output``; typed loosely, so that the command line can build what takes one."""


@contextmanager
def evaluating(model: nn.Module, trainer: Trainer | None = None, *, fitting: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients, an isolated random state, silent ``log``; everything is put back at the end.

    Args:
        model: The module whose train/eval modes are set and restored, each submodule's own.
        trainer: The Trainer inside whose hook this runs.
        fitting: For a pass over fitting data. The trainer's stage is set to validating, so that a user's
            ``on_after_batch_transfer`` does not augment, and inference mode is left, since what is fitted outlives it.
    """
    modes = [(module, module.training) for module in model.modules()]
    logs = (
        {name: model.__dict__.get(name) for name in ("log", "log_dict")} if isinstance(model, LightningModule) else {}
    )
    stage = trainer.state.stage if trainer is not None else None
    rng = isolate_rng()
    rng.__enter__()
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled() and not fitting), torch.no_grad():
            model.eval()
            for name in logs:  # a `forward` that logs would do so a second time, under this hook's name
                model.__dict__[name] = _silent
            if trainer is not None and fitting:
                trainer.state.stage = RunningStage.VALIDATING
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
        rng.__exit__(None, None, None)  # isolate_rng restores on a normal exit alone, so it is never told of an error


def _silent(*args: Any, **kwargs: Any) -> None:
    """Stand-in for a module's ``log``."""


def to_device(batch: Any, model: nn.Module, trainer: Trainer | None = None) -> Any:
    """A loader's batch as Lightning hands it to a step: converted by the precision plugin, through the transfer hooks.

    Without a Trainer it goes to the model's device, and takes the dtype of a half- or double-precision model.
    """
    if trainer is not None:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch)
        return trainer.strategy.batch_to_device(batch)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if weight.dtype != torch.float32:
        batch = apply_to_collection(batch, Tensor, lambda t: t.to(weight.dtype) if t.is_floating_point() else t)
    if isinstance(model, LightningModule):
        return model._apply_batch_transfer_handler(model._on_before_batch_transfer(batch), device=weight.device)
    return move_data_to_device(batch, weight.device)


def is_uncertainty_module(model: Any) -> bool:
    """Whether a module is one of ours: f(x, z), whose ``forward`` gives [Z, B, ...]."""
    return isinstance(getattr(model, "network", None), EpistemicNetwork)


class LogitReader:
    """The logits [Z, B, C] that any classifier gives for a batch.

    They come from ``predict_fn`` where there is one, else from the ``forward`` of one of our modules, [Z, B, C], else
    from the model's own ``forward``, [B, C]. Half precision is upcast to float32.

    Args:
        predict_fn: ``predict_fn(model, x)`` gives what ``output`` reads: logits [B, C], or [Z, B, C] for an ensemble.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``; default the module's own, else ``(x, y)``, a bare ``x`` or a
            mapping with ``input``.
        output: What the model (or ``predict_fn``) returns; one of our modules knows that itself.
    """

    def __init__(
        self, predict_fn: PredictFn | None = None, unpack_batch: UnpackBatch | None = None, output: Output = "logits"
    ) -> None:
        for name, value in (("predict_fn", predict_fn), ("unpack_batch", unpack_batch)):
            if value is not None and not callable(value):
                raise InputError(f"Expected argument `{name}` to be a function, but got {type(value).__name__}.")
        self.predict_fn = predict_fn
        self.unpack_batch = unpack_batch
        self.read = OutputReader(output)

    def task(self, model: nn.Module) -> Task:
        """What the outputs mean: a module of ours says it, and any other is a classifier."""
        if self.predict_fn is None and is_uncertainty_module(model):
            own: Task = model.task  # type: ignore[assignment]  # a Module's attribute is untyped
            return own
        return Classification()

    def unpack(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
        """Input and target of a batch."""
        own = model.unpack_batch if is_uncertainty_module(model) else batches.unpack_batch
        unpack: UnpackBatch = self.unpack_batch or own  # type: ignore[assignment]  # a Module's attribute is untyped
        return unpack(batch)

    def __call__(self, model: nn.Module, batch: Any, trainer: Trainer | None = None, *, check: bool = True) -> Tensor:
        """Logits [Z, B, C] of a batch on the model's device; ``check`` looks at their values too.

        Raises:
            InputError: The output is no classifier's logits; the message names the argument that helps.
        """
        x, _ = self.unpack(model, batch)
        ours = self.predict_fn is None and is_uncertainty_module(model)
        if self.predict_fn is None and not _has_forward(model):
            raise InputError(
                f"{type(model).__name__} has no `forward` to take logits from. Pass argument `predict_fn`, a function "
                "`(model, x) -> logits [B, C]`."
            )
        if trainer is not None:
            # The model alone: under `bf16-true` tensors made in this context are bfloat16.
            with trainer.precision_plugin.forward_context():
                raw = self._run(model, x)
        else:
            raw = self._run(model, x)
        logits = raw if ours and isinstance(raw, Tensor) else self.read(raw)
        if logits.ndim == 2 and not ours:
            logits = logits.unsqueeze(0)
        elif logits.ndim != 3 or (self.predict_fn is None and not ours):
            raise InputError(
                f"Expected logits [B, C] from {type(model).__name__}, but got shape {list(logits.shape)}. Pass argument "
                "`predict_fn`, a function `(model, x)` that returns [B, C], or [Z, B, C] with one row per hypothesis."
            )
        if check and not ours:
            Classification().check_output(logits)
        return upcast(logits)

    def _run(self, model: nn.Module, x: Any) -> Any:
        return call_network(model, x) if self.predict_fn is None else self.predict_fn(model, x)


def _has_forward(model: nn.Module) -> bool:
    inherited = (LightningModule.forward, nn.Module.forward)
    return "forward" in vars(model) or getattr(type(model), "forward", None) not in inherited


def gather_rows(rows: Tensor, trainer: Trainer | None = None) -> Tensor:
    """Every rank's rows [n_r, ...], one rank's after the other's in turn: as :func:`exact_loader` shares them. A collective."""
    if trainer is None or trainer.world_size == 1:
        return rows
    parts = gather_all_tensors(rows)
    turn = [torch.arange(len(part), device=rows.device) * len(parts) + rank for rank, part in enumerate(parts)]
    return torch.cat(parts)[torch.cat(turn).argsort()]


@contextmanager
def together(trainer: Trainer | None = None) -> Iterator[None]:
    """An error in the body on one rank is raised on all of them, with one text. The body must hold no collective."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, trainer)


def raise_together(error: Exception | None, trainer: Trainer | None = None) -> None:
    """Raise the first rank's error on every rank; none where no rank has one. A collective."""
    if trainer is None or trainer.world_size == 1:
        if error is not None:
            raise error
        return
    kind = type(error) if isinstance(error, UQError) else RuntimeError
    text = str(error) if isinstance(error, UQError) else f"{type(error).__name__}: {error}"
    errors: list[tuple[type[Exception], str] | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(errors, None if error is None else (kind, text))
    for first in errors:
        if first is not None:
            raise first[0](first[1]) from error
