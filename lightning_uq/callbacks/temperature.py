"""Calibration after training: a temperature, or a scale and a bias a class, fitted on the validation data."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.post_training import PostTrainingCallback, Weights, patch, unpatch
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional._validation import check_choice
from lightning_uq.functional.temperature import Method, Objective, Scope, _check_method, fit_ensemble_temperature
from lightning_uq.functional.vector_scaling import fit_vector_scaling
from lightning_uq.networks.output import Output
from lightning_uq.predictions import CategoricalPrediction, Prediction
from lightning_uq.running.classes import check_classes, class_labels, class_logits, gather_logits
from lightning_uq.running.evaluation import to_device
from lightning_uq.running.loaders import validation_loaders
from lightning_uq.running.logits import PredictFn, UnpackBatch, is_uncertainty_module
from lightning_uq.running.ranks import together


class Calibration(PostTrainingCallback):
    """What calibrating callbacks share: held-out logits, gathered from all ranks, and predictions that carry the result.

    In ``validate``, ``test`` and ``predict`` the predictions of this package's modules are calibrated, so that
    ``test_nll`` and ``test_ece`` are those after calibration. A module that is not ours is left alone, unless
    ``attach=True`` replaces its predictions.
    """

    tensor_name: ClassVar[str]
    """What the fitted tensor is called."""

    of_members = False
    """Whether the result acts inside the members, rather than on the log of their mean probabilities."""

    def fit_logits(self, logits: Tensor, labels: Tensor) -> "Calibration":
        """Fit logits [N, C] or [Z, N, C] with labels [N] that are in memory; gives back the callback itself."""
        self._set({**self.fit_members(logits if logits.ndim > 2 else logits.unsqueeze(0), labels)}, None)
        return self

    @abstractmethod
    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The fitted tensors, from the members' logits [Z, N, C] in float64 and labels [N]."""

    @abstractmethod
    def calibrate(self, prediction: Prediction) -> Prediction:
        """The prediction, calibrated."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second calibration of the same predictions, which can carry one."""
        super().setup(trainer, pl_module, stage)
        ours = is_uncertainty_module(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Calibration) and (ours or c.attach)]
        if len(others) > 1:
            raise InputError(
                f"Expected one callback that calibrates the predictions of {type(pl_module).__name__}, but the Trainer has "
                f"{' and '.join(type(c).__name__ for c in others)}. Fit the others with `fit(model, loader)`."
            )

    # ------------------------------------------------------------------ fitting

    def default_loader(self, trainer: Trainer) -> Any:
        """The validation loader."""
        loaders = validation_loaders(trainer)
        if len(loaders) != 1:
            raise InputError(
                f"{type(self).__name__} needs one validation loader to be fitted on, but the Trainer has "
                f"{len(loaders) or 'none'}. Pass a validation loader to `fit`, or argument `dataloader`."
            )
        return loaders[0]

    def loader_limit(self, trainer: Trainer) -> int | float | None:
        """``limit_val_batches`` holds for the fit as well."""
        limit: int | float | None = trainer.limit_val_batches
        return limit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no classes."""
        check_classes(self.logits.task(pl_module), type(self).__name__)
        super().on_fit_start(trainer, pl_module)

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Look for labels and logits."""
        self._labels(model, batch)
        class_logits(self.logits, model, batch, trainer, of_members=self.of_members)

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Logits of all rows, from all ranks, in float64."""
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        with together(trainer):
            for raw in loader:
                batch = to_device(raw, model, trainer)
                y = self._labels(model, batch)
                rows = class_logits(self.logits, model, batch, trainer, check=not logits, of_members=self.of_members)
                logits.append(rows.transpose(0, 1).double())  # rows first, so that they gather
                labels.append(y.flatten())
        all_logits, all_labels = gather_logits(logits, labels, trainer)
        if not len(all_labels):
            raise InputError(f"Expected {type(self).__name__}'s fitting data to hold samples, but it is empty.")
        return self.fit_members(all_logits.transpose(0, 1).cpu(), all_labels.cpu())

    def _labels(self, model: nn.Module, batch: Any) -> Tensor:
        return class_labels(self.logits, model, batch, f"{type(self).__name__}'s fitting data")

    # ------------------------------------------------------------------ predictions that carry it

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate what ``trainer.validate`` measures; the validations of a training are left as they are."""
        if trainer.state.fn == "validate":
            self._calibrate_module(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        unpatch(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate what is tested."""
        self._calibrate_module(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        unpatch(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate what is predicted."""
        if is_uncertainty_module(pl_module):
            self._calibrate_module(pl_module)
        else:
            super().on_predict_start(trainer, pl_module)

    @contextmanager
    def attaching(self, model: nn.Module) -> Iterator[Callable[[Prediction], Prediction]]:
        """A context around one call of the model; what it yields then calibrates its prediction."""
        yield self.calibrate

    def _calibrate_module(self, pl_module: LightningModule) -> None:
        if is_uncertainty_module(pl_module):
            patch(pl_module, "prediction", lambda inner: lambda output: self.calibrate(inner(output)))

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Refuse what is no calibration of this kind.

        Raises:
            InputError: The fitted tensor is not there.
        """
        if tensors is not None and not isinstance(tensors.get(self.tensor_name), Tensor):
            raise InputError(f"Expected a tensor `{self.tensor_name}`, but got {sorted(tensors)}.")

    def _get(self) -> Tensor:
        if self._tensors is None:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: train with it, or call `fit(model, loader)` or `fit_logits`."
            )
        tensor: Tensor = self._tensors[self.tensor_name]
        return tensor

    def _rounded_for(self, prediction: Prediction) -> Tensor:
        """The fitted tensor, in float64 for a prediction in float64 and in float32 for any other."""
        return self._get().to(torch.float64 if prediction.dtype == torch.float64 else torch.float32)


class TemperatureScaling(Calibration):
    """Temperature scaling after training, on any LightningModule that classifies.

    Fitted on the validation data in float64, whatever the precision of the training. Held-out likelihood usually falls,
    but nothing guarantees that it does: a temperature fitted on few rows can be worse than none.

    - ``scope="pooled"``: T on the log of the mean probabilities (Rahaman and Thiery). The members stay as they are, hence
      mutual information and joint log-loss too.
    - ``"shared"``: one T inside all members, whose pooled likelihood is fitted; joint predictions stay coherent.
    - ``"member"``: each member's own, as DDU has it.

    For a single network the three are one.

    Args:
        objective: ``"nll"``, or ``"ece"`` with ``method="grid"``.
        method: ``"newton"``, or ``"grid"``, DDU's 0.1, 0.2, ..., 10.
        scope: ``"pooled"``, ``"shared"`` or ``"member"``.
        dataloader: Fitting data; default the validation loader.
        weights: ``"best"`` or ``"last"``.
        name: Tells two of these apart.
        predict_fn: ``predict_fn(model, x) -> logits``, where ``forward`` does not give them.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``.
        output: What the model returns.
        attach: Whether the predictions of a module that is not ours are replaced by ours, calibrated.

    Raises:
        InputError: At the start of the training, where there is no validation data or it has no labels.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599); Rahaman & Thiery, NeurIPS 2021 (arXiv 2007.08792).

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]] * 10)
        >>> scaling = TemperatureScaling().fit_logits(logits, torch.tensor([0] * 8 + [1] * 2))
        >>> scaling.temperature.round(decimals=4)
        tensor(2.8854, dtype=torch.float64)
    """

    tensor_name = "temperature"

    def __init__(
        self,
        objective: Objective = "nll",
        method: Method = "newton",
        scope: Scope = "pooled",
        dataloader: Any = None,
        weights: Weights = "best",
        *,
        name: str | None = None,
        predict_fn: PredictFn | None = None,
        unpack_batch: UnpackBatch | None = None,
        output: Output = "logits",
        attach: bool = False,
    ) -> None:
        super().__init__(
            dataloader=dataloader,
            weights=weights,
            name=name,
            predict_fn=predict_fn,
            unpack_batch=unpack_batch,
            output=output,
            attach=attach,
        )
        _check_method(objective, method)
        check_choice("scope", scope, ("pooled", "shared", "member"))
        self.objective = objective
        self.method = method
        self.scope = scope
        self.of_members = scope != "pooled"

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on."""
        return {**super().settings, "objective": self.objective, "method": self.method, "scope": self.scope}

    @property
    def temperature(self) -> Tensor:
        """T, a scalar in float64, or [Z] with ``scope="member"``.

        Raises:
            NotFittedError: Nothing was fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The temperature of members' logits [Z, N, C]."""
        fitted = fit_ensemble_temperature(logits, labels, self.scope, self.objective, self.method)
        return {"temperature": fitted}

    def calibrate(self, prediction: Prediction) -> Prediction:
        """The prediction with its temperature, or with tempered members."""
        if not self.of_members:
            return prediction.replace(temperature=self._rounded_for(prediction))
        return prediction.map_logits(self._tempered)

    def _tempered(self, logits: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()  # a scalar T would not, and round again
        T = self.temperature.to(logits)
        return logits / (T.reshape(-1, *[1] * (logits.ndim - 1)) if T.ndim else T)

    def _calibrate_module(self, pl_module: LightningModule) -> None:
        if not self.of_members or not is_uncertainty_module(pl_module):
            super()._calibrate_module(pl_module)
        else:  # inside the members, so that joint metrics see it too
            patch(pl_module, "forward", lambda inner: lambda x: self._tempered(inner(x)))


class VectorScaling(Calibration):
    """A scale and a bias a class, with a ridge towards the fitted temperature, on any LightningModule that classifies.

    The ridge's strength is chosen by five-fold validation likelihood; where no strength beats the temperature alone, it is
    the temperature. Applied to the log of the mean probabilities: members stay as they are.

    Args:
        dataloader: Fitting data; default the validation loader.
        weights: ``"best"`` or ``"last"``.
        name: Tells two of these apart.
        predict_fn: ``predict_fn(model, x) -> logits``, where ``forward`` does not give them.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``.
        output: What the model returns.
        attach: Whether the predictions of a module that is not ours are replaced by ours, calibrated.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), section 4.2.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
        >>> target = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1, 0, 1]).repeat(10)  # class 1 is over-predicted
        >>> scale, bias = VectorScaling().fit_logits(logits, target).class_scaling
        >>> bool(bias[0] > bias[1])
        True
    """

    tensor_name = "class_scaling"

    def __init__(
        self,
        dataloader: Any = None,
        weights: Weights = "best",
        *,
        name: str | None = None,
        predict_fn: PredictFn | None = None,
        unpack_batch: UnpackBatch | None = None,
        output: Output = "logits",
        attach: bool = False,
    ) -> None:
        super().__init__(
            dataloader=dataloader,
            weights=weights,
            name=name,
            predict_fn=predict_fn,
            unpack_batch=unpack_batch,
            output=output,
            attach=attach,
        )

    @property
    def class_scaling(self) -> Tensor:
        """Scale and bias [2, C] in float64.

        Raises:
            NotFittedError: Nothing was fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scaling of the log of the mean probabilities."""
        rows = CategoricalPrediction(logits.double()).log_probs
        order = _order(rows, labels)  # ranks hand over rows in orders of their own, and the folds must not differ
        fit = fit_vector_scaling(rows[order], labels[order])
        return {"class_scaling": torch.stack([fit.scale, fit.bias])}

    def calibrate(self, prediction: Prediction) -> Prediction:
        """The prediction with its class scaling."""
        return prediction.replace(class_scaling=self._rounded_for(prediction))


def _order(rows: Tensor, labels: Tensor) -> Tensor | slice:
    """An order of rows [N, C] by what they hold: only rows that are equal may change places."""
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        return slice(None)  # an error that the fit will tell
    direction = torch.randn(rows.shape[1], dtype=rows.dtype, generator=torch.Generator().manual_seed(0))
    by_value = (rows.clamp_min(torch.finfo(torch.float32).min) @ direction).argsort(stable=True)
    return by_value[labels[by_value].argsort(stable=True)]
