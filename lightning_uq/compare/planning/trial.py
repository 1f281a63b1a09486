"""A trial of every method before the first training: one batch through its training, its fits after training, and a prediction."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.training.evaluation import read_predictions
from lightning_uq.compare.training.isolation import IsolatedCallbacks
from lightning_uq.compare.training.reading import data_for, logger_for
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError, NotFiniteError, UQError, without_period
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.method import Method


def try_methods(
    groups: Mapping[str, Sequence[Method]],
    known: Mapping[str, Method],
    required: Collection[str],
    problem: Problem,
    configuration: Configuration,
) -> dict[str, str]:
    """The methods that cannot run on these data with this network, and why.

    Args:
        groups: For each trained method, the methods that use its training.
        known: All methods by name.
        required: Names of methods whose failure is an error.
        problem: The data of one seed. Its loaders are read, and random states are restored.
        configuration: The configuration.

    Raises:
        InputError: A method of ``required`` cannot run, or no method can run.
    """
    left_out: dict[str, str] = {}
    for trainee, readers in groups.items():
        with seeded(configuration.seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one batch is too small for many fits
            warnings.filterwarnings("error", message="Using a target size")  # from a loss that would broadcast
            left_out |= _try_group(known[trainee], readers, problem, configuration)
    for name, reason in left_out.items():
        if name in required:
            raise InputError(f"methods: {name} cannot run on {problem.data.name} with this network: {reason}.")
    names = [method.name for readers in groups.values() for method in readers]
    if len(left_out) == len(names):
        raise InputError(f"methods: No method can run on {problem.data.name}. {names[0]}: {left_out[names[0]]}.")
    return left_out


def _try_group(
    trainee: Method, readers: Sequence[Method], problem: Problem, configuration: Configuration
) -> dict[str, str]:
    try:
        module = trainee.make_module(problem.setting)
        _fit(module, [], problem, configuration)
    except Exception as error:  # a user's method may raise anything, which is reported
        return {method.name: _reason(error) for method in readers}
    found: dict[str, str] = {}
    for method in readers:
        try:
            callbacks = method.make_callbacks(problem.setting)
            if callbacks:
                _fit(module, callbacks, problem, configuration)
            loader = problem.data.test_dataloader()
            read_predictions(
                method, module, callbacks, problem, loader, configuration.accelerator, labelled=True, limit=1
            )
        except Exception as error:  # also reported
            found[method.name] = _reason(error)
    return found


def _fit(
    module: LightningModule, callbacks: Sequence[Callback], problem: Problem, configuration: Configuration
) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    kind: Any = in_tree_of(module, Trainer)
    isolated = IsolatedCallbacks(callbacks)
    trainer = kind(
        accelerator=configuration.accelerator,
        devices=1,
        fast_dev_run=1,
        callbacks=[isolated],
        logger=logger_for(module),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data_for(module, problem.data))
    if isolated.diverged is not None:
        raise NotFiniteError(isolated.diverged)


def _reason(error: Exception) -> str:
    """An error in one sentence, without its period."""
    text = " ".join(without_period(error).split())[:400]
    return text if isinstance(error, UQError | UserWarning) else f"{type(error).__name__}: {text}".rstrip(": ")
