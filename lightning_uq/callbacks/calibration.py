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
from lightning_uq.running.evaluation import to_device
from lightning_uq.running.logits import is_uncertainty_module
from lightning_uq.running.ranks import raising_on_all_ranks
from lightning_uq.running.row_sample import MAX_ROWS, RowSample
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import Task


class Calibration(PostTrainingCallback):
    """Fits held-out logits, gathered from all ranks, and lets predictions carry the result.

    A test logs what the calibration changes, for any module: ``uq/test_nll``, ``uq/test_ece`` and ``uq/test_brier``, and the same with
    ``_calibrated`` at their end. It costs one more forward pass per test batch, in evaluation mode and with an isolated random
    state. At the end of the training, :attr:`fitted_numbers` are logged under ``uq/``.

    The predictions of this package's modules are calibrated from the fit on, so that ``test_nll`` and ``test_ece`` are those
    after calibration; ``module(x)`` and the losses stay as they are. A module that is not ours is left alone, unless
    ``attach=True`` replaces its predictions.

    Args:
        max_rows: The largest number of rows that are fitted; None reads all. Above it, as the pixels of a segmentation easily are,
            a random sample of so many rows is fitted: the same one in every run, and on any number of ranks.
        fitting: Arguments of :class:`FittingCallback`: ``dataloader``, ``weights``, ``name`` and the like. The default
            fitting data are those of the one validation loader.

    Raises:
        InputError: An argument is not as above.
    """

    tensor_name: ClassVar[str]
    """Name of the fitted tensor."""

    needs_classes: ClassVar[bool] = False
    """Whether each label must be one of several classes, rather than on or off."""

    recalibrates = True

    of_members = False
    """Whether the result acts inside the members, rather than on the log of their mean probabilities."""

    def __init__(self, *, max_rows: int | None = MAX_ROWS, **fitting: Any) -> None:
        super().__init__(**fitting)
        RowSample(max_rows)
        self.max_rows = max_rows

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on."""
        return {**super().settings, "max_rows": self.max_rows}

    def fit_logits(self, logits: Tensor, labels: Tensor) -> "Calibration":
        """Fit logits [N, C] or [Z, N, C] with labels [N] that are in memory; gives back the callback itself."""
        self._set({**self.fit_members(logits if logits.ndim > 2 else logits.unsqueeze(0), labels)}, None)
        return self

    @abstractmethod
    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The fitted tensors, from logits [Z, N, C] and labels [N]: of the members, or pooled with Z = 1."""

    def transform(self) -> PredictionTransform:
        """The calibration as a change of predictions, which carry the fitted tensor."""
        return FieldTransform(self.tensor_name, self._get())

    def calibrate(self, prediction: Prediction) -> Prediction:
        """The prediction, calibrated."""
        return self.transform().apply(prediction)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second calibration of the same predictions, which can carry one."""
        super().setup(trainer, pl_module, stage)
        ours = is_uncertainty_module(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Calibration) and (ours or c.attach)]
        if len(others) > 1:
            raise InputError(
                f"A prediction of {type(pl_module).__name__} carries one calibration, but the Trainer has "
                f"{' and '.join(type(c).__name__ for c in others)}. Keep one of them."
            )

    # ------------------------------------------------------------------ what a test shows of it

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a test."""
        who: str = type(self).__name__
        self._tested = LoggedMetrics(self.logits, self._both, _calibration_metrics, who, ("", "_calibrated"))

    def _both(
        self, model: nn.Module, batch: Any, trainer: Trainer, check: bool
    ) -> tuple[Tensor, dict[When, Prediction]]:
        """A batch's prediction before and after the calibration."""
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
        """Score the batch just tested."""
        super().on_test_batch_end(trainer, pl_module)
        self._tested.update(trainer, pl_module, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how good the probabilities are before and after the calibration."""
        super().on_test_epoch_end(trainer, pl_module)
        self._tested.log(trainer, pl_module, self._prefix(trainer))

    def _prefix(self, trainer: Trainer) -> str:
        """``uq/``, and the callback's name where the Trainer has several calibrations of an unmodified module."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        several = sum(isinstance(one, Calibration) for one in callbacks) > 1
        return f"uq/{self.name or type(self).__name__}/" if several else "uq/"

    # ------------------------------------------------------------------ fitting

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a task without classes."""
        check_calibration(self.logits.task(pl_module), type(self).__name__, self.needs_classes)
        super().on_fit_start(trainer, pl_module)

    def fits_targets(self, model: nn.Module) -> bool:
        """Labels are what a calibration is fitted to."""
        return True

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Every label must be one that the task knows."""
        check_targets(self.logits, model, target, outputs, f"{type(self).__name__}'s fitting data")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, and log what was fitted: to the Trainer's loggers and its ``callback_metrics``."""
        super().on_train_end(trainer, pl_module)
        log_fitted(trainer, self._prefix(trainer), self.fitted_numbers)

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The fit in numbers: ``fit_nll`` and ``fit_nll_calibrated`` of the fitting rows, and ``temperature`` if there is one.

        Several temperatures are ``temperature/0``, ``temperature/1``, and so on. A fit of logits in memory has no ``fit_nll``.

        Raises:
            NotFittedError: Nothing was fitted.
        """
        self._get()
        return {name: float(value) for name, value in (self._tensors or {}).items() if name.startswith("fit_nll")}

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Look for labels and logits."""
        self._reader(model).add(model, batch, trainer)

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Fit the logits of all rows, or a sample of them, from all ranks, in float64; pooled ones are kept without their members."""
        reader = self._reader(model)
        with raising_on_all_ranks(trainer):
            for batch in loader:
                reader.add(model, to_device(batch, model, trainer), trainer)
        return self.fit_read(reader, trainer)

    def fit_read(self, reader: CalibrationReader, trainer: Trainer | None) -> dict[str, Any]:
        """The fitted tensors and the NLLs, from what was read on all ranks. A collective."""
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
        """The fitting rows, calibrated with tensors that were just fitted to them."""
        return prediction.replace(**{self.tensor_name: tensors[self.tensor_name]})

    def fit_rows(self, rows: FittingRows) -> dict[str, Tensor]:
        """The fitted tensors, from the rows of all ranks."""
        return self.fit_members(rows.logits, rows.labels)

    def _reader(self, model: nn.Module) -> CalibrationReader:
        """Reads the rows of the quantity that predictions then carry calibrated."""
        if self.logits.predict_fn is not None and is_uncertainty_module(model):
            raise InputError(
                f"{type(self).__name__} calibrates the predictions that {type(model).__name__} makes itself, so its "
                "`predict_fn` would be fitted but not calibrated. Leave argument `predict_fn` out."
            )
        who = type(self).__name__
        check_calibration(self.logits.task(model), who, self.needs_classes)
        return self.new_reader(who, f"{who}'s fitting data")

    def new_reader(self, who: str, where: str) -> CalibrationReader:
        """A reader of what is fitted, for messages that name ``who`` and begin with ``where``."""
        return CalibrationReader(self.logits, who, where, of_members=self.of_members, max_rows=self.max_rows)

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Refuse a state that is no calibration of this kind.

        Raises:
            InputError: The fitted tensor is not there.
        """
        if tensors is not None and not isinstance(tensors.get(self.tensor_name), Tensor):
            raise InputError(
                f"A fitted state of {type(self).__name__} needs a tensor `{self.tensor_name}`, but it holds "
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
    """A fitted tensor in float64 for a prediction in float64, and in float32 for any other."""
    return tensor.to(torch.float64 if prediction.dtype == torch.float64 else torch.float32)
