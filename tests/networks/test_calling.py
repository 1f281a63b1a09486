"""Networks are called by one input, or by the names of several."""

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq import DropoutModule, EnsembleModule, EpinetModule, FitGMM, InputError
from lightning_uq.batches import num_rows
from lightning_uq.networks.calling import call_network, takes_by_name
from lightning_uq.networks.ensemble import EnsembleNetwork, VmapEnsembleNetwork


class Pair(nn.Module):
    """Of two inputs."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, left, right=None):
        if not isinstance(left, torch.Tensor):
            raise TypeError("its own")
        right = left.new_zeros(len(left), 2) if right is None else right
        return self.head(self.drop(torch.relu(self.body(torch.cat([left, right], 1)))))


class One(nn.Module):
    """Of a mapping."""

    def forward(self, batch):
        return batch["left"].sum(1)


class Required(Pair):
    def forward(self, left, right):
        return super().forward(left, right)


def pair(n=8):
    generator = torch.Generator().manual_seed(0)
    return {"left": torch.randn(n, 3, generator=generator), "right": torch.randn(n, 2, generator=generator)}


def test_by_name_where_the_keys_are_arguments():
    network, x = Pair(), pair()
    expected = network(x["left"], x["right"])
    for given in (x, UserDict(x)):
        assert torch.equal(call_network(network, given), expected)
    assert torch.equal(call_network(network, x["left"]), network(x["left"]))
    assert torch.equal(call_network(network, {"left": x["left"]}), network(x["left"]))
    compiled = torch.compile(network, backend="eager")
    assert takes_by_name(compiled, x)
    assert torch.equal(call_network(compiled, x), expected)


def test_as_one_where_they_are_not():
    x = pair()
    assert torch.equal(call_network(One(), x), x["left"].sum(1))
    assert not takes_by_name(Pair(), {"left": x["left"], "other": x["right"]})
    assert not takes_by_name(Pair(), {0: x["left"]})
    assert not takes_by_name(Pair(), x["left"])
    assert not takes_by_name(Pair(), (x["left"], x["right"]))


def test_what_does_not_fit_is_named():
    x = pair()
    with pytest.raises(InputError, match=r"`forward` of Required must take only the input of a batch, but it does not: missing a required "
        r"argument: 'right'. Make `unpack_batch` return the input as a mapping"):  # fmt: skip
        call_network(Required(), x["left"])
    with pytest.raises(TypeError, match="its own"):  # an error inside is not ours to explain
        call_network(Pair(), (x["left"], x["right"]))


def test_members_take_names():
    members, x = [Pair() for _ in range(3)], pair()
    expected = torch.stack([member(**x) for member in members])
    torch.testing.assert_close(EnsembleNetwork(members)(x), expected)
    torch.testing.assert_close(VmapEnsembleNetwork(members)(x), expected)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize(
    "build",
    [
        lambda: EnsembleModule(Pair, num_members=2),
        lambda: EpinetModule(Pair, num_eval_samples=4),
        lambda: DropoutModule(lambda: Pair(0.5), num_eval_samples=4),
    ],
)
def test_modules_take_names(build, kind, make_trainer, monkeypatch):
    module = build()
    x, y = pair(32), torch.arange(32) % 3
    loader = DataLoader([{**pair(32), "y": y}], batch_size=None)
    monkeypatch.setattr(type(module), "unpack_batch", lambda self, b: (kind({k: b[k] for k in x}), b["y"]))
    gmm = FitGMM(dataloader=loader)
    trainer = make_trainer(callbacks=[gmm])
    trainer.fit(module, loader)
    (prediction,) = trainer.predict(module, loader)
    assert prediction.logits.shape[1:] == (32, 3)
    assert prediction.log_density.shape == (32,)
    module.eval()  # one row alone is what it is in the batch
    torch.testing.assert_close(module.predict({k: v[5:6] for k, v in x.items()}).probs, prediction.probs[5:6])


def test_rows_of_a_mapping_of_its_own_class():
    assert num_rows(UserDict(pair(7))) == 7
