"""What all predictions of classes share."""

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import entropy
from lightning_uq.functional.vector_scaling import apply_vector_scaling
from lightning_uq.predictions.base import Prediction


class ClassProbabilities(Prediction):
    """What categorical predictions share: everything that follows from the pooled log-probabilities [B, C, ...]."""

    @property
    @abstractmethod
    def log_probs(self) -> Tensor:
        """Pooled (and, after a calibration, tempered) log-probabilities [B, C, ...]."""

    @property
    @abstractmethod
    def expected_entropy(self) -> Tensor:
        """Mean entropy of the hypotheses, in nats: [B, ...]."""

    @property
    @abstractmethod
    def mutual_information(self) -> Tensor:
        """Mutual information of label and index, in nats: [B, ...]; a pooled calibration leaves it as it is."""

    def _calibrated(self, log_probs: Tensor) -> Tensor:
        tensors = self.__dict__["_tensors"]
        if tensors["temperature"] is not None:
            return torch.log_softmax(log_probs / tensors["temperature"], 1)
        if tensors["class_scaling"] is not None:
            scale, bias = tensors["class_scaling"].to(log_probs.device)
            return torch.log_softmax(apply_vector_scaling(log_probs, scale, bias).to(log_probs.dtype), 1)
        return log_probs

    @property
    def probs(self) -> Tensor:
        """Pooled probabilities [B, C, ...]."""
        return self.log_probs.exp()

    @property
    def label(self) -> Tensor:
        """Most probable class [B, ...]."""
        return self.log_probs.argmax(1)

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
        if target.is_floating_point() or target.shape != self.label.shape:
            raise InputError(
                f"Expected argument `target` to be class indices of shape {list(self.label.shape)}, but got "
                f"{target.dtype} of shape {list(target.shape)}."
            )
        return self.log_probs.gather(1, target.long().unsqueeze(1)).squeeze(1)

    def to_dict(self) -> dict[str, Tensor]:
        """``label``, ``confidence``, ``probs``, the three entropies, and ``log_density`` where there is one."""
        return {
            "label": self.label,
            "confidence": self.confidence,
            "probs": self.probs,
            "predictive_entropy": self.predictive_entropy,
            "expected_entropy": self.expected_entropy,
            "mutual_information": self.mutual_information,
            **self._optional(),
        }
