"""Makes a method's record for one seed from the predictions of the Trainer."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.batches import num_rows
from lightning_uq.callbacks.conformal_sets import ConformalSets
from lightning_uq.callbacks.ood_scores import OODScorer
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.records import Record
from lightning_uq.compare.testbed import divergences
from lightning_uq.compare.training.reading import (
    Loader,
    ReadPredictions,
    data_for,
    is_foreign,
    reading_predictions,
    rows_repeated,
    target_of,
)
from lightning_uq.compare.training.saved_predictions import columns_of, save_predictions
from lightning_uq.compare.training.training import Trained
from lightning_uq.data import TestbedDataModule
from lightning_uq.errors import InputError
from lightning_uq.functional.held_out_scores import rows_needed
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.method import Method, Reading
from lightning_uq.metrics import JointLogLoss
from lightning_uq.metrics.joint import has_joint
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.predictions import CategoricalPrediction, ClassProbabilities, Prediction
from lightning_uq.tasks import Task

TAU = JointLogLoss().tau
TIMED_ROWS = 1000
ALPHA = 0.1
"""The share of labels that sets of classes may miss."""


def evaluate(
    method: Method,
    trained: Trained,
    problem: Problem,
    seed: int,
    accelerator: str,
    devices: int | list[int] = 1,
    saved: Path | None = None,
) -> Record:
    """Evaluate a trained method on the test split and on the out-of-distribution data.

    Args:
        method: The method.
        trained: Its training.
        problem: The data of the seed.
        seed: The seed.
        accelerator: Lightning's accelerator.
        devices: Lightning's devices.
        saved: The file for the predictions of the test rows; None: they are not saved.
    """
    module, callbacks, data = trained.module, trained.callbacks[method.name], problem.data

    def predict(loader: Any, *, labelled: bool, keep: bool = False) -> Reader:
        return read_predictions(
            method, module, callbacks, problem, loader, accelerator, devices, labelled=labelled, keep=keep
        )

    inside = predict(data.test_dataloader(), labelled=True, keep=saved is not None)
    rows = inside.rows()
    if saved is not None:
        save_predictions(saved, data.test_rows, inside.columns, data.class_names)
    if inside.log_probs and not problem.is_testbed:
        rows |= sets_of(predict(data.val_dataloader(), labelled=True), inside)
    outside = [predict(loader, labelled=False).rows() for loader in data.ood_dataloaders().values()]
    names = outside[0] if outside else {}
    values = {name: float(metric.compute()) for name, metric in inside.further.items()}
    if isinstance(data, TestbedDataModule):
        values |= divergences(module.to(inside.device), data)
    if isinstance(module, UncertaintyModule):
        module.prediction_transforms.clear()  # time only the scorers' own pass, without the transforms
    values["parameters"] = num_weights(module)
    values["train_seconds"] = trained.seconds[method.name]
    values |= _milliseconds(module.to(inside.device), method, scorers_of(module, callbacks), inside.seen)
    return Record(
        method.name,
        seed,
        values,
        rows,
        data.test_rows,
        {name: torch.cat([one[name] for one in outside]) for name in names},
        inside.num_indices,
        trained.stopped,
    )


def read_predictions(
    method: Method,
    module: LightningModule,
    callbacks: Sequence[Callback],
    problem: Problem,
    loader: Any,
    accelerator: str,
    devices: int | list[int] = 1,
    *,
    labelled: bool,
    keep: bool = False,
    limit: int | None = None,
) -> "Reader":
    """Let a Trainer predict a loader's batches, at most ``limit``, and read the predictions."""
    if isinstance(module, UncertaintyModule):
        module.return_members = True  # for the joint log-loss
        module.prediction_transforms.clear()  # left by other methods that use the same training
        task = module.task
    else:
        task = problem.setting.task if method.reading is None else method.reading.task
    reader = Reader(method, task, scorers_of(module, callbacks), labelled=labelled, keep=keep)
    kind: Any = in_tree_of(module, Trainer)
    trainer = kind(
        accelerator=accelerator,
        devices=devices,
        callbacks=[*reader.attached(module), *callbacks, reader],
        limit_predict_batches=limit,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.predict(module, datamodule=data_for(module, Loader(problem.data, loader)), return_predictions=False)
    return reader


def scorers_of(module: LightningModule, callbacks: Sequence[Callback]) -> list[OODScorer]:
    """The providers of scores besides the predictions."""
    return [one for one in (module, *callbacks) if isinstance(one, OODScorer)]


def ood_score(
    name: str,
    prediction: Prediction,
    provided: Sequence[Callable[[Tensor], Mapping[str, Tensor]]] = (),
) -> Tensor:
    """A prediction's out-of-distribution score [B] by name; higher is more out of distribution.

    A score of a callback or of the module (:class:`~lightning_uq.callbacks.ood_scores.OODScorer`) takes precedence over
    ``prediction.score(name)``. For a map, it is the mean over the positions.

    Args:
        name: The score's name.
        prediction: A prediction.
        provided: The scores from the scorers' contexts around the model's call.

    Raises:
        InputError: There is no score with this name.

    Example:
        >>> from lightning_uq import CategoricalPrediction
        >>> ood_score("energy", CategoricalPrediction(torch.zeros(1, 1, 2)))
        tensor([-0.6931])
    """
    for function in provided:
        scores = function(getattr(prediction, "calibration_logits", torch.empty(0)))
        if name in scores:
            return scores[name]
    score = prediction.score(name)
    return score.flatten(1).mean(1) if score.ndim > 1 else score


def sets_of(held_out: "Reader", tested: "Reader") -> dict[str, Tensor]:
    """Whether each test label is in its set of classes, and the set's size, with a threshold for 90 % from the validation data.

    The validation data also stopped the training, so the coverage may be a little below 90 %. If they are too few for a
    threshold, the result is empty.
    """
    if len(torch.cat(held_out.targets)) < rows_needed(ALPHA):
        return {}
    rows, new = (CategoricalPrediction(torch.cat(one.log_probs).unsqueeze(0)) for one in (held_out, tested))
    conformal = ConformalSets(alpha=ALPHA).fit_predictions(rows, torch.cat(held_out.targets))
    sets, target = conformal.sets(new), torch.cat(tested.targets)
    return {"in_set": sets.gather(1, target.unsqueeze(1)).squeeze(1), "set_size": sets.sum(1)}


def num_weights(module: nn.Module) -> int:
    """The number of weights: parameters and floating-point buffers (such as a frozen prior), each counted once.

    Running statistics (BatchNorm's, and any buffer named ``running_*``) and metric states are not counted.

    Example:
        >>> num_weights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        15
    """
    counted = {id(parameter): parameter.numel() for parameter in module.parameters()}
    for part in module.modules():
        if isinstance(part, Metric):
            continue
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and not name.startswith("running_"):
                counted[id(buffer)] = buffer.numel()
    return sum(counted.values())


class Reader(Callback):
    """Reads predictions as the Trainer makes them: scores of rows, and numbers that do not belong to single rows.

    Args:
        method: The method.
        task: The task of its module's outputs.
        scorers: Providers of scores besides the predictions.
        labelled: Whether to read targets.
        keep: Whether to keep the predictions of labelled rows.

    Attributes:
        columns: For each batch, the kept columns of its predictions.
        further: Metrics that are not means of row scores.
        log_probs: For each batch, if each input has one of several classes.
        targets: For each batch, in the same case.
        num_indices: Z of the predictions.
        device: The device of the module.
        seen: The first batches in the form that the module gets, with at least 1,000 rows if available.
    """

    def __init__(
        self, method: Method, task: Task, scorers: Sequence[OODScorer], *, labelled: bool, keep: bool = False
    ) -> None:
        self.method = method
        self.keep = keep
        self.columns: list[dict[str, Tensor]] = []
        self.task = task
        self.scorers = scorers
        self.labelled = labelled
        metrics = task.metrics("test") if labelled else {}
        self.further = {name: metric for name, metric in metrics.items() if isinstance(metric, JointLogLoss)}
        self.log_probs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.num_indices: int | None = None
        self.device = torch.device("cpu")
        self.seen: list[Any] = []
        self._num_seen = 0
        self._rows: list[dict[str, Tensor]] = []
        self._stack = ExitStack()
        self._provided: list[Callable[[Tensor], Mapping[str, Tensor]]] = []

    def attached(self, module: LightningModule) -> list[Callback]:
        """The callbacks that make predictions of a foreign module readable."""
        reading = self._reading(module)
        return [] if reading is None else [ReadPredictions(reading)]

    def _reading(self, module: LightningModule) -> Reading | None:
        return self.method.reading if is_foreign(module) else None

    def rows(self) -> dict[str, Tensor]:
        """The scores of all rows by name [N, ...]."""
        return {name: torch.cat([batch[name] for batch in self._rows]) for name in self._rows[0]}

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Enter the contexts of the scorers around the module's call."""
        self.device = pl_module.device
        if self.labelled and self._num_seen < TIMED_ROWS:
            self.seen.append(batch)
        self._provided = [self._stack.enter_context(scorer.ood_scores(pl_module)) for scorer in self.scorers]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Read the scores of a batch.

        Raises:
            InputError: A foreign module's ``predict_step`` does not return a prediction, or the batch has no target.
        """
        if not isinstance(outputs, Prediction):
            raise InputError(
                f"`predict_step` of {type(pl_module).__name__} must return a prediction of lightning_uq, but it returned an object of type "
                f"{type(outputs).__name__}. Pass a `reading` to the Method."
            )
        name = self.method.ood_score
        scores = {} if name is None else {"ood_score": ood_score(name, outputs, self._provided).cpu()}
        self._stack.close()
        if not self.labelled:
            self._rows.append(scores)
            return
        target = target_of(batch, pl_module, self._reading(pl_module))
        if target is None:
            raise InputError("The batches of the test loader must have targets, but they have none.")
        prediction, target = outputs.to("cpu"), target.cpu()
        self._num_seen += len(target)
        if self.keep:
            self.columns.append({**columns_of(prediction, target), **scores})
        self._rows.append({**scores, **self.task.row_scores(prediction, target)})
        counted, label = self.task.rows(prediction, target)
        if isinstance(counted, ClassProbabilities) and not prediction.map_shape:
            self.log_probs.append(counted.log_probs)
            self.targets.append(label)
        self.num_indices = getattr(prediction, "num_indices", None)
        if not has_joint(counted):
            self.further.clear()
        for metric in self.further.values():
            metric.update(counted, label)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Exit the contexts of the scorers."""
        self._stack.close()


def _milliseconds(
    module: LightningModule,
    method: Method,
    scorers: Sequence[OODScorer],
    seen: Sequence[Any],
    *,
    warm_up: int = 3,
    repeats: int = 11,
    budget: float = 5.0,
) -> dict[str, float]:
    """The median time for the predictions and the score of 1,000 inputs in one batch, including the transfer to the CPU; None for batches that cannot be joined.

    If 1,000 inputs would take more than ``budget`` seconds at the speed of the first batch, that batch is timed instead. This is an upper bound, since most
    of a small batch's time may be spent on drawing weights, which 1,000 inputs share. The measurement ends after ``budget``
    seconds.
    """
    try:
        whole, (first, num) = rows_repeated(seen, TIMED_ROWS), (seen[0], num_rows(seen[0]))
    except TypeError:
        return {}
    assert num is not None
    with reading_predictions(module, method.reading if is_foreign(module) else None):
        # The second of two calls, since the first one includes torch's one-time setup.
        _, seconds = (_seconds(module, method, scorers, first) for _ in range(2))
        batch, rows = (first, num) if seconds * TIMED_ROWS / num > budget else (whole, TIMED_ROWS)
        times: list[float] = []
        while len(times) < warm_up + repeats and sum(times) <= budget:
            times.append(_seconds(module, method, scorers, batch))
    return {"ms_per_1000": 1000 * statistics.median(times[warm_up:] or times[-1:]) * TIMED_ROWS / rows}


def _seconds(module: LightningModule, method: Method, scorers: Sequence[OODScorer], batch: Any) -> float:
    start = time.perf_counter()
    with torch.inference_mode(), ExitStack() as stack:
        provided = [stack.enter_context(scorer.ood_scores(module)) for scorer in scorers]
        prediction = module.predict_step(batch, 0)
        center = prediction.probs if hasattr(prediction, "probs") else prediction.point
        center.cpu()
        if method.ood_score is not None:
            ood_score(method.ood_score, prediction, provided).cpu()
    return time.perf_counter() - start
