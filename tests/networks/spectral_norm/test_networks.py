"""Networks of any origin: which layers are bounded, and the errors of those that cannot be."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_uq import DeterministicModule, Factory
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks import freeze_as_buffers, remove_spectral_norm, spectral_normalize
from tests.networks.spectral_norm.bounded import X, norm_of, original, saved, small_net, true_norm


def test_torchvision():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=3)
    plain = {key: value.shape for key, value in net.state_dict().items()}
    spectral_normalize(net, coefficient=0.5, exclude=["fc"])
    bounded = [name for name, layer in net.named_modules() if parametrize.is_parametrized(layer, "weight")]
    assert len(bounded) == 20
    assert "fc" not in bounded
    x = torch.randn(2, 3, 32, 32)
    net(x).sum().backward()
    net.eval()
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(remove_spectral_norm(net)(x), expected)
    assert {key: value.shape for key, value in net.state_dict().items()} == plain
    net.load_state_dict(resnet18(num_classes=3).state_dict())


def test_timm():
    timm = pytest.importorskip("timm")
    net = spectral_normalize(timm.create_model("resnet18", num_classes=3), coefficient=0.5, exclude=["fc"])
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    with torch.no_grad():
        pickle.loads(pickle.dumps(net)).eval()(torch.randn(2, 3, 32, 32))


def test_a_shared_layer_and_an_attention_block():
    shared = nn.Linear(4, 4)
    net = spectral_normalize(nn.Sequential(shared, nn.ReLU(), shared), coefficient=0.1)
    net(torch.ones(1, 4))
    assert len(list(net.parameters())) == 2
    block = spectral_normalize(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), coefficient=0.1, n_warmup_iterations=200
    )
    block.eval()
    with torch.no_grad():
        assert block(torch.randn(2, 3, 8)).isfinite().all()
    assert torch.linalg.matrix_norm(block.self_attn.out_proj.weight, 2).item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficient": 0.0}, "`coefficient` must be a positive number, but it is 0.0."),
        ({"coefficient": float("nan")}, "`coefficient` must be a positive number, but it is nan."),
        ({"n_power_iterations": 0}, "`n_power_iterations` must be an integer of at least 1, but it is 0."),
        ({"n_warmup_iterations": -1}, "`n_warmup_iterations` must be an integer of at least 0, but it is -1."),
        ({"eps": -1.0}, "`eps` must be at least 0, but it is -1.0."),
        ({"conv_norm": "true"}, "`conv_norm` must be 'operator' or 'reshaped', but it is 'true'."),
        ({"exclude": ["fc"]}, "`exclude` names 'fc', but Sequential has no such submodule"),
        ({"exclude": ["0", "3", "5"]}, "There is nothing to bound: Sequential has no linear layer and no convolution"),
        ({"exclude": [""]}, "There is nothing to bound: Sequential has no linear layer and no convolution"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError) as info:
        spectral_normalize(small_net(), **arguments)
    assert str(info.value).startswith(message)


def test_a_factory_is_no_network():
    with pytest.raises(InputError, match="`network` must be a torch.nn.Module, but it is Factory\\("):
        spectral_normalize(Factory("torch.nn.ReLU"))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean())


def weight_normed():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.ConvTranspose2d(1, 1, 3),
            "'last' (ConvTranspose2d) is a transposed convolution, which has no bound yet",
        ),
        (lambda: OwnForward(1, 1, 3), "'last' (OwnForward) is a Conv2d with its own `forward`"),
        (lambda: nn.LazyLinear(3), "'last' (LazyLinear) has no weight yet"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "'last' (Linear) has complex weights"),
        (
            lambda: freeze_as_buffers(nn.Linear(2, 2)),
            "The weight of 'last' (Linear) is not a parameter: it is a buffer",
        ),
        (weight_normed, "The weight of 'last' (Linear) is not a parameter"),
        (lambda: nn.BatchNorm1d(2, affine=False), "'last' (BatchNorm1d) lacks a scale or a running variance"),
        (
            lambda: nn.BatchNorm1d(2, track_running_stats=False),
            "'last' (BatchNorm1d) lacks a scale or a running variance",
        ),
    ],
)
def test_layers_that_cannot_be_bounded(make, message):
    net = nn.ModuleDict({"first": nn.Linear(2, 2), "last": make()})
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        spectral_normalize(net, bound_batchnorm=True)
    assert not parametrize.is_parametrized(net["first"])  # nothing half done
    spectral_normalize(net, bound_batchnorm=True, exclude=["last"])


def test_twice_is_an_error():
    net = spectral_normalize(small_net())
    with pytest.raises(InputError, match=r"'0' \(ParametrizedConv2d\) is already spectral-normalized"):
        spectral_normalize(net)
    with pytest.raises(InputError, match="no layer of Sequential is spectral-normalized"):
        remove_spectral_norm(small_net())


def test_on_top_of_another_parametrization():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    spectral_normalize(layer, coefficient=0.1, n_warmup_iterations=300).eval()
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(0.1, rel=1e-4)


# ------------------------------------------------------------------------------------------ shared weights


class Tied(nn.Module):
    """Word vectors that also score the words, as language models have them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_a_tied_embedding_stays_unbounded():
    net = spectral_normalize(Tied(), coefficient=0.1, n_warmup_iterations=300)
    assert original(net.head) is net.embedding.weight
    assert len(list(net.parameters())) == 1
    x = torch.arange(7)
    net(x).square().sum().backward()
    net.eval()
    embedded = net.embedding(x).detach().clone()
    with torch.no_grad():
        expected = net(x)
        assert torch.linalg.matrix_norm(net.head.weight, 2).item() == pytest.approx(0.1, rel=1e-4)
        remove_spectral_norm(net)
        assert torch.equal(net.embedding(x), embedded)
        torch.testing.assert_close(net(x), expected)


