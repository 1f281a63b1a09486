"""An inference of stacked members: few at a time where a batch is large, and nothing that only a gradient needs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_uq.networks import MLP
from lightning_uq.networks.ensemble import stacked
from tests.counting import peak_bytes
from tests.networks.ensemble.members import assert_same, build, state_of


@pytest.mark.parametrize("training", [False, True])
def test_members_in_groups_give_the_numbers_of_a_loop(training, monkeypatch):
    monkeypatch.setattr(
        stacked, "_CACHED_NUMBERS", 2 * 6 * 8
    )  # two members of 6 rows and 8 units: groups of 2, 2 and 1
    ours, loop = (
        build(lambda: MLP(3, 2, hidden_sizes=(8,), norm="batch"), kind, num=5).train(training)
        for kind in ("stacked", "loop")
    )
    x, xs = torch.randn(6, 3), torch.randn(5, 6, 3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), loop(x))
        torch.testing.assert_close(ours(x, torch.tensor([4, 0, 2])), loop(x, torch.tensor([4, 0, 2])))
        torch.testing.assert_close(ours.forward_each(xs), loop.forward_each(xs))
    assert_same(state_of(loop), state_of(ours))  # with the statistics of the batches


def test_a_large_inference_holds_few_members_at_once():
    network, x = build(lambda: MLP(4, 2, hidden_sizes=(64, 64)), "stacked", num=16), torch.randn(2048, 4)
    layer = 4 * 2048 * 64  # bytes of one member's activations
    with torch.no_grad():
        assert peak_bytes(lambda: network(x)) < 8 * layer
    assert peak_bytes(lambda: network(x)) > 32 * layer  # all of them, for the gradient


def test_an_inference_calls_no_function_with_a_backward():
    network, x = build(lambda: MLP(4, 2), "stacked"), torch.randn(3, 4)

    def calls():
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            network(x)
        return sum(event.count for event in profiled.key_averages() if "_BatchedLinear" in event.key)

    assert calls() == 3
    with torch.no_grad():
        assert calls() == 0
