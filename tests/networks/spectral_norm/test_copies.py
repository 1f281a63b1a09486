"""Copies, pickles, state dicts, the original keys and weight averages of bounded networks."""

import copy
import io
import math
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_uq.networks import remove_spectral_norm, spectral_normalize
from tests.networks.spectral_norm.bounded import X, norm_of, original, saved, small_net, trained, true_norm

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: torch.load(io.BytesIO(saved(net)), weights_only=False),
    "twice": lambda net: pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(net))))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("after", ["construction", "training", "evaluation"])
def test_copies_compute_the_same_and_go_their_own_way(how, after):
    net = spectral_normalize(small_net(), coefficient=0.3, bound_batchnorm=True)
    if after != "construction":
        net(X)
        net(X).sum().backward()
        net.zero_grad()
    if after == "evaluation":
        with torch.no_grad():
            net.eval()(X)
    copied = COPIES[how](net)
    assert isinstance(copied[0], nn.Conv2d)
    with torch.no_grad():
        torch.testing.assert_close(copied.eval()(X), net.eval()(X))
    if how == "copy":
        return
    copied.train()
    copied(X).sum().backward()
    assert original(net[0]).grad is None
    assert original(copied[0]).grad is not None
    with torch.no_grad():
        original(net[5]).mul_(0.1)
        net.eval()(X)
        assert not torch.allclose(copied.eval()(X), net(X))
    plain = remove_spectral_norm(copied)
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    assert not plain[0]._forward_pre_hooks
    assert not plain[0]._load_state_dict_pre_hooks
    assert type(plain[0]) is nn.Conv2d
    if after != "construction":
        assert parametrize.is_parametrized(net[0])
        remove_spectral_norm(net)
        assert not net[0]._forward_pre_hooks


def test_an_optimizer_pickled_with_the_network_keeps_its_parameters():
    net = trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}


def test_an_optimizer_made_before_goes_on():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    spectral_normalize(net)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("into", ["fresh", "used", "used at another size"])
def test_a_state_dict_goes_through_a_file(into):
    net = trained().eval()
    state = torch.load(io.BytesIO(saved(net.state_dict())), weights_only=True)
    other = spectral_normalize(small_net(), coefficient=0.3)
    if into == "used":
        other(X)
        with torch.no_grad():
            other.eval()(X)
    if into == "used at another size":
        other[:3](torch.zeros(1, 2, 9, 7))
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(X), net(X), rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_state_from_before_the_first_forward_unlearns_the_size():
    net = spectral_normalize(small_net(), coefficient=0.3)
    early = copy.deepcopy(net.state_dict())
    net(X)
    net.load_state_dict(early)
    assert not norm_of(net[0]).is_sized
    fresh = spectral_normalize(small_net(), coefficient=0.3)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(X), fresh.eval()(X))


def test_a_plain_state_is_warmed_up_anew():
    net = trained(coefficient=0.3, n_warmup_iterations=300)
    plain = small_net()
    with torch.no_grad():
        plain[5].weight.mul_(20)
    net.load_state_dict(plain.state_dict())
    net.eval()(X)
    assert torch.linalg.matrix_norm(net[5].weight, 2).item() == pytest.approx(0.3, rel=1e-4)
    assert torch.equal(original(net[5]), plain[5].weight)


def original_state(net, size=(6, 6)):
    """What the original code would have saved for ``small_net`` with 3x3 kernels bounded by conv, others as a matrix."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, value in net.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and value.ndim > 1:
            state[f"{name}.weight_orig"] = torch.randn(value.shape, generator=generator)
            rows, columns = value.flatten(1).shape
            if value.shape[-1] == 3:
                rows, columns = len(value) * math.prod(size), value.shape[1] * math.prod(size)
            state[f"{name}.weight_u"] = torch.randn(rows, generator=generator)
            state[f"{name}.weight_v"] = torch.randn(columns, generator=generator)
            state[f"{name}.weight_sigma"] = torch.rand(1, generator=generator) + 1
        else:
            state[key] = value
    return state


def test_the_original_keys_are_read():
    state = original_state(small_net())
    net = spectral_normalize(small_net(), coefficient=0.3)
    net.load_state_dict(state)
    assert "0.weight_orig" in state  # the caller's own mapping is left alone
    for i in (0, 3, 5):
        torch.testing.assert_close(original(net[i]), nn.Parameter(state[f"{i}.weight_orig"]))
        for key in ("u", "v", "sigma"):
            assert torch.equal(getattr(norm_of(net[i]), key).flatten(), state[f"{i}.weight_{key}"])
    assert norm_of(net[0]).v.shape == (2, 6, 6)
    net.eval()(X)
    assert torch.equal(norm_of(net[0]).u.flatten(), state["0.weight_u"])  # no warm-up over what was loaded


def test_original_keys_that_do_not_fit_are_reported():
    net = spectral_normalize(small_net())
    with pytest.raises(RuntimeError, match=r"`0.weight_u` and `0.weight_v` do not belong to a square input"):
        net.load_state_dict(original_state(small_net(), (6, 5)))
    net[0](torch.zeros(1, 2, 6, 5))
    net[0].load_state_dict({k[2:]: v for k, v in original_state(small_net(), (6, 5)).items() if k.startswith("0.")})
    assert norm_of(net[0]).v.shape == (2, 6, 5)
    state = original_state(small_net())
    del state["0.weight_v"]
    with pytest.raises(RuntimeError, match=r"0\.weight_v"):
        net.load_state_dict(state)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("copied", ["before the first forward", "after it"])
def test_a_weight_average_follows(use_buffers, copied):
    net = spectral_normalize(small_net(), coefficient=0.2)
    if copied == "after it":
        net(X)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
        average.update_parameters(net)
    average.eval()
    with torch.no_grad():
        average(X)
    inner = average.module
    assert true_norm(inner[0], (6, 6)) == pytest.approx(0.2, rel=0.02)
    assert torch.linalg.matrix_norm(inner[5].weight, 2).item() == pytest.approx(0.2, rel=0.02)
    state = torch.load(io.BytesIO(saved(average.state_dict())), weights_only=True)
    other = AveragedModel(spectral_normalize(small_net(), coefficient=0.2))
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(X), average(X))


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = spectral_normalize(small_net(), coefficient=0.2, bound_batchnorm=True)
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        fresh = pickle.loads(pickle.dumps(self.net)).eval()
        self.seen.append((self.net(batch), fresh(batch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_lightning_with_a_weight_average():
    module = Regression()
    data = torch.utils.data.DataLoader(X, batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.5)],
    )
    trainer.fit(module, data, data)
    trainer.validate(module, data, verbose=False)
    assert len(module.seen) == 2 * 6  # with the sanity check
    # The average is written through ``.data``, after ``eval()``: none of the outputs came from a weight folded before.
    for got, expected in module.seen:
        torch.testing.assert_close(got, expected)
    assert true_norm(module.net[0], (6, 6)) == pytest.approx(0.2, rel=0.1)


def test_copies_made_before_the_first_forward_are_otherwise_independent():
    first = spectral_normalize(small_net(), coefficient=0.3, n_warmup_iterations=300)
    second = copy.deepcopy(first)
    with torch.no_grad():
        original(second[0]).normal_()
        first.eval()(X)
        second.eval()(X)
    assert true_norm(second[0], (6, 6)) == pytest.approx(0.3, rel=1e-3)  # warmed up with its own weights
    assert true_norm(first[0], (6, 6)) == pytest.approx(0.3, rel=1e-3)
    second.train()(torch.zeros(2, 2, 6, 6))
    assert not torch.equal(norm_of(first[0]).v, norm_of(second[0]).v)
