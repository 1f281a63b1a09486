"""The fitted density: the original's numbers, scores by definition, precision, persistence and export."""

import copy
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional import auroc
from lightning_uq.functional.gaussian import fit_gaussian
from lightning_uq.networks import density as module
from lightning_uq.networks.class_statistics import ClassStatistics
from lightning_uq.networks.density import GaussianDensity

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("ddu_gmm_*_D*.npz"))
KINDS = ["full", "tied", "diagonal"]
SCORES = ["log_density", "mahalanobis", "relative_mahalanobis"]

pytestmark = pytest.mark.filterwarnings("ignore:Class .* rows for .* features")


def load(case):
    return {key: torch.as_tensor(value) for key, value in np.load(REFERENCE / f"{case}.npz").items()}


def rows(seed, n=60, d=4, c=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    centers = 3 * torch.randn(c, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(c, d, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, d, generator=generator, dtype=torch.float64) @ mix[labels]
    return (centers[labels] + noise.squeeze(1)).to(dtype), labels


def fitted(seed=0, **kwargs):
    x, y = rows(seed)
    return GaussianDensity.fit_features(x, y, **kwargs)


# --- the original's numbers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("jitter", "key"), [(1e-6, "jitter1e-06"), (1e-3, "jitter0.001")])
def test_log_probs_are_the_originals_at_a_given_jitter(case, jitter, key):
    data = load(case)
    density = GaussianDensity.fit_features(data["train_x"], data["train_y"], regularization=jitter)
    for part in ("test", "ood"):
        torch.testing.assert_close(density.log_prob(data[f"{part}_x"]), data[f"logp_{part}_{key}"], rtol=1e-6, atol=0)


def test_a_well_posed_case_end_to_end():
    data = load("ddu_gmm_well_C3_D8")
    for regularization in (0.0, "ddu"):
        density = GaussianDensity.fit_features(data["train_x"], data["train_y"], regularization=regularization)
        factor = torch.linalg.inv(density.whitening)
        torch.testing.assert_close(factor, data["scale_tril"], rtol=1e-10, atol=1e-12)
        found = {}
        for part in ("test", "ood"):
            log_prob = density.log_prob(data[f"{part}_x"])
            torch.testing.assert_close(log_prob, data[f"logp_{part}"], rtol=1e-9, atol=0)
            posterior = log_prob.softmax(1)
            entropy = -torch.special.xlogy(posterior, posterior).sum(1)
            torch.testing.assert_close(entropy.float(), data[f"entropy_{part}"], rtol=1e-4, atol=1e-6)
            found[part] = density.log_density(data[f"{part}_x"])
            # The original has no prior; ours is uniform and sums to one.
            expected = data[f"density64_{part}"] - math.log(3)
            torch.testing.assert_close(found[part], expected, rtol=1e-9, atol=0)
        score = -torch.cat([found["test"], found["ood"]])
        is_ood = torch.arange(len(score)) >= len(found["test"])
        assert auroc(score, is_ood).item() == pytest.approx(float(data["m1_auroc_auprc_m2_auroc_auprc"][0]), abs=1e-9)


# --- definitions


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(["uniform", "empirical"]))
def test_scores_are_their_definitions(seed, kind, priors):
    x, y = rows(seed)
    x, y = torch.cat([x, x[:7] + 1]), torch.cat([y, torch.zeros(7, dtype=y.dtype)])  # uneven classes
    density = GaussianDensity.fit_features(x, y, covariance=kind, priors=priors, regularization=0.05)
    eye = 0.05 * torch.eye(4, dtype=torch.float64)
    scatters = [(p - p.mean(0)).T @ (p - p.mean(0)) for p in (x[y == c] for c in range(3))]
    counts = torch.bincount(y).double()
    covariances = {
        "full": [S / (n - 1) + eye for S, n in zip(scatters, counts, strict=True)],
        "tied": [sum(scatters) / (len(x) - 3) + eye] * 3,
        "diagonal": [torch.diag(S.diagonal()) / (n - 1) + eye for S, n in zip(scatters, counts, strict=True)],
    }[kind]
    points = 4 * torch.randn(11, 4, dtype=torch.float64)
    normals = [
        torch.distributions.MultivariateNormal(x[y == c].mean(0), covariances[c]) for c in range(3)
    ]  # an implementation of torch's own
    log_prob = torch.stack([normal.log_prob(points) for normal in normals], 1)
    prior = counts / counts.sum() if priors == "empirical" else torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(density.log_prob(points), log_prob, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(density.log_density(points), (log_prob.exp() @ prior).log(), rtol=1e-7, atol=1e-7)

    def squared(mean, covariance):
        return ((points - mean) @ torch.linalg.inv(covariance) * (points - mean)).sum(1)

    distance = torch.stack([squared(x[y == c].mean(0), covariances[c]) for c in range(3)]).amin(0)
    torch.testing.assert_close(density.mahalanobis(points), distance, rtol=1e-8, atol=1e-8)
    everything = torch.cov(x.T) if kind != "diagonal" else torch.diag(x.var(0))
    relative = distance - squared(x.mean(0), everything + eye)
    torch.testing.assert_close(density.relative_mahalanobis(points), relative, rtol=1e-8, atol=1e-7)
    for name, expected in (("log_density", -density.log_density(points)), ("mahalanobis", distance)):
        torch.testing.assert_close(density.score(points, name), expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.0, "oas"]))
