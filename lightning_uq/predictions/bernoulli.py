"""Predictions of several binary labels per input."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.errors import InputError
from lightning_uq.functional import bernoulli
from lightning_uq.functional.validation import check_shape
from lightning_uq.predictions.decomposition import Decomposed
from lightning_uq.predictions.fields import Field


class LabelProbabilities(Decomposed):
    """The base class of predictions of L labels, independent given the index: results from the pooled logits [B, L].

    A temperature acts on the pooled logits. It changes ``probs``, ``label``, ``confidence`` and ``predictive_entropy``, but not
    the hypotheses. The parts of their entropy are then named ``uncalibrated_expected_entropy`` and
    ``uncalibrated_mutual_information``. Scores are sums over the labels.
    """

    score_names: ClassVar[tuple[str, ...]] = ("predictive_entropy", "mutual_information", "expected_entropy")

    temperature = Field("T, a scalar or [L]: probabilities are sigmoid(pooled logit / T).", fitted_by="temperature")

    # ------------------------------------------------------------------ defined by each type

    @property
    @abstractmethod
    def mean_logits(self) -> Tensor:
        """The logit of the mean probability [B, L], before any calibration."""

    @property
    def calibration_logits(self) -> Tensor:
        """Logits [Z, B, L] that a calibration is fitted to: the members', or those of the mean with Z = 1."""
        return self.logits if self.has_logits else self.mean_logits.unsqueeze(0)

    def pool(self) -> "LabelProbabilities":
        """The prediction without its members: only pooled logits and moments, Z times smaller."""
        mean, fitted = self.mean_logits, self._fitted()
        entropies = (self.uncalibrated_expected_entropy, self.uncalibrated_mutual_information)
        if self.is_calibrated and self._is_one_network:  # then the temperature belongs to the network
            mean, fitted = self.pooled_logits, self._fitted("temperature")
            entropies = (self.expected_entropy, self.mutual_information)
        return PooledBernoulliPrediction(mean, *entropies, **fitted)

    # ------------------------------------------------------------------ results

    @property
    def pooled_logits(self) -> Tensor:
        """The logit of the probability [B, L], after the calibration if there is one."""
        temperature = self._get("temperature")
        return self.mean_logits if temperature is None else self.mean_logits / temperature

    @property
    def probs(self) -> Tensor:
        """Probability that each label is on [B, L]."""
        return torch.sigmoid(self.pooled_logits)

    @property
    def label(self) -> Tensor:
        """Whether each label's probability is above 0.5: [B, L] of int64, 0 or 1, and -1 for NaN."""
        return torch.where(self.pooled_logits.isnan(), -1, (self.pooled_logits > 0).long())

    def labels(self, threshold: float | Tensor) -> Tensor:
        """Whether each label's probability is above a threshold: [B, L] of int64, 0 or 1.

        Args:
            threshold: A number in [0, 1], or one per label [L].
        """
        return (self.probs > threshold).long()

    @property
    def confidence(self) -> Tensor:
        """Probability of the more probable outcome of each label: [B, L], at least 0.5."""
        return torch.sigmoid(self.pooled_logits.abs())

    @property
    def predictive_entropy(self) -> Tensor:
        """Entropy of each label's pooled probability, in nats: [B, L]."""
        return bernoulli.bernoulli_entropy(self.pooled_logits)

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability [B] of labels [B, L], summed over the known labels.

        Args:
            target: Labels 0 and 1, of any dtype; NaN marks an unknown label. A number in between is the probability of label 1.
        """
        check_shape("target", target, self.mean_logits.shape, advice="An array of another shape would broadcast.")
        on, off = bernoulli.log_probs_of(self.pooled_logits)
        y = target.to(on.dtype)
        each = torch.where(y > 0, y * on, 0.0) + torch.where(y < 1, (1 - y) * off, 0.0)  # an unknown label adds 0
        return each.sum(-1)

    def _score(self, name: str) -> Tensor:
        return super()._score(name).sum(-1)

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``label``, ``confidence``, ``probs``, ``predictive_entropy`` and its two parts for each label [B, L], and ``log_density`` if fitted.

        Args:
            interval: Ignored, because labels have no interval.
        """
        results = {
            "label": self.label,
            "confidence": self.confidence,
            "probs": self.probs,
            "predictive_entropy": self.predictive_entropy,
            **self._parts(),
        }
        return self._columns(results)


