"""The logits that any classifier gives for a batch."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq import batches
from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.networks.calling import call_network
from lightning_uq.networks.output import Output, OutputReader
from lightning_uq.predictions import Prediction
from lightning_uq.running.transforms import PredictionTransforms, transforms_of
from lightning_uq.tasks import Classification, Task

UnpackBatch = Callable[[Any], tuple[Any, Tensor | None]]
PredictFn = Callable[[Any, Any], Any]
"""``predict_fn(model, x) -> output``; typed loosely, so that the command line can build what takes one."""


def is_uncertainty_module(model: object) -> bool:
    """Whether a module is an ``UncertaintyModule``, whose ``forward`` gives [Z, B, ...].

    A user's own module may hold an ``EpistemicNetwork`` too, but its ``forward`` and its batches are its own.
    """
    return transforms_of(model) is not None


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
                raise InputError(f"`{name}` must be a function, but its type is {type(value).__name__}.")
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
                f"{type(model).__name__} must return logits [B, C], but it returned shape {list(logits.shape)}. Pass argument "
                "`predict_fn`, a function `(model, x)` that returns [B, C], or [Z, B, C] with one row per hypothesis."
            )
        if check and not ours:
            Classification().check_output(logits)
        return upcast(logits)

    def prediction(self, model: nn.Module, logits: Tensor) -> Prediction:
        """The prediction whose scores are taken: changes inside the members are in, a pooled calibration is not."""
        if self.predict_fn is None and is_uncertainty_module(model):
            raw: Prediction = model.prediction(logits)  # type: ignore[operator]  # a Module's attribute is untyped
            transforms: PredictionTransforms = model.prediction_transforms  # type: ignore[assignment]
            return transforms.apply(model, raw, to_members_only=True)
        return self.task(model).predict(logits)

    def _run(self, model: nn.Module, x: Any) -> Any:
        return call_network(model, x) if self.predict_fn is None else self.predict_fn(model, x)


def _has_forward(model: nn.Module) -> bool:
    inherited = (LightningModule.forward, nn.Module.forward)
    return "forward" in vars(model) or getattr(type(model), "forward", None) not in inherited
