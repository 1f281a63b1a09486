import copy

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork
from lightning_uq.networks.indexers import EnsembleIndexer, GaussianIndexer, GaussianWithUnitIndexer
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.additive import mlp_prior
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers
from tests.versions import VMAP_EXPORT, skip_on_torch_2_6

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def base():
    return MLP(4, 3, hidden_sizes=(16,))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 5, 2), nn.GroupNorm(1, 5), nn.Flatten(), nn.ReLU(), nn.Linear(5, 3)
    )


def call_one(network, x, weights, i):
    return torch.func.functional_call(network, {name: value[i] for name, value in weights.items()}, (x,))


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("make", [base, conv])
@pytest.mark.parametrize("hidden_sizes", [(), (5, 7)])
def test_one_batched_call_is_a_call_an_index(make, hidden_sizes):
    network = HypermodelNetwork(make(), hidden_sizes=hidden_sizes)
    z = network.sample_index(7)
    weights = network.weights(z)
    expected = torch.stack([call_one(network.network, X, weights, i) for i in range(7)])
    torch.testing.assert_close(network(X, z), expected)
    torch.testing.assert_close(network.eval()(X, z), expected)
    torch.testing.assert_close(network(X[2:3], z[4:5])[0, 0], expected[4, 2])


def test_a_linear_hypermodels_weights_are_linear_in_z():
    network = HypermodelNetwork(base(), indexer=GaussianIndexer(3))
    a, b = torch.randn(2, 1, 3)
    zero = network.weights(torch.zeros(1, 3))
    for name in network.names:
        mixed = network.weights(2 * a - b)[name] - zero[name]
        parts = [network.weights(z)[name] - zero[name] for z in (a, b)]
        torch.testing.assert_close(mixed, 2 * parts[0] - parts[1], atol=1e-5, rtol=1e-4)


def test_its_weights_start_about_the_networks_own():
    for scale in (True, False):
        for hidden_sizes in ((), (20,)):
            torch.manual_seed(0)
            inner = MLP(30, 5, hidden_sizes=(40,))
            own = {name: p.detach().clone() for name, p in inner.named_parameters()}
            network = HypermodelNetwork(inner, hidden_sizes=hidden_sizes, scale=scale)
            drawn = network.weights(network.sample_index(4000, torch.Generator().manual_seed(1)))
            assert drawn.keys() == own.keys()
            for name, value in own.items():
                if not hidden_sizes:
                    torch.testing.assert_close(drawn[name].mean(0), value, atol=0.02, rtol=0)
                spread = drawn[name].var(0).mean().sqrt() / value.square().mean().sqrt()
                assert 0.6 < spread < 1.5, (name, spread)


def test_enns_start():
    torch.manual_seed(0)
    network = HypermodelNetwork(
        MLP(100, 2, hidden_sizes=(200,)), indexer=GaussianIndexer(6), scale=False, initialization="enn"
    )
    for part, n in zip(torch.split(network.generator.weight, [20000, 200, 400, 2]), (20000, 200, 400, 2), strict=True):
        bound = 2 / 0.8796256610342398 / ((6 + n) / 2) ** 0.5
        assert part.abs().max() <= bound
        if n > 100:
            assert part.std().item() == pytest.approx(((6 + n) / 2) ** -0.5, rel=0.1)
    assert network.generator.bias[:20000].std().item() == pytest.approx(20000**-0.5, rel=0.05)


def test_what_is_not_generated_is_shared_and_trained():
    inner = conv()
    inner[5].bias.requires_grad_(False)
    network = HypermodelNetwork(inner)
    assert network.names == ["1.weight", "1.bias", "5.weight"]
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"generator.weight", "generator.bias", "network.2.weight", "network.2.bias"}
    network(X, network.sample_index(3)).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert network.network[5].bias.grad is None


def test_what_comes_before_the_generated_weights_runs_once():
    calls = []

    class Count(nn.Module):
        def forward(self, x):
            calls.append(x.shape)
            return x.relu()

    body = nn.Linear(4, 8).requires_grad_(False)
    network = HypermodelNetwork(nn.Sequential(body, Count(), nn.Linear(8, 3)))
    assert network(X, network.sample_index(5)).shape == (5, 6, 3)
    assert calls == [(6, 8)]


def test_outputs_that_a_function_picks_and_inputs_that_are_mappings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, batch):
            return {"logits": self.body(batch["x"])}

    network = HypermodelNetwork(Net(), output=lambda out: out["logits"]).eval()
    z = network.evaluation_index(3)
    assert network({"x": X}, z).shape == (3, 6, 3)


# ------------------------------------------------------------------ priors


def test_the_prior_is_added_and_never_trained():
    prior = PriorIndependentLayers(4, 3, index_dim=8, seed=0)
    network = HypermodelNetwork(base(), prior=prior, prior_scale=3.0, calibrate_prior=False)
    z = network.sample_index(5)
    learned, scaled = network.learned_and_prior(X, z)
    torch.testing.assert_close(scaled, 3 * prior(X, z))
    torch.testing.assert_close(network(X, z), learned + scaled)
    assert not scaled.requires_grad
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"generator"}
    network.train()
    assert not prior.training
    assert network.num_frozen == 1


