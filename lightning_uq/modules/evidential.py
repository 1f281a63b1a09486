"""Evidential classification: one network, one pass, a Dirichlet over class probabilities."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.functional._validation import check_choice
from lightning_uq.functional.scores import SCORES
from lightning_uq.losses.evidential import (
    Evidence,
    EvidenceLoss,
    EvidentialLoss,
    FisherEvidentialLoss,
    MaxNormLoss,
    RelaxedEvidentialLoss,
)
from lightning_uq.metrics import BrierScore
from lightning_uq.metrics.base import UncertaintyMetric
from lightning_uq.modules.base import UncertaintyModule, restore_argument
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.networks.output import Output
from lightning_uq.predictions import DirichletPrediction
from lightning_uq.registry import Setting, register_method

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

_DIRICHLET_SCORES = (
    "vacuity",
    "mutual_information",
    "differential_entropy",
    "predictive_entropy",
    "expected_entropy",
)
_MEAN_SCORES = ("max_softmax", "gen")
"""Scores of any probabilities, here the Dirichlet's mean: on the raw outputs they would be of a softmax."""


class EvidentialModule(UncertaintyModule):
    """A classifier whose outputs are evidence: a Dirichlet over class probabilities from one pass of one network.

    Its uncertainty is a *relative* score. It ranks inputs, and can tell unfamiliar ones; it does not vanish as data grow,
    nothing proper makes it right, and its level follows from the regularizer (Bengs et al., ICML 2023; Juergens et al., ICML
    2024; Shen et al., NeurIPS 2024). Where a second network can be paid for, an ensemble is the safer choice.

    The regularizer is annealed: its factor rises linearly from 0 to ``max_reg_factor`` over the first ``annealing_steps``
    optimizer steps, or over ``annealing_epochs`` epochs, and is logged as ``reg_factor``. It follows the Trainer's own
    counters, so that a resumed training goes on where it was. ``val_loss`` and ``test_loss`` are taken at the final factor,
    so that epochs can be compared; ``val_nll`` does not depend on it and is what to monitor.

    Args:
        network: The network, or a factory of it (which a checkpoint can remember): raw outputs [B, C], or maps [B, C, ...].
        num_classes: C.
        loss: ``"evidential"`` (Sensoy et al., sum of squares; ``"nll"`` and ``"cross_entropy"`` are its two other risks),
            ``"maxnorm"`` (Tsiligkaridis), ``"r_edl"`` and ``"re_edl"`` (Chen et al.), ``"i_edl"`` (Deng et al.).
        evidence: ``"clamped_exp"``, ``"softplus"``, ``"relu"`` (which cannot learn from a sample whose raw outputs are all
            negative), or a function.
        annealing_steps: Optimizer steps until the factor is at its maximum; 0 begins there.
        annealing_epochs: Epochs, in the place of steps.
        max_reg_factor: The final factor. None: 1 for the evidential losses, 0.1 for max-norm, 0 for Re-EDL. For max-norm that
            departs from the original's example, which goes to 1: reached within 140 steps on eight digits, this leaves two of
            them without any prediction and an accuracy of 0.62, against 0.98 with 0.1. Many classes (64, say) may need less
            than 1 with the evidential loss, too.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer.
        output: ``"logits"``, or a function that picks the raw outputs from what the network returns.
        loss_arguments: More arguments of the loss: ``weight`` (one number a class), ``p_norm``, ``fisher``, ``prior``,
            ``fisher_factor``; see :mod:`lightning_uq.losses.evidential`.

    Attributes:
        ood_score_names: The scores it gives, all of the Dirichlet and none of a softmax: vacuity C / S, mutual information and
            differential entropy, and those of the mean probabilities.

    Raises:
        InputError: An argument is not as above.

    Example:
        >>> module = EvidentialModule(nn.Linear(4, 3), num_classes=3)
        >>> module.predict(torch.zeros(2, 4)).vacuity.shape
        torch.Size([2])
    """

    ood_score = "vacuity"
    ood_score_names: ClassVar[tuple[str, ...]] = _DIRICHLET_SCORES + _MEAN_SCORES

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        num_classes: int,
        *,
        loss: EvidentialLossName = "evidential",
        evidence: Evidence = "clamped_exp",
        annealing_steps: int = 1000,
        annealing_epochs: int | None = None,
        max_reg_factor: float | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        output: Output = "logits",
        loss_arguments: dict[str, Any] | None = None,
    ) -> None:
        check_choice("loss", loss, tuple(_LOSSES))
        network, output = restore_argument(network, "network"), restore_argument(output, "output")
        evidence = restore_argument(evidence, "evidence")
        if output in ("probs", "log_probs"):
            raise InputError(
                f"Expected argument `output` to be 'logits' or a function, but got {output!r}: evidence is made of raw outputs."
            )
        built = network if isinstance(network, nn.Module) else build_network(network)
        super().__init__(
            DeterministicNetwork(built, output),
            num_classes=num_classes,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        kind, arguments, default_factor = _LOSSES[loss]
        for name, value in (("annealing_steps", annealing_steps), ("annealing_epochs", annealing_epochs)):
            if value is not None and value < 0:
                raise InputError(f"Expected argument `{name}` to be at least 0, but got {value}.")
        self.annealing_steps = annealing_steps
        self.annealing_epochs = annealing_epochs
        self.max_reg_factor = default_factor if max_reg_factor is None else max_reg_factor
        # The steps have looked at the labels, and evidence of ours is not negative.
        given = {"reg_factor": self.max_reg_factor, "validate_args": False, **arguments, **(loss_arguments or {})}
        try:
            self.evidence_loss = kind(evidence, **given)
        except TypeError as error:
            raise InputError(
                f"Expected argument `loss_arguments` to hold arguments of {kind.__name__}: {error}."
            ) from error
        if self.evidence_loss.weight is not None and self.evidence_loss.weight.shape != (num_classes,):
            raise InputError(
                f"Expected `weight` in argument `loss_arguments` to hold {num_classes} numbers, but got "
                f"{list(self.evidence_loss.weight.shape)}."
            )
        self._save_arguments(
            network=network,
            num_classes=num_classes,
            loss=loss,
            evidence=evidence,
            annealing_steps=annealing_steps,
            annealing_epochs=annealing_epochs,
            max_reg_factor=max_reg_factor,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            output=output,
            loss_arguments=loss_arguments,
        )

    # ------------------------------------------------------------------ loss

    @property
    def reg_factor(self) -> float:
        """The regularizer's factor at this point of the training; the final one outside a training."""
        if self._trainer is None or not self.trainer.training:
            return self.max_reg_factor
        if self.annealing_epochs is not None:
            done, end = self.trainer.current_epoch, self.annealing_epochs
        else:
            done, end = self.trainer.global_step, self.annealing_steps
        return self.max_reg_factor * min(1.0, done / end) if end else self.max_reg_factor

    def example_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of raw outputs [B, C, ...] under the present factor."""
        loss: Tensor = self.evidence_loss(output, y, self.reg_factor)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step, with ``reg_factor`` logged."""
        self.log("reg_factor", self.reg_factor, batch_size=1)
        return super().training_step(batch, batch_idx)

    # ------------------------------------------------------------------ predictions

    def prediction(self, output: Tensor) -> DirichletPrediction:
        """The Dirichlet of raw outputs [1, B, C, ...]."""
        (raw,) = output
        alpha = self.evidence_loss.concentration(raw)
        if self.evidence_loss.prior == 1:
            return DirichletPrediction(alpha)
        return RelaxedDirichletPrediction(alpha, self.evidence_loss.prior)

    @contextmanager
    def ood_scores(self, model: Any) -> Iterator[Callable[[Tensor], Mapping[str, Tensor]]]:
        """The scores of the Dirichlet that the network's outputs stand for, for callbacks that score inputs.

        What such a callback hands over may be logits of the mean probabilities, of which no evidence is left, so that the
        raw outputs are read where they are made.
        """
        seen: list[Tensor] = []
        handle = self.network.register_forward_hook(lambda module, args, output: seen.append(output))

        def scores(logits: Tensor) -> Mapping[str, Tensor]:
            return _Scores(self.prediction(seen[-1] if seen else logits))

        try:
            yield scores
        finally:
            handle.remove()

    # ------------------------------------------------------------------ metrics

    def validation_metrics(self) -> dict[str, Metric]:
        """Those of any classifier, of the Dirichlet's mean, and the number of classes that are never predicted."""
        classes = cast(int, self.num_classes)
        return {**super().validation_metrics(), "unpredicted_classes": UnpredictedClasses(classes)}

    def evaluation_metrics(self) -> dict[str, Metric]:
        """Those of the validation and the Brier score; a joint log-loss needs hypotheses, of which there are none."""
        return {**self.validation_metrics(), "brier": BrierScore()}

    def on_validation_epoch_end(self) -> None:
        """Warn of classes that are never predicted: in ``validate``, and in a training whose annealing is over."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking or (self.trainer.state.fn == "fit" and not self._annealed):
            return
        for metrics in self.val_metrics:
            missing = metrics["unpredicted_classes"].classes()  # type: ignore[index]  # a bare Module to mypy
            if missing:
                rank_zero_warn(
                    f"Of the classes in the validation data, {missing} are never predicted. Evidence of a class can die: try a "
                    f"smaller `max_reg_factor` than {self.max_reg_factor:g}, a longer annealing, or evidence='clamped_exp'."
                )

    @property
    def _annealed(self) -> bool:
        if self.annealing_epochs is not None:
            return self.trainer.current_epoch >= self.annealing_epochs
        return self.trainer.global_step >= self.annealing_steps


class _Scores(Mapping[str, Tensor]):
    """The scores [B] of a prediction by name, each computed when it is asked for."""

    def __init__(self, prediction: DirichletPrediction) -> None:
        self._prediction = prediction

    def __getitem__(self, name: str) -> Tensor:
        if name in _MEAN_SCORES:
            return SCORES[name](self._prediction.log_probs.unsqueeze(0))
        if name not in _DIRICHLET_SCORES:
            raise KeyError(name)
        score: Tensor = getattr(self._prediction, name)
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(_DIRICHLET_SCORES + _MEAN_SCORES)

    def __len__(self) -> int:
        return len(_DIRICHLET_SCORES + _MEAN_SCORES)


class RelaxedDirichletPrediction(DirichletPrediction):
    """A Dirichlet whose classes have another prior weight than 1: concentration = evidence + prior.

    Args:
        concentration: alpha [B, C, ...].
        prior: lambda, the weight of each class without any evidence.
        temperature: See :class:`~lightning_uq.predictions.DirichletPrediction`, as for the next two.
        log_density: Log-density [B].
        class_scaling: Scale and bias [2, C].

    Source: Chen et al., R-EDL, ICLR 2024.

    Example:
        >>> RelaxedDirichletPrediction(torch.tensor([[0.1, 0.1]]), 0.1).vacuity
        tensor([1.], dtype=torch.float64)
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {**DirichletPrediction._batch_axis, "prior": None}

    def __init__(
        self,
        concentration: Tensor,
        prior: float,
        temperature: Tensor | None = None,
        log_density: Tensor | None = None,
        class_scaling: Tensor | None = None,
    ) -> None:
        super().__init__(concentration, temperature, log_density, class_scaling)
        self._set(**self.__dict__["_tensors"], prior=torch.tensor(prior, dtype=concentration.dtype))

    @property
    def vacuity(self) -> Tensor:
        """lambda C / S: 1 without any evidence, towards 0 as it grows: [B, ...]."""
        return super().vacuity * self._get("prior").to(self.concentration.device)


class UnpredictedClasses(UncertaintyMetric):
    """Number of classes that occur among the labels and are never predicted.

    Args:
        num_classes: C.
        kwargs: What every ``torchmetrics.Metric`` takes.

    Example:
        >>> metric = UnpredictedClasses(3)
        >>> metric.update(DirichletPrediction(torch.tensor([[2.0, 1.0, 1.0]])), torch.tensor([1]))
        >>> metric.compute(), metric.classes()
        (tensor(1), [1])
    """

    higher_is_better: bool | None = False
    labelled: Tensor
    predicted: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self._add_sum("labelled", num_classes)
        self._add_sum("predicted", num_classes)

    def update(self, prediction: DirichletPrediction, target: Tensor) -> None:
        """Add a batch: labels [B, ...] and a prediction of them."""
        self.labelled = self.labelled + torch.bincount(target.flatten(), minlength=self.num_classes)
        self.predicted = self.predicted + torch.bincount(prediction.label.flatten(), minlength=self.num_classes)

    def compute(self) -> Tensor:
        """The number of such classes."""
        return self._missing.sum()

    def classes(self) -> list[int]:
        """Which they are, over all ranks; a collective."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=not self._is_synced):
            missing: list[int] = self._missing.nonzero().flatten().tolist()
        return missing

    @property
    def _missing(self) -> Tensor:
        return (self.labelled > 0) & (self.predicted == 0)


@register_method("evidential", ood_score="vacuity")
def _evidential(setting: Setting) -> EvidentialModule:
    return EvidentialModule(setting.network, setting.num_classes, optimizer=setting.optimizer)


@register_method("maxnorm", ood_score="vacuity")
def _maxnorm(setting: Setting) -> EvidentialModule:
    return EvidentialModule(setting.network, setting.num_classes, loss="maxnorm", optimizer=setting.optimizer)
