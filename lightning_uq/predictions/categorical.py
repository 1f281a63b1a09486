"""The prediction of a softmax classifier."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lightning_uq.functional import entropy
from lightning_uq.functional.scores import SCORES
from lightning_uq.predictions.class_probabilities import ClassProbabilities
from lightning_uq.predictions.fields import Field


class CategoricalPrediction(ClassProbabilities):
    """A classifier's prediction: one row of logits per hypothesis.

    Args:
        logits: Raw logits [Z, B, C] (or [Z, B, C, ...]).
        temperature: Scalar T of a pooled calibration: probabilities are softmax(log(mean_z p_z) / T). The members are unchanged; the
            parts of their entropy are then ``uncalibrated_expected_entropy`` and ``uncalibrated_mutual_information``.
        class_scaling: Scale and bias [2, C] of a pooled calibration by vector scaling, instead of T.
        class_matrix: Weights, bias, floor and 1 / T [C + 3, C] of a pooled calibration by matrix scaling, instead of T.
        class_curves: Knots and values [2, C, K] of a pooled isotonic calibration, instead of T.
        log_density: Log-density [B] of the input's features, if one was fitted.

    Attributes:
        score_names: The keys of :data:`~lightning_uq.functional.scores.SCORES`. A pooled calibration changes
            ``predictive_entropy``; all other scores use the members.

    Raises:
        InputError: ``logits`` has fewer than three axes.

    Example:
        >>> import torch
        >>> prediction = CategoricalPrediction(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
        >>> prediction.probs
        tensor([[0.5000, 0.5000]])
        >>> prediction.mutual_information, prediction.score("max_softmax")
        (tensor([0.3278]), tensor([0.5000]))
    """

    score_names: ClassVar[tuple[str, ...]] = tuple(SCORES)
    has_logits: ClassVar[bool] = True

    logits = Field("Raw logits [Z, B, C, ...] of every hypothesis.", batch_axis=1, class_axis=2)

    def _check(self) -> None:
        self._check_classes("logits", "[Z, B, C]")
        super()._check()

    @property
    def num_indices(self) -> int:
        """Z, the number of hypotheses."""
        return len(self.logits)

    @property
    def mean_log_probs(self) -> Tensor:
        """log mean_z softmax(l_z) [B, C, ...], before any calibration."""
        return self._once("mean_log_probs", lambda: entropy.mean_log_probs(self.logits))

    @property
    def uncalibrated_expected_entropy(self) -> Tensor:
        """mean_z H[p_z] in nats, before any pooled calibration: [B, ...]."""
        return entropy.expected_entropy(self.logits)

    @property
    def uncalibrated_mutual_information(self) -> Tensor:
        """H[mean_z p_z] - mean_z H[p_z] in nats, before any pooled calibration: [B, ...]."""
        return entropy.mutual_information(self.logits)

    def _uncalibrated(self) -> tuple[Tensor, Tensor, Tensor]:
        return entropy.decompose(self.logits)

    def map_logits(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy whose members' logits were transformed by a function before they are pooled."""
        return self.replace(logits=function(self.logits))

    def _score(self, name: str) -> Tensor:
        return super()._score(name) if hasattr(type(self), name) else SCORES[name](self.logits)