def test_the_first_training_batch_makes_the_scale_a_spread():
    for scale in (0.5, 4.0):
        network = HypermodelNetwork(base(), prior=PriorIndependentLayers(4, 3, index_dim=8), prior_scale=scale)
        network(X, network.sample_index(2))
        spread = network.prior_scale.running_spread.clone()
        _, prior = network.learned_and_prior(X, network.sample_index(4000))
        assert prior.var(0).mean().sqrt().item() == pytest.approx(scale, rel=0.2)
        network(100 * X, network.sample_index(2))
        assert torch.equal(network.prior_scale.running_spread, spread)  # once and for all
        again = HypermodelNetwork(base(), prior=PriorIndependentLayers(4, 3, index_dim=8), prior_scale=scale)
        again.load_state_dict(network.state_dict())
        z = network.evaluation_index(3)
        assert torch.equal(again.eval()(X, z), network.eval()(X, z))


def test_a_hypermodel_or_an_additive_prior_as_the_prior():
    for prior in (HypermodelNetwork(MLP(4, 3, hidden_sizes=(5,))), mlp_prior(4, 3, index_dim=8)):
        network = HypermodelNetwork(base(), prior=prior)
        assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"generator"}
        before = {name: value.clone() for name, value in network.state_dict().items() if name.startswith("prior.")}
        assert before
        optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=1.0)
        network(X, network.sample_index(4)).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_independent_layers_by_definition():
    prior = PriorIndependentLayers(4, 2, index_dim=5, hidden_sizes=(3,), weight_scaling=2.0, bias_scaling=0.5, bias=0.1)
    z = torch.randn(3, 5)
    shares = [z[:, :3], z[:, 3:]]  # the first layers take what does not divide
    for i in range(3):
        h = X
        for layer in range(2):
            w, b = prior.get_buffer(f"weight_{layer}"), prior.get_buffer(f"bias_{layer}")
            w, b = w / w.norm(dim=-1, keepdim=True) * 2**0.5, b / b.norm(dim=-1, keepdim=True) * 0.5**0.5 + 0.1
            if layer:
                w, h = w / 3**0.5, h.relu()
            h = h @ (w @ shares[layer][i]).T + b @ shares[layer][i]
        torch.testing.assert_close(prior(X, z)[i], h)


def test_few_entries_of_z_go_to_every_layer():
    prior = PriorIndependentLayers(4, 2, index_dim=1, hidden_sizes=(3, 3))
    assert [prior.get_buffer(f"weight_{i}").shape[-1] for i in range(3)] == [1, 1, 1]
    assert prior(X, torch.zeros(2, 1)).abs().max() == 0
    torch.testing.assert_close(prior(X, torch.ones(1, 1))[0], prior(X, torch.tensor([[5.0], [1.0]]))[1])


def test_seeds_of_priors():
    one, other, third = (PriorIndependentLayers(4, 2, index_dim=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight_0, other.weight_0)
    assert not torch.equal(one.weight_0, third.weight_0)


# ------------------------------------------------------------------ memory, copies, precision


def test_chunks_make_no_difference_but_in_memory(monkeypatch):
    network = HypermodelNetwork(base(), prior=PriorIndependentLayers(4, 3, index_dim=8)).eval()
    z = network.evaluation_index(11)
    whole = network(X, z)
    sizes = []
    run = network._run
    monkeypatch.setattr(network, "_run", lambda x, part: sizes.append(len(part)) or run(x, part))
    monkeypatch.setattr("lightning_uq.networks.generated.weights._MAX_WEIGHTS_CPU", 4 * network.num_weights + 1)
    torch.testing.assert_close(network(X, z), whole)
    assert sizes == [4, 4, 3]
    sizes.clear()
    monkeypatch.setattr("lightning_uq.networks.generated.weights._MAX_WEIGHTS_CPU", 1)  # fewer than one index needs
    torch.testing.assert_close(network(X, z), whole)
    assert sizes == [1] * 11
    monkeypatch.undo()
    monkeypatch.setattr("lightning_uq.networks.chunks._MAX_ROWS_CPU", 12)
    torch.testing.assert_close(network(X, z), whole)


def test_the_generated_weights_have_no_copy_in_the_network():
    network = HypermodelNetwork(MLP(100, 100, hidden_sizes=(100,)))
    assert sum(buffer.numel() for buffer in network.buffers()) == 2  # the spread of the prior, and its factor
    assert [name for name in network.state_dict() if name.startswith("network.")] == []


@pytest.mark.parametrize("make", [base, conv])
def test_copies_compilation_and_export(make):
    network = HypermodelNetwork(make(), prior=PriorIndependentLayers(4, 3, index_dim=8), calibrate_prior=False)
    z = network.evaluation_index(4)
    assert torch.equal(copy.deepcopy(network)(X, z), network(X, z))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, z), network(X, z))
    compiled(X, z).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    skip_on_torch_2_6(VMAP_EXPORT)
    network.eval()
    torch.testing.assert_close(torch.export.export(network, (X, z), strict=False).module()(X, z), network(X, z))


