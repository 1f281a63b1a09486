"""One trunk with many heads: what is computed, trained, stored and refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import EnsembleModule, Factory, FitGMM, InputError, TemperatureScaling, UnsupportedError
from lightning_uq.networks import SharedTrunkNetwork, build_ensemble
from tests.trainers import quiet_trainer

M = 3
X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
LOADER = DataLoader(TensorDataset(X, Y), 10)
sgd = partial(torch.optim.SGD, lr=0.1)


class Trunk(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def head():
    return nn.Linear(8, 3)


def mlp_head():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


class OddHead(nn.Module):
    """Cannot be stacked."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, h):
        return self.layer(h) if h.sum() > -1e9 else self.layer(-h)


def ensemble(factory=head, **kwargs):
    return EnsembleModule(factory, **{"num_members": M, "seed": 0, "optimizer": sgd, "trunk": Trunk(), **kwargs})


@pytest.mark.parametrize(
    ("factory", "execution"), [(head, "stacked"), (mlp_head, "stacked"), (OddHead, "loop"), (head, "vmap")]
)
def test_outputs_are_those_of_each_member(factory, execution):
    module = ensemble(factory, execution=execution).eval()
    network = module.network
    assert network.execution == execution
    for i in range(M):
        torch.testing.assert_close(network(X)[i], network.member(i)(X))
        torch.testing.assert_close(network(X, torch.tensor([i]))[0], network.member(i)(X))
        assert network.member(i).state_dict().keys() == network.member_state_dict(i).keys()
    xs = torch.randn(M, 5, 4)
    each = network.forward_each(xs)
    torch.testing.assert_close(each, torch.stack([network.member(i)(xs[i]) for i in range(M)]))
    torch.testing.assert_close(network.unstacked()(X), network(X))


def test_the_trunk_runs_once_and_is_stored_once(tmp_path):
    module = ensemble()
    trunk = module.network.trunk
    module.training_loss(X, Y, (X, Y))
    assert trunk.calls == 1
    module.predict(X)
    assert trunk.calls == 2
    plain = sum(p.numel() for p in Trunk().parameters())
    assert sum(p.numel() for p in module.parameters()) == plain + M * sum(p.numel() for p in head().parameters())


@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_the_trunk_learns_from_the_mean_and_each_head_from_its_own_loss(execution):
    module = ensemble(execution=execution)
    trunk = copy.deepcopy(module.network.trunk)
    heads = [copy.deepcopy(module.network.member(i)[1]) for i in range(M)]
    module.training_loss(X, Y, (X, Y)).backward()
    losses = [nn.functional.cross_entropy(one(trunk(X)), Y) for one in heads]
    (sum(losses) / M).backward()
    for own, expected in zip(module.network.trunk.parameters(), trunk.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
    for i, one in enumerate(heads):
        gradient = torch.autograd.grad(nn.functional.cross_entropy(one(trunk(X)), Y), one.weight)[0]
        heads_of = module.network.heads
        own = heads_of.members[i].weight.grad if execution == "loop" else heads_of.parameter_groups()[0][0].grad[i]
        torch.testing.assert_close(own, gradient)


def test_gradients_are_clipped_apart():
    module = ensemble()
    (1e4 * module.training_loss(X, Y, (X, Y))).backward()
    module.configure_gradient_clipping(None, 0.5)
    network = module.network
    assert nn.utils.get_total_norm([p.grad for p in network.trunk.parameters()]) == pytest.approx(0.5, rel=1e-3)
    for i in range(M):
        own = [p.grad[i] for p in network.heads.parameters()]
        assert nn.utils.get_total_norm(own) == pytest.approx(0.5, rel=1e-3)


def test_a_frozen_trunk_does_not_change(tmp_path):
    trunk = Trunk().requires_grad_(False)
    module = ensemble(trunk=trunk)
    before = copy.deepcopy(trunk.state_dict())
    heads = copy.deepcopy(module.network.heads.state_dict())
    quiet_trainer(tmp_path, max_epochs=2).fit(module, LOADER)
    assert not trunk.training
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())
    assert not any(torch.equal(heads[name], value) for name, value in module.network.heads.state_dict().items())


