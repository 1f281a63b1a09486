import functools
import pickle
import sys

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.networks import backbone, default_backbone
from lightning_uq.networks.backbones.by_name import BACKBONES
from lightning_uq.networks.factory import factory_from_config, factory_to_config

SMALL = {"mlp": (4,), "fc_resnet": (4,), "cnn": (1, 8, 8), "lenet": (1, 28, 28), "unet": (3, 9, 7)}
LARGE = dict.fromkeys(("resnet18", "wide_resnet", "vgg16"), (3, 32, 32))


@pytest.mark.parametrize(("name", "shape"), [*SMALL.items(), *LARGE.items(), ("mlp", (1, 8, 8)), ("cnn", (3, 33, 20))])
def test_outputs_have_the_size_that_was_asked_for(name, shape):
    network = backbone(name, shape)(3)
    outputs = network(torch.randn(2, *shape))
    assert outputs.shape == ((2, 3, *shape[1:]) if name == "unet" else (2, 3))


def test_all_networks_have_a_case():
    assert {*SMALL, *LARGE, "resnet50", "resnet110"} == set(BACKBONES)


@pytest.mark.parametrize(("name", "shape"), [*SMALL.items(), ("timm:resnet10t", (1, 32, 32))])
def test_a_factory_can_be_pickled_and_remembered(name, shape):
    make = functools.partial(backbone(name, shape), num_outputs=3)
    for again in (pickle.loads(pickle.dumps(make)), factory_from_config(factory_to_config(make))):
        torch.manual_seed(0)
        first = make()
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again().parameters(), strict=True))


def dropout_rates(network):
    return {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)}


@pytest.mark.parametrize("name", ["mlp", "fc_resnet", "cnn", "unet"])
def test_dropout_layers(name):
    assert dropout_rates(backbone(name, SMALL[name])(3, dropout=0.25)) == {0.25}
    assert dropout_rates(backbone(name, SMALL[name])(3)) <= {0.0}


def test_dropout_of_networks_without_dropout_layers():
    message = r"`network` lenet has no dropout layers, so `dropout` must be 0, but it is 0.1. Networks with dropout layers are mlp, fc_resnet, cnn"
    with pytest.raises(InputError, match=message):
        backbone("lenet", (1, 28, 28))(3, dropout=0.1)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "resnet81",
            (3, 8, 8),
            r"must be one of mlp, .* or timm:NAME, .* but it is 'resnet81'. Did you mean 'resnet18'\?",
        ),
        ("resnet18", (4,), r"`network` resnet18 needs inputs \[C, H, W\], but the data have inputs \[4\]"),
        ("lenet", (1, 28, 30), r"`network` lenet needs inputs \[C, H, H\], but the data have inputs \[1, 28, 30\]"),
        ("fc_resnet", (1, 8, 8), r"`network` fc_resnet needs inputs \[d\]"),
        ("timm:resnet18", (4,), r"`network` timm:resnet18 needs inputs \[C, H, W\]"),
        (
            "timm:resnte18",
            (3, 8, 8),
            r"`network` must name a model of timm .*, but it has no 'resnte18'. Did you mean .*resnet18",
        ),
        (
            "nowhere.module:make",
            (4,),
            "`network` must be the import path of a class or function, but it is 'nowhere.module.make'",
        ),
    ],
)
def test_names_of_no_backbone(name, shape, message):
    with pytest.raises(InputError, match=message):
        backbone(name, shape)


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="`network` timm:resnet18 needs timm: pip install timm"):
        backbone("timm:resnet18", (3, 32, 32))


def test_a_model_of_timm_has_the_datas_channels_and_dropout():
    network = backbone("timm:resnet10t", (1, 32, 32))(5, dropout=0.2)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert network.drop_rate == 0.2
    with pytest.raises(
        InputError, match=r"`network` timm:vit_tiny_patch16_224 fails on one input of zeros \[1, 3, 32, 32\]"
    ):
        backbone("timm:vit_tiny_patch16_224", (3, 32, 32))(5)


