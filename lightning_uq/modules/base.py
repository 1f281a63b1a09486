"""The steps every method shares; a method adds its network, and what is special about its training."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric
from typing_extensions import Self

from lightning_uq import batches
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError, UQError
from lightning_uq.losses.data_noise import DataNoise
from lightning_uq.losses.index import IndexLoss, Penalty, takes_indices
from lightning_uq.metrics.base import MeanLoss
from lightning_uq.modules.resume import ExactResume
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.factory import Factory, build_network, factory_from_config, factory_to_config, is_plain
from lightning_uq.predictions import Prediction
from lightning_uq.running.transforms import PredictionTransforms
from lightning_uq.strategies import check_strategy
from lightning_uq.tasks import Progress, Stage, Task, describe, sums_and_counts, task_of

# The classes beside the callables are what LightningCLI builds from a class path: it takes a callable for a factory of what it
# returns.
Loss = Callable[[Tensor, Tensor], Tensor] | IndexLoss | nn.Module
Regularizer = Callable[[EpistemicNetwork, Any], Tensor] | Penalty | nn.Module

MAX_MEMBERS = 32
"""Predictions keep their members up to this many indices, unless ``return_members`` asks for all."""


class Targets(NamedTuple):
    """What a training loss compares outputs [Z, B, ...] with.

    Attributes:
        values: Targets [B, ...], or [Z, B, ...] if every index has its own.
        of_each_index: Whether every index has its own.
        weights: The samples' own weights [B], which normalise the loss as well: sum w l / sum w.
        noise_weights: Weights [Z, B] or [B] of ``data_noise``, which do not: mean w l. Their expectation is 1.
    """

    values: Tensor
    of_each_index: bool = False
    weights: Tensor | None = None
    noise_weights: Tensor | None = None


class UncertaintyModule(ExactResume):
    """A LightningModule around an epistemic network f(x, z): the steps, metrics and predictions of every method.

    A method subclasses it, builds its :class:`EpistemicNetwork`, and overrides what is special: often only
    :meth:`training_loss`. The task says what the outputs mean. The steps log ``train_loss``, ``val_*`` and ``test_*``; a sample
    that a distributed sampler repeats as padding is counted once. A mapping's ``weight`` [B] weighs its samples in the training
    loss: sum_b w_b l_b / sum_b w_b. A resumed training ends as the uninterrupted one: see :class:`ExactResume`.

    Args:
        network: The epistemic network, or a factory of it (which a checkpoint can remember).
        task: What the outputs mean: a :class:`~lightning_uq.tasks.Task` or its name, for instance ``"classification"``
            (logits [B, C]), ``"segmentation"`` (maps [B, C, *P]) or ``"regression"`` (means and raw variances [B, 2 D]).
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer; a ``ReduceLROnPlateau`` follows ``val_loss`` unless it names a monitor.
        loss: ``loss(output[B, ...], target)`` for one index, a scalar or the samples' losses [B, ...], instead of the task's.
            A loss with an attribute ``over_indices = True``, as :class:`~lightning_uq.losses.JointLoss`, takes the outputs
            [Z, B, ...] of all.
        num_train_samples: Indices drawn per training step, where the index set is infinite; of a finite one all are taken. None:
            the method's own ``default_train_samples``.
        num_eval_samples: Indices per evaluation, where the index set is infinite.
        return_members: Whether predictions keep their members [Z, B, ...]: True, False, or None for "up to 32".
        data_noise: Noise on the training data that belongs to (sample, index):
            :class:`~lightning_uq.losses.BootstrapNoise` or :class:`~lightning_uq.losses.GaussianTargetNoise`. The batches must
            carry their samples' positions: see :class:`~lightning_uq.data.Indexed`.
        regularizer: ``regularizer(network, x) -> scalar``, added to the training loss: for instance
            :class:`~lightning_uq.losses.PriorLoss` or :class:`~lightning_uq.losses.L2WeightDecay`.

    Attributes:
        prediction_transforms: What callbacks have attached to the predictions, a calibration or a density:
            :class:`~lightning_uq.running.transforms.PredictionTransforms`.
        default_train_samples: The method's default for ``num_train_samples``.
        preferred_ood_scores: The method's out-of-distribution scores, fixed before any such data is seen: the first one that
            the task knows is taken, else the task's own.
    """

    default_train_samples: ClassVar[int] = 1
    preferred_ood_scores: ClassVar[tuple[str, ...]] = ()
    # One set of metrics per data loader, made when the number of loaders is known.
    val_metrics: nn.ModuleList
    test_metrics: nn.ModuleList

    def __init__(
        self,
        network: EpistemicNetwork | Factory | Callable[[], nn.Module],
        *,
        task: Task | str = "classification",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Loss | None = None,
        num_train_samples: int | None = None,
        num_eval_samples: int = 100,
        return_members: bool | None = None,
        data_noise: DataNoise | None = None,
        regularizer: Regularizer | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        built = given_network(network)
        if not isinstance(built, EpistemicNetwork):
            raise InputError(
                f"Expected argument `network` to be an EpistemicNetwork, or a factory of one, but got {type(built).__name__}; "
                "DeterministicModule takes a plain network."
            )
        self.network: EpistemicNetwork = built
        self.task: Task = task_of(restore_argument(task, "task"))
        self.optimizer = restore_argument(optimizer, "optimizer")
        self.lr_scheduler = restore_argument(lr_scheduler, "lr_scheduler")
        self.loss = restore_argument(loss, "loss")
        self.num_train_samples = self.default_train_samples if num_train_samples is None else num_train_samples
        self.num_eval_samples = num_eval_samples
        self.return_members = return_members
        self.data_noise = restore_argument(data_noise, "data_noise")
        self.regularizer = restore_argument(regularizer, "regularizer")
        if getattr(self.data_noise, "of_targets", False) and not self.task.has_numeric_targets:
            raise InputError(
                f"`data_noise` must leave the targets of {describe(self.task)} as they are, but {self.data_noise!r} changes "
                "them."
            )
        kind = self.network.read_output.output
        if kind in ("probs", "log_probs") and not self.task.takes_probabilities:
            raise InputError(
                f"{describe(self.task)} needs the network's raw outputs, but argument `output` is {kind!r}. Pass 'logits', or a "
                "function that picks them."
            )
        self.prediction_transforms = PredictionTransforms()
        self._output_checked = False
        self._targets_checked = False
        self._is_logged = False
        self._training_arguments = {name: value for name, value in given.items() if name != "network"}
        if type(self) is UncertaintyModule:  # a method saves its own arguments
            self._save_arguments(network=network)

    @property
    def ood_score(self) -> str:
        """The default out-of-distribution score: the method's preferred one if the task knows it, else the task's."""
        known = self.task.score_names
        return next((name for name in self.preferred_ood_scores if name in known), self.task.ood_score)

    # ------------------------------------------------------------------ outputs and predictions

    def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Input and target of a batch: ``(x, y)``, a bare ``x``, or a mapping; override it for anything else."""
        return batches.unpack_batch(batch)

    def forward(self, x: Any) -> Tensor:
        """Raw outputs [Z, B, ...] over the evaluation indices: logits, or means and raw variances."""
        index = self._place(self.network.evaluation_index(self.num_eval_samples))
        try:
            output: Tensor = self.network(x, index)
        except RuntimeError as error:
            self._explain(error, x)
            raise
        self._check_output(output)
        return output

    def prediction(self, output: Tensor) -> Prediction:
        """The prediction that outputs [Z, B, ...] stand for, with all its members and before any transform."""
        return self.task.predict(output)

    def predict(self, x: Any) -> Prediction:
        """The prediction for inputs x [B, ...], as :meth:`predict_step` makes it for a batch.

        It is pooled, and so Z times smaller, above 32 indices or if ``return_members`` is False. It carries what callbacks
        such as ``TemperatureScaling`` and ``FitGMM`` have fitted, see ``prediction_transforms``.

        Raises:
            NotFittedError: A callback was fitted on other weights than the module has.
        """
        with self.prediction_transforms.observing(self) as transformed:
            output = self(x)
        self._check_numbers(output)
        prediction = transformed(self.prediction(output))
        keep = len(output) <= MAX_MEMBERS if self.return_members is None else self.return_members
        return prediction if keep else prediction.pool()

    # ------------------------------------------------------------------ steps

    def setup(self, stage: str) -> None:
        """Refuse strategies under which this was not tested (FSDP, DeepSpeed, model parallelism); priors are in eval mode always.

        A training takes all ``prediction_transforms`` off, since the weights that they belong to change.
        """
        super().setup(stage)
        check_strategy(self.trainer, type(self).__name__)
        if stage == "fit":
            self.prediction_transforms.clear()
            expect_eval_mode(getattr(self.network, "num_frozen", 0))

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """Mean of the loss over all indices of a finite set, or over drawn ones; an override may sum, reweight or regularise."""
        index = self._place(self._training_index())
        loss = self.index_losses(self.network(x, index), self.targets(y, batch, index)).mean()
        return self.regularized(loss, x)

    def regularized(self, loss: Tensor, x: Any) -> Tensor:
        """A training loss with the ``regularizer`` added, if there is one."""
        return loss if self.regularizer is None else loss + self.regularizer(self.network, x)

    def _training_index(self) -> Tensor:
        num = self.network.num_indices
        return self.network.sample_index(self.num_train_samples) if num is None else self.network.evaluation_index(num)

    def targets(self, y: Tensor, batch: Any, index: Tensor) -> Targets:
        """Targets and weights of a training batch for these indices: the batch's own ``weight``, and ``data_noise``."""
        own = batches.sample_weights(batch)
        if own is not None and own.shape != y.shape[:1]:
            raise InputError(
                f"`weight` of a batch must hold {len(y)} numbers, one per sample, but it holds {len(own)}."
            )
        if self.data_noise is None:
            return Targets(y, weights=own)
        sample = batches.known_sample_index(batch, f"data_noise={self.data_noise!r}").to(y.device)
        indexer = getattr(self.network, "indexer", None)
        # Targets first: the weights do not depend on them.
        noisy = self.data_noise.targets(y, sample, index.to(y.device), indexer)
        weights = self.data_noise.weights(sample, index.to(y.device), indexer)
        return Targets(noisy, noisy.ndim > y.ndim, own, weights)

    def _place(self, index: Tensor) -> Tensor:
        # Member numbers are read by Python: on the CPU that waits for no device.
        return index if self.network.num_indices is not None else index.to(self.device)

    def index_losses(self, output: Tensor, y: Tensor | Targets) -> Tensor:
        """The loss of each index [Z] from outputs [Z, B, ...] and their targets.

        It is the batch's total loss divided by its total count, and 0 if nothing counts. A loss over all indices has no part
        for each: its value stands Z times.
        """
        return self._losses_and_count(output, y if isinstance(y, Targets) else Targets(y))[0]

    def _losses_and_count(self, output: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The loss of each index [Z], and the number that one of them was divided by."""
        y, of_each, weights, noise_weights = targets
        self._check_output(output)
        self._check_target(y[0] if of_each else y, output)
        weighted = weights is not None or noise_weights is not None
        num, rows = output.shape[:2]
        if self.loss is not None and takes_indices(self.loss):
            if weighted:
                raise InputError(
                    f"`loss` must be one of single indices, so that samples can be weighted, but it is {self.loss!r}."
                )
            joint: Tensor = self.loss(output, y)
            return joint.expand(num), _number(rows, output)
        each = y if of_each else y.expand(num, *y.shape)
        if self.loss is None:
            sums, counts = self.task.sample_losses(output.flatten(0, 1), each.flatten(0, 1), self._progress)
        else:
            losses = torch.stack([self.loss(*pair) for pair in zip(output, each, strict=True)])
            if not weighted and losses.shape[:2] != output.shape[:2]:
                return losses.flatten(1).mean(1) if losses.ndim > 1 else losses, _number(rows, output)
            if losses.shape[:2] != output.shape[:2]:
                raise InputError(
                    f"`loss` must return the losses of the samples, [{rows}] (for torch's own: reduction='none'), so that they "
                    f"can be weighted, but it returned shape {list(losses.shape[1:])}."
                )
            sums, counts = sums_and_counts(losses.flatten(0, 1))
        sums, counts = sums.reshape(num, rows), counts.reshape(num, rows)
        if noise_weights is not None:
            sums = sums * noise_weights.to(sums)
        if weights is not None:
            sums, counts = sums * weights.to(sums), counts * weights.to(counts)
        total, count = sums.sum(1), counts.sum(1)
        # What nothing counts adds nothing, whatever its sum (label smoothing has one where all weights are 0).
        return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0 * total), count[0]

    @property
    def _progress(self) -> Progress | None:
        """How far the training is; None outside a training."""
        if self._trainer is None or not self.trainer.training:
            return None
        return Progress(self.trainer.global_step, self.trainer.current_epoch)

    def teardown(self, stage: str) -> None:
        """Name a loader that held nothing: Lightning would have trained, tested or predicted on no batch at all."""
        super().teardown(stage)
        batches.check_not_empty(self.trainer, stage)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of :meth:`training_loss`, logged as ``train_loss``."""
        x, y = self._labelled(batch, batch_idx)
        try:
            loss = self.training_loss(x, y, batch)
        except RuntimeError as error:
            self._explain(error, x)
            raise
        self._check_first_loss(loss)
        self._log_training(loss.detach(), x)
        return loss

    def _log_training(self, loss: Tensor, x: Any) -> None:
        self.log("train_loss", loss, prog_bar=True, batch_size=batches.batch_size(x))
        progress = self._progress
        for name, value in ({} if progress is None else self.task.logged(progress)).items():
            self.log(name, value, batch_size=1)

    def on_validation_start(self) -> None:
        """Make a set of metrics for every loader."""
        self.val_metrics = self._make_metrics(self.trainer.val_dataloaders, "val")
        self._log_before_batches("val", self.val_metrics)

    def on_test_start(self) -> None:
        """Make a set of metrics for every loader."""
        self.test_metrics = self._make_metrics(self.trainer.test_dataloaders, "test")
        self._log_before_batches("test", self.test_metrics)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update and log ``val_loss`` and the validation metrics."""
        loaders = _as_list(self.trainer.val_dataloaders)
        self._evaluate("val", self.val_metrics, loaders, batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update and log ``test_loss`` and the test metrics."""
        loaders = _as_list(self.trainer.test_dataloaders)
        self._evaluate("test", self.test_metrics, loaders, batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Prediction:
        """The prediction for a batch ``(x, y)``, a bare ``x`` or a mapping; a target is not looked at."""
        x, _ = self.unpack_batch(batch)
        self._check_input(x, batch_idx)
        return self.predict(x)

    # ------------------------------------------------------------------ metrics

    def on_validation_epoch_end(self) -> None:
        """Let the task look at the metrics, and warn of what they show."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            return
        training = self.trainer.state.fn == "fit"
        progress = Progress(self.trainer.global_step, self.trainer.current_epoch) if training else None
        for metrics in self.val_metrics:  # on every rank, with or without a batch: a review may gather
            self.task.review(dict(metrics.items()), progress)  # type: ignore[operator]

    def _make_metrics(self, loaders: Any, stage: Stage) -> nn.ModuleList:
        # A fresh set per loader: metrics that several loaders share would mix their samples.
        sets = [nn.ModuleDict({"loss": MeanLoss(), **self.task.metrics(stage)}) for _ in _as_list(loaders)]
        return nn.ModuleList(sets).to(self.device)

    def _logs_before_batches(self) -> bool:
        """Whether it is certain before the first batch that the metrics will be logged."""
        return True

    def _log_before_batches(self, stage: str, metric_sets: nn.ModuleList) -> None:
        """Log the metrics of a single loader on every rank, so that a rank without a batch computes them too.

        At a loader's end Lightning computes what its steps logged, and the ranks wait for each other. With several loaders
        every rank needs a batch of each.
        """
        self._is_logged = self.trainer.world_size > 1 and len(metric_sets) == 1 and self._logs_before_batches()
        if self._is_logged:
            self._log_metrics(stage, dict(metric_sets[0].items()), 0)  # type: ignore[operator]

    def _log_metrics(self, stage: str, metrics: dict[str, Metric], loader_idx: int) -> None:
        for name, metric in metrics.items():
            self.log(
                f"{stage}_{name}",
                metric,
                prog_bar=stage == "val" and name in ("loss", self.task.metric_on_bar),
                batch_size=1,  # a metric counts for itself
                metric_attribute=f"{stage}_metrics.{loader_idx}.{name}",
            )

    def _evaluate(
        self, stage: str, metric_sets: nn.ModuleList, loaders: list[Any], batch: Any, batch_idx: int, loader_idx: int
    ) -> None:
        x, y = self._labelled(batch, batch_idx)
        output = self(x)
        index = batches.sample_index(batch)
        metrics = dict(metric_sets[loader_idx].items())  # type: ignore[operator]  # a ModuleList yields bare Modules
        position, keep = batches.distributed_rows(loaders[loader_idx], batch_idx, len(y))
        if position is not None and keep is not None:
            # Positions also keep the joint log-loss the same on any number of ranks.
            index = (position if index is None else index.cpu())[keep]
            output, y = output[:, keep.to(output.device)], y[keep.to(y.device)]
        if len(y):
            self._check_numbers(output)
            losses, count = self._losses_and_count(output, Targets(y))
            metrics["loss"].update(losses.mean(), count)
            self._update_metrics(metrics, output, y, index)
        if not self._is_logged:
            self._log_metrics(stage, metrics, loader_idx)

    def _update_metrics(self, metrics: dict[str, Metric], output: Tensor, y: Tensor, index: Tensor | None) -> None:
        """Update all metrics but the loss with the rows that count; the prediction is pooled once for all of them."""
        prediction = self.prediction_transforms.apply(self, self.prediction(output))
        prediction, target = self.task.rows(prediction, y)
        if not len(target):
            return
        for name, metric in metrics.items():
            if name == "loss":
                continue
            if getattr(metric, "takes_index", False):
                metric.update(prediction, target, index)
            else:
                metric.update(prediction, target)

    # ------------------------------------------------------------------ checks

    def _labelled(self, batch: Any, batch_idx: int) -> tuple[Any, Tensor]:
        x, y = self.unpack_batch(batch)
        if y is None:
            raise InputError(
                "Expected a batch with a target, `(x, y)` or a mapping with `input` and `target`, but it holds an input "
                "alone. Override `unpack_batch` where it lies elsewhere."
            )
        if not isinstance(y, Tensor):
            raise InputError(
                f"Expected the targets of a batch to be a tensor, but got a {type(y).__name__}. Let the data set give numbers; "
                "where the batch is no pair, as that of several training loaders, override `unpack_batch`."
            )
        self._check_input(x, batch_idx)
        return x, y

    def _check_input(self, x: Any, batch_idx: int) -> None:
        for leaf in tree_leaves(dict(x) if isinstance(x, Mapping) else x):
            # On a GPU a look at the values waits for the device, so there only the first batch is looked at.
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and (batch_idx == 0 or leaf.device.type == "cpu"):
                # One of several inputs may be a mask to add, of which minus infinity is a part.
                bad = ~leaf.isfinite() if leaf is x else leaf.isnan() | (leaf == math.inf)
                if bool(bad.any()):
                    rows = bad.flatten(1).any(1) if bad.ndim > 1 else bad.reshape(-1)
                    raise InputError(
                        f"Expected the input to be finite, but {int(rows.sum())} of {len(rows)} rows of batch {batch_idx} hold "
                        "NaN or infinity."
                    )

    def _explain(self, error: RuntimeError, x: Any) -> None:
        """Tell what torch says of shapes that do not meet, at the first batch, as the input's misfit."""
        first = not self._output_checked and isinstance(x, Tensor)
        if first and any(word in str(error) for word in ("shape", "size", "dtype")):
            text = str(error).splitlines()[0]
            kind = f"shape {list(x.shape)} and {x.dtype}"
            raise InputError(f"The network does not take an input of {kind}: {text}") from error

    def _check_target(self, y: Tensor, output: Tensor) -> None:
        # On a GPU a look at the values waits for the device, so there only the first batch is looked at.
        values = y.device.type == "cpu" or not self._targets_checked
        self.task.check_target(y, output, values=values)
        self._targets_checked = True

    def _check_output(self, output: Tensor) -> None:
        if not self._output_checked and not torch.compiler.is_compiling():
            self.task.check_output(output)
            self._output_checked = True

    def _check_first_loss(self, loss: Tensor) -> None:
        # Later steps are not looked at: under fp16 a loss may overflow, and the step is skipped.
        if self.global_step == 0 and not bool(loss.isfinite()):
            raise InputError(
                f"Expected the loss of the first step to be finite, but got {loss.item()}: the network's weights or outputs "
                "hold NaN or infinity, or the loss does not fit them."
            )

    def _check_numbers(self, output: Tensor) -> None:
        bad = self.task.invalid(output)
        if bool(bad.any()):
            rows = int(bad.transpose(0, 1).flatten(1).any(1).sum())
            raise InputError(
                f"Expected the network to return finite numbers, but its outputs for {rows} of {output.shape[1]} rows hold NaN "
                "or infinity. Its weights may hold them too, after a training that diverged."
            )

    # ------------------------------------------------------------------ optimizer and checkpoint

    def optimized_parameters(self) -> list[Any]:
        """What the optimizer is called with: the parameters that need a gradient, or groups of them."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all parameters that need a gradient, and its scheduler."""
        try:
            optimizer: torch.optim.Optimizer = self.optimizer(self.optimized_parameters())
        except (TypeError, ValueError) as error:
            raise InputError(f"Expected argument `optimizer` to build an optimizer, but: {error}") from error
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    @_restricted_classmethod  # as Lightning's: called on an instance, it would leave that one as it was
    def load_from_checkpoint(
        cls,  # noqa: N805  # a class method
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, and by default from plain data alone, wherever the file lies; a file that does not fit is named.

        Args:
            checkpoint_path: The file.
            map_location: Where its tensors go.
            hparams_file: Hyper-parameters, where the file holds none.
            strict: Whether its weights' names have to match; None: as the module says.
            weights_only: False also runs code that is pickled in the file.
            kwargs: Constructor arguments that differ from the file's, or that it could not hold.

        Raises:
            InputError: The file is damaged, holds pickled code, or was not written by such a module.
        """
        given = (checkpoint_path, map_location, hparams_file, strict, weights_only)
        try:
            return super().load_from_checkpoint(*given, **kwargs)
        except (UQError, FileNotFoundError):
            raise
        except Exception as error:
            if isinstance(checkpoint_path, str | Path) and weights_only is not False:
                read_checkpoint(checkpoint_path, "argument `checkpoint_path` to name a checkpoint")
            text = " ".join(str(error).split()) or type(error).__name__
            reason = text if len(text) < 500 else f"{text[:500]} ..."
            raise InputError(
                f"Expected argument `checkpoint_path` to name a checkpoint of {cls.__name__}, but {checkpoint_path} does not fit: "
                f"{reason}"
            ) from error

    def _save_arguments(self, **arguments: Any) -> None:
        """Save constructor arguments as plain data, so that a checkpoint loads under ``weights_only=True``.

        A method names its own; those of :class:`UncertaintyModule` are added.
        An importable factory, optimizer or loss is saved by its name and arguments. What has no name (a lambda, a built
        network) is marked, and :func:`restore_argument` asks for it by name when a checkpoint is loaded without it.
        """
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()  # the command line's own configuration, which is plain data already
            return
        arguments = {**self._training_arguments, **arguments}
        self.save_hyperparameters({name: saved_argument(value) for name, value in arguments.items()})
        self._hparams_name = "kwargs"


def _number(value: int, like: Tensor) -> Tensor:
    return torch.tensor(float(value), device=like.device)  # half precision counts to 256


def training_option(training: Mapping[str, Any], name: str, default: Any) -> Any:
    """An argument of :class:`UncertaintyModule` that a method needs before its base is built.

    A method must not write ``training.get(...)`` or ``training.pop(...)``: the command line would take that for an argument
    without a type.
    """
    return restore_argument(training.get(name, default), name)


def take_training_option(training: dict[str, Any], name: str, default: Any) -> Any:
    """:func:`training_option`, taken out of the arguments: the method passes it to its base by itself."""
    return restore_argument(training.pop(name, default), name)


def given_network(network: Any) -> nn.Module:
    """What a module's argument ``network`` stands for: the network itself, or what its factory builds."""
    network = restore_argument(network, "network")
    return network if isinstance(network, nn.Module) else build_network(network)


def expect_eval_mode(num_modules: int) -> None:
    """Keep Lightning from warning of so many modules that are frozen, and so in eval mode always; of others it still does."""
    if num_modules:
        warnings.filterwarnings("ignore", rf".*Found {num_modules} module\(s\) in eval mode", PossibleUserWarning)


def saved_argument(value: Any) -> Any:
    """An argument as plain data; what cannot be imported again becomes ``{"unsaved": description}``."""
    if isinstance(value, np.generic):
        value = value.item()
    if is_plain(value):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        found = factory_to_config(type(value))
        saved = {name: saved_argument(field) for name, field in fields.items()}
        if found is not None and not any(_is_unsaved(field) for field in saved.values()):
            return {"class_path": found["target"], "init_args": saved}
    config = factory_to_config(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return {"unsaved": f"{named.__module__}.{named.__qualname__}"} if config is None else config


def restore_argument(value: Any, name: str) -> Any:
    """The inverse of :func:`saved_argument`.

    Raises:
        InputError: The argument could not be saved, and has to be passed again.
    """
    if _is_unsaved(value):
        raise InputError(
            f"Argument `{name}` was a {value['unsaved']}, which no checkpoint can hold as plain data. Pass it again: "
            f"`load_from_checkpoint(path, {name}=...)`; a `Factory` or an importable function is saved by its name."
        )
    if isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}:
        return Factory(value["class_path"], {k: restore_argument(v, name) for k, v in value["init_args"].items()})()
    return factory_from_config(value)


def _is_unsaved(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"unsaved"}


def _as_list(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]
