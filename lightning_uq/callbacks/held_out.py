"""The base of callbacks that fit held-out predictions to their targets: intervals, sets, thresholds and factors."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import Self

from lightning_uq.callbacks.carried import Carried, carried_by
from lightning_uq.callbacks.foreign import transformed_prediction
from lightning_uq.callbacks.held_out_order import check_after, check_order, earlier_callbacks, transforms_before
from lightning_uq.callbacks.logged_metrics import LoggedMetrics, When, log_fitted
from lightning_uq.callbacks.post_training import PostTrainingCallback, post_training_callbacks
from lightning_uq.errors import InputError, NotFiniteError, NotFittedError
from lightning_uq.functional.validation import one_per_row
from lightning_uq.predictions import Prediction
from lightning_uq.running.classes import check_targets, labelled_batch
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.finite import unusable_rows
from lightning_uq.running.fitted_state import to_cpu
from lightning_uq.running.logits import is_uncertainty_module
from lightning_uq.running.ranks import first_of_ranks, raising_on_all_ranks
from lightning_uq.running.row_sample import MAX_ROWS, RowSample, keys_of_positions, row_keys
from lightning_uq.running.transforms import PredictionTransform, observing_all
from lightning_uq.tasks import Task


class HeldOutCallback(PostTrainingCallback):
    """Fits predictions of the validation data to their targets. Callbacks before this one have already changed the predictions.

    A subclass reduces predictions and targets to rows of numbers (:meth:`rows`), which are gathered from all ranks, and fits the
    rows (:meth:`fit_rows`). Without a Trainer, :meth:`fit_predictions` fits predictions from memory, of any origin.
    A test logs :meth:`test_metrics` under ``uq/``. This costs one more forward pass per test batch.

    Args:
        max_rows: The largest number of rows to fit, such as the pixels of maps. If there are more, a random sample of this size is
            fitted. None fits all.
        fitting: Arguments of :class:`FittingCallback`: ``dataloader``, ``weights``, ``name`` and others. By default, the
                validation loader is fitted; there must be exactly one.
    """

    can_continue = True

    per_sample: ClassVar[bool] = False
    """Whether a row is a sample with all positions of its map, rather than one position."""

    value_names: ClassVar[tuple[str, ...]] = ()
    """Names of the additional numbers per row that :meth:`rows` takes."""

    whens: ClassVar[tuple[When, ...]] = ("",)
    """The predictions that a test scores: only changed ones, or, as ``("", "_calibrated")``, those before and after the change."""

    needs_targets: ClassVar[bool] = True
    """Whether the fit uses targets; if not, :meth:`rows` gets zeros [B]."""

    own_arguments: ClassVar[tuple[str, ...]] = ()
    """Names of the constructor arguments that a state holds, in its settings or among its tensors."""

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """A callback with a saved state and the arguments of its fit, for :func:`load_fitted`.

        Raises:
            InputError: The result depends on a function of the input, which a state cannot hold.
        """
        settings, tensors = state["settings"], state["tensors"]
        functions = [name for name in ("groups", "density_ratio") if settings.get(name)]
        if functions:
            raise InputError(
                f"{cls.__name__} was fitted with `{functions[0]}`, a function of the input that a file cannot hold. Use the callback itself."
            )
        held = {**tensors, **settings}
        callback = cls(**{name: held[name] for name in cls.own_arguments if name in held})
        callback._set(tensors, None)
        return callback

    def __init__(self, *, max_rows: int | None = MAX_ROWS, **fitting: Any) -> None:
        super().__init__(**fitting)
        RowSample(max_rows)
        self.max_rows = max_rows
        self.after: tuple[PostTrainingCallback, ...] = ()  # callbacks whose results it reads on a foreign module

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        return {**super().settings, "max_rows": self.max_rows}

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def rows(self, prediction: Any, target: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        """Tensors [N, ...] that the fit needs, one row per prediction.

        Args:
            prediction: Predictions as ``task.rows`` returns them. For maps, there is one per counted position.
            target: The checked targets [N, ...].
            values: Numbers per row [N], named as in ``value_names``.

        Raises:
            InputError: Such predictions cannot be fitted. It is also raised before a training.
        """

    @abstractmethod
    def fit_rows(self, *rows: Tensor) -> dict[str, Any]:
        """The fitted tensors, from the rows of all ranks on the CPU."""

    @abstractmethod
    def transform(self) -> PredictionTransform:
        """The transform that adds the result to predictions."""

    @abstractmethod
    def test_metrics(self, task: Task, when: When) -> dict[str, Metric]:
        """The metrics of predictions that a test logs, by name."""

    def input_functions(self) -> Mapping[str, Callable[[Any], Tensor]]:
        """Functions of the input that return a number per sample [B], by the names that :meth:`rows` takes."""
        return {}

    def check_task(self, task: Task) -> None:  # optional
        """Raise an :class:`InputError` for a task whose predictions cannot be fitted."""

    # ------------------------------------------------------------------ without a Trainer

    def fit(self, model: nn.Module, loader: Any, after: Sequence[PostTrainingCallback] = ()) -> Self:
        """Fit on the current weights of ``model``, without a Trainer, and return the callback.

        Args:
            model: The model.
            loader: Held-out rows.
            after: Fitted callbacks of this model whose results this one reads, in order. Not for a module of this package, which carries the results itself.

        Raises:
            NotFittedError: A callback in ``after`` is not fitted, or was fitted on other weights.
            InputError: The loader or its data are invalid, or ``after`` was given for a module of this package.
        """
        check_after(after, model)
        self.after = tuple(after)
        return super().fit(model, loader)

    def fit_predictions(self, prediction: Prediction, target: Tensor, **values: Tensor) -> Self:
        """Fit predictions from memory to their targets, and return the callback.

        Args:
            prediction: Predictions of held-out rows, calibrated like later ones. For maps, pass ``prediction.as_rows()``.
            target: Their targets.
            values: Additional numbers per row [N], if the callback takes any.

        Raises:
            InputError: The arguments do not match, or cannot be fitted.
        """
        unknown = sorted(values.keys() - set(self.value_names))
        if unknown:
            raise InputError(
                f"`fit_predictions` of {type(self).__name__} got an unknown argument {unknown[0]!r}. Besides predictions and targets, it takes "
                f"{', '.join(self.value_names) or 'nothing'}."
            )
        lacking = [name for name in self.input_functions() if name not in values]
        if lacking:
            raise InputError(
                f"`{lacking[0]}` is missing: {type(self).__name__} has a function for it, so pass its values for the rows."
            )
        rows = [part.cpu() for part in self.rows(prediction, target, **values)]
        if not len(prediction):
            raise InputError("`prediction` must hold at least one row, but it is empty.")
        self._set(to_cpu({**self.fit_rows(*rows), **carried_by(prediction)}), None)
        return self

    def change(self, prediction: Prediction) -> Prediction:
        """The prediction with the result of the fit.

        Raises:
            NotFittedError: The callback is not fitted.
            InputError: The prediction has other calibrations than the fitted ones, or the result depends on the input.
        """
        for name in self.input_functions():
            raise InputError(
                f"`{name}` of {type(self).__name__} depends on the input, which `change` does not get. Use `trainer.predict`."
            )
        return self.transform().apply(prediction)

    def predict(self, model: nn.Module, x: Any) -> Prediction:
        """The prediction for inputs, or for a batch, which `unpack_batch` needs, with the results of this fit and of those before it.

        Raises:
            NotFittedError: The callback was not fitted on a model (after :meth:`fit_predictions`, use :meth:`change`), or was fitted on other weights.
            NotFiniteError: An input row holds NaN or infinity, unless ``nonfinite="inf"``.
            InputError: The predictions have other calibrations than the fitted ones.
        """
        self.check_fitted(model)
        with evaluating(model):
            used, batch = [*transforms_before(self, model, None), self.transform()], to_device(x, model)
            return transformed_prediction(model, batch, self.logits, used, self.nonfinite, to_members=False)

    @property
    def state(self) -> dict[str, Any]:
        """The fitted tensors.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        if self._tensors is None:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: train with it, or call `fit(model, loader)` or `fit_predictions`."
            )
        return self._tensors

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Check that the tensors are the result of this callback."""
        if tensors is not None:
            self.transform()

    def carried(self) -> Carried:
        """The calibrations of the fitted predictions."""
        return Carried(type(self).__name__, self.state)

    # ------------------------------------------------------------------ with a model

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a later callback that changes the predictions that this one is fitted to, and note the earlier ones."""
        super().setup(trainer, pl_module, stage)
        self.after = tuple(earlier_callbacks(self, trainer))
        check_order(self, trainer, pl_module, stage)

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Reduce a batch to rows, in the type that its predictions will have."""
        self._check_own_predictions(model)
        self.logits.look_at_task(model, batch, trainer)
        task = self.logits.task(model)
        self.check_task(task)
        outputs = self.logits(model, batch, trainer)
        target = self._target(model, batch, outputs)
        prediction = self.logits.prediction(model, outputs)
        for earlier in earlier_callbacks(self, trainer):
            prediction = earlier.preview(prediction)
        self._rows_of(model, batch, task, prediction, target)

    def fits_targets(self, model: nn.Module) -> bool:
        """Whether predictions are fitted to targets."""
        return self.needs_targets

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Check that the task accepts every target."""
        check_targets(self.logits, model, target, outputs, self._where)

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Fit the rows of all ranks, or a sample of them."""
        self._check_own_predictions(model)
        held = SimpleNamespace(sample=RowSample(self.max_rows), carried=None)
        reading = self.reading(model, loader, trainer)
        with raising_on_all_ranks(trainer):
            before = transforms_before(self, model, trainer)
            for batch in reading.batches(held):
                self.logits.look_at_task(model, batch, trainer, is_first=(is_first := reading.num_read == 0))
                task = self.logits.task(model)
                self.check_task(task)
                outputs, prediction = self._predict(model, batch, trainer, before, check=is_first)
                self._check_finite(outputs, task)
                target = self._target(model, batch, outputs)
                rows = self._rows_of(model, batch, task, prediction, target)
                if held.carried is not None:  # a continued fit may find other results of earlier callbacks
                    Carried(type(self).__name__, held.carried).check(prediction)
                numbers = reading.numbers(len(target))
                one_each = self.per_sample or not task.has_positions
                keys = row_keys(numbers) if one_each else keys_of_positions(task, target.cpu(), numbers, len(rows[0]))
                chosen = held.sample.choose(keys)
                at = chosen.to(outputs.device) if isinstance(chosen, Tensor) else chosen
                held.sample.add(keys[chosen], *(part[at].cpu() for part in rows))
                held.carried = to_cpu(carried_by(prediction))
        gathered = [part.cpu() for part in held.sample.gather(trainer, type(self).__name__)]
        (carried,) = first_of_ranks([held.carried], trainer)
        if carried is None or not len(gathered[0]):
            raise InputError(f"{type(self).__name__}'s fitting data are empty.")
        return {**self.fit_rows(*gathered), **carried}

    def _target(self, model: nn.Module, batch: Any, outputs: Tensor) -> Tensor:
        """The checked target of a batch, or zeros [B] if none is needed."""
        if not self.needs_targets:
            return outputs.new_zeros(outputs.shape[1])
        return labelled_batch(self.logits, model, batch, outputs, self._where).to(outputs.device)

    def _check_finite(self, outputs: Tensor, task: Task) -> None:
        if num_bad := int(unusable_rows(outputs, task).sum()):
            raise NotFiniteError(
                f"{self._where} must have finite outputs, but those of {num_bad} of {outputs.shape[1]} rows hold NaN or infinity. Remove such "
                "inputs, or check the weights for NaN."
            )

    def _check_own_predictions(self, model: nn.Module) -> None:
        if self.logits.predict_fn is not None and is_uncertainty_module(model):
            raise InputError(
                f"{type(self).__name__} is fitted to the predictions that {type(model).__name__} makes itself, which `predict_fn` would "
                "bypass. Leave argument `predict_fn` out."
            )

    def _rows_of(
        self, model: nn.Module, batch: Any, task: Task, prediction: Prediction, target: Tensor
    ) -> tuple[Tensor, ...]:
        if self.needs_targets:
            prediction, target = (task.sample_rows if self.per_sample else task.rows)(prediction, target)
        if self.needs_targets and task.has_classes and target.is_floating_point():
            raise InputError(
                f"{self._where} must have labels, but the targets of a batch are probabilities. Pass a loader without label mixing or "
                "smoothing."
            )
        functions = self.input_functions()
        x = self.logits.unpack(model, batch)[0] if functions else None
        values = {name: one_per_row(name, function(x), len(prediction)) for name, function in functions.items()}
        return self.rows(prediction, target, **values)

    @property
    def _where(self) -> str:
        return f"{type(self).__name__}'s fitting data"

    # ------------------------------------------------------------------ predictions after the earlier callbacks

    def _predict(
        self,
        model: nn.Module,
        batch: Any,
        trainer: Trainer | None,
        transforms: Sequence[PredictionTransform],
        *,
        check: bool,
    ) -> tuple[Tensor, Prediction]:
        """The outputs [Z, B, ...], and the prediction after the transforms."""
        x, _ = self.logits.unpack(model, batch)
        with observing_all(transforms, model, x) as change:
            outputs = self.logits(model, batch, trainer, check=check)
            prediction = self.logits.prediction(model, outputs, to_members=False)
        return outputs, change(prediction)

    # ------------------------------------------------------------------ test metrics

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, and log the fitted numbers."""
        super().on_train_end(trainer, pl_module)
        log_fitted(trainer, self._prefix(trainer), self.fitted_numbers)

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The fit as a few numbers, by name."""
        return {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the metrics of a test."""
        self._tested = LoggedMetrics(
            self.logits,
            self._tested_predictions,
            self.test_metrics,
            type(self).__name__,
            self.whens,
            self.per_sample,
            self.needs_targets,
        )
        self._test_transform: PredictionTransform | None = None  # set when the first batch verifies the state

    def _tested_predictions(
        self, model: nn.Module, batch: Any, trainer: Trainer, check: bool
    ) -> tuple[Tensor, dict[When, Prediction]]:
        outputs, prediction = self._predict(model, batch, trainer, transforms_before(self, model, trainer), check=check)
        if self._test_transform is None:
            self._test_transform = self.transform()
        changed = self._test_transform.of_input(self.logits.unpack(model, batch)[0]).apply(prediction)
        return outputs, {"": changed} if self.whens == ("",) else {"": prediction, "_calibrated": changed}

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
        """Log the metrics."""
        super().on_test_epoch_end(trainer, pl_module)
        self._tested.log(trainer, pl_module, self._prefix(trainer))

    def _prefix(self, trainer: Trainer) -> str:
        """``uq/``, followed by the callback's name if it has one, or by its class if another callback logs scores of the same names."""
        ours = [one for one in post_training_callbacks(trainer) if isinstance(one, HeldOutCallback)]
        several = len(self.whens) > 1 and sum(one.whens == self.whens for one in ours) > 1
        name = self.name or (type(self).__name__ if several else None)
        return "uq/" if name is None else f"uq/{name}/"
