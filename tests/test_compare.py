import json
import math
import statistics
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_uq import DeterministicModule, DirichletPrediction, Method, TemperatureScaling
from lightning_uq.compare import Configuration, Progress, Recipe, compare, write
from lightning_uq.compare.environment import command_line
from lightning_uq.compare.pages import drawing
from lightning_uq.compare.pages.drawing import draw, equal_predictions, pooled
from lightning_uq.compare.pages.page import make_report
from lightning_uq.compare.planning import discovery
from lightning_uq.compare.planning import plan as plan_module
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.compare.planning.plan import choose_methods, share_trainings
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.results import summarize
from lightning_uq.compare.training.evaluation import num_weights, ood_score
from lightning_uq.errors import InputError
from lightning_uq.functional import SCORES, auroc
from lightning_uq.method import Monitor
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.report import risk_coverage_figure
from tests.result_keys import CLASSIFICATION_KEYS

TIMES = ("train_seconds", "ms_per_1000")
QUICK = Recipe(max_epochs=3)


class Log(Progress):
    def __init__(self):
        self.calls = []

    def start(self, trainings, epochs, done):
        assert done == 0
        self.calls.append(("start", trainings, epochs))

    def training(self, method, seed):
        self.calls.append(("training", method, seed))

    def epoch(self, method, seed):
        self.calls.append(("epoch",))

    def trained(self, method, seed, epochs, seconds):
        assert seconds > 0
        self.calls.append(("trained", epochs))


def run(**changes):
    arguments = {"methods": ("softmax", "energy", "ensemble"), "seeds": 2, "seed": 5, "recipe": QUICK, **changes}
    log = Log()
    return compare(Configuration(**arguments), log), log.calls


@pytest.fixture(scope="module")
def done():
    return run()


@pytest.fixture
def add_method(monkeypatch):
    """Add methods to those of the package until the test ends."""

    def add(**arguments):
        method = Method(**arguments)
        known = {**discovery.methods(), method.name: method}
        for user in (discovery, plan_module):
            monkeypatch.setattr(user, "methods", lambda task="classification": dict(known))

    return add


def without_times(results):
    return {**results, "rows": [{k: v for k, v in row.items() if k not in TIMES} for row in results["rows"]]}


# ------------------------------------------------------------------ results


def test_results_have_exactly_these_keys(done):
    results = done[0].results()
    assert set(results) == {
        *("format", "data", "task", "verdict", "rows", "baseline", "differences", "single_rows", "methods", "problem"),
        *("configuration", "command", "versions", "git", "left_out", "missing", "tuned", "notes"),
    }
    assert results["data"] == "digits"
    assert [row["method"] for row in results["rows"]] == ["softmax", "energy", "ensemble"]
    for row in results["rows"]:
        assert set(row) == {"method", *CLASSIFICATION_KEYS}
        for key in CLASSIFICATION_KEYS:
            assert set(row[key]) == {"mean", "se", "seeds"}
            assert all(math.isfinite(value) for value in [row[key]["mean"], row[key]["se"], *row[key]["seeds"]])
        assert 0.5 < row["accuracy"]["mean"] <= 1
        assert row["train_seconds"]["mean"] > 0 < row["ms_per_1000"]["mean"]
    json.dumps(results, allow_nan=False)


def test_one_network_is_shared_by_the_methods_that_read_it(done):
    softmax, energy, ensemble = done[0].rows
    same = {key for key in CLASSIFICATION_KEYS if softmax[key] == energy[key]}
    assert same >= {"accuracy", "nll", "brier", "ece", "joint_log_loss", "parameters"}
    assert softmax["ood_auroc"] != energy["ood_auroc"]
    assert softmax["nll"] != ensemble["nll"]
    # With one hypothesis tau labels cost tau times what one does.
    assert softmax["joint_log_loss"]["mean"] == pytest.approx(10 * softmax["nll"]["mean"])
    assert ensemble["joint_log_loss"]["mean"] < 10 * ensemble["nll"]["mean"]
    weights = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 8 + 8
    assert softmax["parameters"] == {"mean": weights, "se": 0, "seeds": [weights] * 2}
    assert ensemble["parameters"] == {"mean": 5 * weights, "se": 0, "seeds": [5 * weights] * 2}


