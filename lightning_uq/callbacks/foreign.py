"""Replaces the ``predict_step`` of a foreign module during ``trainer.predict`` if a callback has ``attach=True``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.lightning_trees import both
from lightning_uq.networks.calling import has_forward
from lightning_uq.networks.finite import NonFinite
from lightning_uq.predictions import Prediction
from lightning_uq.running.finite import FiniteRows
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.same_reading import difference_of_readings
from lightning_uq.running.transforms import PredictionTransform, observing_all


def check_attachable(model: nn.Module) -> None:
    """Check that Lightning would run a prediction of a module, whose ``predict_step`` a callback with ``attach=True`` replaces.

    Raises:
        InputError: It has neither ``predict_step`` nor ``forward``.
    """
    own = any(getattr(type(model), "predict_step", None) is kind.predict_step for kind in both(LightningModule))
    if own and "predict_step" not in vars(model) and not has_forward(model):
        name = type(model).__name__
        raise InputError(
            f"`attach=True` changes what `trainer.predict` returns, but Lightning refuses to predict with {name}, which has neither `forward` "
            f"nor `predict_step`. Define one of them in {name}, or leave out `attach`."
        )


class _PredictStep:
    """A ``predict_step`` that returns a prediction of this package, changed by all transforms."""

    def __init__(self, model: LightningModule, logits: LogitReader, nonfinite: NonFinite) -> None:
        self.model = model
        self.logits = logits
        self.nonfinite = nonfinite
        self.transforms: list[PredictionTransform] = []
        self.own = model.__dict__.get("predict_step")

    def __call__(self, batch: Any, batch_idx: int = 0, *_: Any, **__: Any) -> Prediction:
        with unwrapped(self.model):  # a `predict_fn` may call it
            return transformed_prediction(
                self.model,
                batch,
                self.logits,
                self.transforms,
                self.nonfinite,
                f"of batch {batch_idx}",
                self.model.trainer,
            )


def transformed_prediction(
    model: nn.Module,
    batch: Any,
    logits: LogitReader,
    transforms: Sequence[PredictionTransform],
    nonfinite: NonFinite = "error",
    where: str = "",
    trainer: Trainer | None = None,
    *,
    to_members: bool = True,
) -> Prediction:
    """The prediction from a batch's outputs, changed by all transforms.

    With ``to_members``, the transforms attached to a module of this package that change its members are applied too.

    Raises:
        InputError: The batch is a loader.
        NotFiniteError: With ``nonfinite="error"``, the input or the outputs hold NaN or infinity.
    """
    if isinstance(batch, DataLoader):
        raise InputError(
            "`x` must be inputs or one batch, but it is a DataLoader. Call `predict` on each of its batches, or use `trainer.predict` with `attach=True`."
        )
    x, _target = logits.unpack(model, batch)
    rows = FiniteRows(x, nonfinite, where)
    with observing_all(transforms, model, x) as change:
        outputs = logits(model, batch, trainer)
        outputs = rows.outputs(outputs, logits.task(model))
        prediction = logits.prediction(model, outputs, to_members=to_members)
    return rows.prediction(change(prediction))


def check_reading(
    model: nn.Module, first: tuple[LogitReader, NonFinite], second: tuple[LogitReader, NonFinite]
) -> None:
    """Reject two callbacks with ``attach=True`` that read a foreign module differently, since one prediction is made of both."""
    difference = difference_of_readings(first[0], second[0]) or ("nonfinite" if first[1] != second[1] else None)
    if difference is not None:
        raise InputError(
            f"The callbacks with `attach=True` build predictions of {type(model).__name__} together, but their `{difference}` differs. Pass the "
            f"same `{difference}` to each, or `attach=True` to one of them only."
        )


def wrap_predict_step(
    model: LightningModule, logits: LogitReader, transform: PredictionTransform | None, nonfinite: NonFinite = "error"
) -> None:
    """Make ``predict_step`` return predictions of this package, with one more transform, until :func:`unwrap_predict_step`."""
    step = model.__dict__.get("predict_step")
    if not isinstance(step, _PredictStep):
        step = _PredictStep(model, logits, nonfinite)
        model.__dict__["predict_step"] = step
    else:
        check_reading(model, (step.logits, step.nonfinite), (logits, nonfinite))
    if transform is not None:
        others = [one for one in step.transforms if one.kind != transform.kind]
        if len(others) < len(step.transforms):
            report_guess(
                f"Predictions of {type(model).__name__} carry only one {transform.kind}, that of the last of several callbacks with `attach=True`.",
                model,
            )
        step.transforms = [*others, transform]


def unwrap_predict_step(model: nn.Module) -> None:
    """Restore the module's own ``predict_step``."""
    step = model.__dict__.get("predict_step")
    if isinstance(step, _PredictStep):
        del model.__dict__["predict_step"]
        if step.own is not None:
            model.__dict__["predict_step"] = step.own


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """The module with its own ``predict_step`` during a fit or one call."""
    step = model.__dict__.get("predict_step")
    unwrap_predict_step(model)
    try:
        yield
    finally:
        if isinstance(step, _PredictStep):
            model.__dict__["predict_step"] = step