def test_defaults():
    assert default_backbone("classification", (4,)) == "mlp"
    assert default_backbone("binary", (1, 8, 8)) == "cnn"
    assert default_backbone("regression", (7, 3)) == "mlp"
    assert default_backbone("segmentation", (3, 8, 8)) == "unet"
    with pytest.raises(InputError, match=r"`network` unet needs inputs \[C, H, W\], but the data have inputs \[9\]"):
        default_backbone("segmentation", (9,))


# ------------------------------------------------------------------ a user's own

FACTORIES = """
import torch
from torch import nn

def by_outputs(num_outputs): return nn.Linear(4, num_outputs)
def by_classes(num_classes=10, hidden=8): return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, num_classes))
def with_sizes(in_features, out_features, dropout=0.0): return nn.Sequential(nn.Dropout(dropout), nn.Linear(in_features, out_features))
def with_shape(input_shape, num_classes): return nn.Linear(*input_shape, num_classes)
def any_keyword(*, weights=None, **kwargs): return by_classes(**kwargs)
def fixed(): return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3))
def needs_more(width, num_outputs): return nn.Linear(4, num_outputs)
def no_network(num_outputs): return "network"
def two_outputs(num_outputs): return Two()

class Two(nn.Module):
    def forward(self, x): return x, x

class Outer:
    class Network(nn.Linear):
        def __init__(self, num_outputs): super().__init__(4, num_outputs)

class Frozen(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.norm = nn.BatchNorm1d(4).eval()
        self.last = nn.Linear(4, num_outputs)
    def forward(self, x): return self.last(self.norm(x))
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_networks.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "users_networks"
    sys.modules.pop("users_networks", None)


@pytest.mark.parametrize(
    "name", ["by_outputs", "by_classes", "with_sizes", "with_shape", "any_keyword", "fixed", "Outer.Network", "Frozen"]
)
def test_a_users_factory_gets_the_sizes_that_it_takes(users_module, name):
    network = backbone(f"{users_module}:{name}", (4,))(3)
    assert network(torch.randn(2, 4)).shape == (2, 3)
    assert network.training


def test_the_check_leaves_modes_and_statistics_alone(users_module):
    network = backbone(f"{users_module}:Frozen", (4,))(3)
    assert not network.norm.training
    assert network.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "dropout", "message"),
    [
        (
            "needs_more",
            0.0,
            "is called with the arguments that it takes among num_outputs, .*, but it also needs width",
        ),
        ("no_network", 0.0, "must return a torch.nn.Module, but it returned a str"),
        ("two_outputs", 0.0, r"must return a tensor \[B, 5\], but it returned a tuple"),
        (
            "fixed",
            0.0,
            r"must have 5 outputs, but for one input of zeros \[1, 4\] it returned shape \[1, 3\]. Give it an argument `num",
        ),
        ("by_outputs", 0.1, "users_networks:by_outputs has no dropout layers and takes no `dropout`, so .* it is 0.1"),
    ],
)
def test_a_users_factory_that_does_not_fit(users_module, name, dropout, message):
    with pytest.raises(InputError, match=message):
        backbone(f"{users_module}:{name}", (4,))(5, dropout=dropout)


def test_dropout_of_a_users_factory(users_module):
    assert dropout_rates(backbone(f"{users_module}:with_sizes", (4,))(3, dropout=0.2)) == {0.2}
    assert dropout_rates(backbone(f"{users_module}:fixed", (4,))(3, dropout=0.2)) == {0.3}


def test_an_input_that_a_users_network_does_not_take(users_module):
    with pytest.raises(InputError, match=r"users_networks:by_outputs fails on one input of zeros \[1, 7\]: .*shapes"):
        backbone(f"{users_module}:by_outputs", (7,))(3)


def test_a_factory_of_torchvision():
    assert backbone("torchvision.models:squeezenet1_1", (3, 64, 64))(4)(torch.randn(2, 3, 64, 64)).shape == (2, 4)