def test_densities_ignore_a_shift_and_follow_a_change_of_scale(seed, kind, regularization):
    x, y = rows(seed)
    base = GaussianDensity.fit_features(x, y, covariance=kind, regularization=regularization)
    moved = GaussianDensity.fit_features(5 * x + 1e3, y, covariance=kind, regularization=regularization)
    points = rows(seed + 1)[0]
    expected = base.log_prob(points) - 4 * math.log(5)
    torch.testing.assert_close(moved.log_prob(5 * points + 1e3), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.mahalanobis(5 * points + 1e3), base.mahalanobis(points), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_relabelled_classes_permute_log_probs_and_leave_the_density(kind):
    x, y = rows(1)
    order = torch.tensor([1, 2, 0])
    one = GaussianDensity.fit_features(x, y, covariance=kind)
    other = GaussianDensity.fit_features(x, order[y], covariance=kind)
    torch.testing.assert_close(other.log_prob(x)[:, order], one.log_prob(x))
    torch.testing.assert_close(other.log_density(x), one.log_density(x))


@pytest.mark.parametrize("kind", KINDS)
def test_far_features_have_finite_densities_in_order(kind):
    density = fitted(covariance=kind)
    far = torch.tensor([[1e2] * 4, [1e4] * 4, [1e8] * 4, [1e30] * 4])
    score = density.log_density(far)
    assert score.isfinite().all()
    assert (score.diff() < 0).all()
    assert density.log_density(torch.full((1, 4), math.nan)) == -math.inf  # no number that looks like one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_an_offset_of_a_million_costs_no_precision(kind, dtype):
    x, y = rows(2, n=600)
    near = GaussianDensity.fit_features(x, y, covariance=kind, regularization=0.0)
    far = GaussianDensity.fit_features(x + 2.0**20, y, covariance=kind, regularization=0.0, dtype=dtype)
    tolerance = 1e-7 if dtype is None else 1e-5
    torch.testing.assert_close(far.log_prob(x + 2.0**20), near.log_prob(x), rtol=tolerance, atol=tolerance)


def test_leading_axes_and_chunks_change_nothing(monkeypatch):
    density = fitted()
    features = torch.randn(2, 300, 4)
    expected = density.log_prob(features[1, 7:8])
    flat = density.score(features.reshape(-1, 4))
    assert density.log_prob(features).shape == (2, 300, 3)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)  # 64 rows at a time
    torch.testing.assert_close(density.score(features), flat.reshape(2, 300), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(density.log_prob(features)[1, 7:8], expected, rtol=1e-12, atol=1e-12)
    assert density.log_density(torch.empty(0, 4)).shape == (0,)
    assert density.log_density(torch.zeros(4)).shape == ()


# --- precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", SCORES)
def test_single_precision_products_agree_to_single_precision(kind, score):
    x, y = rows(3, n=3000, d=32)
    single = GaussianDensity.fit_features(x, y, covariance=kind, dtype=torch.float32)
    double = GaussianDensity.fit_features(x, y, covariance=kind)
    assert single.whitening.dtype == single.background_whitening.dtype == torch.float32
    assert single.mean.dtype == single.log_det.dtype == torch.float64
    got, expected = single.score(x, score), double.score(x, score)
    assert got.dtype == torch.float64
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float64_whatever_the_features(dtype):
    density = fitted()
    x = rows(0)[0].to(dtype)
    assert density(x).dtype == torch.float64
    assert torch.equal(density(x), density(x.double()))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()])
def test_a_cast_of_the_surrounding_module_leaves_the_density(cast):
    density = fitted()
    expected = density(rows(0)[0])
    model = cast(nn.ModuleDict({"net": nn.Linear(2, 2), "density": density}))
    assert model["net"].weight.dtype != torch.float64
    assert torch.equal(model["density"](rows(0)[0]), expected)
    assert model["density"].mean.dtype == torch.float64


def test_autocast_does_not_reach_the_products():
    density = fitted(dtype=torch.float32)
    x = rows(0)[0].float()
    expected = density.score(x, "relative_mahalanobis")
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        assert torch.equal(density.score(x, "relative_mahalanobis"), expected)


# --- persistence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_an_empty_instance_takes_shapes_and_precision_from_a_state(kind, dtype):
    density = fitted(covariance=kind, dtype=dtype, score="relative_mahalanobis")
    file = io.BytesIO()
    torch.save(density.state_dict(), file)
    file.seek(0)
    other = GaussianDensity(score="relative_mahalanobis")
    assert not other.is_fitted
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.is_fitted
    assert torch.equal(other(rows(0)[0]), density(rows(0)[0]))
    inside = nn.Sequential(GaussianDensity())
    inside.load_state_dict(nn.Sequential(density).state_dict())
    assert torch.equal(inside[0].score(rows(0)[0]), density.score(rows(0)[0], "log_density"))
    other.load_state_dict(fitted(1, covariance=kind).state_dict())  # another fit replaces it
    single = GaussianDensity(dtype=torch.float32)
    single.load_state_dict(fitted(covariance=kind).state_dict())
    assert single.whitening.dtype == torch.float32


