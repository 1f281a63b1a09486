"""Application of a fitted calibration to log-probabilities, selected by the name of its tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_uq.functional.isotonic import apply_isotonic
from lightning_uq.functional.matrix_scaling import apply_matrix_scaling
from lightning_uq.functional.vector_scaling import apply_vector_scaling

CALIBRATIONS = ("temperature", "class_scaling", "class_matrix", "class_curves")
"""The tensors that can calibrate the mean probabilities of classes."""


def calibrate_log_probs(log_probs: Tensor, fitted: Mapping[str, Tensor | None]) -> Tensor:
    """Calibrate log-probabilities [N, C, ...] -> [N, C, ...].

    Args:
        log_probs: Log of the mean probabilities.
        fitted: Tensors by name, of which at most one is not None: ``temperature``, ``class_scaling`` (:func:`apply_vector_scaling`),
            ``class_matrix`` (:func:`apply_matrix_scaling`) or ``class_curves`` (:func:`apply_isotonic`).

    Example:
        >>> calibrate_log_probs(torch.tensor([[0.8, 0.2]]).log(), {"temperature": torch.tensor(2.0)}).exp()
        tensor([[0.6667, 0.3333]])
    """
    for name, tensor in fitted.items():
        if tensor is None:
            continue
        if name == "temperature":
            return torch.log_softmax(log_probs / tensor, 1)
        tensor = tensor.to(log_probs)
        if name == "class_scaling":
            return torch.log_softmax(apply_vector_scaling(log_probs, *tensor), 1)
        apply = apply_matrix_scaling if name == "class_matrix" else apply_isotonic
        return apply(log_probs, tensor)
    return log_probs