def test_the_joint_log_loss_follows_a_calibration_of_one_network_and_is_empty_for_one_of_a_mean(add_method):
    add_method(
        name="calibrated_ensemble",
        ood_score="predictive_entropy",
        trained_as="ensemble",
        callbacks=lambda setting: [TemperatureScaling()],
    )
    comparison, _ = run(methods=("softmax", "temperature", "calibrated_ensemble"), seeds=1)
    softmax, temperature, ensemble = comparison.rows
    assert temperature["nll"]["mean"] != softmax["nll"]["mean"]
    assert temperature["joint_log_loss"]["mean"] == pytest.approx(10 * temperature["nll"]["mean"])
    assert "joint_log_loss" not in ensemble
    assert "It is empty for methods without one" in " ".join(make_report(comparison.results(), {}).notes)


def test_progress_tells_every_training_and_epoch(done):
    calls = done[1]
    assert calls[0] == ("start", 4, 3)
    assert [call[1:] for call in calls if call[0] == "training"] == [
        ("softmax", 5),
        ("softmax", 6),
        ("ensemble", 5),
        ("ensemble", 6),
    ]
    assert calls.count(("trained", 3)) == 4
    assert calls.count(("epoch",)) == 12


def test_numbers_are_recomputed_from_the_module(done):
    """One row from scratch: a Trainer of its own is not needed, only the same seed, data and weights."""
    configuration = Configuration(methods=("softmax",), seeds=1, seed=5, recipe=QUICK)
    modules = []

    class Keep(Callback):
        def on_fit_end(self, trainer, pl_module):
            modules.append(pl_module)

    problem = make_problem(configuration, 5)
    data = problem.data
    from lightning_uq.compare.training.training import train

    softmax = replace(methods()["softmax"], callbacks=lambda setting: [Keep()])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = train(softmax, [softmax], problem, 5, configuration, Progress(), monitor=Monitor("val_nll"))
    torch.set_num_threads(threads)
    assert modules == [trained.module]
    with torch.no_grad():
        logits = {part: trained.module.network.network(data.dataset(part).tensors[0]) for part in ("test", "ood")}
    y = data.dataset("test").tensors[1]
    probs = logits["test"].double().softmax(1)
    row = run(methods=("softmax",), seeds=1)[0].rows[0]
    accuracy = pytest.approx(float((probs.argmax(1) == y).double().mean()))
    assert row["accuracy"] == {"mean": accuracy, "se": None, "seeds": [accuracy]}
    assert row["nll"]["mean"] == pytest.approx(float(-probs[torch.arange(len(y)), y].log().mean()), rel=1e-5)
    brier = ((probs - nn.functional.one_hot(y, 8)) ** 2).sum(1).mean()
    assert row["brier"]["mean"] == pytest.approx(float(brier), rel=1e-5)
    entropy = {part: SCORES["predictive_entropy"](value[None]) for part, value in logits.items()}
    is_ood = torch.arange(len(y) + len(entropy["ood"])) >= len(y)
    expected = auroc(torch.cat([entropy["test"], entropy["ood"]]), is_ood)
    assert row["ood_auroc"]["mean"] == pytest.approx(float(expected), abs=1e-6)


def test_same_seed_same_results(done):
    again, _ = run()
    assert without_times(again.results()) == without_times(done[0].results())
    other, _ = run(seed=6)
    assert without_times(other.results()) != without_times(done[0].results())


def test_a_method_does_not_depend_on_which_others_run(done):
    alone, _ = run(methods=("ensemble",))
    assert without_times(alone.results())["rows"][0] == without_times(done[0].results())["rows"][2]


def test_callers_random_state_and_threads_are_left_alone():
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.get_rng_state())


def test_no_held_out_classes_no_detection_columns():
    comparison, _ = run(ood_classes=(), methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
    assert set(comparison.rows[0]) == {"method", *(key for key in CLASSIFICATION_KEYS if not key.startswith("ood_"))}


def test_a_file_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(200) % 4
    np.savez(tmp_path / "blobs.npz", x=rng.normal(size=(200, 5)) + 4 * y[:, None], y=y)
    comparison, _ = run(
        data=str(tmp_path / "blobs.npz"), ood_classes=(3,), methods=("softmax",), recipe=Recipe(max_epochs=9)
    )
    row = comparison.rows[0]
    assert row["accuracy"]["mean"] > 0.7
    assert row["parameters"]["mean"] == 5 * 128 + 128 + 128 * 128 + 128 + 128 * 3 + 3
    assert comparison.problem.setting.data == "blobs"


def test_early_stopping_keeps_the_best_epoch():
    """With a huge step the loss explodes after the first epochs; what is evaluated is the best of them."""
    comparison, calls = run(
        methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=30, patience=2, learning_rate=0.3, batch_size=8)
    )
    epochs = next(call[1] for call in calls if call[0] == "trained")
    assert epochs < 30
    assert calls.count(("epoch",)) == epochs
    assert comparison.rows[0]["nll"]["mean"] < 5


