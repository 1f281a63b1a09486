"""One row's numbers for one seed, read off the predictions that the Trainer makes."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.callbacks.conformal_sets import ConformalSets
from lightning_uq.callbacks.ood_scores import OODScorer, detection_metrics
from lightning_uq.compare.testbed import divergences
from lightning_uq.compare.training import Trained
from lightning_uq.data import ArrayDataModule, TestbedDataModule
from lightning_uq.functional import certainty
from lightning_uq.functional.held_out_scores import rows_needed
from lightning_uq.method import Method
from lightning_uq.metrics import ExpectedCalibrationError, JointLogLoss
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.predictions import CategoricalPrediction, ClassProbabilities
from lightning_uq.report import RESULT_KEYS
from lightning_uq.tasks import Classification, Task

TAU = JointLogLoss().tau
NUM_BINS = ExpectedCalibrationError().num_bins
TIMED_ROWS = 1000
ALPHA = 0.1
"""Share of labels that sets of classes may miss."""


@dataclass
class Pooled:
    """One method's predictions on the test and held-out data, seed after seed: what the figures show.

    Attributes:
        confidence: Probability of the predicted class, of test inputs.
        certainty: What ranks them where that is rounded to 1: see :func:`~lightning_uq.functional.certainty`.
        correct: Whether it was right.
        score_in: Out-of-distribution scores of test inputs.
        score_out: Those of held-out inputs.
    """

    confidence: list[Tensor] = field(default_factory=list)
    certainty: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    score_in: list[Tensor] = field(default_factory=list)
    score_out: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """One method's numbers for one seed.

    Attributes:
        values: By result key; one that does not apply is absent.
        num_indices: Z of its predictions, None where they have no members.
    """

    values: dict[str, float]
    num_indices: int | None


def evaluate(method: Method, trained: Trained, data: ArrayDataModule, accelerator: str, pooled: Pooled) -> Evaluation:
    """Measure a trained method on the test split and on the held-out classes, and add its predictions to ``pooled``."""
    module, callbacks = trained.module, trained.callbacks[method.name]
    if isinstance(module, UncertaintyModule):
        module.return_members = True  # the joint log-loss needs them
        module.prediction_transforms.clear()  # of other methods that read the same training
    scorers = [one for one in (module, *callbacks) if isinstance(one, OODScorer)]
    task = module.task if isinstance(module, UncertaintyModule) else Classification()

    def predict(loader: Any, *, labelled: bool) -> _Reader:
        reader = _Reader(method.ood_score, task, scorers, labelled=labelled)
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            callbacks=[*callbacks, reader],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.predict(module, loader, return_predictions=False)
        return reader

    inside = predict(data.test_dataloader(), labelled=True)
    score_in, correct = torch.cat(inside.scores), torch.cat(inside.correct)
    measured = {key: metric for key, metric in inside.metrics.items() if metric.update_called and key in RESULT_KEYS}
    values = {key: float(metric.compute()) for key, metric in measured.items()}
    if not isinstance(data, TestbedDataModule):
        values |= sets_of(predict(data.val_dataloader(), labelled=True), inside)
    pooled.confidence.append(torch.cat(inside.confidence))
    pooled.certainty.append(torch.cat(inside.certainty))
    pooled.correct.append(correct)
    pooled.score_in.append(score_in)
    outside = [predict(loader, labelled=False) for loader in data.ood_dataloaders().values()]
    if outside:
        score_out = torch.cat([scores for reader in outside for scores in reader.scores])
        pooled.score_out.append(score_out)
        values |= {key: float(value) for key, value in detection_metrics(score_in, score_out).items()}
    if isinstance(data, TestbedDataModule):
        values |= divergences(module.to(inside.device), data)
    if isinstance(module, UncertaintyModule):
        module.prediction_transforms.clear()  # the scorers' own pass is timed, and not the transforms' too
    values["parameters"] = num_weights(module)
    values["ms_per_1000"] = _milliseconds(module.to(inside.device), method.ood_score, scorers, data)
    values["train_seconds"] = trained.seconds[method.name]
    return Evaluation(values, inside.num_indices)


def ood_score(
    name: str,
    prediction: ClassProbabilities,
    provided: Sequence[Callable[[Tensor], Mapping[str, Tensor]]] = (),
) -> Tensor:
    """A prediction's out-of-distribution score [B], higher = more out of distribution, found by its name.

    A score that a callback or the module provides (:class:`~lightning_uq.callbacks.ood_scores.OODScorer`) comes first, then
    ``prediction.score(name)``.

    Args:
        name: The score's name.
        prediction: A classifier's prediction.
        provided: What the scorers' contexts yielded around the model's call.

    Raises:
        InputError: Nothing has a score of that name.

    Example:
        >>> from lightning_uq import CategoricalPrediction
        >>> ood_score("energy", CategoricalPrediction(torch.zeros(1, 1, 2)))
        tensor([-0.6931])
    """
    for function in provided:
        scores = function(prediction.calibration_logits)
        if name in scores:
            return scores[name]
    return prediction.score(name)


def sets_of(held_out: "_Reader", tested: "_Reader") -> dict[str, float]:
    """Coverage and mean size of sets of classes on the test data, with a threshold for 90 % that is fitted to the validation data.

    The validation data have stopped the training too, so the coverage may be a little below 90 %. Where they are too few for a
    threshold, there are none.
    """
    if len(torch.cat(held_out.targets)) < rows_needed(ALPHA):
        return {}
    rows, new = (CategoricalPrediction(torch.cat(one.log_probs).unsqueeze(0)) for one in (held_out, tested))
    conformal = ConformalSets(alpha=ALPHA).fit_predictions(rows, torch.cat(held_out.targets))
    sets, target = conformal.sets(new), torch.cat(tested.targets)
    covered = sets.gather(1, target.unsqueeze(1))
    return {"coverage": float(covered.double().mean()), "set_size": float(sets.sum(1).double().mean())}


def num_weights(module: nn.Module) -> int:
    """Number of weights: parameters and floating-point buffers (a frozen prior is one), each counted once.

    Running statistics and metric states are not counted. Running statistics are BatchNorm's, and any buffer named ``running_*``.

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


