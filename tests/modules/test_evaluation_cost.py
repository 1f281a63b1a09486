"""What a prediction and an evaluation do not do: keep a graph, copy a large input to check it, log a metric at every batch."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule
from lightning_uq.errors import NotFiniteError
from lightning_uq.networks.finite import check_finite
from tests.counting import peak_bytes


def test_a_prediction_has_no_graph_but_its_parts_have():
    module, x = EnsembleModule(lambda: nn.Linear(4, 3), num_members=2, seed=0), torch.randn(5, 4, requires_grad=True)
    assert not module.predict(x).probs.requires_grad
    module.prediction(module(x)).probs[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_metrics_are_logged_once_per_loader_and_count_all_batches(num_loaders, make_trainer, monkeypatch):
    module = DeterministicModule(nn.Linear(4, 3))
    x, y = torch.randn(num_loaders, 24, 4), torch.randint(3, (num_loaders, 24))
    loaders = [DataLoader(TensorDataset(*one), batch_size=4) for one in zip(x, y, strict=True)]
    calls, log = Counter(), module.log
    monkeypatch.setattr(module, "log", lambda name, *args, **kwargs: (calls.update([name]), log(name, *args, **kwargs)))
    for _ in range(2):  # each evaluation has metrics of its own
        results = make_trainer().test(module, loaders, verbose=False)
    assert calls["test_loss"] == calls["test_accuracy"] == 2 * num_loaders
    for i, found in enumerate(results):
        suffix = f"/dataloader_idx_{i}" if num_loaders > 1 else ""
        hits = (module.predict(x[i]).label == y[i]).float().mean().item()
        assert found[f"test_accuracy{suffix}"] == pytest.approx(hits)


def test_the_check_of_an_input_needs_no_copy_and_takes_any_finite_number():
    x = torch.zeros(1_000_000)
    assert peak_bytes(lambda: check_finite(x)) < 1000
    check_finite(torch.full((2, 2), torch.finfo(torch.float32).max))  # whose sum is not finite
    for bad in (torch.inf, -torch.inf, torch.nan):
        x[7] = bad
        with pytest.raises(NotFiniteError, match="1 of 1000000 rows"):
            check_finite(x)
