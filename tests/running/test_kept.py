"""What a hook of a module changes is taken back."""

import pytest
import torch
from torch import nn

from lightning_uq.running.kept import run_revocably, tensors_put_back


def test_changes_are_revoked_one_by_one():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module.names, module.numbers = ["a"], {1, 2}
    module.table = {"x": [1]}
    old = module[0]

    def hook():
        module.names.append("b")
        module.numbers.clear()
        module.table["y"] = module.table.pop("x")
        module.later = 1
        del module.training
        module[0] = nn.Linear(3, 3)

    revoke = run_revocably(module, hook)
    module.fitted = True  # what changes afterwards stays
    revoke()
    assert (module.names, module.numbers, module.table) == (["a"], {1, 2}, {"x": [1]})
    assert module.training
    assert module.fitted
    assert not hasattr(module, "later")
    assert module[0] is old


def test_the_changes_of_a_hook_that_raises_are_revoked_at_once():
    def hook():
        module.names.append("b")
        module.later = 1
        raise KeyError("note")

    module = nn.Linear(2, 2)
    module.names = ["a"]
    with pytest.raises(KeyError):
        run_revocably(module, hook)
    assert module.names == ["a"]
    assert not hasattr(module, "later")


def test_values_are_put_back_whatever_happens():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.LazyLinear(1))
    before = module[0].running_mean.clone()  # the first part is loaded, and then the other does not fit
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        tensors_put_back([*module.parameters(), *module.buffers()]),
    ):
        module[0].load_state_dict({**module[0].state_dict(), "running_mean": torch.ones(2), "weight": torch.ones(3)})
    assert torch.equal(module[0].running_mean, before)