# ------------------------------------------------------------------ methods


def test_trained_as_trains_what_is_not_listed():
    comparison, calls = run(methods=("energy",), seeds=1, recipe=Recipe(max_epochs=1))
    assert ("training", "softmax", 5) in calls
    assert [row["method"] for row in comparison.rows] == ["energy"]


def test_default_is_every_method(add_method):
    add_method(name="a_reader", ood_score="energy", trained_as="softmax")
    problem = make_problem(Configuration(), 0)
    chosen = list(choose_methods(Configuration(), problem)[0])
    assert set(chosen) == set(discovery.methods()) >= {"a_reader", "ensemble"}
    assert chosen.index("softmax") < chosen.index("energy") < chosen.index("ensemble")
    assert chosen.index("softmax") < chosen.index("a_reader") < chosen.index("ensemble")
    assert list(choose_methods(Configuration(methods=("energy", "softmax", "energy")), problem)[0]) == [
        "energy",
        "softmax",
    ]


def test_sharing_groups_by_training():
    known = methods()
    groups = share_trainings({name: known[name] for name in ("energy", "ensemble", "softmax")})
    assert {name: [m.name for m in readers] for name, readers in groups.items()} == {
        "softmax": ["energy", "softmax"],
        "ensemble": ["ensemble"],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("softmax", "nope")}, "methods: unknown for classification: 'nope'. Choose from softmax, "),
        ({"methods": ()}, "methods: no method is named"),
        ({"data": "mnist"}, "`data` must be digits, .* but it is 'mnist'"),
        ({"data": "nowhere.npz"}, "nowhere.npz must be .* but there is no such file"),
        ({"ood_classes": (8, 12)}, "labels of digits .* but it holds 12"),
        ({"seeds": 0}, "`seeds` must be at least 1, but it is 0"),
        ({"seed": -1}, "`seed` must lie in .*, but it is -1"),
        ({"recipe": Recipe(max_epochs=0)}, "`max_epochs` must be at least 1, but it is 0"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


# ------------------------------------------------------------------ callbacks and scores


class FirstFeature(Callback):
    """Scores an input by its mean pixel, fitted after training; another instance must not see it."""

    ood_score_names = ("mean_pixel",)

    def __init__(self):
        self.fitted = None

    def on_train_end(self, trainer, pl_module):
        self.fitted = sum(float(x.sum()) for x, _ in trainer.train_dataloader)
        torch.tensor(0.0).item()

    @contextmanager
    def ood_scores(self, model):
        seen = []
        handle = model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            yield lambda logits: {"mean_pixel": seen[-1].mean(1) + 0 * self.fitted}
        finally:
            handle.remove()


def test_a_callbacks_score_is_read_and_charged_to_its_row(add_method):
    class Slow(FirstFeature):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            import time

            time.sleep(0.5)

    add_method(name="pixels", ood_score="mean_pixel", trained_as="softmax", callbacks=lambda setting: [Slow()])
    comparison, _ = run(methods=("softmax", "pixels"), seeds=1, recipe=Recipe(max_epochs=1))
    softmax, pixels = comparison.rows
    data = Configuration().make_data(5)
    score = [data.dataset(part).tensors[0].mean(1) for part in ("test", "ood")]
    is_ood = torch.arange(len(score[0]) + len(score[1])) >= len(score[0])
    assert pixels["ood_auroc"]["mean"] == pytest.approx(float(auroc(torch.cat(score), is_ood)), abs=1e-6)
    assert pixels["nll"] == softmax["nll"]
    assert 0.5 < pixels["train_seconds"]["mean"] - softmax["train_seconds"]["mean"] < 1.5
    assert equal_predictions(comparison.results(), comparison.records) == [["softmax", "pixels"]]


def test_score_order_provider_then_property_then_members():
    categorical = CategoricalPrediction(torch.randn(3, 4, 5))
    dirichlet = DirichletPrediction(1 + torch.rand(1, 4, 5))
    assert torch.equal(ood_score("energy", categorical), SCORES["energy"](categorical.logits))
    assert torch.equal(ood_score("mutual_information", categorical), categorical.mutual_information)
    assert torch.equal(ood_score("vacuity", dirichlet), dirichlet.vacuity)
    assert torch.equal(ood_score("mutual_information", dirichlet), dirichlet.mutual_information)
    own = [lambda logits: {"other": logits}, lambda logits: {"energy": logits[0, :, 0]}]
    assert torch.equal(ood_score("energy", categorical, own), categorical.logits[0, :, 0])
    assert torch.equal(ood_score("energy", dirichlet, own), dirichlet.log_probs[:, 0])
    with pytest.raises(
        InputError, match=r"CategoricalPrediction has no score 'nope'. Its scores are predictive_entropy, "
    ):
        ood_score("nope", categorical)
    with pytest.raises(InputError, match="DirichletPrediction has no score 'energy'"):
        ood_score("energy", dirichlet)


# ------------------------------------------------------------------ summaries


def test_summary_is_mean_and_standard_error():
    values = [3.0, 4.0, 8.0]
    summary = summarize([{"nll": value} for value in values])
    error = pytest.approx(statistics.stdev(values) / 3**0.5)
    assert summary == {"nll": {"mean": 5.0, "se": error, "seeds": values}}
    assert summarize([{"nll": 3.0}]) == {"nll": {"mean": 3.0, "se": None, "seeds": [3.0]}}
    assert summarize([{"nll": 3.0}, {"nll": math.inf}]) == {"nll": {"mean": None, "se": None, "seeds": [3.0, None]}}
    assert summarize([{"nll": math.nan}]) == {"nll": {"mean": None, "se": None, "seeds": [None]}}
    assert list(summarize([{"nll": 1.0, "accuracy": 1.0}])) == ["accuracy", "nll"]


def test_weights_count_frozen_priors_and_no_statistics():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("prior", torch.zeros(7))
            self.register_buffer("running_scale", torch.zeros(5))
            self.register_buffer("index", torch.arange(4))
            self.tied = self.linear
            self.again = nn.Parameter(self.linear.weight.detach())
            self.accuracy = MulticlassAccuracy(3)

    assert num_weights(Prior()) == 9 + 6 + 7 + 6
    frozen = nn.Linear(2, 3).requires_grad_(False)
    assert num_weights(frozen) == 9
    assert num_weights(DeterministicModule(nn.Linear(2, 3))) == 9


# ------------------------------------------------------------------ what is written


def test_the_risk_coverage_figure_ranks_by_certainty_which_is_not_rounded(done, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        drawing,
        "risk_coverage_figure",
        lambda curves, **options: drawn.update(curves) or risk_coverage_figure(curves, **options),
    )
    draw(done[0].results(), done[0].records)
    ranks, wrong = drawn["softmax, energy"]
    scores = pooled(done[0].records["softmax"])
    torch.testing.assert_close(-torch.expm1(-ranks), scores["confidence"].double(), rtol=0, atol=1e-6)
    assert torch.equal(wrong, ~scores["correct"])


def test_written_files(done, tmp_path):
    comparison = done[0]
    names = write(comparison.results(), comparison.records, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert set(names) == {
        "results.json",
        "report.html",
        "differences_nll.png",
        "differences_ood_auroc.png",
        "risk_coverage.png",
        "reliability_softmax.png",  # energy's predictions are the same
        "reliability_ensemble.png",
        "scores_softmax.png",
        "scores_energy.png",
        "scores_ensemble.png",
    }
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == comparison.results()
    assert "NaN" not in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 8
    for fact in (
        "--ood-classes 8,9",
        "mlp",
        "5, 6",
        torch.__version__,
        "CPU cores",
        "falls as the number of",
        "Z = 5",
    ):
        assert fact in page, fact
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / name).stat().st_size > 5000


def test_the_command_repeats_the_comparison(done):
    assert command_line(done[0].configuration) == (
        "lightning-uq compare --data digits --ood-classes 8,9 --methods softmax,energy,ensemble --seeds 2 --seed 5 --max-epochs 3"
    )


def test_nothing_held_out_is_written_without_histograms(tmp_path):
    comparison, _ = run(ood_classes=(), methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
    names = write(comparison.results(), comparison.records, tmp_path)
    assert not [name for name in names if name.startswith("scores_")]
    page = (tmp_path / "report.html").read_text()
    assert "held out" not in page
    assert "AUROC" not in page
    assert "no standard error" in page