@pytest.mark.parametrize("make", [base, conv])
def test_precisions(make):
    network = HypermodelNetwork(make(), prior=PriorIndependentLayers(4, 3, index_dim=8)).eval()
    z = network.evaluation_index(4)
    output = network(X, z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(X, z).float(), output, atol=0.1, rtol=0.05)
    half = copy.deepcopy(network).bfloat16()(X.bfloat16(), z)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), output, atol=0.1, rtol=0.05)
    double = copy.deepcopy(network).double()(X.double(), z)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), output, atol=1e-4, rtol=1e-3)


def test_an_index_drawn_in_inference_mode_serves_training_too():
    network = HypermodelNetwork(base())
    with torch.inference_mode():
        network.eval()(X, network.evaluation_index(3))
    network(X, network.evaluation_index(3)).sum().backward()


def test_indices():
    network = HypermodelNetwork(base(), indexer=GaussianWithUnitIndexer(4))
    assert (network.sample_index(5)[:, 0] == 1).all()
    assert torch.equal(network.evaluation_index(5), network.evaluation_index(5))
    assert not torch.equal(network.evaluation_index(5), network.evaluation_index(5, seed=1))
    a, b = (network.sample_index(5, torch.Generator().manual_seed(s)) for s in (3, 3))
    assert torch.equal(a, b)


# ------------------------------------------------------------------ refusals


def test_batch_norm_is_refused_and_other_norms_are_not():
    with pytest.raises(
        UnsupportedError, match=r"HypermodelNetwork does not support '1' \(BatchNorm1d\): every index has"
    ):
        HypermodelNetwork(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    for norm in (nn.BatchNorm1d(8, track_running_stats=False), nn.LayerNorm(8), nn.RMSNorm(8)):
        network = HypermodelNetwork(nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3)))
        assert network(X, network.sample_index(2)).shape == (2, 6, 3)


def test_what_vmap_cannot_map_is_named():
    class Branch(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if float(y.sum()) > 0 else -y

    network = HypermodelNetwork(nn.Sequential(Branch(4, 3)))
    with pytest.raises(UnsupportedError, match=r"Sequential cannot run with the weights of many indices at once.*vmap"):
        network(X, network.sample_index(2))


def test_bad_arguments():
    with pytest.raises(
        InputError, match="must have linear layers or convolutions that require a gradient, but ReLU has none"
    ):
        HypermodelNetwork(nn.ReLU())
    with pytest.raises(InputError, match="LazyLinear is lazy"):
        HypermodelNetwork(nn.LazyLinear(3))
    with pytest.raises(InputError, match="`initialization`"):
        HypermodelNetwork(base(), initialization="zero")
    for scale in (-1, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"`prior_scale` must be at least 0 and finite, but it is {scale}"):
            HypermodelNetwork(base(), prior_scale=scale)
    with pytest.raises(InputError, match=r"`indexer` must draw vectors \[Z, D\], but it is EnsembleIndexer"):
        HypermodelNetwork(base(), indexer=EnsembleIndexer(3))
    tied = base()
    tied.again = tied[0]
    with pytest.raises(UnsupportedError, match="one parameter under two names"):
        HypermodelNetwork(tied)
    network = HypermodelNetwork(base())
    for index in (torch.randn(3), torch.randn(3, 7), torch.zeros(3, 8, dtype=torch.long)):
        with pytest.raises(InputError, match=r"`index` must be vectors \[Z, 8\]"):
            network(X, index)
    with pytest.raises(InputError, match="`num_samples`"):
        network.evaluation_index(0)
    wrong = HypermodelNetwork(base(), prior=PriorIndependentLayers(4, 2, index_dim=8))
    with pytest.raises(InputError, match=r"network's shape \[2, 6, 3\], but its shape is \[2, 6, 2\]"):
        wrong(X, wrong.sample_index(2))
    prior = PriorIndependentLayers(4, 2, index_dim=3)
    with pytest.raises(InputError, match=r"`index` must be \[Z, 3\], but its shape is \[2, 4\]"):
        prior(X, torch.zeros(2, 4))
    with pytest.raises(InputError, match="4 features .* but it has 3"):
        prior(X[:, :3], torch.zeros(2, 3))
    with pytest.raises(InputError, match="`index_dim` must be an integer of at least 1, but it is 0"):
        PriorIndependentLayers(4, 2, index_dim=0)
    with pytest.raises(InputError, match="at least 1, but it is -2"):
        PriorIndependentLayers(4, 2, index_dim=2, hidden_sizes=(-2,))
