"""All private names of Lightning that this package uses, each with the reason why no public name serves.

``tests/test_lightning_private.py`` fails if a Lightning release drops one of them.
"""

from typing import Any

from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.distributed import _DatasetSamplerWrapper
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import (
    LightningOptimizer,
    _configure_optimizers,
    _configure_schedulers_automatic_opt,
    _validate_optimizers_attached,
    _validate_scheduler_api,
)
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_uq.lightning_trees import in_tree_of, is_instance

# Like Lightning's own `load_from_checkpoint`, it refuses to be called on an instance. An override needs the same decorator.
restricted_classmethod = _restricted_classmethod

# Whether an optimizer unscales gradients inside its step, as fused ones do. Only the precision plugin asks for this.
optimizer_handles_unscaling = _optimizer_handles_unscaling

# Reads and checks what `configure_optimizers` returns. The public entry point takes a Trainer and its module, but a member of an
# ensemble has no Trainer of its own.
configure_optimizers = _configure_optimizers
configure_schedulers = _configure_schedulers_automatic_opt
check_optimizers_attached = _validate_optimizers_attached


def check_scheduler_api(configs: list[LRSchedulerConfig], member: LightningModule) -> None:
    """Refuse schedulers as Lightning does, with the check of the member's class tree, which looks for overrides of that tree's hook."""
    in_tree_of(member, _validate_scheduler_api)(configs, member)


def is_local_path(path: str) -> bool:
    """Whether a path is on this machine's file system.

    The plugin that writes checkpoints atomically renames files, which is atomic on local file systems only. Lightning uses this
    function to decide where to write. fsspec's own parser gives other answers on Windows.
    """
    return bool(_is_local_file_protocol(path))


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that ``trainer.save_checkpoint`` would write.

    The public method writes the file itself: with the weights of an averaging callback, and without a hook for our entries.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def before_transfer(module: LightningModule, batch: Any) -> Any:
    """Apply the module's ``on_before_batch_transfer`` to a batch, as Lightning does.

    The public hook needs the loader's number, and the data module may override it; this function finds the owner.
    """
    return module._on_before_batch_transfer(batch)


def transferred(module: LightningModule, batch: Any, device: Any) -> Any:
    """Apply all of the module's transfer hooks to a batch, without a Trainer: ``strategy.batch_to_device`` needs one."""
    return module._apply_batch_transfer_handler(before_transfer(module, batch), device=device)


def trainer_of(module: Any) -> Trainer | None:
    """The module's Trainer, or None. The public ``trainer`` property raises if there is none."""
    trainer: Trainer | None = getattr(module, "_trainer", None)
    return trainer


def training_source(trainer: Trainer) -> Any:
    """The source of the training loader: ``trainer.train_dataloader`` is None until training begins."""
    return trainer.fit_loop._data_source


