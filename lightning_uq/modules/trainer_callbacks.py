"""Checks of Lightning callbacks that need an attribute which a module of this package lacks; they are refused before training."""

from collections.abc import Iterable

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
)
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch import nn

from lightning_uq._lightning import batch_size_name, learning_rate_names
from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance

_APART = "Train such modules separately, each with its own callback, and collect them with `EnsembleModule.from_checkpoints`."


def check_callbacks(module: LightningModule, callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that need an attribute which the module lacks, or that would change how members train.

    Raises:
        InputError: There is such a callback. Lightning's own error would name only the attribute, or there would be none.
    """
    members = getattr(module, "members", None)  # the LightningModules of an ensemble
    for callback in callbacks:
        if members is not None:
            _check_for_members(module, members.modules[0], callback)
        elif is_instance(callback, BackboneFinetuning):
            _check_backbone(module, type(callback).__name__)
        names = learning_rate_names(callback) if is_instance(callback, LearningRateFinder) else ()
        if names and not any(lightning_hasattr(module, name) for name in names):
            raise InputError(
                f"The learning rate finder has no attribute {' or '.join(f'`{name}`' for name in names)} of {type(module).__name__} to "
                "set. Pass `update_attr=False` to `Tuner.lr_find`, and build the module with an optimizer that has the suggested rate."
            )


def _check_backbone(module: LightningModule, callback: str) -> None:
    kind = type(module).__name__
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise InputError(
            f"{callback} needs an attribute `backbone`, which {kind} does not have. Subclass {kind} with a property `backbone` that "
            "returns the layers to freeze, or write a BaseFinetuning callback that finds them."
        )
    own = {id(parameter) for parameter in module.parameters()}
    if any(id(parameter) not in own for parameter in backbone.parameters()):
        raise InputError(
            f"{callback} would freeze copies: the `backbone` of {kind} has parameters that {kind} does not train. Members that run at "
            "once have no layers of their own, so use `execution='loop'`."
        )


def _check_for_members(ensemble: LightningModule, member: LightningModule, callback: Callback) -> None:
    kind, name = type(member).__name__, type(callback).__name__
    if is_instance(callback, BaseFinetuning):
        raise InputError(
            f"{name} freezes layers of one module and adds them to its optimizer later, but each {kind} in this ensemble has its own "
            f"optimizer. {_APART}"
        )
    if is_instance(callback, ModelPruning):
        raise InputError(
            f"{name} compares the weights of all members with each other, so they would not be pruned as each {kind} would be "
            f"alone. {_APART}"
        )
    rates = learning_rate_names(callback) if is_instance(callback, LearningRateFinder) else ()
    if rates and not any(lightning_hasattr(ensemble, rate) for rate in rates):
        raise InputError(
            f"The learning rate finder cannot set the rate of each member. Find the rate for one of them, `Tuner(trainer).lr_find({kind}())`"
            f", and let the factory build each {kind} with it. With `update_attr=False` the finder only suggests a rate."
        )
    size = batch_size_name(callback) if is_instance(callback, BatchSizeFinder) else None
    if size is not None and not lightning_hasattr(ensemble, size):
        raise InputError(
            f"The batch size finder sets an attribute `{size}`, which the members share. Move it and the loaders to a "
            "LightningDataModule, and pass that as `datamodule`."
        )
