import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from lightning_uq import DeterministicModule
from lightning_uq.data import (
    TestbedDataModule,
    classification_problem,
    draw_from_gp,
    draw_inputs,
    draw_teacher,
    gaussian_inputs,
    gp_classification_problem,
    gp_posterior,
    nngp_kernel,
    polyadic_inputs,
    regression_problem,
    save_problem,
    teacher_logits,
    weibull_inputs,
)
from lightning_uq.errors import InputError

REFERENCE = Path(__file__).parents[1] / "reference"
STORED = Path(__file__).parents[3] / "shared" / "reference" / "testbed"


def arrays_of(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def problem():
    return classification_problem(input_dim=3, num_train=20, num_test=30, seed=1)


@pytest.fixture
def write(tmp_path, problem):
    """A problem's file, some of its arrays replaced (None: left out)."""

    def write(**changes):
        arrays = {name: value for name, value in {**problem, **changes}.items() if value is not None}
        np.savez(tmp_path / "problem.npz", **arrays)
        return str(tmp_path / "problem.npz")

    return write


def meta(**values):
    return np.array(json.dumps(values))


# ------------------------------------------------------------------ the original's numbers


@pytest.mark.parametrize("tau", [1, 10])
def test_the_originals_teacher(tau):
    stored = arrays_of(REFERENCE / "enn_testbed_problem.npz")
    x, temperature = torch.from_numpy(stored[f"x_test_tau{tau}"]), json.loads(str(stored["meta"]))["temperature"]
    logits = teacher_logits(stored, x, temperature)
    np.testing.assert_allclose(logits, stored[f"true_logits_tau{tau}"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits.softmax(-1), stored[f"true_probs_tau{tau}"], rtol=1e-4, atol=1e-5)
    target = torch.from_numpy(stored[f"y_test_tau{tau}"]).long()
    log_probs = logits.log_softmax(-1).gather(-1, target).sum((1, 2))
    np.testing.assert_allclose(log_probs, stored[f"true_ll_tau{tau}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 10])
def test_the_originals_kernel(d):
    stored = arrays_of(REFERENCE / "enn_testbed_nngp.npz")
    x = torch.from_numpy(stored[f"d{d}/x"])
    np.testing.assert_allclose(nngp_kernel(x), stored[f"d{d}/nngp"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nngp_kernel(x[:3], x), stored[f"d{d}/nngp"][:3], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not STORED.exists(), reason="the stored problems are not there")
@pytest.mark.parametrize(("number", "expected"), [(20, (2, 20)), (80, (10, 100))])
def test_the_stored_problems_load(number, expected):
    data = TestbedDataModule(str(STORED / f"problem_{number}.npz"))
    assert (data.num_features, data.num_train, data.num_classes, data.temperature) == (*expected, 2, 0.1)
    assert data.taus == (1, 10)
    for tau in data.taus:
        draws = data.joint_draws(tau)
        assert draws.x.shape == (1000, tau, expected[0])
        assert draws.y.shape == (1000, tau)


def test_a_generated_problem_has_the_stored_ones_arrays():
    stored = arrays_of(REFERENCE / "enn_testbed_problem.npz")
    ours = classification_problem(input_dim=2, num_train=20, num_test=20)
    assert set(ours) == set(stored)
    for name, value in stored.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype.kind == value.dtype.kind, name


# ------------------------------------------------------------------ generators


def test_polyadic_inputs_repeat_their_anchors():
    generator = torch.Generator().manual_seed(0)
    x = polyadic_inputs(500, 10, 3, kappa=2, generator=generator)
    distinct = torch.tensor([len(draw.unique(dim=0)) for draw in x])
    assert set(distinct.tolist()) <= {1, 2}
    assert (distinct == 1).float().mean().item() == pytest.approx(2**-9, abs=0.01)
    assert polyadic_inputs(5, 50, 3, kappa=4).flatten(0, 1).unique(dim=0).shape[0] == 20
    anchors = x.flatten(0, 1).unique(dim=0)
    assert anchors.mean(0).abs().max() < 0.15
    assert (anchors.std(0) - 1).abs().max() < 0.15
    assert gaussian_inputs(4, 10, 3).flatten(0, 1).unique(dim=0).shape[0] == 40


def test_the_teachers_weights_have_the_originals_moments():
    weights = draw_teacher(400, hidden_size=400, generator=torch.Generator().manual_seed(0))
    for layer in ("linear", "linear_1"):
        w = weights[f"gen/{layer}/w"]
        assert w.std().item() * 20 == pytest.approx(0.8796, abs=0.01)
        assert w.abs().max() <= 2 / 20
    assert weights["gen/linear/b"].std().item() * 20 == pytest.approx(1, abs=0.1)
    assert weights["gen/linear/b"].abs().max() > 2 / 20  # a whole normal, unlike the weights
    assert not weights["gen/linear_1/b"].any()
    assert not weights["gen/linear_2/b"].any()


def test_labels_follow_their_probabilities():
    problem = classification_problem(input_dim=2, num_train=5000, temperature=0.5, num_classes=3, num_test=5, seed=3)
    counts = np.bincount(problem["y_train"][:, 0], minlength=3) / 5000
    np.testing.assert_allclose(counts, problem["true_probs_train"].mean(0), atol=0.02)
    probs = problem["true_probs_tau10"]
    chosen = np.take_along_axis(probs, problem["y_test_tau10"].astype(int), -1)[..., 0]
    np.testing.assert_allclose(np.log(chosen).sum(1), problem["true_ll_tau10"], rtol=1e-4, atol=1e-5)


def test_a_lower_temperature_is_less_random():
    entropies = []
    for temperature in (0.01, 0.1, 0.5):
        probs = classification_problem(10, 100, temperature, num_test=10)["true_probs_train"].astype(float)
        entropies.append(-(probs * np.log(probs + 1e-300)).sum(1).mean())
    assert entropies == sorted(entropies)


@pytest.mark.parametrize("make", [classification_problem, gp_classification_problem, regression_problem])
def test_seeds_repeat_and_the_global_state_stays(make):
    before = torch.random.get_rng_state()
    first, again, other = (make(num_test=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["x_train"], other["x_train"])


def test_gaussian_test_inputs():
    problem = classification_problem(inputs="gaussian", num_test=20, taus=(3,))
    assert len(np.unique(problem["x_test_tau3"].reshape(-1, 2), axis=0)) == 60
    assert "x_test_tau1" not in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_dim": 0}, "`input_dim` must be above 0, but it is 0"),
        ({"num_train": 0}, "`num_train` must be above 0, but it is 0"),
        ({"temperature": -1.0}, "`temperature` must be above 0, but it is -1"),
        ({"temperature": math.nan}, "`temperature` must be above 0, but it is nan"),
        ({"num_classes": 1}, "`num_classes` must be at least 2, but it is 1"),
        ({"taus": (0, 10)}, "`tau` must be above 0, but it is 0"),
        ({"inputs": "uniform"}, "`inputs` must be 'polyadic', 'gaussian' or 'weibull', but it is 'uniform'"),
        ({"rejected_classes": 2}, r"`rejected_classes` must be in \[0, 2\), but it is 2"),
        ({"rejected_classes": -1}, r"`rejected_classes` must be in \[0, 2\), but it is -1"),
        ({"reject_prob": 1.5}, r"`reject_prob` must be in \[0, 1\], but it is 1.5"),
    ],
)
def test_problems_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        classification_problem(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inputs": 0}, "`num_inputs` must be above 0, but it is 0"),
        ({"ridge": 0.0}, "`ridge` must be above 0, but it is 0"),
        ({"temperature": math.inf}, "`temperature` must be above 0, but it is inf"),
        ({"num_classes": 1}, "`num_classes` must be at least 2, but it is 1"),
        ({"taus": ()}, "`tau` must be above 0, but it is 0"),
    ],
)
def test_gaussian_processes_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        gp_classification_problem(**changes)


def test_weibull_inputs_keep_their_anchor_and_their_distances():
    x = weibull_inputs(4000, 3, 200, generator=torch.Generator().manual_seed(0)).double()
    assert abs(x[:, 0].std().item() - 1) < 0.01
    # The original's parameters: scale ln(10)^(-1/k), concentration k.
    k = math.log10(math.log2(10))
    distribution = torch.distributions.Weibull(math.log(10) ** (-1 / k), k)
    for place in (1, 2):
        difference = x[:, place] - x[:, 0]
        radius = difference.square().mean(1).sqrt()
        for t in (0.01, 0.1, 1.0, 3.0):
            share = (radius < t).double().mean().item()
            assert share == pytest.approx(distribution.cdf(torch.tensor(t)).item(), abs=0.03)
        away = radius > 0.01
        assert (difference[away] / radius[away].unsqueeze(1)).mean().abs() < 0.01
    once = weibull_inputs(2000, 1, 3, generator=torch.Generator().manual_seed(1))
    assert once.shape == (2000, 1, 3)
    assert once.isfinite().all()
    assert once.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("inputs", ["polyadic", "gaussian", "weibull"])
def test_inputs_repeat_with_their_seed(inputs):
    first, again, other = (draw_inputs(inputs, 5, 4, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (5, 4, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_shift_takes_classes_from_the_training_data_alone():
    common = {"input_dim": 4, "num_train": 20_000, "temperature": 0.5, "num_classes": 4, "num_test": 2000, "seed": 5}
    plain = classification_problem(**common)
    none, rare, gone = (
        classification_problem(**common, rejected_classes=2, reject_prob=prob) for prob in (0.0, 0.8, 1.0)
    )
    rejected = json.loads(str(gone["meta"]))["rejected_classes"]
    assert len(set(rejected)) == 2
    assert json.loads(str(rare["meta"]))["rejected_classes"] == rejected

    def share(problem, name="y_train"):
        return np.isin(problem[name], rejected).mean()

    p = plain["true_probs_train"][:, rejected].sum(1).mean()
    assert share(gone) == 0
    assert share(none) == pytest.approx(p, abs=0.02)
    assert share(rare) == pytest.approx(0.2 * p / (1 - 0.8 * p), abs=0.02)  # kept with probability 0.2
    assert len(gone["x_train"]) == len(rare["x_train"]) == 20_000
    assert share(gone, "y_test_tau1") == pytest.approx(p, abs=0.05)
    # Labels still belong to their inputs: among the classes that are left, as often as their probabilities say.
    kept = [label for label in range(4) if label not in rejected]
    probs = gone["true_probs_train"][:, kept]
    probs = probs / probs.sum(1, keepdims=True)
    first = (gone["y_train"][:, 0] == kept[0]).astype(float)
    for group in (probs[:, 0] > 0.5, probs[:, 0] <= 0.5):
        assert first[group].mean() == pytest.approx(probs[group, 0].mean(), abs=0.02)


def test_a_teacher_that_draws_one_class_cannot_lose_it():
    # Almost without noise, and in one dimension, some teachers give all inputs one label; half of those lose it.
    common = {"input_dim": 1, "num_train": 200, "temperature": 1e-4, "num_test": 1}
    one_sided = [s for s in range(40) if len(np.unique(classification_problem(**common, seed=s)["y_train"])) == 1]

    def refuses(seed):
        try:
            classification_problem(**common, rejected_classes=1, seed=seed)
        except InputError:
            return True
        return False

    refused = [seed for seed in one_sided if refuses(seed)]
    assert 0 < len(refused) < len(one_sided)
    message = (
        r"must leave 200 training samples, but of 12000 drawn ones, with classes \[[01]\] rejected, only 0 were left"
    )
    with pytest.raises(InputError, match=message):
        classification_problem(**common, rejected_classes=1, seed=refused[0])


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "make",
    [classification_problem, gp_classification_problem],
)
def test_a_saved_problem_is_read_again(tmp_path, make):
    problem = make(3, 20, 0.25, num_classes=3, num_test=30, taus=(1, 10, 100))
    path = tmp_path / "new" / "problem.npz"
    save_problem(problem, path)
    save_problem(problem, str(path))
    stored = arrays_of(path)
    assert stored.keys() == problem.keys()
    assert all(np.array_equal(stored[name], value) for name, value in problem.items())
    data = TestbedDataModule(str(path))
    assert (data.num_features, data.num_train, data.num_classes, data.temperature) == (3, 20, 3, 0.25)
    assert data.taus == (1, 10, 100)
    assert data.joint_draws(100).y.shape == (30, 100)


def test_an_error_while_saving_leaves_the_former_problem(tmp_path, problem):
    class Unsaveable:
        def __array__(self, *args, **kwargs):
            raise OSError("disk full")

    path = tmp_path / "problem.npz"
    save_problem(problem, path)
    with pytest.raises(OSError, match="disk full"):
        save_problem({**problem, "y_train": Unsaveable()}, path)
    assert arrays_of(path).keys() == problem.keys()
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved(tmp_path, problem):
    with pytest.raises(InputError, match=r"`path` must be an \.npz file, but it is .*problem"):
        save_problem(problem, tmp_path / "problem")
    with pytest.raises(InputError, match="`problem` must be a testbed problem, but it lacks y_train, meta"):
        save_problem({"x_train": problem["x_train"]}, tmp_path / "problem.npz")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the Gaussian process


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), d=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_the_kernel_is_a_covariance(seed, n, d, scale):
    x = scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = nngp_kernel(x)
    torch.testing.assert_close(kernel, kernel.T)
    variance = (x.square().sum(1) + 1) / d / 4
    torch.testing.assert_close(kernel.diagonal(), variance)
    assert torch.linalg.eigvalsh(kernel / variance.max()).min() > -1e-9


def test_the_kernel_is_that_of_wide_networks():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(4000):
        h = x
        for layer, width in enumerate((64, 64, 1)):
            w = torch.randn(h.shape[1], width, generator=generator, dtype=torch.float64) / h.shape[1] ** 0.5
            b = torch.randn(width, generator=generator, dtype=torch.float64) / 3**0.5 if layer == 0 else 0
            h = h @ w + b
            h = h.relu() if layer < 2 else h
        outputs.append(h[:, 0])
    covariance = torch.stack(outputs).T.cov()
    torch.testing.assert_close(covariance, nngp_kernel(x), rtol=0.15, atol=0.01)


def test_the_posterior_is_its_definition():
    x, y, new = torch.randn(8, 2), torch.randn(8), torch.randn(5, 2)
    mean, covariance = gp_posterior(x, y, new, noise_std=0.3)
    gram = nngp_kernel(x.double()) + 0.09 * torch.eye(8)
    cross = nngp_kernel(x.double(), new.double())
    torch.testing.assert_close(mean, cross.T @ torch.linalg.solve(gram, y.double()))
    torch.testing.assert_close(covariance, nngp_kernel(new.double()) - cross.T @ torch.linalg.solve(gram, cross))
    # Where the function was seen almost without noise, it is known.
    mean, covariance = gp_posterior(x, y * 0.1, x, noise_std=1e-4)
    torch.testing.assert_close(mean, y.double() * 0.1, atol=1e-3, rtol=0)
    assert covariance.diagonal().max() < 1e-6


def test_regression_noise_has_its_log_density():
    problem = regression_problem(2, 30, noise_std=0.5, num_test=400)
    error = problem["y_test_tau10"][..., 0] - problem["true_mean_tau10"]
    assert error.std() == pytest.approx(0.5, abs=0.02)
    expected = torch.distributions.Normal(0, 0.5).log_prob(torch.from_numpy(error)).sum(1)
    np.testing.assert_allclose(expected, problem["true_ll_tau10"], rtol=1e-4, atol=1e-3)
    assert json.loads(str(problem["meta"]))["noise_std"] == 0.5
    with pytest.raises(InputError, match="`noise_std` must be above 0, but it is 0"):
        regression_problem(noise_std=0)


def test_functions_drawn_have_the_kernels_covariance():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = draw_from_gp(x, 40_000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(values.cov(), nngp_kernel(x), rtol=0.05, atol=0.01)
    assert values.mean(1).abs().max() < 0.02


def test_gaussian_process_labels_follow_their_softmax():
    problem = gp_classification_problem(2, 30, 0.25, num_classes=3, num_test=3000, num_inputs=200, seed=3)
    assert json.loads(str(problem["meta"])) == {
        "input_dim": 2, "num_train": 30, "temperature": 0.25, "num_classes": 3, "seed": 3
    }  # fmt: skip
    probs, y = problem["true_probs_tau10"].astype(float), problem["y_test_tau10"].astype(int)
    logits = problem["true_logits_tau10"].astype(float)
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), probs, atol=1e-5)
    np.testing.assert_allclose(np.bincount(y.ravel(), minlength=3) / y.size, probs.mean((0, 1)), atol=0.02)
    chosen = np.take_along_axis(probs, y, -1)[..., 0]
    np.testing.assert_allclose(np.log(chosen).sum(1), problem["true_ll_tau10"], rtol=1e-4, atol=1e-4)
    # One input has one function value, wherever it is drawn.
    x, rows = np.unique(problem["x_test_tau10"].reshape(-1, 2), axis=0, return_inverse=True)
    assert len(x) == 200
    flat = logits.reshape(-1, 3)
    for row in range(0, 200, 40):
        assert np.ptp(flat[rows.ravel() == row], axis=0).max() == 0
    # A lower temperature sharpens the same functions.
    sharper = gp_classification_problem(2, 30, 0.125, num_classes=3, num_test=3000, num_inputs=200, seed=3)
    assert sharper["true_probs_train"].max(1).mean() > problem["true_probs_train"].max(1).mean()


# ------------------------------------------------------------------ the data module


def test_training_and_test_data(write, problem):
    data = TestbedDataModule(write())
    x, y = data.dataset("train").tensors
    assert torch.equal(x, torch.from_numpy(problem["x_train"]))
    assert torch.equal(y, torch.from_numpy(problem["y_train"][:, 0]).long())
    x, y = data.dataset("test").tensors
    assert torch.equal(x, torch.from_numpy(problem["x_test_tau1"][:, 0]))
    assert len(y) == 30
    assert data.val_dataloader() == []
    assert data.ood_dataloaders() == {}
    assert sum(len(batch[1]) for batch in data.predict_dataloader()) == 30


def test_an_epoch_is_a_number_of_steps(write):
    data = TestbedDataModule(write(), seed=4, batch_size=50, num_steps=8)
    batches = [x for x, _ in data.train_dataloader()]
    assert [len(x) for x in batches] == [50] * 8
    # One shuffle of the 20 samples after the other.
    rows = torch.cat(batches)
    train = data.dataset("train").tensors[0].unique(dim=0)
    assert all(torch.equal(part.unique(dim=0), train) for part in rows.split(20))
    assert not torch.equal(rows[:20], rows[20:40])
    again = TestbedDataModule(write(), seed=4, batch_size=50, num_steps=8)
    assert torch.equal(torch.cat([x for x, _ in again.train_dataloader()]), rows)
    other = TestbedDataModule(write(), seed=5, batch_size=50, num_steps=8)
    assert not torch.equal(torch.cat([x for x, _ in other.train_dataloader()]), rows)


def test_under_a_trainer(write, make_trainer):
    data = TestbedDataModule(write(), num_steps=5)
    module = DeterministicModule(torch.nn.Linear(3, 2))
    trainer: Trainer = make_trainer(limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 5
    assert "test_nll" in trainer.test(module, datamodule=data, verbose=False)[0]


def test_one_tau_is_enough(write, problem):
    gone = dict.fromkeys(name for name in problem if name.endswith("_tau1"))
    data = TestbedDataModule(write(**gone))
    assert data.taus == (10,)
    assert torch.equal(data.dataset("test").tensors[0], torch.from_numpy(problem["x_test_tau10"][:, 0]))


def test_labels_without_an_axis_of_their_own(write, problem):
    data = TestbedDataModule(write(y_train=problem["y_train"][:, 0].astype(np.uint8)))
    assert data.dataset("train").tensors[1].dtype == torch.int64


def test_the_environment_need_not_be_there(write, problem):
    keep = (
        "x_train",
        "y_train",
        "meta",
        *(f"{part}_tau{tau}" for part in ("x_test", "y_test", "true_ll") for tau in (1, 10)),
    )
    data = TestbedDataModule(write(**dict.fromkeys(set(problem) - set(keep))))
    data.setup()
    assert data.joint_draws(10).true_log_likelihood.shape == (30,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "x_train is missing"),
        ({"meta": None}, "meta is missing"),
        ({"meta": np.array("{")}, "`meta` of .* must be a JSON text"),
        ({"meta": np.array("[1]")}, r"`meta` of .* must be a JSON object, but it is \[1\]"),
        ({"meta": meta(num_classes=2)}, "have `temperature` as a number above 0, but it is None"),
        ({"meta": meta(num_classes=2, temperature=0)}, "have `temperature` as a number above 0, but it is 0"),
        ({"meta": meta(num_classes=2, temperature="low")}, "`temperature` as a number above 0, but it is 'low'"),
        ({"meta": meta(temperature=0.1)}, "have `num_classes` as a number of at least 2, but it is None"),
        ({"meta": meta(temperature=0.1, num_classes=1)}, "`num_classes` as a number of at least 2, but it is 1"),
        ({"x_train": np.zeros(20)}, r"`x_train` of .* must hold numbers \[n, d\], but it is float64 of shape \[20\]"),
        ({"x_train": np.full((20, 3), np.nan)}, "`x_train` of .* must be finite"),
        ({"y_train": np.zeros(20)}, r"`y_train` of .* must hold integer labels \[20\], but it is float64"),
        ({"y_train": np.zeros((19, 1), int)}, r"`y_train` of .* integer labels \[20\], but it is int64 of shape \[19, 1\]"),
        ({"y_train": np.full((20, 1), 2)}, r"`y_train` of .* must hold labels in \[0, 2\), but it holds 2 to 2"),
        ({"x_test_tau1": np.zeros((30, 1, 4))}, "`x_test_tau1` of .* must hold inputs of dimension 3, as x_train does, but it holds 4"),
        ({"true_ll_tau1": None, "true_ll_tau10": None}, "must be a testbed problem"),
        ({"y_test_tau1": None}, "y_test_tau1 is missing"),
        ({"true_ll_tau10": np.zeros(29)}, r"true_ll_tau10 of shape \[S\]"),
        ({"x_test_tau10": np.zeros((30, 9, 3)), "y_test_tau10": np.zeros((30, 9), int)}, r"x_test_tau10 of shape \[S, 10, d\]"),
    ],
)  # fmt: skip
def test_files_that_do_not_hold_a_problem(write, changes, message):
    data = TestbedDataModule(write(**changes))

    def read():
        data.setup()
        assert data.temperature > 0

    with pytest.raises(InputError, match=message):
        read()


def test_no_file_no_steps(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        TestbedDataModule(str(tmp_path / "nowhere.npz")).setup()
    with pytest.raises(InputError, match="`num_steps` must be at least 1, but it is 0"):
        TestbedDataModule("problem.npz", num_steps=0)
    problem = regression_problem(num_test=5, num_inputs=10)
    np.savez(tmp_path / "regression.npz", **problem)
    with pytest.raises(InputError, match="have `num_classes`"):
        TestbedDataModule(str(tmp_path / "regression.npz")).setup()
