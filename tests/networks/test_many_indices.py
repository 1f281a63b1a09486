"""What many indices cost, counted: the trunk and the features' products run once, and memory does not grow with Z."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import BayesByBackpropModule, DeterministicModule, DropoutModule, EpinetModule
from lightning_uq.networks import MLP, BayesByBackpropNetwork, DropoutNetwork, EpinetHead, EpinetNetwork, mlp_prior
from lightning_uq.networks.chunks import in_chunks
from lightning_uq.networks.epinet.projected_mlp import ProjectedMLP
from lightning_uq.predictions import PooledCategoricalPrediction, PooledRegressionPrediction
from tests.counting import operators, peak_bytes, products

B, D, C = 1024, 16, 3  # a pass takes 8 indices of so many rows
X = torch.randn(B, D)


def epinet():
    return EpinetNetwork(MLP(D, C, hidden_sizes=(64,)))


NETWORKS = {
    "epinet": epinet,
    "dropout": lambda: DropoutNetwork(MLP(D, C, hidden_sizes=(64, 64), dropout=0.1)),
    "bayes_by_backprop": lambda: BayesByBackpropNetwork(MLP(D, C, hidden_sizes=(64, 64))),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    network = NETWORKS[request.param]().eval()
    network(X, network.evaluation_index(2))  # a dropout network looks at its dropouts
    return network


@torch.no_grad()
def test_memory_grows_with_the_outputs_alone(network):
    def beyond_outputs(number):
        z = network.evaluation_index(number)
        return peak_bytes(lambda: network(X, z)) - 4 * number * B * C

    assert beyond_outputs(40) - beyond_outputs(8) < 3 * 4 * 32 * B * C  # an epinet adds up three such outputs


@torch.no_grad()
def test_results_of_chunks_are_not_there_twice():
    numbers = torch.arange(100.0)
    whole = in_chunks(lambda part: part.unsqueeze(1).repeat(1, 1000), numbers, 7)
    assert whole.equal(numbers.unsqueeze(1).expand(-1, 1000))
    peak = peak_bytes(lambda: in_chunks(lambda part: part.unsqueeze(1).repeat(1, 1000), numbers, 7))
    assert peak < 1.1 * 4 * 100 * 1000  # the whole and one part


def products_of_each_index(make, mode="eval"):
    """The products of 16 indices more, for features of two widths."""
    found = []
    for width in (16, 512):
        network, x = getattr(make(width), mode)(), torch.randn(64, width)
        few, many = network.sample_index(16), network.sample_index(32)
        network(x, few)  # a prior's spread is measured, and a dropout network looks at its dropouts
        found.append(products(lambda: network(x, many)) - products(lambda: network(x, few)))  # noqa: B023  # called at once
    return found


@torch.no_grad()
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_product_with_the_features_of_an_epinet_is_taken_once(monkeypatch, mode):
    monkeypatch.setattr("lightning_uq.networks.chunks._MAX_ROWS_CPU", 256)
    few, many = products_of_each_index(lambda width: EpinetNetwork(nn.Linear(width, C)), mode)
    assert few == many


@torch.no_grad()
def test_the_first_layer_of_a_dropout_network_is_taken_once(monkeypatch):
    monkeypatch.setattr("lightning_uq.networks.chunks._MAX_ROWS_CPU", 256)
    few, many = products_of_each_index(
        lambda width: DropoutNetwork(nn.Sequential(nn.Linear(width, 64), nn.Dropout(0.1), nn.Linear(64, C)))
    )
    assert few == many


def test_the_operators_of_a_training_step():
    """Counted on a processor; about as many kernels are launched on a GPU, where small steps wait for launches."""
    x, y = torch.randn(8, D), torch.randint(C, (8,))

    def of(module):
        module.train()

        def step():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = module.training_loss(x, y, (x, y))
            loss.backward()

        step()
        module.zero_grad()  # as an optimizer does: no operator adds to an old gradient
        return operators(step)

    def epinet_module(number, **head):
        return EpinetModule(MLP(D, C, hidden_sizes=(64,)), head=EpinetHead(**head), num_train_samples=number)

    plain, few, many = (
        of(DeterministicModule(MLP(D, C, hidden_sizes=(64,)))),
        of(epinet_module(8)),
        of(epinet_module(32)),
    )
    assert few == many
    assert few - plain <= 61  # 71 before the scaler and the prior's scale took fewer
    assert few - of(epinet_module(8, prior_scale=0.0)) <= 9


def test_an_epinets_head_keeps_its_precision_under_autocast():
    network = epinet().eval()
    z = network.evaluation_index(4)
    features = torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learned, prior = network.epinet(features, z)
    assert learned.dtype == prior.dtype == torch.float32
    torch.testing.assert_close((learned, prior), network.epinet(features, z))


@pytest.mark.parametrize("concat_index", [True, False])
def test_an_epinet_is_what_its_formula_says(concat_index):
    mlp = ProjectedMLP(7, 3, index_dim=5, hidden_sizes=(6, 4), concat_index=concat_index).double()
    h, z = torch.randn(9, 7, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    layers = list(mlp.layers)
    for i, output in enumerate(mlp(h, z)):
        v = torch.cat([z[i].expand(9, -1), h], 1) if concat_index else h
        for layer in layers[:-1]:
            v = layer(v).relu()
        torch.testing.assert_close(output, layers[-1](v).reshape(9, 3, 5) @ z[i])


def test_chunks_of_an_epinets_indices_make_no_difference(monkeypatch):
    network = EpinetNetwork(MLP(D, C, hidden_sizes=(64,)), prior=mlp_prior(D, C, 8)).double().eval()
    x, z = X[:6].double(), network.evaluation_index(11)
    whole = network(x, z)
    monkeypatch.setattr("lightning_uq.networks.chunks._MAX_ROWS_CPU", 13)
    torch.testing.assert_close(network(x, z), whole)


@torch.no_grad()
def test_the_index_of_bayes_by_backprop_is_its_seeds():
    """The numbers are drawn where they are used: the same for any number of indices at once, and at every batch."""
    network = BayesByBackpropNetwork(MLP(D, C, hidden_sizes=(128, 128))).eval()
    z = network.evaluation_index(100)
    assert z.shape == (100,)
    torch.testing.assert_close(network.noise(z)[40:42], network.noise(z[40:42]))
    few, many = (peak_bytes(lambda z=z[:number]: network(X[:256], z)) for number in (40, 100))
    assert many - few < 0.5 * 4 * 60 * network.num_weights


@pytest.mark.parametrize("make", [EpinetModule, DropoutModule, BayesByBackpropModule])
@pytest.mark.parametrize(
    ("task", "kind"), [("classification", PooledCategoricalPrediction), ("regression", PooledRegressionPrediction)]
)
def test_predictions_of_many_indices_keep_no_members(make, task, kind):
    def size(number):
        torch.manual_seed(0)
        network = MLP(D, 4, hidden_sizes=(8,), dropout=0.1 if make is DropoutModule else 0.0)
        prediction = make(network, task=task, num_eval_samples=number).predict(X[:10])
        assert isinstance(prediction, kind)
        return sum(tensor.untyped_storage().nbytes() for _, tensor, _ in prediction._present())

    assert size(33) == size(200)


def test_a_regression_test_holds_the_members_of_one_batch(make_trainer):
    """The CRPS needs the mean and the variance of each member: 2 Z B numbers. Those of the batches before are gone."""
    rows, number = 512, 40
    members = 4 * 2 * number * rows
    module = EpinetModule(MLP(D, 2, hidden_sizes=(8,)), task="regression", num_eval_samples=number)

    def peak(batches):
        loader = DataLoader(TensorDataset(torch.randn(batches * rows, D), torch.randn(batches * rows, 1)), rows)
        trainer = make_trainer()
        return peak_bytes(lambda: trainer.test(module, loader, verbose=False))

    peak(1)  # indices and the like are made once
    few, many = peak(1), peak(3)
    assert few > members
    assert abs(many - few) < 0.1 * members
