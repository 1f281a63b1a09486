"""The base class of every method: steps, metrics and predictions. A method adds its network and its own training loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_uq import batches
from lightning_uq._lightning import trainer_of
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer, describe
from lightning_uq.functional.waiting import is_free
from lightning_uq.importing import as_function
from lightning_uq.losses.data_noise import DataNoise
from lightning_uq.losses.penalty import Penalty
from lightning_uq.modules import checks
from lightning_uq.modules.arguments import given_network
from lightning_uq.modules.checkpointing import CheckpointedModule
from lightning_uq.modules.evaluation import log_before_batches, log_metrics, make_metrics, metrics_of, update_metrics
from lightning_uq.modules.frozen import expect_eval_mode, in_eval_mode
from lightning_uq.modules.targets import Loss, Targets, losses_and_count
from lightning_uq.modules.trainer_callbacks import check_callbacks
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.calling import signature_of
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.finite import NonFinite, check_finite
from lightning_uq.networks.output import PredictFn
from lightning_uq.predictions import Prediction
from lightning_uq.running.finite import FiniteRows
from lightning_uq.running.loaders import loader_list
from lightning_uq.running.logits import UnpackBatch
from lightning_uq.running.transforms import PredictionTransforms
from lightning_uq.strategies import check_strategy
from lightning_uq.tasks import Progress, Task, task_of

# LightningCLI builds `Penalty` and `nn.Module` from a class path. It would read a bare callable as a factory of its result.
Regularizer = Callable[[EpistemicNetwork, Any], Tensor] | Penalty | nn.Module

MAX_MEMBERS = 32
"""Predictions keep their members up to this number of indices, unless ``return_members`` says otherwise."""


class UncertaintyModule(CheckpointedModule):
    """A LightningModule around an epistemic network f(x, z): the steps, metrics and predictions of every method.

    A method subclasses it, builds its :class:`EpistemicNetwork`, and overrides the steps that differ: often only
    :meth:`training_loss`. The task defines what the outputs mean. The steps log ``train_loss``, ``val_*`` and ``test_*``; samples
    that a distributed sampler repeats as padding count once. If a batch is a mapping, its key ``weight`` [B] weights the samples in
    the training loss: sum_b w_b l_b / sum_b w_b. A resumed training is exact: see :class:`CheckpointedModule`.

    Args:
        network: The epistemic network, or a factory of it. A checkpoint can hold an importable factory, but not a network.
        task: What the outputs mean: a :class:`~lightning_uq.tasks.Task` or its name, for instance ``"classification"``
            (logits [B, C]), ``"segmentation"`` (maps [B, C, *P]) or ``"regression"`` (means and raw variances [B, 2 D]).
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer, and stepped after each epoch. A ``ReduceLROnPlateau`` monitors ``val_loss`` unless it
            names another metric. To step a scheduler with each batch, override ``configure_optimizers``.
        loss: Replaces the task's loss: ``loss(output[B, ...], target)`` for one index returns a scalar or one loss per sample
            [B, ...]. A loss with the attribute ``over_indices = True``, such as :class:`~lightning_uq.losses.JointLoss`, takes
            the outputs [Z, B, ...] of all indices.
        num_train_samples: Number of indices drawn per training step from an infinite index set; a finite set is always used
            completely. None: the method's ``default_train_samples``.
        num_eval_samples: Number of indices per evaluation from an infinite index set.
        return_members: Whether predictions keep their members [Z, B, ...]. None: they keep up to 32 members.
        data_noise: Noise on the training data that depends on (sample, index):
            :class:`~lightning_uq.losses.BootstrapNoise` or :class:`~lightning_uq.losses.GaussianTargetNoise`. The batches must
            contain the samples' positions: see :class:`~lightning_uq.data.Indexed`.
        regularizer: ``regularizer(network, x) -> scalar``, added to the training loss: for instance
            :class:`~lightning_uq.losses.PriorLoss` or :class:`~lightning_uq.losses.L2WeightDecay`.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``, or its import path; the target may be None. Default: see
            :func:`~lightning_uq.batches.unpack_batch`.
        predict_fn: ``predict_fn(network, x) -> output``, or its import path, called instead of ``network(x)`` for each network.
            Without ``unpack_batch``, ``x`` is the whole batch if its input is ambiguous.

    Attributes:
        prediction_transforms: The calibrations and densities that callbacks have attached to the predictions:
            :class:`~lightning_uq.running.transforms.PredictionTransforms`.
        nonfinite: Treatment of input rows that hold NaN or infinity in a prediction: ``"error"``, or ``"inf"``, which gives NaN as
            probabilities and plus infinity as ``score(name)``.
        default_train_samples: The method's default for ``num_train_samples``.
        preferred_ood_scores: The method's out-of-distribution scores, fixed before any such data is seen. The first one that the
            task supports is used, else the task's own.
    """

    default_train_samples: ClassVar[int] = 1
    preferred_ood_scores: ClassVar[tuple[str, ...]] = ()
    nonfinite: NonFinite = "error"
    # One set of metrics per data loader, created when the number of loaders is known.
    val_metrics: nn.ModuleList
    test_metrics: nn.ModuleList

    def __init__(
        self,
        network: EpistemicNetwork | Factory | Callable[[], nn.Module],
        *,
        task: Task | str = "classification",
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.Adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        loss: Loss | None = None,
        num_train_samples: int | None = None,
        num_eval_samples: int = 100,
        return_members: bool | None = None,
        data_noise: DataNoise | None = None,
        regularizer: Regularizer | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        predict_fn: PredictFn | str | None = None,
    ) -> None:
        super().__init__()
        built = given_network(network)
        if not isinstance(built, EpistemicNetwork):
            raise InputError(
                f"`network` must be an EpistemicNetwork, or a factory of one, but it is {describe(built)}. Use DeterministicModule "
                "for a plain network."
            )
        if predict_fn is not None:
            built.call_by(predict_fn)
        self.network: EpistemicNetwork = built
        self.task: Task = task_of(task)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loss = loss
        self.num_train_samples = self.default_train_samples if num_train_samples is None else num_train_samples
        self.num_eval_samples = num_eval_samples
        check_integer("num_train_samples", self.num_train_samples, 1)
        check_integer("num_eval_samples", num_eval_samples, 1)
        self.return_members = return_members
        self.data_noise = data_noise
        self.regularizer = regularizer
        self._unpack = None if unpack_batch is None else as_function(unpack_batch, "unpack_batch")
        checks.check_fits_task(self.task, self.network, self.data_noise)
        self.prediction_transforms = PredictionTransforms()
        self._output_checked = self._targets_checked = False
        self._logged_loaders: set[int] = set()  # loaders whose metrics are logged in this evaluation
        self._save_arguments()

    @property
    def runs_sharded(self) -> bool:
        """Whether the module runs under FSDP2 (``ModelParallelStrategy``)."""
        return False

    @property
    def ood_score(self) -> str | None:
        """The default out-of-distribution score: the method's preferred one if the task supports it, else the task's.

        None for a single hypothesis if all scores of the task need several.
        """
        if self.task.needs_members and self.network.num_indices == 1:
            return None
        known = self.task.score_names
        return next((name for name in self.preferred_ood_scores if name in known), self.task.ood_score)

    # ------------------------------------------------------------------ outputs and predictions

    def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Return input and target of a batch, by argument ``unpack_batch`` or :func:`~lightning_uq.batches.unpack_batch`.

        A subclass may override it.
        """
        if self._unpack is not None:
            x, y = self._unpack(batch)
            return x, y
        network = self.network.called_network
        signature = None if network is None or not isinstance(batch, Mapping) else signature_of(network)
        allows_whole = self.network.read_output.predict_fn is not None
        return batches.unpack_batch(batch, signature, allows_whole=allows_whole, about=self)

    def forward(self, x: Any) -> Tensor:
        """Raw outputs [Z, B, ...] at the evaluation indices: logits, or means and raw variances."""
        index = self._place(self.network.evaluation_index(self.num_eval_samples))
        try:
            output = self.outputs_at(x, index)
        except RuntimeError as error:
            self._explain(error, x)
            raise
        self._check_output(output)
        return output

    def outputs_at(self, x: Any, index: Tensor) -> Tensor:
        """Raw outputs [Z, B, ...] at the evaluation indices. A subclass overrides it if its loss and its evaluation use different outputs."""
        return self.network.evaluate_at(x, index)

    def prediction(self, output: Tensor) -> Prediction:
        """Return the prediction for outputs [Z, B, ...], with all its members and before any transform."""
        return self.task.predict(output)

    def predict(self, x: Any) -> Prediction:
        """The prediction for inputs x [B, ...], the same as :meth:`predict_step` returns for a batch.

        Above 32 indices, or if ``return_members`` is False, it is pooled and so Z times smaller. It includes what callbacks have
        fitted (``prediction_transforms``), and raises a :class:`NotFittedError` if the weights have changed since that fit. It runs in
        evaluation mode and restores the former modes. It has no gradients; for gradients of an input use
        ``module.prediction(module(x))``. A row with NaN or infinity raises a :class:`NotFiniteError`, or has a score of plus infinity
        if ``nonfinite`` is ``"inf"``.
        """
        return self._predict(x, "")

    @torch.no_grad()
    def _predict(self, x: Any, where: str) -> Prediction:
        rows = FiniteRows(x, self.nonfinite, where)
        with in_eval_mode(self), self.prediction_transforms.observing(self, x) as transformed:
            output = self(x)
        prediction = rows.prediction(transformed(self.prediction(rows.outputs(output, self.task))))
        keep = len(output) <= MAX_MEMBERS if self.return_members is None else self.return_members
        return prediction if keep else prediction.pool()

    # ------------------------------------------------------------------ steps

    def setup(self, stage: str) -> None:
        """Refuse untested strategies (FSDP, DeepSpeed, mostly model parallelism), and keep priors in eval mode."""
        super().setup(stage)
        check_strategy(self.trainer, type(self).__name__, runs_sharded=self.runs_sharded)
        if stage == "fit":
            self.prediction_transforms.clear()  # they belong to the old weights
            expect_eval_mode(self.network.num_frozen)

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Refuse callbacks of the Trainer that need an attribute which this module lacks. Lightning calls this before their ``setup``."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_callbacks(self, self.trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        return super().configure_callbacks()

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """Mean loss over all indices of a finite set, or over drawn ones; an override may sum, reweight or regularise."""
        index = self._place(self.network.training_index(self.num_train_samples))
        loss = self.index_losses(self.network(x, index), self.targets(y, batch, index)).mean()
        return self.regularized(loss, x)

    def reported_loss(self, loss: Tensor) -> Tensor:
        """The value logged as ``train_loss``, computed from the result of :meth:`training_loss`."""
        return loss

    def regularized(self, loss: Tensor, x: Any) -> Tensor:
        """The training loss plus the ``regularizer``, if there is one."""
        return loss if self.regularizer is None else loss + self.regularizer(self.network, x)

    def targets(self, y: Tensor, batch: Any, index: Tensor) -> Targets:
        """Targets and weights of a training batch at these indices, from the batch's own ``weight`` and ``data_noise``."""
        own = batches.sample_weights(batch)
        if own is not None and own.shape != y.shape[:1]:
            raise InputError(
                f"`weight` of a batch must hold {len(y)} numbers, one per sample, but it holds {len(own)}."
            )
        if self.data_noise is None:
            return Targets(y, weights=own)
        sample = batches.known_sample_index(batch, f"data_noise={self.data_noise!r}").to(y.device)
        indexer = self.network.indexer
        # Targets come first: the weights do not depend on them.
        noisy = self.data_noise.targets(y, sample, index.to(y.device), indexer)
        weights = self.data_noise.weights(sample, index.to(y.device), indexer)
        return Targets(noisy, noisy.ndim > y.ndim, own, weights)

    def _place(self, index: Tensor) -> Tensor:
        # Python reads member numbers, and on the CPU that does not wait for a device.
        return index if self.network.num_indices is not None else index.to(self.device)

    def index_losses(self, output: Tensor, y: Tensor | Targets) -> Tensor:
        """The loss of each index [Z], from outputs [Z, B, ...] and their targets.

        It is the batch's total loss divided by its total count, and 0 if nothing counts. A loss over all indices has no separate
        value per index, so its value is repeated Z times.
        """
        return self.losses_and_count(output, y if isinstance(y, Targets) else Targets(y))[0]

    def losses_and_count(self, output: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return the loss of each index [Z] and the count that one index's loss was divided by."""
        self._check_output(output)
        self._check_target(targets.values[0] if targets.of_each_index else targets.values, output)
        return losses_and_count(output, targets, self.task, self.loss, self._progress)

    @property
    def _progress(self) -> Progress | None:
        """The progress of the training; None outside a training."""
        if trainer_of(self) is None or not self.trainer.training:
            return None
        return Progress(self.trainer.global_step, self.trainer.current_epoch)

    def teardown(self, stage: str) -> None:
        """Raise an error that names an empty loader; Lightning itself ends such a run silently."""
        super().teardown(stage)
        batches.check_not_empty(self.trainer, stage)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of :meth:`training_loss`, logged as ``train_loss``."""
        x, y = self.labelled(batch, batch_idx)
        try:
            loss = self.training_loss(x, y, batch)
        except RuntimeError as error:
            self._explain(error, x)
            raise
        if self.global_step == 0:
            checks.check_first_loss(loss)
        self._log_training(self.reported_loss(loss.detach()), batches.num_rows(x, y))
        return loss

    def _log_training(self, loss: Tensor, num_rows: int | None) -> None:
        self.log("train_loss", loss, prog_bar=True, batch_size=num_rows)
        progress = self._progress
        for name, value in ({} if progress is None else self.task.logged(progress)).items():
            self.log(name, value, batch_size=1)

    def on_validation_start(self) -> None:
        """Create a set of metrics per loader."""
        self.val_metrics = make_metrics(self.task, self.trainer.val_dataloaders, "val").to(self.device)
        self._log_before_batches("val", self.val_metrics)

    def on_test_start(self) -> None:
        """Create a set of metrics per loader."""
        self.test_metrics = make_metrics(self.task, self.trainer.test_dataloaders, "test").to(self.device)
        self._log_before_batches("test", self.test_metrics)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update and log ``val_loss`` and the validation metrics."""
        loaders = loader_list(self.trainer.val_dataloaders)
        self._evaluate("val", self.val_metrics, loaders, batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update and log ``test_loss`` and the test metrics."""
        loaders = loader_list(self.trainer.test_dataloaders)
        self._evaluate("test", self.test_metrics, loaders, batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Prediction:
        """Return the prediction for a batch ``(x, y)``, a bare ``x`` or a mapping; a target is ignored."""
        x, _ = self.unpack_batch(batch)
        return self._predict(x, f"of batch {batch_idx}")

    # ------------------------------------------------------------------ metrics

    def on_validation_epoch_end(self) -> None:
        """Let the task review the metrics, and warn of problems that they show."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            return
        training = self.trainer.state.fn == "fit"
        progress = Progress(self.trainer.global_step, self.trainer.current_epoch) if training else None
        for metrics in self.val_metrics:  # on every rank, even without a batch: a review may gather
            self.task.review(dict(metrics.items()), progress)  # type: ignore[operator]

    def _log_before_batches(self, stage: str, metric_sets: nn.ModuleList) -> None:
        self._logged_loaders = log_before_batches(self, stage, metric_sets)

    def _evaluate(
        self, stage: str, metric_sets: nn.ModuleList, loaders: list[Any], batch: Any, batch_idx: int, loader_idx: int
    ) -> None:
        metrics = metrics_of(metric_sets, loader_idx)
        update_metrics(self, metrics, loaders[loader_idx], batch, batch_idx)
        # Once per loader: Lightning keeps the metrics, and each call of `log` takes longer than a small batch.
        if loader_idx not in self._logged_loaders:
            log_metrics(self, stage, metrics, loader_idx)
            self._logged_loaders.add(loader_idx)

    # ------------------------------------------------------------------ checks

    def labelled(self, batch: Any, batch_idx: int) -> tuple[Any, Tensor]:
        """Input and target of a batch that needs both, after a check."""
        x, y = self.unpack_batch(batch)
        y = checks.check_labelled(x, y)
        if batch_idx == 0 or is_free(y):
            check_finite(x, f"of batch {batch_idx}")
        return x, y

    def _explain(self, error: RuntimeError, x: Any) -> None:
        """Re-raise an error about the shape or dtype of the first batch as one that names the input."""
        if not self._output_checked:
            checks.raise_shape_error(error, x)

    def _check_target(self, y: Tensor, output: Tensor) -> None:
        values = is_free(y) or not self._targets_checked
        self.task.check_target(y, output, values=values)
        self._targets_checked = True

    def _check_output(self, output: Tensor) -> None:
        if not self._output_checked and not torch.compiler.is_compiling():
            checks.check_first_output(self, output)
            self._output_checked = True

    # ------------------------------------------------------------------ optimizer and checkpoint

    def optimized_parameters(self) -> list[Any]:
        """Return the optimizer's first argument: the parameters that need a gradient, or parameter groups."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over all parameters that need a gradient, and its scheduler."""
        try:
            optimizer: torch.optim.Optimizer = self.optimizer(self.optimized_parameters())
        except (TypeError, ValueError) as error:
            raise InputError(f"Argument `optimizer` does not build an optimizer: {error}") from error
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]
