"""What the tests of conformal callbacks share: data whose probabilities are known, and resplits of their rows."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.predictions import CategoricalPrediction

CALIBRATION = 499  # 0.9 (n + 1) is an integer, so the expected coverage of continuous scores is 0.9


def labelled(
    num: int, num_classes: int = 5, spread: float = 1.0, seed: int = 0
) -> tuple[CategoricalPrediction, Tensor]:
    """Predictions, and labels that were drawn from their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    prediction = CategoricalPrediction(spread * torch.randn(1, num, num_classes, generator=generator))
    return prediction, torch.multinomial(prediction.probs, 1, generator=generator).squeeze(1)


def resplit(num: int, covered: Callable[[Tensor, Tensor], Tensor], times: int = 1000) -> Tensor:
    """``covered(fitted, others)`` of random splits of the rows, stacked."""
    generator = torch.Generator().manual_seed(1)
    splits = (torch.randperm(num, generator=generator) for _ in range(times))
    return torch.stack([covered(rows[:CALIBRATION], rows[CALIBRATION:]) for rows in splits])


def pairs(x: Tensor, y: Tensor, batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)
