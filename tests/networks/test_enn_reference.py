"""The networks held to the numbers of google-deepmind/enn: same weights, same inputs, same indices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq.compat.haiku import load_haiku, read_haiku
from lightning_uq.networks.dropout import DropoutNetwork
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.epinet.head import Epinet, EpinetHead
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.networks.epinet.projected_mlp import ProjectedMLP
from lightning_uq.networks.features import OUTPUT
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.additive import AdditivePrior, cifar_conv_prior, imagenet_conv_prior
from lightning_uq.networks.priors.members import NetworkWithPrior

REFERENCE = Path(__file__).parents[1] / "reference"


def read(name: str) -> dict[str, torch.Tensor]:
    return read_haiku(REFERENCE / f"enn_{name}.npz")


def under(arrays, prefix):
    """The Haiku parameters below a prefix."""
    found = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name.endswith(("/w", "/b")) and "grad" not in name}


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("concat", [True, False])
def test_projected_mlp(concat):
    data = read("projected_mlp")
    network = ProjectedMLP(6, 3, 5, hidden_sizes=[7], concat_index=concat)
    load_haiku(network, under(data, f"concat{int(concat)}/"))
    check(network(data["x"], data["z"]), data[f"concat{int(concat)}/out"])


@pytest.mark.parametrize("inputs", [True, False])
def test_last_layer_epinet_with_its_prior(inputs):
    data = read("epinet_last_layer")
    prefix = f"drop{int(not inputs)}/"
    features = torch.cat([data["hidden"], data["x"].flatten(1)], 1) if inputs else data["hidden"]
    head = EpinetHead(index_dim=5, hidden_sizes=(8, 6), prior_scale=0.7, standardize_features=False)
    epinet = Epinet(features.shape[1], 3, head=head)
    load_haiku(epinet, under(data, prefix))
    learned, prior = epinet(features, data["z"])
    check(learned, data[prefix + "out_train"])
    check(prior, data[prefix + "out_prior"])
    check(learned + prior, data[prefix + "out_preds"])
    assert learned.requires_grad
    assert not prior.requires_grad


def test_a_linear_epinet_with_a_prior_of_another_shape():
    data = read("epinet_last_layer")
    head = EpinetHead(
        index_dim=5, hidden_sizes=(), prior_hidden_sizes=(4,), prior_scale=2.0, standardize_features=False
    )
    epinet = Epinet(7, 3, head=head)
    load_haiku(epinet, under(data, "linear/"))
    learned, prior = epinet(data["hidden"], data["z"])
    check(learned, data["linear/out_train"])
    check(prior, data["linear/out_prior"])


@pytest.mark.parametrize(
    ("exposed", "layers"), [("all", ("0", "2", "4", OUTPUT)), ("last_hidden", ("0", "4")), ("none", ("0",))]
)
def test_mlp_epinet_its_outputs_and_its_gradients(exposed, layers):
    data, prefix = read("epinet_mlp"), f"{exposed}/"
    head = EpinetHead(
        index_dim=4, hidden_sizes=(8, 8), prior_scale=0.5, standardize_features=False, calibrate_prior=False
    )
    network = EpinetNetwork(MLP(6, 3, hidden_sizes=(10, 9)), feature_layers=layers, num_outputs=3, head=head)
    assert network.is_initialized
    load_haiku(network, under(data, prefix))
    x, z = data["x"], data["z"]
    check(network._base(x)[1], data[prefix + "exposed_features"])
    learned, prior = network.learned_and_prior(x, z)
    check(learned, data[prefix + "out_train"])
    check(prior, data[prefix + "out_prior"])
    check(network(x, z), data[prefix + "out_preds"])

    (network(x, z[:1]) * data["G"]).sum().backward()  # the file's gradients are those of the first index
    expected = EpinetNetwork(MLP(6, 3, hidden_sizes=(10, 9)), feature_layers=layers, num_outputs=3, head=head)
    gradients = {
        name.removeprefix(f"{prefix}grad/"): value for name, value in data.items() if name.startswith(f"{prefix}grad/")
    }
    assert all(not value.any() for name, value in gradients.items() if name.startswith("prior"))
    load_haiku(expected, gradients)
    for (name, parameter), (_, gradient) in zip(network.named_parameters(), expected.named_parameters(), strict=True):
        check(parameter.grad, gradient.detach())
        assert "prior" not in name


class Base(nn.Module):
    """The reference's base: a hidden layer over pixels in the order of the file, then logits."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(3072, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.h(x.permute(0, 2, 3, 1).flatten(1)).relu())


