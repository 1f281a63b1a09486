"""BatchEnsemble: each member is the network with the weights W * s r^T, and learns as such."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import EnsembleModule, FitGMM, InputError, UnsupportedError
from lightning_uq.networks import BatchEnsembleNetwork
from tests.trainers import quiet_trainer

M = 3
sgd = partial(torch.optim.SGD, lr=0.1)


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def tokens():
    return nn.Sequential(
        nn.Embedding(10, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(35, 3)
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


INPUTS = {mlp: torch.randn(7, 4), tokens: torch.randint(10, (7, 7)), convolutions: torch.randn(7, 2, 8, 8)}


def drawn(network):
    """Factors and biases that differ in more than their signs."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.split(".")[-1] in ("scale_in", "scale_out", "bias"):
                p.add_(0.3 * torch.randn_like(p))
    return network


@pytest.mark.parametrize("make", [mlp, tokens, convolutions])
def test_each_member_is_the_network_with_its_own_weights(make):
    network, x = drawn(BatchEnsembleNetwork(make(), M)).eval(), INPUTS[make]
    whole = network(x)
    assert whole.shape == (M, 7, 3)
    for i in range(M):
        member = network.member(i)
        assert [type(layer) for layer in member.modules()] == [type(layer) for layer in make().modules()]
        torch.testing.assert_close(whole[i], member(x))
    torch.testing.assert_close(network(x, torch.tensor([2, 0])), whole[[2, 0]])
    torch.testing.assert_close(network(x), whole)
    torch.testing.assert_close(network.unstacked()(x), whole)
    if x.is_floating_point():
        xs = torch.randn(M, *x.shape)
        each = torch.stack([network.member(i)(xs[i]) for i in range(M)])
        torch.testing.assert_close(network.forward_each(xs), each)


def test_the_shared_weight_learns_from_the_mean_and_factors_from_their_own_loss():
    module = EnsembleModule(mlp, num_members=M, seed=0, sharing="batch_ensemble", optimizer=sgd)
    drawn(module.network)
    x, y = INPUTS[mlp], torch.arange(7) % 3
    layer = module.network.shared[0]
    weight = layer.layer.weight.detach().clone()
    module.training_loss(x, y, (x, y)).backward()
    expected = torch.zeros_like(weight)
    for i in range(M):
        member = module.network.member(i)
        own = torch.autograd.grad(nn.functional.cross_entropy(member(x), y), [member[0].weight, member[0].bias])
        factor = layer.scale_out[i][:, None] * layer.scale_in[i]
        expected += own[0] * factor / M
        torch.testing.assert_close(layer.scale_in.grad[i], (own[0] * weight * layer.scale_out[i][:, None]).sum(0))
        torch.testing.assert_close(layer.bias.grad[i], own[1])
    torch.testing.assert_close(layer.layer.weight.grad, expected)


def test_it_trains_saves_and_resumes(tmp_path):
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    loader = DataLoader(TensorDataset(x, y), 10)
    make = partial(EnsembleModule, mlp, num_members=M, seed=0, sharing="batch_ensemble")
    whole = make()
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[FitGMM(weights="last")]).fit(whole, loader)
    assert whole.predict(x).log_density.isfinite().all()
    assert whole.predict(x).mutual_information.mean() > 0
    part, trainer = make(), quiet_trainer(tmp_path, max_epochs=1, gradient_clip_val=None)
    trainer.fit(part, loader)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed = make()
    quiet_trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    loaded = EnsembleModule.load_from_checkpoint(tmp_path / "part.ckpt")
    torch.testing.assert_close(loaded.predict(x).probs, part.predict(x).probs)
    with pytest.raises(InputError, match="holds 3 members, but the ensemble has 4"):
        EnsembleModule.load_from_checkpoint(tmp_path / "part.ckpt", num_members=4)


def test_members_cost_few_weights():
    from lightning_uq.networks.backbones import resnet18

    network = resnet18(num_classes=10)
    plain = sum(p.numel() for p in network.parameters())
    shared = BatchEnsembleNetwork(network, 5)
    assert sum(p.numel() for p in shared.parameters()) < 1.01 * plain
    x = torch.randn(2, 3, 32, 32)
    shared.eval()
    torch.testing.assert_close(shared(x)[4], shared.member(4)(x), rtol=1e-3, atol=1e-4)
    assert network.conv1.bias is None
    assert copy.deepcopy(shared)(x).shape == (5, 2, 10)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.LSTM(4, 3)), r"'0' \(LSTM\) has weights \('weight_ih_l0'\)"),
        (nn.TransformerEncoderLayer(4, 2), r"'self_attn' \(MultiheadAttention\) has weights"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "no linear layer or convolution"),
    ],
)
def test_networks_that_cannot_share_are_refused(network, message):
    with pytest.raises(UnsupportedError, match=message):
        BatchEnsembleNetwork(network, M)


def test_calls_that_make_no_sense_are_refused():
    network = BatchEnsembleNetwork(mlp(), M)
    for call in (
        lambda: network.load_member(0, mlp()),
        lambda: network.member_tensors(0),
        lambda: network.share(range(1)),
    ):
        with pytest.raises(UnsupportedError):
            call()
    with pytest.raises(InputError, match="take a tensor, or a mapping of tensors"):
        network([torch.zeros(1, 4)])
    with pytest.raises(InputError, match="`sharing` must be .batch_ensemble. or a peft.LoraConfig"):
        EnsembleModule(mlp, sharing="all")
    with pytest.raises(UnsupportedError, match="`predict_fn`"):
        EnsembleModule(mlp, sharing="batch_ensemble", predict_fn=lambda network, x: network(x))
