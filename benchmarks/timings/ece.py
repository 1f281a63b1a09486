"""Calibration errors of a million rows, beside torchmetrics."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from benchmarks.harness import Call, Contender, Work
from lightning_uq.metrics import ExpectedCalibrationError

TITLE = "Calibration error of 1,000,000 rows"
ABOUT = "Ten classes, 15 bins, the updates and the result of a new metric. Both check their arguments, as they do by default; and both without. The state of ours is a sum per bin, which each batch adds to; torchmetrics keeps all rows and bins them once, at the end."

ROWS, CLASSES, BINS = 1_000_000, 10, 15


def works(device: str) -> Iterator[Work]:
    """A thousand batches, and one."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(ROWS, CLASSES, generator=generator).mul(2).softmax(-1).to(device)
    target = torch.multinomial(probs, 1, generator=None if device != "cpu" else generator).squeeze(1)
    for batches in (1000, 1):
        for checks in (True, False):
            rows = list(zip(probs.chunk(batches), target.chunk(batches), strict=True))
            yield Work(
                f"{batches} batch{'es' * (batches > 1)}{'' if checks else ', unchecked'}",
                [
                    Contender("lightning-uq", partial(ours, rows, checks)),
                    Contender("MulticlassCalibrationError", partial(peer, rows, checks), "torchmetrics"),
                ],
            )


def ours(rows: list[tuple[Tensor, Tensor]], checks: bool) -> Call:
    def call() -> Tensor:
        metric = ExpectedCalibrationError(num_bins=BINS, validate_args=checks).to(rows[0][0].device)
        for probs, target in rows:
            metric.update(probs, target)
        return metric.compute()

    return call


def peer(rows: list[tuple[Tensor, Tensor]], checks: bool) -> Call:
    def call() -> Tensor:
        metric = MulticlassCalibrationError(CLASSES, n_bins=BINS, norm="l1", validate_args=checks).to(rows[0][0].device)
        for probs, target in rows:
            metric.update(probs, target)
        return metric.compute()

    return call