def validation_source(trainer: Trainer) -> Any:
    """The source of the validation loaders during ``fit``: ``trainer.val_dataloaders`` is None until training begins."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def users_sampler(sampler: Any) -> Any:
    """The user's own sampler inside a distributed sampler, or None if there is none.

    Lightning wraps the sampler as a data set (``_DatasetSamplerWrapper``) and has no public way back.
    """
    dataset = getattr(sampler, "dataset", None)
    return dataset._sampler if is_instance(dataset, _DatasetSamplerWrapper) else None


def starts_processes(trainer: Trainer) -> bool:
    """Whether the ranks are child processes, which exit silently if one of them fails.

    The launcher is a public attribute of the strategy, but its class is private.
    """
    return is_instance(trainer.strategy.launcher, _MultiProcessingLauncher)


def average_model(callback: Any) -> Any:
    """The copy of the module in which an averaging callback keeps its average, or None if it has none yet.

    Both averaging callbacks of Lightning keep it under this private name.
    """
    average = getattr(callback, "_average_model", None)
    return average.module if isinstance(average, AveragedModel) else average


def are_hyperparameters_given() -> bool:
    """Whether the command line has set the hyper-parameters of the module that is being built.

    LightningCLI passes them around the constructor, and this is the only trace.
    """
    return _given_hyperparameters.get() is not None


def name_hyperparameters(module: LightningModule) -> None:
    """Mark saved hyper-parameters as keyword arguments of the constructor, for ``load_from_checkpoint``.

    ``save_hyperparameters`` finds this name in a constructor's frame, but not if it is passed a dictionary.
    """
    module._hparams_name = "kwargs"  # type: ignore[assignment]  # untyped in Lightning


def hyperparameters_name(module: LightningModule) -> str | None:
    """The name that :func:`name_hyperparameters` or ``save_hyperparameters`` gave to the saved hyper-parameters.

    A checkpoint stores it beside the hyper-parameters. Lightning writes it only for the module that it trains.
    """
    name: str | None = getattr(module, "_hparams_name", None)
    return name


def has_replaced_schedulers(averaging: StochasticWeightAveraging) -> bool:
    """Whether stochastic weight averaging resumes after it replaced the module's schedulers with its own.

    It then expects no schedulers, since their states are not in the checkpoint. No public attribute tells.
    """
    return averaging._scheduler_state is not None


def lightning_optimizer(optimizer: Optimizer | LightningOptimizer, strategy: Strategy) -> LightningOptimizer:
    """An optimizer as ``self.optimizers()`` returns it: wrapped if it is not yet, and tied to the strategy.

    The public constructor has no argument for the strategy, and a step without one raises.
    """
    wrapped: LightningOptimizer = LightningOptimizer._to_lightning_optimizer(optimizer, strategy)
    return wrapped


def after_closure(precision: Precision, module: LightningModule, optimizer: Optimizer) -> None:
    """Run what a precision plugin runs between closure and step: the hook before the step, and gradient clipping.

    The plugin's public ``optimizer_step`` also steps, and searches for infinite gradients once for all members.
    """
    precision._after_closure(module, optimizer)


def learning_rate_names(finder: LearningRateFinder) -> tuple[str, ...]:
    """The attributes of which a learning rate finder sets one; empty if it only suggests a rate.

    The finder has no public attribute for its arguments.
    """
    if not finder._update_attr:
        return ()
    return (finder._attr_name,) if finder._attr_name else ("lr", "learning_rate")


def batch_size_name(finder: BatchSizeFinder) -> str:
    """The attribute that a batch size finder sets; the finder has no public name for it."""
    return finder._batch_arg_name


def state_key(callback: Callback, **arguments: Any) -> str:
    """A key for a callback's state that distinguishes two callbacks of one class, in Lightning's own format."""
    return callback._generate_state_key(**arguments)


def is_compiled(module: object) -> bool:
    """Whether a LightningModule was compiled as a whole: ``torch.compile(module)`` returns a module that shows it only here."""
    return getattr(module, "_compiler_ctx", None) is not None


class _OutsideTraining:
    """False while a Trainer trains, or prepares its training loader."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __bool__(self) -> bool:
        return not self.trainer.training


def keep_training_sampler(trainer: Trainer) -> None:
    """Leave the sampler of the training loader to the user; the loaders of evaluations are split over the ranks as before.

    The public argument ``use_distributed_sampler`` applies to all loaders.
    """
    connector: Any = trainer._accelerator_connector
    if connector.use_distributed_sampler:
        connector.use_distributed_sampler = _OutsideTraining(trainer)  # Lightning reads its truth


def split_training_sampler(trainer: Trainer) -> None:
    """The opposite of :func:`keep_training_sampler`."""
    connector: Any = trainer._accelerator_connector
    if isinstance(connector.use_distributed_sampler, _OutsideTraining):
        connector.use_distributed_sampler = True


def synchronizes_batch_norm(strategy: Strategy) -> bool:
    """Whether the Trainer was asked for ``sync_batchnorm=True``, which only the strategy keeps."""
    return getattr(strategy, "_layer_sync", None) is not None
