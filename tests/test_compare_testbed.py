"""The comparison on a problem of the Neural Testbed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq import DeterministicModule, EnsembleModule
from lightning_uq.cli import main
from lightning_uq.compare import Configuration, Progress, Recipe, compare
from lightning_uq.compare import configuration as configuration_module
from lightning_uq.compare.environment import command_line
from lightning_uq.compare.pages.page import make_report
from lightning_uq.compare.planning.plan import choose_methods
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.testbed import (
    AGENTS,
    DEFAULT_AGENTS,
    accuracy_and_calibration,
    agent_network,
    divergences,
    model_log_likelihood,
)
from lightning_uq.compare.training.evaluation import num_weights
from lightning_uq.compare.training.training import train
from lightning_uq.data import TestbedDataModule, classification_problem, gp_classification_problem, save_problem
from lightning_uq.errors import InputError
from lightning_uq.functional import bin_statistics, calibration_error, clustered_log_likelihood, random_projection
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.report.table import COLUMNS, TESTBED_COLUMNS
from tests.result_keys import CLASSIFICATION_KEYS

STORED = Path(__file__).parents[2] / "shared" / "reference" / "testbed"
QUICK = Recipe(learning_rate=1e-3, batch_size=100, steps=5)
KEYS = {column.key for column in TESTBED_COLUMNS if "tau100" not in column.key}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("testbed") / "problem.npz"
    np.savez(path, **classification_problem(input_dim=3, num_train=12, temperature=0.25, num_test=40, seed=2))
    return str(path)


@pytest.fixture(autouse=True)
def _few_rows_are_timed(monkeypatch):
    monkeypatch.setattr("lightning_uq.compare.training.evaluation.TIMED_ROWS", 10)


def configure(path, **changes):
    return Configuration(**{"data": "testbed", "problem": path, "seeds": 1, "recipe": QUICK, **changes})


def trained_weights(path, name, seed=0):
    configuration = configure(path)
    problem, method = make_problem(configuration, seed), AGENTS[name]
    return train(method, [method], problem, seed, configuration, Progress(), monitor=None).module


# ------------------------------------------------------------------ rows


def test_rows_gain_divergences_and_lose_detection(path):
    comparison = compare(configure(path))
    assert [row["method"] for row in comparison.rows] == list(DEFAULT_AGENTS)
    for row in comparison.rows:
        assert set(row) == {
            "method",
            *KEYS,
            *(
                column.key
                for column in COLUMNS
                if column.key in CLASSIFICATION_KEYS and column.group not in ("sets", "detection")
            ),
        }
        for tau in (1, 10):
            assert math.isfinite(row[f"kl_tau{tau}"]["mean"])
        assert row["kl_infinite"] == {"mean": 0, "se": None, "seeds": [0]}
    uniform = comparison.rows[-1]
    assert uniform["parameters"]["mean"] == 0
    assert uniform["kl_tau10_normalized"]["mean"] == pytest.approx(1)
    with np.load(path) as file:
        for tau in (1, 10):
            expected = float(file[f"true_ll_tau{tau}"].mean()) + tau * math.log(2)
            assert uniform[f"kl_tau{tau}"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert command_line(comparison.configuration).startswith(
        f"lightning-uq compare --data testbed --problem {path} --methods "
    )


def test_the_command_line(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(configuration_module, "TESTBED_RECIPE", QUICK)
    out = tmp_path / "out"
    arguments = ["compare", "--data", "testbed", "--problem", path, "--methods", "uniform,softmax", "--seeds", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["data"] == "testbed"
    uniform, softmax = results["rows"]
    assert uniform["kl_tau10"]["mean"] != softmax["kl_tau10"]["mean"]
    assert "KL 10" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "d = 3, n = 12, T = 0.25" in page
    assert "5 steps" in page
    assert "stratified" not in page
    assert main([*arguments, "--max-epochs", "3", "--out", str(out)]) == 2
    assert "--data testbed takes no --max-epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": None}, "data='testbed' needs `problem`, the path of an .npz file"),
        ({"recipe": Recipe(max_epochs=3)}, "data='testbed' takes no `max_epochs`"),
        ({"ood_classes": (1,)}, "data='testbed' takes no `ood_classes`"),
        ({"data": "digits", "recipe": Recipe()}, "`problem` needs data='testbed', but data is 'digits'"),
        ({"data": "digits", "problem": None}, "`steps` of a recipe needs data='testbed'"),
        ({"problem": "nowhere.npz"}, "nowhere.npz must be .* but there is no such file"),
    ],
)
def test_bad_configurations(path, changes, message):
    with pytest.raises(InputError, match=message):
        compare(configure(path, **changes))


def test_uniform_is_a_method_of_the_testbed_alone(path):
    configuration = configure(path)
    assert "uniform" in choose_methods(configuration, make_problem(configuration, 0))[0]
    digits = make_problem(Configuration(), 0)
    with pytest.raises(InputError, match="unknown for classification: 'uniform'"):
        choose_methods(Configuration(methods=("uniform",)), digits)
    assert "uniform" not in choose_methods(Configuration(), digits)[0]


# ------------------------------------------------------------------ what training sees


@pytest.mark.parametrize("name", [name for name in DEFAULT_AGENTS if name != "uniform"])
def test_training_sees_its_inputs_and_labels_alone(path, tmp_path, name):
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    poisoned = {}
    for key, value in arrays.items():
        if key.startswith(("gen/", "true_")):
            poisoned[key] = np.full_like(value, np.nan)
        elif key.startswith("x_test"):
            poisoned[key] = np.full_like(value, 1e6)
        elif key.startswith("y_test"):
            poisoned[key] = 1 - value
        else:
            poisoned[key] = value
    np.savez(tmp_path / "poisoned.npz", **poisoned)
    clean = trained_weights(path, name).state_dict()
    other = trained_weights(str(tmp_path / "poisoned.npz"), name).state_dict()
    assert clean.keys() == other.keys()
    assert all(torch.equal(clean[key], other[key]) for key in clean)
    # What training does see, changes it.
    np.savez(tmp_path / "flipped.npz", **{**arrays, "y_train": 1 - arrays["y_train"]})
    flipped = trained_weights(str(tmp_path / "flipped.npz"), name).state_dict()
    assert any(not torch.equal(clean[key], flipped[key]) for key in clean)


def test_the_testbeds_recipe_is_the_originals():
    assert Configuration("testbed", problem="problem.npz").recipe == Recipe(
        learning_rate=1e-3, batch_size=100, steps=1000
    )


# ------------------------------------------------------------------ the agents


def test_agents_have_the_originals_sizes(path):
    configuration = configure(path)
    setting = make_problem(configuration, 0).setting
    mlp = 3 * 50 + 50 + 50 * 50 + 50 + 50 * 2 + 2
    sizes = {"softmax": mlp, "ensemble": 10 * mlp, "ensemble_prior": 20 * mlp, "uniform": 0}
    for name, size in sizes.items():
        assert num_weights(AGENTS[name].build(setting)) == size, name


def test_weight_decay_is_the_gradient_of_the_originals_penalty(path):
    configuration = configure(path)
    setting = make_problem(configuration, 0).setting
    scale = math.sqrt(0.25) * 3 / 12
    for name in ("softmax", "ensemble", "ensemble_prior", "dropout"):
        groups = AGENTS[name].build(setting).configure_optimizers().param_groups
        assert all(group["weight_decay"] == pytest.approx(2 * scale) and group["lr"] == 1e-3 for group in groups)
    (group,) = AGENTS["epinet"].build(setting).configure_optimizers().param_groups
    assert group["weight_decay"] == pytest.approx(2 * 0.2 * (3 / 12) ** 0.7)

    # One step by hand, with the penalty in the loss and no decay.
    x, y = torch.randn(12, 3), torch.arange(12) % 2
    networks = [agent_network(3, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network, optimizer in zip(
        networks,
        (setting.optimizer(networks[0].parameters()), torch.optim.Adam(networks[1].parameters(), 1e-3)),
        strict=True,
    ):
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            if network is networks[1]:
                loss = loss + scale * sum(p.square().sum() for p in network.parameters())
            loss.backward()
            optimizer.step()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_epinet_takes_ten_times_the_steps_with_much_data(tmp_path):
    assert [epochs for name, _, epochs in told_of(tmp_path, num_train=501) if name == "epinet"] == [10]
    assert {epochs for _, _, epochs in told_of(tmp_path, num_train=500)} == {1}


def told_of(tmp_path, num_train):
    told = []

    class Log(Progress):
        def training(self, method, seed):
            told.append([method, seed])

        def trained(self, method, seed, epochs, seconds):
            told[-1].append(epochs)

    file = tmp_path / f"{num_train}.npz"
    np.savez(file, **classification_problem(input_dim=1, num_train=num_train, num_test=3))
    compare(configure(str(file), methods=("epinet", "softmax"), recipe=Recipe(batch_size=100, steps=2)), Log())
    return told


def test_agent_networks_start_as_the_originals_do():
    network = agent_network(400, 2, hidden_sizes=(300,), dropout=0.1, nonzero_bias=True)
    assert network[0].weight.std().item() * 20 == pytest.approx(0.8796, abs=0.01)
    assert 0 < network[0].bias.abs().max() <= 2 / 20
    assert not network[-1].bias.any()
    assert not agent_network(4, 2)[0].bias.any()


# ------------------------------------------------------------------ the divergence


def naive(module, x, y):
    """One forward for every index and draw."""
    index = module.network.evaluation_index(1000)
    log_likelihoods = []
    for inputs, labels in zip(x, y, strict=True):
        with torch.no_grad():
            logits = module.network(inputs, index)
        log_probs = logits.double().log_softmax(-1)[:, torch.arange(len(labels)), labels]
        log_likelihoods.append(log_probs.sum(1).logsumexp(0) - math.log(len(index)))
    return torch.stack(log_likelihoods)


def polyadic(num_draws=6):
    problem = classification_problem(3, 12, num_test=num_draws)
    return torch.from_numpy(problem["x_test_tau10"]), torch.from_numpy(problem["y_test_tau10"][..., 0]).long()


@pytest.mark.parametrize("rows", [1, 700, 10**9])
def test_likelihoods_in_parts_are_those_of_every_index_alone(rows):
    x, y = polyadic()
    modules = [
        EnsembleModule(lambda: nn.Linear(3, 2), num_members=7),
        DeterministicModule(nn.Linear(3, 2)),
        EpinetModule(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))).eval(),
    ]
    for module in modules[: 2 if rows == 1 else 3]:
        torch.testing.assert_close(
            model_log_likelihood(module, x, y, rows=rows), naive(module, x, y), rtol=1e-5, atol=1e-5
        )


def test_the_base_runs_once_a_part():
    calls = []
    base = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    base.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    module = EpinetModule(base)
    x, y = polyadic(20)
    distinct = len(x.flatten(0, 1).unique(dim=0))
    calls.clear()
    model_log_likelihood(module, x, y, rows=100 * distinct)
    assert calls == [distinct] * 10  # a thousand indices


def test_a_prediction_without_members_is_one_hypothesis():
    from lightning_uq import EvidentialModule

    module = EvidentialModule(nn.Linear(3, 2))
    x, y = polyadic()
    log_probs = module.predict(x.flatten(0, 1)).log_probs.double()
    expected = log_probs.gather(1, y.flatten().unsqueeze(1)).reshape(y.shape).sum(1)
    torch.testing.assert_close(model_log_likelihood(module, x, y), expected.detach(), rtol=1e-5, atol=1e-6)


class Certain(nn.Module):
    def forward(self, x):
        return torch.stack([x[:, 0] * 0, x[:, 0] * 0 - math.inf], 1)


def test_infinite_draws_are_reported(path):
    data = TestbedDataModule(path)
    with pytest.warns(UserWarning, match=r"\d+ of 40 draws of kl_tau(1|10) were infinite") as told:
        values = divergences(DeterministicModule(Certain()), data)
    assert len(told) == 2
    expected = sum(int((data.joint_draws(tau).y == 1).any(1).sum()) for tau in (1, 10))
    assert values["kl_infinite"] == expected


# ------------------------------------------------------------------ many labels together


def polyadic_hundred(num_draws=6):
    problem = classification_problem(3, 12, num_test=num_draws, taus=(100,))
    return torch.from_numpy(problem["x_test_tau100"]), torch.from_numpy(problem["y_test_tau100"][..., 0]).long()


def test_a_likelihood_that_is_no_number_is_reported(path, tmp_path):
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    arrays["true_ll_tau10"][3] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    with pytest.warns(UserWarning, match=r"Array true_ll_tau10 of .*nan.npz is not finite, so kl_tau10 is undefined"):
        values = divergences(DeterministicModule(nn.Linear(3, 2)), TestbedDataModule(str(tmp_path / "nan.npz")))
    assert math.isnan(values["kl_tau10"])
    assert math.isfinite(values["kl_tau1"])


@pytest.mark.parametrize("rows", [40, 10**9])
def test_above_ten_labels_hypotheses_are_sorted_into_cells(rows):
    x, y = polyadic_hundred()
    module = EpinetModule(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))).eval()
    with torch.no_grad():
        logits = module.network(x.flatten(0, 1), module.network.evaluation_index(64))
    planes = random_projection(100, 2, generator=torch.Generator().manual_seed(0))
    expected = clustered_log_likelihood(logits, y, planes)
    found = model_log_likelihood(module, x, y, num_indices=64, rows=rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # The switch: it can be had below ten labels, and left above.
    exact = model_log_likelihood(module, x, y, num_indices=64, rows=rows, estimator="exact")
    assert (exact - found).abs().max() > 1e-3
    log_probs = logits.double().log_softmax(-1).unflatten(1, (6, 100))
    log_probs = log_probs.gather(3, y.expand(64, -1, -1).unsqueeze(3)).squeeze(3)
    torch.testing.assert_close(exact, log_probs.sum(2).logsumexp(0) - math.log(64), rtol=1e-5, atol=1e-4)
    few = [
        model_log_likelihood(module, x[:, :10], y[:, :10], num_indices=64, estimator=estimator)
        for estimator in ("auto", "exact", "projection")
    ]
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])
    other = model_log_likelihood(module, x, y, num_indices=64, rows=rows, seed=1)
    assert not torch.equal(other, found)
    with pytest.raises(InputError, match="`estimator` must be 'auto', 'exact' or 'projection', but it is 'clusters'"):
        model_log_likelihood(module, x, y, estimator="clusters")


def test_a_row_gains_a_hundred_labels(tmp_path):
    path = tmp_path / "hundred.npz"
    save_problem(gp_classification_problem(3, 12, num_test=20, num_inputs=50, taus=(1, 10, 100)), path)
    comparison = compare(configure(str(path), methods=("uniform", "ensemble")))
    uniform, ensemble = comparison.rows
    with np.load(path) as file:
        expected = float(file["true_ll_tau100"].mean()) + 100 * math.log(2)
    assert uniform["kl_tau100"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert uniform["kl_tau100_normalized"]["mean"] == pytest.approx(1)
    assert ensemble["kl_tau100"]["mean"] != uniform["kl_tau100"]["mean"]
    notes = make_report(comparison.results(), {"risk_coverage": "<svg></svg>"}).notes
    assert any(note.startswith("KL 100 is the testbed's estimate for more than ten labels") for note in notes)


def test_one_hypothesis_needs_no_cells():
    x, y = polyadic_hundred()
    module = DeterministicModule(nn.Linear(3, 2))
    found, exact = (model_log_likelihood(module, x, y, estimator=estimator) for estimator in ("auto", "exact"))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ accuracy and calibration


@pytest.mark.parametrize("tau", [1, 10])
def test_accuracy_and_calibration_are_the_originals(tmp_path, tau):
    problem = classification_problem(3, 50, temperature=0.25, num_test=1200, seed=2)
    save_problem(problem, tmp_path / "problem.npz")
    data = TestbedDataModule(str(tmp_path / "problem.npz"))
    module = EnsembleModule(lambda: nn.Linear(3, 2), num_members=4)
    values = accuracy_and_calibration(module, data, tau)
    assert set(values) == {"train_acc", "test_acc", "train_ece", "test_ece"}
    count = {1: 1001, 10: 101}[tau]
    parts = {
        "train": (problem["x_train"], problem["y_train"]),
        "test": (problem[f"x_test_tau{tau}"][:count], problem[f"y_test_tau{tau}"][:count]),
    }
    for part, (x, y) in parts.items():
        with torch.no_grad():
            probs = module(torch.from_numpy(x).flatten(0, -2)).double().softmax(-1).mean(0)
        confidence, label = probs.max(1)
        correct = label == torch.from_numpy(y).flatten()
        assert values[f"{part}_acc"] == pytest.approx(correct.double().mean().item())
        expected = calibration_error(bin_statistics(confidence, correct, 10))
        assert values[f"{part}_ece"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.skipif(not STORED.exists(), reason="the stored problems are not there")
@pytest.mark.parametrize(("number", "expected"), [(80, (0.50796, 5.09128)), (20, (0.523, 5.023))])
def test_uniform_on_the_stored_problems(number, expected):
    comparison = compare(configure(str(STORED / f"problem_{number}.npz"), methods=("uniform",)))
    row = comparison.rows[0]
    digits = 5e-6 if number == 80 else 5e-4
    assert row["kl_tau1"]["mean"] == pytest.approx(expected[0], abs=digits)
    assert row["kl_tau10"]["mean"] == pytest.approx(expected[1], abs=digits)