def test_layers_with_one_weight_have_a_bound_each():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, stride=2, bias=False))
    net[1].weight = net[0].weight
    spectral_normalize(net, coefficient=0.2, n_warmup_iterations=1000, eps=1e-2)
    assert len(list(net.parameters())) == 1
    x = torch.randn(1, 2, 9, 9)
    net(x).sum().backward()
    with torch.no_grad():
        expected = net.eval()(x)
        weights = [layer.weight.clone() for layer in net]
        assert not torch.allclose(*weights)
        torch.testing.assert_close(remove_spectral_norm(net)(x), expected)
    torch.testing.assert_close([layer.weight.detach() for layer in net], weights)


def test_a_convolution_that_runs_at_two_sizes_keeps_its_bound():
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    net = spectral_normalize(nn.Sequential(layer, nn.MaxPool2d(2), layer), coefficient=0.1)
    for _ in range(2):
        net(torch.randn(1, 2, 8, 8)).sum().backward()
    assert norm_of(layer).v.shape == (2, 4, 4)
    assert true_norm(layer, (4, 4)) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 9)),
        (lambda: nn.Conv3d(2, 3, (1, 3, 2), padding=1), (2, 3, 4, 5)),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), (3, 8)),
    ],
)
def test_other_layers_train_save_and_give_their_weights_back(make, shape):
    torch.manual_seed(0)
    plain = make()
    net, x = spectral_normalize(copy.deepcopy(plain), coefficient=0.2), torch.randn(2, *shape)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    bounded = [layer for layer in net.modules() if parametrize.is_parametrized(layer, "weight")]
    assert all(norm_of(layer).sigma > 0.2 and original(layer).grad.abs().sum() > 0 for layer in bounded)
    other = spectral_normalize(make(), coefficient=0.2)
    other.load_state_dict(torch.load(io.BytesIO(saved(net.state_dict())), weights_only=True))
    with torch.no_grad():
        expected = net.eval()(x)
        torch.testing.assert_close(other.eval()(x), expected)
        torch.testing.assert_close(remove_spectral_norm(net)(x), expected)
    assert set(net.state_dict()) == set(plain.state_dict())


def test_an_excluded_layer_may_have_two_names():
    net = nn.ModuleDict({"first": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    net["again"] = net["head"]
    spectral_normalize(net, exclude=["again"])
    assert [parametrize.is_parametrized(net[name]) for name in ("first", "head")] == [True, False]
    assert not parametrize.is_parametrized(spectral_normalize(small_net(), exclude="5")[5])


# ------------------------------------------------------------------------------------------ factories and files

CONFIG = {
    "network": {"target": "lightning_uq.networks.backbones.FCResNet", "kwargs": {"in_features": 4, "num_classes": 3}},
    "coefficient": 0.65,
    "exclude": ["last"],
}


def test_a_factory_bounds_the_network_that_it_builds(make_trainer, tmp_path):
    factory = Factory("lightning_uq.networks.spectral_normalize", CONFIG)
    first, second = factory(), factory()
    assert first is not second
    assert not torch.equal(original(first.first), original(second.first))  # built anew, not copied
    assert norm_of(first.first).coefficient == 0.65
    assert not parametrize.is_parametrized(first.last)
    module = DeterministicModule(factory)
    trainer = make_trainer()
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    trainer.fit(module, torch.utils.data.DataLoader(data, 8))
    trainer.save_checkpoint(tmp_path / "bounded.ckpt")
    torch.load(tmp_path / "bounded.ckpt", weights_only=True)
    loaded = DeterministicModule.load_from_checkpoint(tmp_path / "bounded.ckpt")
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), module.eval()(x))


def test_a_bounded_network_exports():
    torch.manual_seed(0)
    net = spectral_normalize(small_net(), coefficient=0.3)
    net(X)
    net.eval()
    with torch.no_grad():
        exported = torch.export.export(net, (X,), strict=False).module()
        torch.testing.assert_close(exported(X), net(X))