def test_an_epinet_on_a_frozen_base_with_a_convolutional_prior():
    data = read("epinet_combined_conv")
    x, z = data["img"].permute(0, 3, 1, 2), data["z"]
    prior = load_haiku(cifar_conv_prior(4, index_dim=3), under(data, "convprior/"))
    check(prior(x, z), data["convprior/out"])
    head = EpinetHead(
        index_dim=3,
        hidden_sizes=(5,),
        prior_scale=4.0,
        additive_prior_scale=0.5,
        calibrate_prior=False,
        standardize_features=False,
        base_scale=1.25,
    )
    network = EpinetNetwork(Base(), feature_layers="out", num_outputs=4, head=head, prior=prior, freeze_base=True)
    load_haiku(network.base, under(data, "base/"))
    load_haiku(network.epinet, under(data, "epi/"))
    learned, priors = network.learned_and_prior(x, z)
    check(network.base(x), data["base_logits"])
    check(network._base(x)[1], data["base_hidden"])
    check(learned, data["out_train"])
    # The reference's base has a prior of its own, a constant in z: it belongs to `out_prior` there.
    check(priors + 1.25 * data["base_prior"], data["out_prior"])
    check(learned + priors + 1.25 * data["base_prior"], data["out_preds"])


def test_imagenet_convolutional_prior():
    data = read("imagenet_conv_prior")
    x = (data["img_u8"].float() / 255 - 0.5).permute(0, 3, 1, 2)
    prior = load_haiku(imagenet_conv_prior(5, index_dim=2), under(data, "p/"))
    check(prior(x, data["z"]), data["out"])


def test_an_ensemble_with_matched_priors():
    data = read("ensembles")
    x = data["x"].flatten(1)
    members = [
        NetworkWithPrior(MLP(6, 3, hidden_sizes=(6, 5)), MLP(6, 3, hidden_sizes=(6, 5)), scale=2.0) for _ in range(4)
    ]
    ensemble = EnsembleNetwork(members)
    load_haiku(ensemble, under(data, "matched/"))
    for i, member in enumerate(members):
        load_haiku(member.prior, under(data, f"matched_prior{i}/"))
    check(torch.stack([member.network(x) for member in members]), data["matched/out_train"])
    check(torch.stack([2 * member.prior(x) for member in members]), data["matched/out_prior"])
    check(ensemble(x), data["matched/out_preds"])
    check(AdditivePrior([member.prior for member in members])(x, data["lin/z"]), data["lin/out"])


def test_an_einsum_ensemble_with_its_prior():
    data = read("ensembles")
    x = data["x"].flatten(1)
    ensemble = EnsembleNetwork(
        [NetworkWithPrior(MLP(6, 3, hidden_sizes=(6, 5)), MLP(6, 3, hidden_sizes=(6, 5)), scale=2.0) for _ in range(4)]
    )
    load_haiku(ensemble, under(data, "einsum/"), member_axis=-1)
    priors = EnsembleNetwork([MLP(6, 3, hidden_sizes=(6, 5)) for _ in range(4)])
    load_haiku(priors, under(data, "einsum_prior/"), member_axis=-1)
    for member, prior in zip(ensemble.members, priors.members, strict=True):
        member.prior.load_state_dict(prior.state_dict())
    check(ensemble(x), data["einsum/out_preds"])


def test_dropout_with_masks_shared_by_the_batch(monkeypatch):
    data = read("dropout")
    dropout = [nn.Dropout(0.3) for _ in range(3)]
    layers = [nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    base = nn.Sequential(dropout[0], layers[0], dropout[1], nn.ReLU(), layers[1], dropout[2], nn.ReLU(), layers[2])
    load_haiku(base, under(data, "p/"))
    network = DropoutNetwork(base)

    def stored(index, layer, shape, rate):
        assert shape[0] == 1  # one mask for the batch
        return torch.stack([data[f"mask/z{int(z)}/layer{layer}"] > 0 for z in index]).unsqueeze(1)

    network(data["x"], torch.arange(1))  # looks at its dropouts, with masks that were not stored
    monkeypatch.setattr(network, "mask_of", stored)
    output = network(data["x"], torch.arange(3))
    check(output, torch.stack([data[f"out/z{z}"] for z in range(3)]))


def test_the_initial_weights_have_haikus_spread():
    data = read("initializers")
    layer = truncated_normal_init_(nn.Linear(100, 2000), torch.Generator().manual_seed(0))
    assert layer.weight.std().item() == pytest.approx(float(data["linear_w_std"]), rel=0.01)
    assert layer.weight.abs().max() <= 0.2
    assert layer.weight.abs().max().item() == pytest.approx(float(data["linear_w_absmax"]), rel=0.01)
    assert not layer.bias.any()
    assert np.isclose(layer.weight.mean().item(), 0, atol=1e-3)