class BernoulliPrediction(LabelProbabilities):
    """A multilabel classifier's prediction: one row of logits per hypothesis. The labels are independent given the index.

    Args:
        logits: Raw logits [Z, B, L].
        temperature: T of a pooled calibration, a scalar or [L]: probabilities are sigmoid(logit of the mean / T).
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: ``logits`` does not have three axes.

    Example:
        >>> prediction = BernoulliPrediction(torch.tensor([[[2.0, 3.0]], [[-2.0, 3.0]]]))
        >>> prediction.probs, prediction.mutual_information
        (tensor([[0.5000, 0.9526]]), tensor([[0.3278, 0.0000]]))
        >>> prediction.label, prediction.score("mutual_information")
        (tensor([[0, 1]]), tensor([0.3278]))
    """

    score_names: ClassVar[tuple[str, ...]] = (*LabelProbabilities.score_names, "energy")
    has_logits: ClassVar[bool] = True

    logits = Field("Raw logits [Z, B, L] of every hypothesis.", batch_axis=1)

    def _check(self) -> None:
        if self.logits.ndim != 3:
            raise InputError(f"`logits` must have shape [Z, B, L], but its shape is {list(self.logits.shape)}.")
        super()._check()

    @property
    def num_indices(self) -> int:
        """Z, the number of hypotheses."""
        return len(self.logits)

    @property
    def mean_logits(self) -> Tensor:
        """log mean_z p_z - log mean_z (1 - p_z) [B, L]."""
        return self._once("mean_logits", lambda: bernoulli.pooled_logits(self.logits))

    @property
    def uncalibrated_expected_entropy(self) -> Tensor:
        """mean_z H[p_z] in nats, before any pooled temperature: [B, L]."""
        return bernoulli.bernoulli_expected_entropy(self.logits)

    @property
    def uncalibrated_mutual_information(self) -> Tensor:
        """H[mean_z p_z] - mean_z H[p_z] in nats, before any pooled temperature: [B, L]."""
        return bernoulli.bernoulli_mutual_information(self.logits)

    def map_logits(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy whose members' logits were transformed by a function before they are pooled."""
        return self.replace(logits=function(self.logits))

    def _score(self, name: str) -> Tensor:
        return bernoulli.joint_energy(self.logits) if name == "energy" else super()._score(name)


class PooledBernoulliPrediction(LabelProbabilities):
    """A multilabel classifier's prediction without its members: pooled logits and two moments.

    Args:
        mean_logits: The logit of the mean probability [B, L], before any calibration.
        uncalibrated_expected_entropy: mean_z H[p_z] in nats [B, L].
        uncalibrated_mutual_information: H[mean_z p_z] - mean_z H[p_z] in nats [B, L].
        temperature: T of a pooled calibration, a scalar or [L].
        log_density: Log-density [B] of the input's features, if one was fitted.

    Raises:
        InputError: The shapes do not fit together.

    Example:
        >>> BernoulliPrediction(torch.zeros(1000, 2, 3)).pool()
        PooledBernoulliPrediction(mean_logits=[2, 3], uncalibrated_expected_entropy=[2, 3], uncalibrated_mutual_information=[2, 3])
    """

    _hint: ClassVar[str] = (
        " The other scores need the members, which were pooled: set `module.return_members = True` to keep them."
    )

    mean_logits = Field("The logit of the mean probability [B, L], before any calibration.", batch_axis=0)
    uncalibrated_expected_entropy = Field(
        "Mean entropy of the hypotheses for each label, in nats: [B, L].", batch_axis=0
    )
    uncalibrated_mutual_information = Field(
        "Mutual information between each label and the index, in nats: [B, L].", batch_axis=0
    )

    def pool(self) -> "PooledBernoulliPrediction":
        """The prediction itself."""
        return self

    def _check(self) -> None:
        for name in ("uncalibrated_expected_entropy", "uncalibrated_mutual_information"):
            check_shape(name, self.__dict__["_tensors"][name], self.mean_logits.shape)
        if self.mean_logits.ndim != 2:
            raise InputError(f"`mean_logits` must have shape [B, L], but its shape is {list(self.mean_logits.shape)}.")
        super()._check()

    def _no_logits(self) -> str:
        return "The members' `logits` were pooled when this prediction was made. Set `module.return_members = True` to keep them."
