"""The steps every method shares; a method adds its network, and what is special about its training."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric, Metric
from typing_extensions import Self

from lightning_uq import batches
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError, UQError
from lightning_uq.losses.data_noise import DataNoise
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.losses.index import IndexLoss, Penalty, each_cross_entropy, takes_indices, weighted_mean
from lightning_uq.metrics import (
    CRPS,
    RMSE,
    BrierScore,
    ExpectedCalibrationError,
    GaussianNLL,
    IntervalCoverage,
    JointLogLoss,
    NegativeLogLikelihood,
)
from lightning_uq.modules.resume import ExactResume
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.factory import Factory, build_network, factory_from_config, factory_to_config, is_plain
from lightning_uq.networks.output import OutputShapeError, check_class_logits
from lightning_uq.predictions import CategoricalPrediction, GaussianMixturePrediction, Prediction
from lightning_uq.strategies import check_strategy

Task = Literal["classification", "regression"]
# The classes beside the callables are what LightningCLI builds from a class path: it takes a callable for a factory of what it
# returns.
Loss = Callable[[Tensor, Tensor], Tensor] | IndexLoss | nn.Module
Regularizer = Callable[[EpistemicNetwork, Any], Tensor] | Penalty | nn.Module

MAX_MEMBERS = 32
"""Predictions keep their members up to this many indices, unless ``return_members`` asks for all."""


class UncertaintyModule(ExactResume):
    """A LightningModule around an epistemic network f(x, z): the steps, metrics and predictions of every method.

    A method subclasses it, builds its :class:`EpistemicNetwork`, and overrides what is special: often only
    :meth:`training_loss`. The steps log ``train_loss``, ``val_*`` and ``test_*``; a sample that a distributed sampler
    repeats as padding is counted once. A mapping's ``weight`` [B] weighs its samples in the training loss (their weighted losses
    are divided by B). A resumed training ends as the uninterrupted one: see :class:`ExactResume`.

    Args:
        network: The epistemic network, or a factory of it (which a checkpoint can remember).
        task: ``"classification"`` (outputs are logits [B, C]) or ``"regression"`` (outputs [B, 2D]: means, then raw
            variances, of which the variance is softplus(raw) + 1e-6).
        num_classes: C, where it is known; the network's output is checked against it.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer; a ``ReduceLROnPlateau`` follows ``val_loss`` unless it names a monitor.
        loss: ``loss(output[B, ...], target) -> scalar`` for one index; default cross-entropy or Gaussian NLL. A loss with an
            attribute ``over_indices = True``, as :class:`~lightning_uq.losses.JointLoss`, takes the outputs [Z, B, ...] of all.
        num_train_samples: Indices drawn per training step, where the index set is infinite.
        num_eval_samples: Indices per evaluation, where the index set is infinite.
        return_members: Whether predictions keep their members [Z, B, C]: True, False, or None for "up to 32".
        data_noise: Noise on the training data that belongs to (sample, index):
            :class:`~lightning_uq.losses.BootstrapNoise` or :class:`~lightning_uq.losses.GaussianTargetNoise`. The batches must
            carry their samples' positions: see :class:`~lightning_uq.data.Indexed`.
        regularizer: ``regularizer(network, x) -> scalar``, added to the training loss: for instance
            :class:`~lightning_uq.losses.PriorLoss` or :class:`~lightning_uq.losses.L2WeightDecay`.

    Attributes:
        ood_score: The method's out-of-distribution score, fixed before any such data is seen.
    """

    ood_score: ClassVar[str] = "predictive_entropy"
    _outputs_per_target: int = 2  # a mean and a raw variance
    # One set of metrics a data loader, made when the number of loaders is known.
    val_metrics: nn.ModuleList
    test_metrics: nn.ModuleList

    def __init__(
        self,
        network: EpistemicNetwork | Factory | Callable[[], nn.Module],
        *,
        task: Task = "classification",
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: Loss | None = None,
        num_train_samples: int = 1,
        num_eval_samples: int = 100,
        return_members: bool | None = None,
        data_noise: DataNoise | None = None,
        regularizer: Regularizer | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if task not in ("classification", "regression"):
            raise InputError(f"Expected argument `task` to be 'classification' or 'regression', but got {task!r}.")
        known = num_classes is not None
        if known and (task == "regression" or not isinstance(num_classes, int) or num_classes < 2):
            raise InputError(
                f"Expected argument `num_classes` to be at least 2, and to be left out for regression, but got "
                f"{num_classes!r} with task={task!r}."
            )
        network = restore_argument(network, "network")
        built = network if isinstance(network, nn.Module) else build_network(network)
        if not isinstance(built, EpistemicNetwork):
            raise InputError(
                f"Expected argument `network` to be an EpistemicNetwork, or a factory of one, but got {type(built).__name__}; "
                "DeterministicModule takes a plain network."
            )
        self.network: EpistemicNetwork = built
        self.task = task
        self.num_classes = num_classes
        self.optimizer = restore_argument(optimizer, "optimizer")
        self.lr_scheduler = restore_argument(lr_scheduler, "lr_scheduler")
        self.loss = restore_argument(loss, "loss")
        self.num_train_samples = num_train_samples
        self.num_eval_samples = num_eval_samples
        self.return_members = return_members
        self.data_noise = restore_argument(data_noise, "data_noise")
        self.regularizer = restore_argument(regularizer, "regularizer")
        if task == "classification" and getattr(self.data_noise, "of_targets", False):
            raise InputError(
                f"Expected argument `data_noise` to leave class labels as they are, but got {self.data_noise!r}."
            )
        self._output_checked = False
        self._labels_checked = False
        if type(self) is UncertaintyModule:  # a method saves its own arguments
            self._save_arguments(**{**given, "network": network})

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
        """The prediction that outputs [Z, B, ...] stand for."""
        if self.task == "regression":
            return GaussianMixturePrediction(*split_gaussian(output))
        prediction = CategoricalPrediction(output)
        keep = len(output) <= MAX_MEMBERS if self.return_members is None else self.return_members
        return prediction if keep else prediction.pool()

    def predict(self, x: Any) -> Prediction:
        """The prediction for inputs x [B, ...], as :meth:`predict_step` makes it for a batch."""
        output = self(x)
        self._check_numbers(output)
        return self.prediction(output)

    # ------------------------------------------------------------------ steps

    def setup(self, stage: str) -> None:
        """Refuse strategies under which this was not tested (FSDP, DeepSpeed, model parallelism); priors are in eval mode always."""
        super().setup(stage)
        check_strategy(self.trainer, type(self).__name__)
        if stage == "fit":
            expect_eval_mode(getattr(self.network, "num_frozen", 0))

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """Mean over the drawn indices of the loss; an override may sum, reweight or regularise."""
        num = self.network.num_indices or self.num_train_samples
        index = self._place(self.network.sample_index(num))
        y, weights = self.noisy_targets(y, batch, index)
        loss = self.index_losses(self.network(x, index), y, weights).mean()
        return loss if self.regularizer is None else loss + self.regularizer(self.network, x)

    def noisy_targets(self, y: Tensor, batch: Any, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Targets [B, ...] or [Z, B, ...], and the samples' weights [Z, B] or [B], if any, for these indices.

        ``data_noise`` makes them; a mapping's own ``weight`` [B] multiplies its weights.
        """
        own = batches.sample_weights(batch)
        if own is not None and own.shape != y.shape[:1]:
            raise InputError(
                f"Expected `weight` of a batch to hold {len(y)} numbers, one a sample, but got {len(own)}."
            )
        if self.data_noise is None:
            return y, own
        sample = batches.known_sample_index(batch, f"data_noise={self.data_noise!r}").to(y.device)
        indexer = getattr(self.network, "indexer", None)
        # Targets first: the weights do not depend on them.
        noisy = self.data_noise.targets(y, sample, index.to(y.device), indexer)
        weights = self.data_noise.weights(sample, index.to(y.device), indexer)
        if own is not None:
            weights = own if weights is None else weights * own
        return noisy, weights

    def _place(self, index: Tensor) -> Tensor:
        # Member numbers are read by Python: on the CPU that waits for no device.
        return index if self.network.num_indices is not None else index.to(self.device)

    def index_losses(self, output: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of each index [Z] from outputs [Z, B, ...] and targets [B, ...], or [Z, B, ...] where each has its own.

        ``weights`` [Z, B] or [B] weigh the samples. A loss over all indices has no part for each: its value stands Z times.
        """
        self._check_output(output)
        self._check_target(output, y)
        if self.loss is not None and takes_indices(self.loss):
            if weights is not None:
                raise InputError(
                    f"Expected argument `loss` to be one of single indices, so that samples can be weighted, but got {self.loss!r}."
                )
            joint: Tensor = self.loss(output, y)
            return joint.expand(len(output))
        if self.loss is not None or type(self).example_loss is not UncertaintyModule.example_loss:
            targets = y if self._has_target_of_each(y) else y.expand(len(output), *y.shape)
            losses = torch.stack([self.example_loss(*pair) for pair in zip(output, targets, strict=True)])
            if weights is not None and losses.shape != output.shape[:2]:
                raise InputError(
                    f"Expected argument `loss` to return the losses of the samples, [{output.shape[1]}], so that they can be "
                    f"weighted, but it returned shape {list(losses.shape[1:])}."
                )
        elif self.task == "regression":
            losses = gaussian_nll_loss(*split_gaussian(output), y, reduction="none")
        else:
            losses = each_cross_entropy(output, y)
        return weighted_mean(losses, weights) if losses.ndim > 1 else losses

    def _has_target_of_each(self, y: Tensor) -> bool:
        return self.task == "regression" and y.ndim == 3

    def example_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of one index's outputs [B, ...], a scalar."""
        if self.loss is not None:
            value: Tensor = self.loss(output, y)
            return value
        if self.task == "regression":
            return gaussian_nll_loss(*split_gaussian(output), y)
        return F.cross_entropy(output, y)

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
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=batches.batch_size(x))
        return loss

    def on_validation_start(self) -> None:
        """Make a set of metrics for every loader."""
        self.val_metrics = self._make_metrics(self.trainer.val_dataloaders, self.validation_metrics)

    def on_test_start(self) -> None:
        """Make a set of metrics for every loader."""
        self.test_metrics = self._make_metrics(self.trainer.test_dataloaders, self.evaluation_metrics)

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

    def validation_metrics(self) -> dict[str, Metric]:
        """Metrics logged as ``val_<name>`` beside ``val_loss``; cheap ones, since they run every epoch."""
        if self.task == "regression":
            return {"nll": GaussianNLL(), "rmse": RMSE()}
        return {"accuracy": MeanMetric(), "nll": NegativeLogLikelihood(), "ece": ExpectedCalibrationError()}

    def evaluation_metrics(self) -> dict[str, Metric]:
        """Metrics logged as ``test_<name>`` beside ``test_loss``."""
        if self.task == "regression":
            return {**self.validation_metrics(), "crps": CRPS(), "coverage_95": IntervalCoverage(0.95)}
        return {**self.validation_metrics(), "brier": BrierScore(), "joint_log_loss": JointLogLoss()}

    def _make_metrics(self, loaders: Any, make: Callable[[], dict[str, Metric]]) -> nn.ModuleList:
        # A fresh set a loader: metrics that several loaders share would mix their samples.
        sets = [nn.ModuleDict({"loss": MeanMetric(), **make()}) for _ in _as_list(loaders)]
        return nn.ModuleList(sets).to(self.device)

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
            prediction = self.prediction(output)
            for name, metric in metrics.items():
                if name == "loss":
                    metric.update(self.index_losses(output, y).mean(), weight=len(y))
                elif name == "accuracy":
                    metric.update((prediction.label == y).float())  # type: ignore[attr-defined]
                elif isinstance(metric, JointLogLoss):
                    metric.update(output, y, index)
                else:
                    metric.update(prediction, y)
        for name, metric in metrics.items():
            self.log(
                f"{stage}_{name}",
                metric,
                prog_bar=stage == "val" and name in ("loss", "accuracy", "rmse"),
                batch_size=max(len(y), 1),
                metric_attribute=f"{stage}_metrics.{loader_idx}.{name}",
            )

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
        if batch_idx == 0 or y.device.type == "cpu":
            if self.task == "classification":
                check_labels(y, self.num_classes)
            elif not y.is_floating_point():
                raise InputError(f"Expected the targets to be floating-point numbers, but got {y.dtype}.")
            elif not bool(torch.isfinite(y).all()):
                raise InputError("Expected the targets to be finite, but they hold NaN or infinity.")
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

    def _check_target(self, output: Tensor, y: Tensor) -> None:
        if self.task == "regression":
            lead = output.shape[:-1] if self._has_target_of_each(y) else output.shape[1:-1]
            expected = (*lead, output.shape[-1] // self._outputs_per_target)
            kind, remedy = "the targets", "an array of another shape would broadcast."
        else:
            expected = (*output.shape[1:2], *output.shape[3:])
            kind = "the class labels"
            remedy = (
                "Where the network returns features, pass argument `output` a function that makes the logits [B, C]."
            )
        if y.shape != expected:
            raise InputError(
                f"Expected {kind} to be of shape {list(expected)}, since the network returns {list(output.shape[1:])}, but "
                f"got {list(y.shape)}; {remedy}"
            )
        if self.task == "classification" and (y.device.type == "cpu" or not self._labels_checked):
            check_labels(y, output.shape[2])
            self._labels_checked = True

    def _check_output(self, output: Tensor) -> None:
        if self._output_checked or torch.compiler.is_compiling():
            return
        if self.task == "classification":
            check_class_logits(output, self.num_classes, self.network.read_output.output)
        elif output.ndim != 3 or output.shape[-1] % 2:
            raise OutputShapeError(
                "Expected a regression network to return [B, 2 D], the means and the raw variances, but got shape "
                f"{list(output.shape[1:])}. Pass argument `output` a function that makes them."
            )
        self._output_checked = True

    def _check_first_loss(self, loss: Tensor) -> None:
        # Later steps are not looked at: under fp16 a loss may overflow, and the step is skipped.
        if self.global_step == 0 and not bool(loss.isfinite()):
            raise InputError(
                f"Expected the loss of the first step to be finite, but got {loss.item()}: the network's weights or outputs "
                "hold NaN or infinity, or the loss does not fit them."
            )

    def _check_numbers(self, output: Tensor) -> None:
        # A class may be ruled out by a logit of minus infinity; nothing else is a number to predict with.
        bad = output.isnan() | (output == math.inf) if self.task == "classification" else ~output.isfinite()
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

        An importable factory, optimizer or loss is saved by its name and arguments. What has no name (a lambda, a built
        network) is marked, and :func:`restore_argument` asks for it by name when a checkpoint is loaded without it.
        """
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()  # the command line's own configuration, which is plain data already
            return
        self.save_hyperparameters({name: saved_argument(value) for name, value in arguments.items()})
        self._hparams_name = "kwargs"


def expect_eval_mode(num_modules: int) -> None:
    """Keep Lightning from warning of so many modules that are frozen, and so in eval mode always; of others it still does."""
    if num_modules:
        warnings.filterwarnings("ignore", rf".*Found {num_modules} module\(s\) in eval mode", PossibleUserWarning)


def saved_argument(value: Any) -> Any:
    """An argument as plain data; what cannot be imported again becomes ``{"unsaved": description}``."""
    if is_plain(value):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        found = factory_to_config(type(value))
        if found is not None and is_plain(fields):
            return {"class_path": found["target"], "init_args": fields}
    config = factory_to_config(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return {"unsaved": f"{named.__module__}.{named.__qualname__}"} if config is None else config


def restore_argument(value: Any, name: str) -> Any:
    """The inverse of :func:`saved_argument`.

    Raises:
        InputError: The argument could not be saved, and has to be passed again.
    """
    if isinstance(value, dict) and set(value) == {"unsaved"}:
        raise InputError(
            f"Argument `{name}` was a {value['unsaved']}, which no checkpoint can hold as plain data. Pass it again: "
            f"`load_from_checkpoint(path, {name}=...)`; a `Factory` or an importable function is saved by its name."
        )
    if isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}:
        return Factory(value["class_path"], dict(value["init_args"]))()
    return factory_from_config(value)


def check_labels(y: Tensor, num_classes: int | None) -> None:
    """An :class:`InputError` where class labels are not integers in [0, C)."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"Expected the targets to be integer class labels, but got {y.dtype}.")
    if y.numel():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= (math.inf if num_classes is None else num_classes):
            upper = "C" if num_classes is None else str(num_classes)
            raise InputError(
                f"Expected the targets to be class labels in [0, {upper}), but got values {low} to {high}."
            )


def _as_list(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]
