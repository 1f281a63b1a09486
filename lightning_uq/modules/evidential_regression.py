"""Evidential regression: one network, one pass, a Student-t over the target."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq.errors import InputError
from lightning_uq.losses.evidential_regression import (
    NUM_BLOCKS,
    EvidentialRegressionLoss,
    RegressionLoss,
    split_nig,
)
from lightning_uq.metrics.base import MeanMetric
from lightning_uq.modules.base import UncertaintyModule, restore_argument
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.networks.output import Output
from lightning_uq.predictions import StudentTPrediction


class EvidentialRegressionModule(UncertaintyModule):
    """A regressor that predicts a normal-inverse-gamma, hence a Student-t over the target.

    What it calls epistemic is a *relative* score: the data do not determine nu, so that its level is the regularizer's and the
    optimizer's (Meinert et al.). The Student-t itself is a likelihood like any other.

    Args:
        network: The network, or a factory of it: raw outputs [B, 4 D], or [B, 3 D] for ``loss="meinert"``; see
            :func:`~lightning_uq.losses.evidential_regression.split_nig`.
        loss: ``"amini"``, ``"scaled"`` or ``"meinert"``; see
            :func:`~lightning_uq.losses.evidential_regression.evidential_regression_loss`.
        reg_factor: Weight of the loss's regularizer.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimizer.
        output: ``"logits"`` takes the network's output as it is; a function picks it from what the network returns.

    Raises:
        InputError: An argument is not as above.

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600); Meinert et al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> module = EvidentialRegressionModule(nn.Linear(2, 4))
        >>> module.predict(torch.zeros(3, 2)).epistemic_variance.shape
        torch.Size([3, 1])
    """

    ood_score = "epistemic_variance"
    ood_score_names: ClassVar[tuple[str, ...]] = ("epistemic_variance", "inverse_nu")

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        loss: RegressionLoss = "amini",
        reg_factor: float = 0.01,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        output: Output = "logits",
    ) -> None:
        network, output = restore_argument(network, "network"), restore_argument(output, "output")
        built = network if isinstance(network, nn.Module) else build_network(network)
        evidence_loss = EvidentialRegressionLoss(loss, reg_factor)
        super().__init__(
            DeterministicNetwork(built, output), task="regression", optimizer=optimizer, lr_scheduler=lr_scheduler
        )
        self.evidence_loss = evidence_loss
        self._outputs_per_target = NUM_BLOCKS[loss]
        self._save_arguments(
            network=network,
            loss=loss,
            reg_factor=reg_factor,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            output=output,
        )

    def prediction(self, output: Tensor) -> StudentTPrediction:
        """The Student-t of raw outputs [1, B, 4 D]."""
        (raw,) = output
        return StudentTPrediction(*split_nig(raw, self.evidence_loss.loss))

    def example_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of raw outputs [B, 4 D] and targets [B, D]."""
        loss: Tensor = self.evidence_loss(output, y)
        return loss

    @contextmanager
    def ood_scores(self, model: Any) -> Iterator[Callable[[Tensor], Mapping[str, Tensor]]]:
        """Mean over the target dimensions of Var[mu], and of 1 / nu."""

        def scores(output: Tensor) -> Mapping[str, Tensor]:
            prediction = self.prediction(output)
            _, relative = prediction.uncertainties("meinert")
            return {
                "epistemic_variance": prediction.epistemic_variance.mean(-1),
                "inverse_nu": relative.square().mean(-1),
            }

        yield scores

    def validation_metrics(self) -> dict[str, Metric]:
        """Negative log-density of the Student-t, summed over dimensions, and the root mean squared error."""
        return {"nll": _StudentTScore("nll"), "rmse": _StudentTScore("rmse")}

    def evaluation_metrics(self) -> dict[str, Metric]:
        """With the continuous ranked probability score and the coverage of the central 95 % interval."""
        return {
            **self.validation_metrics(),
            "crps": _StudentTScore("crps"),
            "coverage_95": _StudentTScore("coverage_95"),
        }

    def _check_output(self, output: Tensor) -> None:
        blocks = NUM_BLOCKS[self.evidence_loss.loss]
        if output.ndim != 3 or output.shape[-1] == 0 or output.shape[-1] % blocks:
            raise InputError(
                f"Expected a network that returns [B, {blocks} D] for loss={self.evidence_loss.loss!r}, but got shape "
                f"{list(output.shape[1:])}."
            )


class _StudentTScore(MeanMetric):
    """One of the scores of a Student-t, averaged over a data set."""

    def __init__(self, name: str) -> None:
        super().__init__(f"student_t_{name}")
        self.name = name

    def update(self, prediction: StudentTPrediction, target: Tensor) -> None:
        """Add a batch of targets [B, D]."""
        if self.name == "nll":
            self._add(-prediction.log_prob(target))
        elif self.name == "rmse":
            self._add((prediction.mean.double() - target.double()).square())
        elif self.name == "crps":
            self._add(prediction.crps(target))
        else:
            self._add(((prediction.cdf(target) - 0.5).abs() <= 0.475).double())

    def compute(self) -> Tensor:
        """The mean, or its root."""
        mean = super().compute()
        return mean.sqrt() if self.name == "rmse" else mean
