"""A user's own LightningModule as rows of the comparison: unchanged, as an ensemble, and with each callback that is fitted after training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_uq.callbacks import (
    ConformalIntervals,
    FitGMM,
    FitKNN,
    FitLaplace,
    FitViM,
    IsotonicScaling,
    MatrixScaling,
    QuantileRecalibration,
    TemperatureScaling,
    VarianceScaling,
    VectorScaling,
)
from lightning_uq.callbacks.conformal_methods import ALPHA
from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.own_config import make_builder
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.training.quiet import quiet
from lightning_uq.compare.training.reading import Loader, data_for, logit_reader
from lightning_uq.errors import InputError, UQError, without_period
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.method import Method, Monitor, Reading, Setting
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.ensemble_methods import NUM_MEMBERS
from lightning_uq.tasks import Binary, Classification, Regression, Task, task_of
from lightning_uq.tasks.names import task_from_config

MODULE = "module"
"""Name of the row of the unchanged module, with which the names of the others begin."""

_CLASSES = ("classification", "segmentation", "binary", "multilabel")


@dataclass(frozen=True)
class _Row:
    """Callbacks that make one row of the module.

    Attributes:
        make: Makes the callbacks from the arguments for reading the module.
        about: A description of the row.
        tasks: The supported tasks.
        ood_score: The OOD score of the row; None: that of the module.
    """

    make: Callable[..., list[Callback]]
    about: str
    tasks: tuple[str, ...]
    ood_score: str | None = None


def _one(callback: Callable[..., Callback], **own: Any) -> Callable[..., list[Callback]]:
    return lambda **reading: [callback(**own, **reading)]


def _recalibration(**reading: Any) -> list[Callback]:
    return [VarianceScaling(**reading), QuantileRecalibration(**reading)]  # a mean has no distribution by itself


_ROWS = {
    "temperature": _Row(_one(TemperatureScaling), "a temperature fitted to the validation rows", _CLASSES),
    "vector": _Row(
        _one(VectorScaling), "a scale and a bias per class fitted to the validation rows", ("classification",)
    ),
    "matrix": _Row(
        _one(MatrixScaling), "a linear map of the logits fitted to the validation rows", ("classification",)
    ),
    "isotonic": _Row(
        _one(IsotonicScaling), "probabilities by isotonic regression on the validation rows", ("binary", "multilabel")
    ),
    "laplace": _Row(
        _one(FitLaplace),
        "a Gaussian over the weights of the last layer, fitted after training",
        ("classification", "binary", "multilabel", "regression"),
        "laplace",
    ),
    "density": _Row(
        _one(FitGMM, name="density"), "a Gaussian per class over its features", ("classification",), "density"
    ),
    "knn": _Row(
        _one(FitKNN), "the distance of its features to those of training rows", (*_CLASSES, "regression"), "knn"
    ),
    "vim": _Row(_one(FitViM), "the virtual logit of its features", ("classification",), "vim"),
    "conformal": _Row(
        _one(ConformalIntervals, alpha=ALPHA),
        "intervals of one width that cover 90 % of the validation rows",
        ("regression",),
    ),
    "variance": _Row(_one(VarianceScaling), "a variance fitted to the validation rows", ("regression",)),
    "recalibrated": _Row(
        _recalibration, "a variance, and quantiles recalibrated on the validation rows", ("regression",)
    ),
}
"""The callbacks by the names of their rows. Callbacks that reject a module are left out, and the results say why."""


def module_methods(configuration: Configuration, problem: Problem) -> dict[str, Method]:
    """The rows of the module in the configuration, by name; empty without a module.

    Args:
        configuration: The configuration, with the module and its arguments.
        problem: The data of one seed.

    Raises:
        InputError: The module does not exist or cannot be built, or its outputs contradict the data's task.
    """
    if configuration.module is None:
        return {}
    settings = configuration.contents.get("module", {})
    name = configuration.module.replace(":", ".").rpartition(".")[2]
    make = make_builder(configuration.module, LightningModule, settings.get("init_args", {}), "module")
    task = problem.setting.task if settings.get("task") is None else _given_task(settings["task"])
    reading = Reading(
        task=task, **{key: settings[key] for key in ("output", "predict_fn", "unpack_batch") if key in settings}
    )
    with isolate_rng(), quiet():
        reading = _checked(make, reading, settings.get("task") is None, problem, configuration, name)
    shared: dict[str, Any] = {
        "reading": reading,
        "monitor": Monitor(settings["monitor"], settings.get("mode", "min")) if "monitor" in settings else None,
        "tasks": (problem.data.task,),
    }
    score = None if reading.task.needs_members else reading.task.ood_score

    def build_ensemble(setting: Setting) -> LightningModule:
        return EnsembleModule(make, num_members=NUM_MEMBERS, **reading.arguments)

    spread = next(one for one in (*EnsembleModule.preferred_ood_scores, score) if one in reading.task.score_names)
    found = [
        Method(name=MODULE, about=f"{name} as it is", build=lambda setting: make(), ood_score=score, **shared),
        Method(
            name=f"{MODULE}_ensemble",
            about=f"{NUM_MEMBERS} of {name} from different initial weights, whose predictions are averaged",
            build=build_ensemble,
            ood_score=spread,
            **shared,
        ),
    ]
    for suffix, row in _ROWS.items():
        if problem.data.task in row.tasks:
            found.append(_read_by(row, suffix, name, score, reading, shared))
    return {method.name: method for method in found}


def _read_by(
    row: _Row, suffix: str, name: str, score: str | None, reading: Reading, shared: Mapping[str, Any]
) -> Method:
    def fit(setting: Setting) -> list[Callback]:
        return row.make(attach=True, **reading.arguments)

    return Method(
        name=f"{MODULE}_{suffix}",
        about=f"{name} with {row.about}",
        trained_as=MODULE,
        callbacks=fit,
        ood_score=row.ood_score or score,
        **shared,
    )


def _given_task(value: Any) -> Task:
    return task_from_config({"init_args": {}, **value}) if isinstance(value, Mapping) else task_of(value)


def _checked(
    make: Callable[[], Any], reading: Reading, infers: bool, problem: Problem, configuration: Configuration, name: str
) -> Reading:
    """The reading, tested on a validation batch. The data determine the meaning of the outputs, unless the user gave it."""
    try:
        module = make()
    except Exception as error:  # the user's constructor may raise anything
        raise InputError(
            f"`module` {name} cannot be built: {type(error).__name__}: {without_period(error)}."
        ) from error
    if isinstance(module, UncertaintyModule):
        return Reading(task=module.task)
    kind: Any = in_tree_of(module, Trainer)
    check = _Check(reading, infers)
    trainer = kind(
        accelerator=configuration.accelerator,
        devices=1,
        callbacks=[check],
        limit_predict_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module.predict_step = lambda *_: 0  # since the check reads the outputs itself
    try:
        trainer.predict(
            module,
            datamodule=data_for(module, Loader(problem.data, problem.data.val_dataloader())),
            return_predictions=False,
        )
    except Exception as error:  # the user's forward may raise anything
        if check.failed_inputs is not None:
            reason = " ".join(without_period(error).split())
            raise InputError(
                f"The `forward` of `module` {name} failed on inputs {check.failed_inputs}: {type(error).__name__}: {reason}."
            ) from error
        text = str(error) if isinstance(error, UQError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"The outputs of `module` {name} cannot be read for the data's task, {problem.data.task}: {' '.join(text.split())} "
            "Pass another task as `task`, or describe the module in the file of `config`: module.task for the meaning of the outputs, module.output and "
            "module.predict_fn for reading them, and module.unpack_batch for the batches."
        ) from error
    return check.reading


class _Check(Callback):
    """Reads the outputs of one batch.

    Attributes:
        reading: The arguments for reading outputs.
        failed_inputs: The shape of the inputs, or their type, for which the module's code raised; None: it did not raise.
    """

    def __init__(self, reading: Reading, infers: bool) -> None:
        self.reading = reading
        self.infers = infers
        self.failed_inputs: str | None = None

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        reader = logit_reader(self.reading)
        x, target = reader.unpack(pl_module, batch)
        try:
            outputs = reader.run(pl_module, batch, trainer)
        except UQError:
            raise
        except Exception:
            self.failed_inputs = str(list(x.shape)) if isinstance(x, Tensor) else f"of type {type(x).__name__}"
            raise
        if self.infers and isinstance(outputs, Tensor) and isinstance(target, Tensor):
            self.reading = Reading(**{**self.reading.arguments, "task": read_as(self.reading.task, outputs, target)})
            reader = logit_reader(self.reading)
        outputs = reader(pl_module, batch, trainer)
        if target is None:
            raise InputError("Its batches have no target.")
        self.reading.task.check_target(target, outputs)


def read_as(task: Task, outputs: Tensor, target: Tensor) -> Task:
    """The meaning of the outputs of a user's own module on data of a task, since its author's loss does not use standardized targets.

    One number per target is read as a mean, and two outputs for a binary target are read as logits of two classes.

    Example:
        >>> import torch
        >>> read_as(Regression(target_scale=(1.0, 2.0)), torch.zeros(5, 1), torch.zeros(5, 1)).head
        'mean'
    """
    if type(task) is Regression:
        return Regression(head="mean")
    if type(task) is Binary and outputs.shape == (len(target), 2):
        return Classification(num_classes=2)
    return task
