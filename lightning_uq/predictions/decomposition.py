"""The two parts of a predictive entropy, before and after a pooled calibration."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.predictions.base import Prediction
from lightning_uq.predictions.fields import Field


class Decomposed(Prediction):
    """The base class of predictions with a predictive entropy: the sum of expected entropy and mutual information.

    A pooled calibration (a temperature or a class scaling of the mean probabilities) belongs to no single hypothesis, so with several
    hypotheses the calibrated predictive entropy has no parts. Only the parts before the calibration exist then:
    ``uncalibrated_expected_entropy`` and ``uncalibrated_mutual_information``. With one network, the calibration belongs to it, and
    all of the predictive entropy is expected entropy.
    """

    prediction_set = Field(
        "Whether each class, or label, belongs to the set with a fitted coverage: bool [B, C, ...].",
        batch_axis=0,
        class_axis=1,
        fitted_by="set",
    )
    answered = Field(
        "Whether the prediction is confident enough for the requested error rate: bool [B, ...].",
        batch_axis=0,
        fitted_by="selective threshold",
    )

    member_temperature = Field(
        "T, a scalar or [Z], by which the logits of the hypotheses have already been divided.",
        fitted_by="temperature of members",
    )

    _calibrations: ClassVar[tuple[str, ...]] = ("temperature",)

    @property
    def set_size(self) -> Tensor:
        """Number of classes, or labels, in the set: [B, ...] of int64."""
        return self.prediction_set.sum(1)

    @property
    @abstractmethod
    def predictive_entropy(self) -> Tensor:
        """Entropy of the pooled probabilities, after the calibration if there is one."""

    @property
    @abstractmethod
    def uncalibrated_expected_entropy(self) -> Tensor:
        """Mean entropy of the hypotheses before any pooled calibration, in nats."""

    @property
    @abstractmethod
    def uncalibrated_mutual_information(self) -> Tensor:
        """Mutual information between label and index before any pooled calibration, in nats."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the prediction carries a pooled calibration."""
        return any(self._get(name) is not None for name in self._calibrations)

    @property
    def _is_one_network(self) -> bool:
        """Whether there is one hypothesis, without uncertainty of its own."""
        return self.num_indices == 1 and self.has_logits

    @property
    def expected_entropy(self) -> Tensor:
        """Mean entropy of the hypotheses, in nats.

        Raises:
            InputError: A pooled calibration of several hypotheses leaves this part undefined.
        """
        if not self.is_calibrated:
            return self.uncalibrated_expected_entropy
        self._check_one_network("expected_entropy")
        return self.predictive_entropy

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information between label and index, in nats.

        Raises:
            InputError: A pooled calibration of several hypotheses leaves this part undefined.
        """
        if not self.is_calibrated:
            return self.uncalibrated_mutual_information
        self._check_one_network("mutual_information")
        return torch.zeros_like(self.predictive_entropy)

    def _check_one_network(self, name: str) -> None:
        if not self._is_one_network:
            instead = (
                ", or TemperatureScaling(scope='shared'), which calibrates the hypotheses" if self.has_logits else ""
            )
            raise InputError(
                f"`{name}` is not defined for a predictive entropy that was calibrated after the hypotheses were pooled. Use "
                f"`uncalibrated_{name}`{instead}."
            )

    def _parts(self) -> dict[str, Tensor]:
        """The two parts, under names that say whether the hypotheses are uncalibrated."""
        return {name: getattr(self, name) for name in self._part_names()}

    def _part_names(self) -> tuple[str, ...]:
        prefix = "uncalibrated_" if self.is_calibrated and not self._is_one_network else ""
        return tuple(f"{prefix}{name}" for name in _PARTS)

    def _listed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        parts = {name.removeprefix("uncalibrated_"): name for name in self._part_names()}
        return tuple(parts.get(name, name) for name in names)

    def score(self, name: str) -> Tensor:
        """A score [B] by its name: higher is more uncertain. See :meth:`Prediction.score`.

        ``uncalibrated_expected_entropy`` and ``uncalibrated_mutual_information`` are also scores; ``score_names`` lists them if no
        other parts exist.

        Raises:
            InputError: The name is unknown, or is a part that a pooled calibration of several hypotheses leaves undefined.
            NotFittedError: The prediction carries no ``log_density``.
        """
        is_part = name.removeprefix("uncalibrated_") in _PARTS
        return self._nan_as_infinity(self._score(name)) if is_part else super().score(name)

    def _columns(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super()._columns(results)
        return found if self._get("prediction_set") is None else {**found, "set_size": self.set_size}


_PARTS = ("expected_entropy", "mutual_information")