def test_a_checkpoint_resumes_and_loads(tmp_path):
    target = "tests.networks.ensemble.test_shared_trunk"
    make = partial(
        EnsembleModule,
        Factory(f"{target}.head"),
        num_members=M,
        seed=0,
        trunk=Factory(f"{target}.Trunk"),
        task="classification",
    )
    whole = make()
    quiet_trainer(tmp_path, max_epochs=2).fit(whole, LOADER)
    part, trainer = make(), quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(part, LOADER)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed = make()
    quiet_trainer(tmp_path, max_epochs=2).fit(resumed, LOADER, ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    for own, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, expected)
    loaded = EnsembleModule.load_from_checkpoint(tmp_path / "part.ckpt")
    torch.testing.assert_close(loaded.predict(X).probs, part.predict(X).probs)
    with pytest.raises(InputError, match="holds 3 members, but the ensemble has 4"):
        EnsembleModule.load_from_checkpoint(tmp_path / "part.ckpt", num_members=4)


def test_callbacks_fit_on_shared_features(tmp_path):
    module = ensemble()
    callbacks = [FitGMM(weights="last"), TemperatureScaling(weights="last")]
    quiet_trainer(tmp_path, callbacks=callbacks).fit(module, LOADER, LOADER)
    prediction = module.predict(X)
    assert prediction.log_density.isfinite().all()
    assert prediction.logits.shape == (M, 40, 3)


def test_a_trunk_that_is_frozen_later_stays_in_eval_mode():
    module = ensemble()
    module.network.trunk.requires_grad_(False)
    before = module.network.trunk.net[1].running_mean.clone()
    module.training_loss(X, Y, (X, Y)).backward()
    assert torch.equal(module.network.trunk.net[1].running_mean, before)


@pytest.mark.parametrize("options", [{"adversarial_epsilon": 0.01}, {"prior_network": head, "prior_scale": 1.0}])
def test_other_arguments_work_with_a_trunk(options, tmp_path):
    module = ensemble(**options)
    quiet_trainer(tmp_path).fit(module, LOADER)
    assert module.predict(X).probs.isfinite().all()


def test_a_changed_head_is_loaded_and_another_trunk_is_refused():
    network = ensemble().network
    member = network.member(1)
    nn.init.zeros_(member.head.weight)
    network.load_member(1, member)
    assert not network.heads.member(1).weight.any()
    nn.init.zeros_(member.trunk.net[0].weight)
    with pytest.raises(InputError, match="another trunk"):
        network.load_member(1, member)
    with pytest.raises(InputError, match="a trunk and a head"):
        network.load_member(1, head())


class TupleTrunk(Trunk):
    def forward(self, x):
        return super().forward(x), x


def test_errors():
    with pytest.raises(InputError, match="`trunk` must return features as one tensor, but it returned a tuple"):
        ensemble(trunk=TupleTrunk()).predict(X)
    with pytest.raises(InputError, match="`trunk` must be a network or a factory of it, but it is 'resnet'"):
        ensemble(trunk="resnet")
    with pytest.raises(UnsupportedError, match="share a trunk"):
        ensemble(predict_fn=lambda network, x: network(x))
    with pytest.raises(UnsupportedError, match="cannot train on different processes"):
        ensemble().network.share(range(1))
    with pytest.raises(InputError, match="Members with `trunk` share weights"):
        EnsembleModule.from_checkpoints(["a.pt"], head, trunk=Trunk())


def test_five_heads_cost_little_more_than_one_forward():
    """Counted, not timed: the products of the five heads beside those of a small residual network."""
    from torch.utils.flop_counter import FlopCounterMode

    from lightning_uq.networks.backbones import resnet18

    backbone = resnet18(num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as one:
        backbone(x)
    backbone.fc = nn.Identity()
    module = EnsembleModule(lambda: nn.Linear(512, 10), num_members=5, trunk=backbone)
    with FlopCounterMode(display=False) as five:
        module(x)
    assert five.get_total_flops() < 1.001 * one.get_total_flops()


def test_a_network_of_given_parts():
    network = SharedTrunkNetwork(Trunk(), build_ensemble([head() for _ in range(M)]))
    assert network.execution_reason.startswith("One trunk, with heads. Ensemble of 3 runs stacked")
    assert not network.is_frozen