def test_a_state_that_is_not_a_densitys_is_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        GaussianDensity().load_state_dict({})
    state = fitted().state_dict()
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        GaussianDensity().load_state_dict(state)


def test_it_holds_buffers_alone_and_copies():
    density = fitted()
    assert list(density.parameters()) == []
    x = rows(0)[0]
    for other in (copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
        assert torch.equal(other(x), density(x))
    assert repr(density) == "GaussianDensity(3 classes, 4 features, covariance='full', score='log_density')"
    assert "covariance='tied'" in repr(fitted(covariance="tied"))
    assert "covariance='diagonal'" in repr(fitted(covariance="diagonal"))
    assert repr(GaussianDensity()) == "GaussianDensity(not fitted, score='log_density')"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", SCORES)
def test_forward_exports_with_any_number_of_rows(kind, score):
    density = fitted(covariance=kind, score=score)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(density, (torch.randn(8, 4),), dynamic_shapes=({0: batch},), strict=False)
    x = rows(5, n=33)[0].float()
    torch.testing.assert_close(program.module()(x), density(x))


def test_forward_compiles():
    density = fitted(score="relative_mahalanobis")
    compiled = torch.compile(density, backend="aot_eager", fullgraph=True)
    x = rows(0)[0]
    torch.testing.assert_close(compiled(x), density(x))


# --- misuse


def test_an_empty_density_says_so():
    density = GaussianDensity()
    for call in (density, density.log_prob, density.log_density, density.mahalanobis, density.relative_mahalanobis):
        with pytest.raises(NotFittedError, match="This density is empty. Fit it, or load the state of a fitted one"):
            call(torch.zeros(2, 4))


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="`score` must be one of 'log_density', 'mahalanobis', 'relative_mahalanobis'"):
        GaussianDensity(score="energy")
    with pytest.raises(InputError, match=r"`dtype` must be torch.float32 or torch.float64, but it is torch.bfloat16"):
        GaussianDensity(dtype=torch.bfloat16)
    density = fitted()
    with pytest.raises(InputError, match="`name` must be one of"):
        density.score(torch.zeros(2, 4), "energy")
    with pytest.raises(
        InputError, match=r"floating-point tensor \[..., 4\], but it is torch.float32 of shape \[2, 5\]"
    ):
        density(torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"floating-point tensor \[..., 4\], but it is torch.int64"):
        density(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(
        InputError, match=r"`features` must be \[N, D\] with at least one row, but its shape is \[0, 4\]"
    ):
        GaussianDensity.fit_features(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="but class 3 has 0"):
        GaussianDensity.fit_features(*rows(0), num_classes=4)


# --- what the default is for


def test_the_common_intensity_detects_with_uneven_classes_where_one_a_class_does_not():
    """Digits 0 to 7 against 8 and 9 after a small network's features, half of the classes cut to a fifth."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    common, single = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        known = torch.randperm(len(x))
        known = known[y[known] < 8]
        train, test = known[:1000], known[1000:]
        keep = torch.ones(len(train), dtype=torch.bool)
        for c in range(0, 8, 2):
            of_class = (y[train] == c).nonzero().flatten()
            keep[of_class[len(of_class) // 5 :]] = False
        train = train[keep]
        body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        head = nn.Linear(128, 8)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(body(x[train])), y[train]).backward()
            optimizer.step()
        with torch.no_grad():
            features = body(x)
        density = GaussianDensity.fit_features(features[train], y[train])
        points = torch.cat([features[test], features[y >= 8]])
        is_ood = torch.arange(len(points)) >= len(test)
        common.append(auroc(density(points), is_ood).item())
        single.append(auroc(_one_intensity_each(features[train], y[train])(points), is_ood).item())
    assert sum(common) / 3 > 0.85, common
    assert sum(common) > sum(single), (common, single)


def _one_intensity_each(features, labels):
    """What the default is not: every class shrunk by its own intensity towards its own variance."""
    from lightning_uq.functional.shrinkage import oas_intensity

    statistics = ClassStatistics(8, features.shape[1])
    statistics.update(features, labels)
    fit = fit_gaussian(statistics)
    whitening, log_det = [], []
    for scatter, count in zip(statistics.scatter, statistics.count, strict=True):
        S = scatter / (count - 1)
        r = oas_intensity(S, float(count - 1))
        S = (1 - r) * S + r * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
        whitening.append(torch.linalg.inv(torch.linalg.cholesky(S)))
        log_det.append(torch.logdet(S))
    return GaussianDensity(fit._replace(whitening=torch.stack(whitening), log_det=torch.stack(log_det)))
