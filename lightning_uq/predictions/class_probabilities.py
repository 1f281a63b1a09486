"""The base class of all predictions of classes."""

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_uq.errors import InputError
from lightning_uq.functional import entropy
from lightning_uq.functional.class_calibration import CALIBRATIONS, calibrate_log_probs
from lightning_uq.functional.scores import SCORES
from lightning_uq.functional.true_class import at_class
from lightning_uq.predictions.decomposition import Decomposed
from lightning_uq.predictions.fields import Field


class ClassProbabilities(Decomposed):
    """The base class of predictions of classes: all results from the pooled log-probabilities [B, C, ...].

    A prediction has at most one calibration, which acts on the log of the mean probabilities. It changes ``log_probs`` and its
    results ``probs``, ``label``, ``confidence`` and ``predictive_entropy``, but neither the hypotheses nor the scores that use
    them. The parts of the entropy are then named ``uncalibrated_expected_entropy`` and ``uncalibrated_mutual_information``.
    """

    _calibrations = CALIBRATIONS

    temperature = Field("Scalar T: probabilities are softmax(log(mean_z p_z) / T).", fitted_by="temperature")
    class_scaling = Field("Scale and bias [2, C] of a vector scaling, instead of T.", fitted_by="class scaling")
    class_matrix = Field(
        "Weights, bias, floor and 1 / T [C + 3, C] of a matrix scaling, instead of T.", fitted_by="matrix scaling"
    )
    class_curves = Field(
        "Knots and values [2, C, K] of a monotone curve per class, instead of T.", fitted_by="isotonic scaling"
    )

    # ------------------------------------------------------------------ defined by each type

    @property
    @abstractmethod
    def mean_log_probs(self) -> Tensor:
        """Log of the mean probabilities [B, C, ...], before any calibration."""

    @property
    def calibration_logits(self) -> Tensor:
        """Logits [Z, B, C, ...] that a calibration is fitted to: the members', or the log of the mean with Z = 1."""
        return self.logits if self.has_logits else self.mean_log_probs.unsqueeze(0)

    def pool(self) -> "ClassProbabilities":
        """The prediction without its members: only the log of the mean probabilities and moments, Z times smaller."""
        from lightning_uq.predictions.pooled_categorical import PooledCategoricalPrediction

        if self.is_calibrated and self._is_one_network:  # then the calibration belongs to the network
            parts = self.log_probs, self.expected_entropy, self.mutual_information
            kept = self._fitted(*self._calibrations)
        else:
            parts, kept = self._uncalibrated(), self._fitted()
        return PooledCategoricalPrediction(*parts, **kept, **self._further_moments())

    def _uncalibrated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean log-probabilities, expected entropy and mutual information before any calibration."""
        return self.mean_log_probs, self.uncalibrated_expected_entropy, self.uncalibrated_mutual_information

    def _further_moments(self) -> dict[str, Tensor]:
        """Moments that a type keeps when it is pooled, in addition to those of all types."""
        return {}

    # ------------------------------------------------------------------ results

    @property
    def log_probs(self) -> Tensor:
        """Pooled log-probabilities [B, C, ...], after the calibration if there is one."""
        return self._once("log_probs", lambda: self._calibrated(self.mean_log_probs))

    def _calibrated(self, log_probs: Tensor) -> Tensor:
        return calibrate_log_probs(log_probs, {name: self._get(name) for name in self._calibrations})

    @property
    def probs(self) -> Tensor:
        """Pooled probabilities [B, C, ...]."""
        return self.log_probs.exp()

    @property
    def label(self) -> Tensor:
        """Most probable class [B, ...]; -1 if the probabilities are NaN."""
        highest, label = self.log_probs.max(1)  # the maximum is NaN if any number is
        return torch.where(highest.isnan(), -1, label)

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class: [B, ...]."""
        return self.log_probs.amax(1).exp()

    @property
    def predictive_entropy(self) -> Tensor:
        """Entropy of the pooled probabilities, in nats: [B, ...]."""
        return entropy.entropy(self.log_probs, 1)

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability [B, ...] of the class indices ``target`` [B, ...]."""
        expected = [len(self), *self.map_shape]
        if target.is_floating_point() or list(target.shape) != expected:
            raise InputError(
                f"`target` must be class indices of shape {expected}, but it is {target.dtype} of shape "
                f"{list(target.shape)}."
            )
        return at_class(self.log_probs, target, 1)

    def _score(self, name: str) -> Tensor:
        if hasattr(type(self), name):
            return super()._score(name)
        return SCORES[name](self.mean_log_probs.unsqueeze(0))

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of the positions of each input, such as (H, W) of a segmentation; empty if there is one label per input."""
        tensor, axis = self._classes()
        return tuple(tensor.shape[axis + 1 :])

    def _classes(self) -> tuple[Tensor, int]:
        """The first tensor with a class axis, and that axis."""
        for name, tensor, _ in self._present():
            axis = self._fields[name].class_axis
            if axis is not None:
                return tensor, axis
        raise InputError(f"{type(self).__name__} declares no field with a class axis.")

    def as_rows(self) -> Self:
        """The prediction with every position of a map as a separate row: [B, C, H, W] becomes [B H W, C].

        ``log_density`` [B] and ``ood_score`` are repeated for each position of their input.
        """
        if not self.map_shape:
            return self
        num_positions = torch.Size(self.map_shape).numel()
        rows: dict[str, Tensor] = {}
        for name, tensor, axis in self._present():
            class_axis = self._fields[name].class_axis
            if axis is None:
                rows[name] = tensor
            elif class_axis is not None:
                rows[name] = tensor.movedim(class_axis, -1).flatten(axis, -2)
            elif tensor.ndim > axis + 1:
                rows[name] = tensor.flatten(axis)
            else:
                rows[name] = tensor.repeat_interleave(num_positions, axis)
        return self._from_tensors({name: rows.get(name) for name in self._fields})

    def to_dict(self, interval: float | None = None) -> dict[str, Tensor]:
        """``label``, ``confidence``, ``probs``, ``predictive_entropy``, its two parts, and ``log_density`` if fitted.

        Args:
            interval: Ignored, because classes have no interval.
        """
        results = {
            "label": self.label,
            "confidence": self.confidence,
            "probs": self.probs,
            "predictive_entropy": self.predictive_entropy,
            **self._parts(),
        }
        return self._columns(results)

    def _check_classes(self, name: str, axes: str) -> None:
        """Refuse a tensor with a class axis but too few axes."""
        tensor, class_axis = self._get(name), self._fields[name].class_axis
        if tensor is None or class_axis is None or tensor.ndim > class_axis:
            return
        add = "" if tensor.ndim < class_axis else f" Add the index axis: `{name}.unsqueeze(0)`."
        raise InputError(f"`{name}` must have shape {axes}, but its shape is {list(tensor.shape)}.{add}")
