"""The time of 1,000 predictions, with a module that spends the time of a clock of its own."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_uq.compare.training import evaluation


class Slow(LightningModule):
    """Takes the same time for each batch, whatever its size, and 60 s more for the first."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.sizes, self.now = seconds, [], 0.0

    def perf_counter(self):
        return self.now

    def predict_step(self, batch, batch_idx):
        self.now += self.seconds + 60 * (not self.sizes)
        self.sizes.append(len(batch))
        return SimpleNamespace(point=batch)


@pytest.mark.parametrize(("seconds", "size"), [(0.2, 1000), (0.6, 100)])
def test_a_small_batch_is_timed_only_where_1000_rows_may_take_too_long(seconds, size, monkeypatch):
    module = Slow(seconds)
    monkeypatch.setattr(evaluation, "time", module)
    method = SimpleNamespace(reading=SimpleNamespace(), ood_score=None)
    monkeypatch.setattr(evaluation, "is_foreign", lambda module: False)
    found = evaluation._milliseconds(module, method, [], [torch.zeros(100, 2)])
    assert found == {"ms_per_1000": pytest.approx(1000 * seconds * 1000 / size)}
    assert module.sizes[2:] == [size] * len(module.sizes[2:])
