"""The mean IoU over batches: its state stays three integers per class."""

import pytest
import torch

from lightning_uq import metrics
from lightning_uq.predictions import CategoricalPrediction


def maps(seed, rows=2, classes=4, size=(6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, *size, generator=generator)
    return logits, torch.randint(classes, (rows, *size), generator=generator)


def test_batches_are_pooled_and_not_averaged():
    from torchmetrics.classification import MulticlassJaccardIndex

    metric, theirs = metrics.MeanIoU(), MulticlassJaccardIndex(4)
    for seed in range(5):
        logits, target = maps(seed, rows=1 + seed)
        metric.update(CategoricalPrediction(logits[None]) if seed % 2 else logits.softmax(1), target)
        theirs.update(logits, target)
    assert float(metric.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert metric.per_class().shape == (4,)


def test_batches_may_know_more_classes_than_earlier_ones():
    metric = metrics.MeanIoU()
    for classes in (2, 5, 3):
        logits, target = maps(classes, classes=classes)
        metric(logits, target)
    assert metric.per_class().shape == (5,)
    assert metrics.MeanIoU().per_class().shape == (0,)


NAMES = ["NegativeLogLikelihood", "Accuracy", "BrierScore", "ExpectedCalibrationError", "MeanIoU"]


@pytest.mark.parametrize("name", NAMES)
def test_pixels_leave_the_state_at_its_size(name):
    """Numbers in the state after 60 batches of 120,000 pixels are those after one."""
    metric = getattr(metrics, name)(validate_args=False)
    logits, target = maps(0, rows=3, size=(200, 200))
    rows = CategoricalPrediction(logits[None]).as_rows()
    sizes = set()
    for _ in range(60):
        metric.update(rows, target.reshape(-1))
        states = [getattr(metric, state) for state in metric._defaults]
        sizes.add(sum(t.numel() for state in states for t in (state if isinstance(state, list) else [state])))
    assert len(sizes) == 1
    assert sizes.pop() <= 3 * 15
    once = getattr(metrics, name)()
    once.update(rows, target.reshape(-1))
    assert float(metric.compute()) == pytest.approx(float(once.compute()), rel=1e-6)


def test_counts_are_exact_beyond_what_a_float32_holds():
    metric = metrics.MeanIoU()
    logits, target = maps(0)
    metric.update(logits, target)
    metric.intersections = [rows * 10**9 + 1 for rows in metric.intersections]
    before = metric.intersections[0].clone()
    metric.update(logits, target)
    again = metrics.MeanIoU()
    again.update(logits, target)
    assert torch.equal(metric.intersections[0] - before, again.intersections[0])
