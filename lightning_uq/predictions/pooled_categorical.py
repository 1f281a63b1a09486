"""The prediction of a classifier whose members were pooled."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.functional.validation import check_shape
from lightning_uq.predictions.class_probabilities import ClassProbabilities
from lightning_uq.predictions.fields import Field


class PooledCategoricalPrediction(ClassProbabilities):
    """A classifier's prediction without its members: mean probabilities and two moments.

    A module returns it instead of a prediction with more than 32 members, which is Z times larger, and :meth:`pool` of a prediction
    with members returns it too. Results that both types have agree up to rounding.

    Args:
        mean_log_probs: log mean_z p_z [B, C] (or [B, C, ...]), before any calibration.
        uncalibrated_expected_entropy: mean_z H[p_z] in nats [B, ...].
        uncalibrated_mutual_information: H[mean_z p_z] - mean_z H[p_z] in nats [B, ...].
        vacuity: Vacuity [B, ...] of a pooled Dirichlet.
        differential_entropy: Differential entropy [B, ...] of a pooled Dirichlet, in nats.
        temperature: Scalar T of a pooled calibration.
        class_scaling: Scale and bias [2, C] of a pooled calibration.
        class_matrix: Weights, bias, floor and 1 / T [C + 3, C] of a pooled calibration.
        class_curves: Knots and values [2, C, K] of a pooled calibration.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes do not fit together.

    Example:
        >>> import torch
        >>> from lightning_uq.predictions import CategoricalPrediction
        >>> CategoricalPrediction(torch.zeros(1000, 2, 3)).pool()
        PooledCategoricalPrediction(mean_log_probs=[2, 3], uncalibrated_expected_entropy=[2], uncalibrated_mutual_information=[2])
    """

    @property
    def score_names(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the type that was pooled
        """The names that :meth:`score` takes; a pooled Dirichlet has two more."""
        names = ("predictive_entropy", "mutual_information", "expected_entropy", "max_softmax", "gen")
        further = (name for name in ("vacuity", "differential_entropy") if self._get(name) is not None)
        return self._listed((*names, *further))

    _hint: ClassVar[str] = (
        " The other scores need the members, which were pooled: set `module.return_members = True` to keep them."
    )

    mean_log_probs = Field("log mean_z p_z [B, C, ...], before any calibration.", batch_axis=0, class_axis=1)
    uncalibrated_expected_entropy = Field("Mean entropy of the hypotheses, in nats: [B, ...].", batch_axis=0)
    uncalibrated_mutual_information = Field("H[mean_z p_z] - mean_z H[p_z] in nats: [B, ...].", batch_axis=0)
    vacuity = Field("Mean over z of the vacuity [B, ...]; only for a Dirichlet.", batch_axis=0, optional=True)
    differential_entropy = Field(
        "Mean over z of the differential entropy [B, ...], in nats; only for a Dirichlet.", batch_axis=0, optional=True
    )

    _moments = ("uncalibrated_expected_entropy", "uncalibrated_mutual_information")

    def pool(self) -> "PooledCategoricalPrediction":
        """The prediction itself."""
        return self

    def _check(self) -> None:
        self._check_classes("mean_log_probs", "[B, C]")
        expected = torch.Size([len(self), *self.map_shape])
        for name in (*self._moments, "vacuity", "differential_entropy"):
            tensor = self._get(name)
            if tensor is not None:
                check_shape(name, tensor, expected)
        super()._check()

    def _no_logits(self) -> str:
        return "The members' `logits` were pooled when this prediction was made. Set `module.return_members = True` to keep them."

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """The results of any classifier, with ``vacuity`` and ``differential_entropy`` of a Dirichlet."""
        further = {name: self._get(name) for name in ("vacuity", "differential_entropy")}
        named = {name: tensor for name, tensor in further.items() if tensor is not None}
        return self._columns({**super().to_dict(interval), **named})
