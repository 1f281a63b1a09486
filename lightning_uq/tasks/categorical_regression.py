"""Numeric targets, predicted by distributions over atoms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.functional.atoms import atom_moments, check_atoms
from lightning_uq.functional.precision import upcast
from lightning_uq.losses.categorical_regression import categorical_regression_loss, split_atoms
from lightning_uq.losses.gaussian import MIN_VARIANCE
from lightning_uq.predictions import GaussianMixturePrediction
from lightning_uq.tasks.base import Progress
from lightning_uq.tasks.regression_base import RegressionTask


@dataclass(frozen=True)
class CategoricalRegression(RegressionTask):
    """Targets [B, D] as distributions over A atoms: outputs [Z, B, D A + D] hold logits over the atoms, then the prior means.

    The loss is the cross-entropy against the 2-hot encoding of the target minus the prior. Each hypothesis predicts a
    Gaussian with the moments of its distribution.

    Args:
        atoms: Positions of the atoms, in increasing order, in the target's units.

    Raises:
        InputError: There are fewer than two atoms, or their positions do not increase.

    Example:
        >>> CategoricalRegression(atoms=(-1.0, 0.0, 1.0)).predict(torch.zeros(5, 2, 4)).mean.shape
        torch.Size([2, 1])
    """

    atoms: Sequence[float] = ()

    ood_score: ClassVar[str] = "epistemic_variance"
    score_names: ClassVar[tuple[str, ...]] = GaussianMixturePrediction.score_names
    layout: ClassVar[str] = "the logits over the atoms and then the prior means"

    def __post_init__(self) -> None:
        object.__setattr__(self, "atoms", tuple(check_atoms(self.atoms).tolist()))

    @property
    def outputs_per_target(self) -> int:  # type: ignore[override]  # depends on the atoms
        """One logit per atom, and the prior mean."""
        return len(self.atoms) + 1

    def predict(self, outputs: Tensor) -> GaussianMixturePrediction:
        """One Gaussian per hypothesis, with the moments of its distribution."""
        logits, prior = split_atoms(outputs, len(self.atoms))
        mean, variance = atom_moments(logits, self._positions(outputs))
        return GaussianMixturePrediction(mean + prior, variance + MIN_VARIANCE)

    def losses(self, output: Tensor, target: Tensor, progress: Progress | None = None) -> Tensor:
        """The cross-entropy against 2-hot targets."""
        logits, prior = split_atoms(output.flatten(0, -2).unsqueeze(0), len(self.atoms))
        rows = target.flatten(0, -2).unsqueeze(0)
        losses = categorical_regression_loss(logits, rows, self._positions(output), prior, reduction="none")
        return losses.reshape(target.shape)

    def _positions(self, outputs: Tensor) -> Tensor:
        return torch.tensor(self.atoms, dtype=upcast(outputs).dtype, device=outputs.device)
