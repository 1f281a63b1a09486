"""An epinet whose head acts at each position of a map."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import EpinetModule
from lightning_uq.errors import InputError
from lightning_uq.networks import Factory
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.tasks import EvidentialClassification, Regression, Segmentation

HEAD = EpinetHead(index_dim=3, hidden_sizes=(6,), standardize_features=False)


class Tokens(nn.Module):
    """A token classifier: words [B, T] to logits [B, T, V]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, words):
        return self.head(self.embed(words))


def convolutions(dims):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), conv(4, 3, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_each_position_is_a_row_of_the_head_under_one_index(dims):
    base = convolutions(dims)
    network = EpinetNetwork(base, head=HEAD, pool="positions").eval()
    x = torch.randn(2, 1, *[5, 4, 3][:dims])
    index = network.sample_index(6)
    output = network(x, index)
    assert network.layers == ["2"]
    assert output.shape == (6, 2, 3, *x.shape[2:])
    rows = base[:2](x).movedim(1, -1).reshape(-1, 4)
    learned, prior = network.epinet(rows, index)
    expected = base(x).movedim(1, -1).reshape(-1, 3) + learned + prior
    torch.testing.assert_close(output.movedim(2, -1).reshape(6, -1, 3), expected)


def test_tokens_have_their_classes_last():
    module = EpinetModule(Tokens(), head=HEAD, task=Segmentation(class_axis=-1), num_eval_samples=4)
    words = torch.randint(11, (3, 7))
    assert module(words).shape == (4, 3, 7, 5)
    assert module.predict(words).probs.shape == (3, 5, 7)
    rows = module.network.base.embed(words).flatten(0, 1)
    index = module.network.evaluation_index(4)
    learned, prior = module.network.epinet(rows, index)
    expected = module.network.base(words).flatten(0, 1) + learned + prior
    torch.testing.assert_close(module(words).flatten(1, 2), expected)


def test_features_of_another_grid_are_those_of_the_nearest_position():
    up = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 3, 1), nn.Upsample(scale_factor=2))
    network = EpinetNetwork(up, head=HEAD, pool="positions").eval()
    x = torch.randn(2, 1, 6, 4)
    spread = network(x, network.sample_index(5)) - up(x)
    assert spread.shape == (5, 2, 3, 6, 4)
    assert torch.allclose(spread[..., ::2, ::2], spread[..., 1::2, 1::2], atol=1e-6)


def test_several_layers_and_the_input_are_features():
    head = EpinetHead(index_dim=3, hidden_sizes=(6,), include_inputs=True)
    network = EpinetNetwork(convolutions(2), feature_layers=["2", "<output>"], head=head, pool="positions")
    network(torch.randn(2, 1, 4, 4), network.sample_index(2))
    assert network.epinet.learned.layers[0].in_features == 3 + 4 + 3 + 1  # index, features, output, input


def test_a_horizon_is_the_same_head_in_another_shape():
    """Steps and numbers [B, H, k D] of one head: what the flat network's epinet gives, reshaped."""
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12))
    x = torch.randn(5, 4)
    torch.manual_seed(1)
    expected = EpinetModule(flat, head=HEAD, task=Regression(), num_eval_samples=7)
    steps = nn.Sequential(flat, nn.Unflatten(1, (3, 4)))
    torch.manual_seed(1)
    module = EpinetModule(steps, head=HEAD, feature_layers="0.2", task=Regression(), num_eval_samples=7)
    module.network.initialize(x)
    module.network.epinet.load_state_dict(expected.network.epinet.state_dict())
    torch.testing.assert_close(module(x).flatten(2), expected(x))
    assert module.predict(x).mean.shape == (5, 3, 2)


def test_a_horizon_is_trained_and_reloaded_bare(make_trainer, tmp_path):
    factory = Factory("tests.contract.cases.horizon_network")
    module = EpinetModule(factory, head=HEAD, task=Regression(), num_eval_samples=5)
    trainer = make_trainer(max_epochs=2)
    data = DataLoader(TensorDataset(torch.randn(20, 4), torch.randn(20, 3, 2)), batch_size=8)
    trainer.fit(module, data)
    assert bool((module.predict(torch.randn(6, 4)).epistemic_variance > 0).all())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EpinetModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(again.predict(x).mean, module.predict(x).mean)


def test_what_does_not_fit_is_named():
    x = torch.randn(2, 1, 4, 4)
    with pytest.raises(
        InputError, match=r"returned \[2, 3, 4, 4\], one row of 3 outputs per position. Pass `pool='positions'`"
    ):
        EpinetNetwork(convolutions(2), head=HEAD)(x, torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"`pool` must be 'positions' for Segmentation\(\), .* but it is 'mean'"):
        EpinetModule(convolutions(2), task="segmentation", pool="mean")
    flat = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match=r"must return a map \[B, C, ...\], but its output has shape \[2, 3\]"):
        EpinetNetwork(flat, head=HEAD, pool="positions")(x, torch.zeros(1, 3))


@pytest.mark.parametrize("task", [Segmentation(ignore_index=255), EvidentialClassification(ignore_index=255)])
def test_it_is_trained_and_its_members_differ_by_position(make_trainer, task):
    x, y = torch.randn(10, 1, 5, 4), torch.randint(3, (10, 5, 4))
    y[:, 0] = 255
    module = EpinetModule(convolutions(2), head=HEAD, task=task, pool="positions", num_eval_samples=4)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    before = [p.clone() for p in module.network.epinet.learned.parameters()] if module.network.epinet else None
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader, loader)
    after = list(module.network.epinet.learned.parameters())
    assert before is None or any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    prediction = module.predict(x)
    assert prediction.mutual_information.shape == (10, 5, 4)
    assert (prediction.mutual_information > 0).all()