class _Reader(Callback):
    """Reads predictions as the Trainer makes them: metrics, confidences and out-of-distribution scores."""

    def __init__(self, ood_score: str, task: Task, scorers: Sequence[OODScorer], *, labelled: bool) -> None:
        self.ood_score = ood_score
        self.scorers = scorers
        self.labelled = labelled
        self.metrics: dict[str, Metric] = task.metrics("test")
        self.confidence: list[Tensor] = []
        self.certainty: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.num_indices: int | None = None
        self.device = torch.device("cpu")
        self._stack = ExitStack()
        self._provided: list[Callable[[Tensor], Mapping[str, Tensor]]] = []

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.device = pl_module.device
        self._provided = [self._stack.enter_context(scorer.ood_scores(pl_module)) for scorer in self.scorers]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.scores.append(ood_score(self.ood_score, outputs, self._provided).cpu())
        self._stack.close()
        if not self.labelled:
            return
        prediction: ClassProbabilities = outputs.to("cpu")
        target = batch[1].cpu()
        self.confidence.append(prediction.confidence)
        self.certainty.append(certainty(prediction.log_probs))
        self.correct.append(prediction.label == target)
        self.log_probs.append(prediction.log_probs)
        self.targets.append(target)
        if prediction.has_logits:
            self.num_indices = prediction.num_indices
        for metric in self.metrics.values():
            metric.update(prediction, target)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stack.close()


def _milliseconds(
    module: LightningModule,
    score: str,
    scorers: Sequence[OODScorer],
    data: ArrayDataModule,
    *,
    warm_up: int = 3,
    repeats: int = 11,
    budget: float = 5.0,
) -> float:
    """Median time of the probabilities and the score of 1,000 inputs in one batch, back on the CPU.

    What is slow is measured less often: once ``budget`` seconds are spent, no more.
    """
    x = data.dataset("test").tensors[0]
    batch = (x[torch.arange(TIMED_ROWS) % len(x)].to(module.device),)
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        with torch.inference_mode(), ExitStack() as stack:
            provided = [stack.enter_context(scorer.ood_scores(module)) for scorer in scorers]
            prediction = module.predict_step(batch, 0)
            prediction.probs.cpu(), ood_score(score, prediction, provided).cpu()
        times.append(time.perf_counter() - start)
        if sum(times) > budget:
            break
    return 1000 * statistics.median(times[warm_up:] or times[-1:])
