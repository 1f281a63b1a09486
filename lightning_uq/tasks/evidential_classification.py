"""Classes with evidence as outputs: a Dirichlet per input or per position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_uq.errors import InputError, without_period
from lightning_uq.functional.validation import check_at_least, check_choice
from lightning_uq.losses.evidence import Evidence
from lightning_uq.losses.evidential_modules import (
    EvidenceLoss,
    EvidentialLoss,
    FisherEvidentialLoss,
    MaxNormLoss,
    RelaxedEvidentialLoss,
)
from lightning_uq.metrics import UnpredictedClasses
from lightning_uq.predictions import DirichletPrediction
from lightning_uq.tasks.base import Progress, Stage, sums_and_counts
from lightning_uq.tasks.classification import (
    NO_LABEL,
    ClassTask,
    check_ignore_index,
    check_num_classes,
    checked_weights,
    counted_outputs,
    label_counts,
    weight_tensor,
)
from lightning_uq.tasks.segmentation import counted_positions, counted_rows, marked_labels

EvidentialLossName = Literal["evidential", "nll", "cross_entropy", "maxnorm", "r_edl", "re_edl", "i_edl"]

_LOSSES: dict[str, tuple[type[EvidenceLoss], dict[str, Any], float]] = {
    "evidential": (EvidentialLoss, {}, 1.0),
    "nll": (EvidentialLoss, {"risk": "nll"}, 1.0),
    "cross_entropy": (EvidentialLoss, {"risk": "cross_entropy"}, 1.0),
    "maxnorm": (MaxNormLoss, {}, 0.1),
    "r_edl": (RelaxedEvidentialLoss, {}, 1.0),
    "re_edl": (RelaxedEvidentialLoss, {}, 0.0),
    "i_edl": (FisherEvidentialLoss, {}, 1.0),
}
"""Loss, its arguments and the default ``max_reg_factor``, by name."""


@dataclass(frozen=True)
class EvidentialClassification(ClassTask):
    """Evidence for classes: raw outputs [Z, B, C] or maps [Z, B, C, *P] define one Dirichlet per row.

    The uncertainty is a *relative* score. It ranks inputs, but it does not vanish with more data, no proper scoring rule
    makes it correct, and the regularizer sets its level (Bengs et al., ICML 2023; Juergens et al., ICML 2024; Shen et al.,
    NeurIPS 2024). An ensemble of softmax classifiers is the safer choice if you can afford a second network.

    The regularizer is annealed: its factor rises linearly from 0 to ``max_reg_factor`` over the first ``annealing_steps``
    optimizer steps, or over ``annealing_epochs`` epochs, and is logged as ``reg_factor``. It follows the Trainer's counters, so a
    resumed training continues correctly. ``val_loss`` and ``test_loss`` use the final factor, so that epochs are comparable;
    ``val_nll`` does not depend on the factor and is the metric to monitor.

    Args:
        num_classes: C. If given, the output is checked against it; None takes it from the network's output.
        loss: ``"evidential"`` (Sensoy et al., sum of squares; ``"nll"`` and ``"cross_entropy"`` are its two other risks),
            ``"maxnorm"`` (Tsiligkaridis), ``"r_edl"`` and ``"re_edl"`` (Chen et al.), ``"i_edl"`` (Deng et al.).
        evidence: ``"clamped_exp"``, ``"softplus"``, ``"relu"`` (which cannot learn from a sample whose raw outputs are all
            negative), or a function.
        annealing_steps: Optimizer steps until the factor reaches its maximum; 0 starts at the maximum.
        annealing_epochs: Number of epochs, instead of steps.
        max_reg_factor: The final factor. None: 1 for the evidential losses, 0.1 for max-norm, 0 for Re-EDL. The original example of
            max-norm goes to 1. On eight digits, reaching 1 within 140 steps leaves two classes without any prediction and an accuracy
            of 0.62, against 0.98 with 0.1. With many classes (64, say), the evidential loss may also need a factor below 1.
        class_weights: One weight per class.
        ignore_index: The label of positions that do not count; None if all count.
        loss_arguments: Further arguments of the loss: ``p_norm``, ``fisher``, ``prior``, ``fisher_factor``; see
            :mod:`lightning_uq.losses.evidential`.

    Raises:
        InputError: A field is out of range or unknown.

    Example:
        >>> import torch
        >>> task = EvidentialClassification(loss="maxnorm")
        >>> task.predict(torch.zeros(1, 2, 3)).vacuity
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    num_classes: int | None = None
    loss: EvidentialLossName = "evidential"
    evidence: Evidence = "clamped_exp"
    annealing_steps: int = 1000
    annealing_epochs: int | None = None
    max_reg_factor: float | None = None
    class_weights: Sequence[float] | None = None
    ignore_index: int | None = None
    loss_arguments: dict[str, Any] | None = None

    ood_score: ClassVar[str] = "vacuity"
    score_names: ClassVar[tuple[str, ...]] = DirichletPrediction.score_names

    def __post_init__(self) -> None:
        check_num_classes(self.num_classes)
        check_ignore_index(self.ignore_index)
        check_choice("loss", self.loss, tuple(_LOSSES))
        for name in ("annealing_steps", "annealing_epochs", "max_reg_factor"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 0)
        object.__setattr__(self, "class_weights", checked_weights(self.class_weights, self.num_classes))
        _ = self._evidence_loss  # raises for a wrong argument now rather than in the first step

    @cached_property
    def _evidence_loss(self) -> EvidenceLoss:
        kind, arguments, _ = _LOSSES[self.loss]
        own = self.loss_arguments or {}
        reserved = {"weight", "reduction", "ignore_index", "validate_args", "reg_factor"} & own.keys()
        if reserved:
            raise InputError(f"`loss_arguments` must not hold {sorted(reserved)[0]!r}: the task has a field for it.")
        ignored = NO_LABEL if self.ignore_index is None else self.ignore_index
        # The task has checked the labels, and the package's evidence functions are not negative.
        given: dict[str, Any] = {"reg_factor": self.final_reg_factor, "validate_args": False, "ignore_index": ignored}
        try:
            return kind(self.evidence, reduction="none", **given, **arguments, **own)
        except TypeError as error:
            raise InputError(
                f"`loss_arguments` must hold arguments of {kind.__name__}: {without_period(error)}."
            ) from error

    @property
    def final_reg_factor(self) -> float:
        """The regularizer's factor after annealing."""
        return _LOSSES[self.loss][2] if self.max_reg_factor is None else self.max_reg_factor

    def reg_factor(self, progress: Progress | None = None) -> float:
        """The regularizer's factor at a point of the training; outside a training, the final factor."""
        if progress is None:
            return self.final_reg_factor
        done, end = self._done_and_end(progress)
        return self.final_reg_factor * min(1.0, done / end) if end else self.final_reg_factor

    def _done_and_end(self, progress: Progress) -> tuple[int, int]:
        if self.annealing_epochs is not None:
            return progress.epoch, self.annealing_epochs
        return progress.step, self.annealing_steps

    # ------------------------------------------------------------------ the interface of a task

    @property
    def ignored_label(self) -> int | None:
        """``ignore_index``."""
        return self.ignore_index

    def predict(self, outputs: Tensor) -> DirichletPrediction:
        """One Dirichlet per hypothesis: concentration = evidence + prior."""
        prior = self._evidence_loss.prior
        concentration = self._evidence_loss.concentration(outputs)
        weight = None if prior == 1 else concentration.new_tensor(prior)
        return DirichletPrediction.of_checked(concentration=concentration, prior=weight)  # evidence is never negative

    def sample_losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """The loss of raw outputs [B, C, ...] with the regularizer's current factor; the counts are the labels' weights."""
        output = counted_outputs(output, target, self.ignore_index)
        losses: Tensor = self._evidence_loss(output, target, self.reg_factor(progress))
        ignored = self._evidence_loss.ignore_index
        counts = label_counts(target, weight_tensor(self.class_weights, output), ignored, losses)
        return sums_and_counts(losses * counts, counts)

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """Classification metrics of the Dirichlet's mean, and the number of classes that are never predicted."""
        return {**super().metrics(stage), "unpredicted_classes": UnpredictedClasses()}

    def rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """The positions that count, as rows [N, C] with labels [N]."""
        return counted_rows(prediction, target, self.ignore_index)

    def sample_rows(self, prediction: Any, target: Tensor) -> tuple[Any, Tensor]:
        """One row per input: maps stay whole, with label -1 at positions that do not count."""
        if not prediction.map_shape:
            return self.rows(prediction, target)
        return prediction, marked_labels(target, self.ignore_index)

    def row_positions(self, target: Tensor) -> Tensor:
        """The positions of the labels that count."""
        return counted_positions(target, self.ignore_index)

    def check_output(self, outputs: Tensor, *, values: bool = True) -> None:
        """Check for raw outputs [Z, B, C, ...] with C >= 2."""
        self._check_classes(outputs, values)

    def logged(self, progress: Progress) -> Mapping[str, float]:
        """The regularizer's factor."""
        return {"reg_factor": self.reg_factor(progress)}

    def review(self, metrics: Mapping[str, Any], progress: Progress | None) -> None:
        """Warn of classes that are never predicted, after the annealing."""
        if progress is not None:
            done, end = self._done_and_end(progress)
            if done < end:
                return
        missing = metrics["unpredicted_classes"].classes()
        if missing:
            rank_zero_warn(
                f"Classes {missing} of the validation data are never predicted. The evidence for a class can die out: try a "
                f"smaller `max_reg_factor` than {self.final_reg_factor:g}, a longer annealing, or evidence='clamped_exp'."
            )

    def _counted(self, target: Tensor) -> Tensor:
        return target if self.ignore_index is None else target[target.long() != self.ignore_index]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_evidence_loss"}
