"""The base of callbacks that calibrate a classifier after training on held-out data."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.callbacks.logged_metrics import LoggedMetrics, When, log_fitted
from lightning_uq.callbacks.post_training import PostTrainingCallback
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.predictions import CategoricalPrediction, Prediction
from lightning_uq.running.classes import CalibrationReader, FittingRows, check_calibration, check_targets
from lightning_uq.running.logits import is_uncertainty_module
from lightning_uq.running.ranks import raising_on_all_ranks
from lightning_uq.running.row_sample import MAX_ROWS, RowSample
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task


class Calibration(PostTrainingCallback):
    """Fits a calibration to held-out logits, gathered from all ranks, and attaches it to predictions.

    A test logs the metrics that the calibration changes, for any module: ``uq/test_nll``, ``uq/test_ece`` and ``uq/test_brier``,
    and each with the suffix ``_calibrated``. This costs one more forward pass per test batch, in evaluation mode and with an
    isolated random state. At the end of the training, :attr:`fitted_numbers` are logged under ``uq/``.

    Predictions of this package's modules are calibrated from the fit on, so ``test_nll`` and ``test_ece`` are the calibrated
    values. ``module(x)`` and the losses do not change. Predictions of a foreign module do not change, unless
    ``attach=True`` replaces them.

    Args:
        max_rows: The largest number of rows to fit; None fits all. If there are more, as with the pixels of a segmentation,
            a random sample of this size is fitted. It is the same in every run and on any number of ranks.
        fitting: Arguments of :class:`FittingCallback`: ``dataloader``, ``weights``, ``name`` and others. By default, the
                validation loader is fitted; there must be exactly one.

    Raises:
        InputError: An argument is invalid.
    """

    tensor_name: ClassVar[str]
    """Name of the fitted tensor."""

    needs_classes: ClassVar[bool] = False
    """Whether each label is one of several classes, rather than on or off."""

    recalibrates = True
    can_continue = True

    of_members = False
    """Whether the calibration acts on each member, rather than on the log of the mean probabilities."""

    def __init__(self, *, max_rows: int | None = MAX_ROWS, **fitting: Any) -> None:
        super().__init__(**fitting)
        RowSample(max_rows)
        self.max_rows = max_rows

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        return {**super().settings, "max_rows": self.max_rows}

    def fit_logits(self, logits: Tensor, labels: Tensor) -> "Calibration":
        """Fit logits [N, C] or [Z, N, C] with labels [N] from memory, and return the callback."""
        self._set({**self.fit_members(logits if logits.ndim > 2 else logits.unsqueeze(0), labels)}, None)
        return self

    @abstractmethod
    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The fitted tensors, from logits [Z, N, C] and labels [N]; Z is the number of members, or 1 if pooled."""

    def transform(self) -> PredictionTransform:
        """The calibration as a transform that adds the fitted tensor to predictions."""
        return FieldTransform(self.tensor_name, self._get())

    def calibrate(self, prediction: Prediction) -> Prediction:
        """The calibrated prediction."""
        return self.transform().apply(prediction)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a second calibration of the same predictions, which can carry only one."""
        super().setup(trainer, pl_module, stage)
        ours = is_uncertainty_module(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Calibration) and (ours or c.attach)]
        if len(others) > 1:
            raise InputError(
                f"Predictions of {type(pl_module).__name__} can carry one calibration, but the Trainer has "
                f"{' and '.join(type(c).__name__ for c in others)}. Keep one of them."
            )

    # ------------------------------------------------------------------ test metrics

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the metrics of a test."""
        who: str = type(self).__name__
        self._tested = LoggedMetrics(
            self.logits, self._before_and_after, _calibration_metrics, who, ("", "_calibrated")
        )

    def _before_and_after(
        self, model: nn.Module, batch: Any, trainer: Trainer, check: bool
    ) -> tuple[Tensor, dict[When, Prediction]]:
        """The batch's prediction before and after the calibration."""
        outputs = self.logits(model, batch, trainer, check=check)
        raw = self.logits.prediction(model, outputs, to_members=False)
        return outputs, {"": raw, "_calibrated": self.calibrate(raw)}

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Verify the weights at the first batch, and keep the batch."""
        super().on_test_batch_start(trainer, pl_module, batch)
        self._tested.keep(batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch that was just tested."""
        super().on_test_batch_end(trainer, pl_module)
        self._tested.update(trainer, pl_module, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics before and after the calibration."""
        super().on_test_epoch_end(trainer, pl_module)
        self._tested.log(trainer, pl_module, self._prefix(trainer))

    def _prefix(self, trainer: Trainer) -> str:
        """``uq/``, followed by the callback's name if the Trainer has several calibrations of a foreign module."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        several = sum(isinstance(one, Calibration) for one in callbacks) > 1
        return f"uq/{self.name or type(self).__name__}/" if several else "uq/"

    # ------------------------------------------------------------------ fitting

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reject a task without classes."""
        check_calibration(self.logits.task(pl_module), type(self).__name__, self.needs_classes)
        super().on_fit_start(trainer, pl_module)

    def fits_targets(self, model: nn.Module) -> bool:
        """True: a calibration is fitted to labels."""
        return True

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Check that the task accepts every label."""
        check_targets(self.logits, model, target, outputs, f"{type(self).__name__}'s fitting data")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, and log the fitted numbers to the Trainer's loggers and ``callback_metrics``."""
        super().on_train_end(trainer, pl_module)
        log_fitted(trainer, self._prefix(trainer), self.fitted_numbers)

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The fit as numbers: ``fit_nll`` and ``fit_nll_calibrated`` on the fitting rows, and ``temperature`` if there is one.

        Several temperatures are named ``temperature/0``, ``temperature/1``, and so on. After a fit of logits from memory, there is no ``fit_nll``.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        self._get()
        return {name: float(value) for name, value in (self._tensors or {}).items() if name.startswith("fit_nll")}

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Check that the batch holds labels and that the model returns logits."""
        self._reader(model).add(model, batch, trainer)

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Fit the logits of all rows of all ranks, or a sample of them, in float64. A pooled fit does not keep the members."""
        reader, reading = self._reader(model), self.reading(model, loader, trainer)
        with raising_on_all_ranks(trainer):
            for batch in reading.batches(reader, without=("reader",)):
                reader.add(model, batch, trainer, lambda num: (reading.numbers(num), None))
        return self.fit_read(reader, trainer)

    def fit_read(self, reader: CalibrationReader, trainer: Trainer | None) -> dict[str, Any]:
        """The fitted tensors and the NLLs, from the rows read on all ranks. A collective."""
        rows = reader.gather(trainer)
        tensors = self.fit_rows(rows)
        nlls = torch.zeros(2, dtype=torch.float64)
        for part in rows.parts():
            raw = CategoricalPrediction(part.logits)
            both = (raw, self.calibrated_rows(raw, part, tensors))
            nlls -= torch.stack([one.log_prob(part.labels).sum() for one in both])
        nlls /= len(rows.labels)
        return {**tensors, "fit_nll": nlls[0], "fit_nll_calibrated": nlls[1]}

    def calibrated_rows(
        self, prediction: CategoricalPrediction, rows: FittingRows, tensors: dict[str, Tensor]
    ) -> CategoricalPrediction:
        """The fitting rows after a calibration with newly fitted tensors."""
        return prediction.replace(**{self.tensor_name: tensors[self.tensor_name]})

    def fit_rows(self, rows: FittingRows) -> dict[str, Tensor]:
        """The fitted tensors, from the rows of all ranks."""
        return self.fit_members(rows.logits, rows.labels)

    def _reader(self, model: nn.Module) -> CalibrationReader:
        """A reader of the logits that the calibration acts on."""
        if self.logits.predict_fn is not None and is_uncertainty_module(model):
            raise InputError(
                f"{type(self).__name__} calibrates the predictions that {type(model).__name__} makes itself, so fitting the output "
                "of `predict_fn` would not calibrate them. Leave argument `predict_fn` out."
            )
        who = type(self).__name__
        check_calibration(self.logits.task(model), who, self.needs_classes)
        return self.new_reader(who, f"{who}'s fitting data")

    def new_reader(self, who: str, where: str) -> CalibrationReader:
        """A reader of the fitting rows; ``who`` and ``where`` are for error messages."""
        return CalibrationReader(self.logits, who, where, of_members=self.of_members, max_rows=self.max_rows)

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Check that the state is one of this kind of calibration.

        Raises:
                InputError: The fitted tensor is missing.
        """
        if tensors is not None and not isinstance(tensors.get(self.tensor_name), Tensor):
            raise InputError(
                f"The fitted state of {type(self).__name__} needs the tensor `{self.tensor_name}`, but it holds "
                f"{sorted(tensors)}."
            )

    def _get(self) -> Tensor:
        if self._tensors is None:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: train with it, or call `fit(model, loader)` or `fit_logits`."
            )
        tensor: Tensor = self._tensors[self.tensor_name]
        return tensor


class FieldTransform(PredictionTransform):
    """Adds a fitted tensor to a prediction, which applies it to its mean probabilities.

    Args:
        name: The field of the prediction.
        tensor: Its value.
    """

    kind = "calibration"

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.tensor = tensor

    def apply(self, prediction: Prediction) -> Prediction:
        """The calibrated prediction."""
        return prediction.replace(**{self.name: rounded_for(self.tensor, prediction)})


def _calibration_metrics(task: Task, when: When) -> dict[str, Metric]:
    return {name: metric for name, metric in task.metrics("test").items() if name in task.calibration_metrics}


def rounded_for(tensor: Tensor, prediction: Prediction) -> Tensor:
    """A fitted tensor, in float64 for a float64 prediction and in float32 for any other."""
    return tensor.to(torch.float64 if prediction.dtype == torch.float64 else torch.float32)
