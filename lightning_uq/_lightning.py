"""Every private name of Lightning that this package uses, each with the reason why no public one does.

``tests/test_lightning_private.py`` fails where a release of Lightning drops one.
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

# Refuses to be called on an instance, as the `load_from_checkpoint` of Lightning does. An override needs the same decorator.
restricted_classmethod = _restricted_classmethod

# Whether an optimizer unscales gradients within its step, as a fused one does. Only the precision plugin asks it.
optimizer_handles_unscaling = _optimizer_handles_unscaling

# How Lightning reads what `configure_optimizers` returns, and what it refuses. Its public entry point takes a Trainer and its module,
# and a member of an ensemble has no Trainer of its own.
configure_optimizers = _configure_optimizers
configure_schedulers = _configure_schedulers_automatic_opt
check_optimizers_attached = _validate_optimizers_attached


def check_scheduler_api(configs: list[LRSchedulerConfig], member: LightningModule) -> None:
    """Refuse schedulers as Lightning does. Its function asks whether the member overrides a hook of its own tree's class."""
    in_tree_of(member, _validate_scheduler_api)(configs, member)


def is_local_path(path: str) -> bool:
    """Whether a path lies on this machine's file system.

    The plugin that writes checkpoints atomically renames files, which only a local file system does at once. Lightning
    decides by this function where to write, and fsspec's own parser differs from it on Windows.
    """
    return bool(_is_local_file_protocol(path))


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that ``trainer.save_checkpoint`` would write, before it is written.

    The public method writes the file itself, with the weights of an averaging callback and without a place for ours.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def before_transfer(module: LightningModule, batch: Any) -> Any:
    """A batch after the module's ``on_before_batch_transfer``, called as Lightning calls it.

    The public hook needs the number of the loader, and the data module may override it; this finds the owner.
    """
    return module._on_before_batch_transfer(batch)


def transferred(module: LightningModule, batch: Any, device: Any) -> Any:
    """A batch after all the module's transfer hooks, without a Trainer: ``strategy.batch_to_device`` needs one."""
    return module._apply_batch_transfer_handler(before_transfer(module, batch), device=device)


def trainer_of(module: Any) -> Trainer | None:
    """The module's Trainer, or None: the public ``trainer`` raises where there is none."""
    trainer: Trainer | None = getattr(module, "_trainer", None)
    return trainer


def training_source(trainer: Trainer) -> Any:
    """What gives the training loader: ``trainer.train_dataloader`` is None until the training begins."""
    return trainer.fit_loop._data_source


def validation_source(trainer: Trainer) -> Any:
    """What gives the validation loaders of a training: ``trainer.val_dataloaders`` is None until it begins."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def users_sampler(sampler: Any) -> Any:
    """The user's own sampler inside a distributed one, or None where there is none.

    Lightning wraps the sampler as a data set (``_DatasetSamplerWrapper``) and has no public way back.
    """
    dataset = getattr(sampler, "dataset", None)
    return dataset._sampler if is_instance(dataset, _DatasetSamplerWrapper) else None


def starts_processes(trainer: Trainer) -> bool:
    """Whether the ranks are child processes, which end without a word when one fails.

    The launcher is a public attribute of the strategy, but its class is private.
    """
    return is_instance(trainer.strategy.launcher, _MultiProcessingLauncher)


def average_model(callback: Any) -> Any:
    """The copy of the module in which an averaging callback keeps its average, or None.

    Both averaging callbacks of Lightning keep it under this name, and neither shows it.
    """
    average = getattr(callback, "_average_model", None)
    return average.module if isinstance(average, AveragedModel) else average


def are_hyperparameters_given() -> bool:
    """Whether the command line has set the hyper-parameters of the module that is being built.

    LightningCLI passes them past the constructor, and shows it nowhere else.
    """
    return _given_hyperparameters.get() is not None


def name_hyperparameters(module: LightningModule) -> None:
    """Mark saved hyper-parameters as keyword arguments of the constructor, for ``load_from_checkpoint``.

    ``save_hyperparameters`` finds this name in the frame of a constructor; a dictionary that is passed to it has none.
    """
    module._hparams_name = "kwargs"  # type: ignore[assignment]  # untyped in Lightning


def hyperparameters_name(module: LightningModule) -> str | None:
    """The name that :func:`name_hyperparameters` or ``save_hyperparameters`` gave to the saved hyper-parameters.

    A checkpoint holds it beside the hyper-parameters, and Lightning writes it only for the module that it trains.
    """
    name: str | None = getattr(module, "_hparams_name", None)
    return name


def has_replaced_schedulers(averaging: StochasticWeightAveraging) -> bool:
    """Whether stochastic weight averaging resumes after it replaced the module's schedulers by its own.

    It then expects none of them, since their states are not in the checkpoint, and shows that nowhere.
    """
    return averaging._scheduler_state is not None


def lightning_optimizer(optimizer: Optimizer | LightningOptimizer, strategy: Strategy) -> LightningOptimizer:
    """An optimizer as ``self.optimizers()`` returns it: wrapped (where it is not yet), and tied to the strategy.

    The public constructor has no argument for the strategy, without which a step raises.
    """
    wrapped: LightningOptimizer = LightningOptimizer._to_lightning_optimizer(optimizer, strategy)
    return wrapped


def after_closure(precision: Precision, module: LightningModule, optimizer: Optimizer) -> None:
    """What a precision plugin does between the closure and the step: the hook before the step, and gradient clipping.

    The plugin's public ``optimizer_step`` steps as well, with one search for infinite gradients for all members.
    """
    precision._after_closure(module, optimizer)


def learning_rate_names(finder: LearningRateFinder) -> tuple[str, ...]:
    """The attributes, one of which a learning rate finder will set; none if it only suggests a rate.

    The finder shows its own arguments nowhere else.
    """
    if not finder._update_attr:
        return ()
    return (finder._attr_name,) if finder._attr_name else ("lr", "learning_rate")


def batch_size_name(finder: BatchSizeFinder) -> str:
    """The attribute that a batch size finder will set; it shows that nowhere else."""
    return finder._batch_arg_name


def state_key(callback: Callback, **arguments: Any) -> str:
    """A key for a callback's state that tells two of a class apart, in Lightning's own format."""
    return callback._generate_state_key(**arguments)


def is_compiled(module: object) -> bool:
    """Whether the steps of a LightningModule were compiled: ``torch.compile`` of the whole gives a module that says so here alone."""
    return getattr(module, "_compiler_ctx", None) is not None
