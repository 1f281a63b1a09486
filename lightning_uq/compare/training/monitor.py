"""Chooses the epoch of a training to keep: the one with the best value of a validation metric."""

import re
from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_uq.compare.training.reading import data_for, logger_for
from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.method import Method, Monitor, Setting
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.ensemble import EnsembleModule

Mode = Literal["min", "max"]

_KINDS: tuple[tuple[str, Mode], ...] = (
    ("nll", "min"),
    ("loss|elbo", "min"),
    ("crps|rmse|mse|mae|mape|brier|error", "min"),
    ("acc|accuracy|f1|auroc|auc|ap|map|iou|miou|dice|r2|r2score|kappa|mcc", "max"),
)
"""Metrics by the words in their names, the best criteria first, and which of their values is the best."""


def find_monitor(method: Method, setting: Setting, data: Any, accelerator: str = "cpu") -> Monitor | None:
    """The validation metric whose best epoch is kept. For a module of this package, it is the NLL, or the error for a task without a likelihood.

    For other modules, it is the one that the method names, or one that a validation with one batch logs: :func:`best_monitor`. None: there is no
    such metric, and the last weights are kept.

    Args:
        method: The trained method.
        setting: The setting of the method.
        data: The data module.
        accelerator: Lightning's accelerator.

    Raises:
        InputError: The method names a metric that its module does not log.

    Example:
        >>> from lightning_uq.compare.configuration import Configuration
        >>> from lightning_uq.compare.planning.discovery import methods
        >>> from lightning_uq.compare.problem import make_problem
        >>> problem = make_problem(Configuration(data="diabetes"), 0)
        >>> find_monitor(methods("regression")["quantile"], problem.setting, problem.data)
        Monitor(name='val_pinball', mode='min')
    """
    with isolate_rng():
        module = method.make_module(setting)
        if isinstance(module, UncertaintyModule) and not (isinstance(module, EnsembleModule) and module.members):
            metric = "nll" if "nll" in module.task.metrics("val") else module.task.metric_on_bar
            return method.monitor or Monitor(f"val_{metric}")
        logged = _logged(module, data, accelerator)
    if method.monitor is None:
        return best_monitor(logged)
    if method.monitor.name not in logged:
        found = ", ".join(sorted(logged)) or "nothing"
        raise InputError(f"`monitor` of {method.name} is {method.monitor.name!r}, but its validation logs {found}.")
    return method.monitor


def _logged(module: LightningModule, data: LightningDataModule, accelerator: str) -> list[str]:
    """The names of the scalars that a validation with one batch logs."""
    kind: Any = in_tree_of(module, Trainer)
    trainer = kind(
        accelerator=accelerator,
        devices=1,
        limit_val_batches=1,
        logger=logger_for(module),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(module, datamodule=data_for(module, data), verbose=False)
    return [name for name, value in trainer.callback_metrics.items() if value.numel() == 1]


def best_monitor(logged: Iterable[str]) -> Monitor | None:
    """The logged metric that judges epochs best: a negative log-likelihood, or else a loss, an error, or a score such as accuracy.

    Of several, it is the one with the shortest name. Metrics of single members of an ensemble, or of the ensemble as a whole, do not count.

    Example:
        >>> best_monitor(["val/acc", "val/loss", "member_0/val/loss"])
        Monitor(name='val/loss', mode='min')
        >>> best_monitor(["validation_f1_score"]), best_monitor(["lr"])
        (Monitor(name='validation_f1_score', mode='max'), None)
    """
    names = [name for name in logged if not re.match(r"(member_\d+|ensemble)/", name)]
    for words, mode in _KINDS:
        found = [name for name in names if set(words.split("|")) & set(re.split(r"[^a-z0-9]+", name.lower()))]
        if found:
            return Monitor(min(found, key=lambda name: (len(name), name)), mode)
    return None
