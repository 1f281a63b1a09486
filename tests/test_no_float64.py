"""All that computes in float64 elsewhere also runs on a device without it, in float32."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_uq as uq
from lightning_uq import functional
from lightning_uq.functional import precision
from lightning_uq.functional.data_noise import member_target_noise
from lightning_uq.functional.isotonic import fit_isotonic
from lightning_uq.functional.matrix_scaling import fit_matrix_scaling
from lightning_uq.functional.quantile_recalibration import fit_recalibration
from lightning_uq.functional.temperature import fit_ensemble_temperature, fit_temperature
from lightning_uq.functional.variance_scaling import fit_stretch
from lightning_uq.functional.vector_scaling import fit_vector_scaling
from lightning_uq.metrics import (
    AUSE,
    CRPS,
    OODAUROC,
    RMSE,
    ExpectedCalibrationError,
    IntervalCoverage,
    IntervalScore,
    NegativeLogLikelihood,
    PITHistogram,
    QuantileCalibrationError,
)
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.networks.epinet.feature_scaler import FeatureScaler
from lightning_uq.networks.priors.scale import PriorScale
from lightning_uq.report import score_histogram
from lightning_uq.running import row_sample
from tests.no_float64 import device_without_float64

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
ONE = torch.ones(2, 4, 1)
TARGET = torch.linspace(-1, 2, 4).unsqueeze(1)


def _move(tensor):
    """What ``.to("mps")`` does to a tensor."""
    if tensor.dtype == torch.float64:
        raise TypeError("no float64")
    return tensor


MOVED_DENSITY = GaussianDensity.fit_features(X, Y % 2, covariance="tied")._apply(_move)


def metric(kind, *batch, **options):
    value = kind(**options)
    value._apply(_move)
    value.update(*batch)
    return value.compute()


def metric_interval(a, b):
    rows = functional.SeedRows([torch.arange(8)] * 3)
    found = [
        functional.resample_metric(functional.weighted_rmse, [{"squared_error": x} for x in losses.square().T], rows)
        for losses in (a, b)
    ]
    return functional.metric_difference(*found)


PREDICTIONS = {
    "dirichlet": lambda: uq.DirichletPrediction(1 + torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(1))),
    "gaussian_mixture": lambda: uq.GaussianMixturePrediction(ONE.cumsum(0), ONE),
    "student_t": lambda: uq.StudentTPrediction(ONE.cumsum(0), ONE, 3 * ONE, ONE),
    "student_t_mixture": lambda: uq.StudentTMixturePrediction(ONE.cumsum(0), ONE, 3 * ONE),
    "mixture_density": lambda: uq.MixtureDensityPrediction(
        *[torch.stack([part, 2 * part], -1) for part in (ONE, ONE.cumsum(0), ONE)]
    ),
    "points": lambda: uq.PointPrediction(ONE.cumsum(0)),
}
KNOTS = torch.tensor([[[0.0, 0.3, 1.0]], [[0.0, 0.5, 1.0]]])
RECALIBRATED = {
    "log_prob": lambda p: p.log_prob(TARGET),
    "crps": lambda p: p.crps(TARGET),
    "variance": lambda p: p.variance,
    "quantile": lambda p: p.quantile(0.3),
}
CALLS = {
    **{
        f"dirichlet_{name}": lambda name=name: PREDICTIONS["dirichlet"]().score(name)
        for name in uq.DirichletPrediction.score_names
    },
    **{
        f"{kind}_{name}": lambda kind=kind, name=name: getattr(PREDICTIONS[kind](), name)(TARGET)
        for kind in ("gaussian_mixture", "student_t", "student_t_mixture", "mixture_density")
        for name in ("log_prob", "cdf", "crps")
    },
    **{
        f"recalibrated_{kind}_{name}": lambda kind=kind, read=read: read(PREDICTIONS[kind]().recalibrated(KNOTS))
        for kind in ("gaussian_mixture", "student_t", "student_t_mixture", "mixture_density")
        for name, read in RECALIBRATED.items()
    },
    "scaled": lambda: PREDICTIONS["gaussian_mixture"]().scaled(torch.full((1,), 4.0)).variance,
    "variance_scale": lambda: fit_stretch(*uq.GaussianMixturePrediction(ONE[:1], ONE[:1]).scaling_rows(TARGET)),
    "recalibration": lambda: fit_recalibration(torch.linspace(0.1, 0.9, 50)[:, None].square()),
    "points_crps": lambda: PREDICTIONS["points"]().crps(TARGET),
    "mixture_density_interval": lambda: torch.stack(PREDICTIONS["mixture_density"]().interval(0.9)),
    "gaussian_mixture_interval": lambda: torch.stack(PREDICTIONS["gaussian_mixture"]().interval(0.9)),
    "student_t_interval": lambda: torch.stack(PREDICTIONS["student_t"]().interval(0.9)),
    **{
        f"density_{name}": lambda name=name: getattr(MOVED_DENSITY, name)(X)
        for name in ("log_prob", "log_density", "mahalanobis", "relative_mahalanobis")
    },
    "metric_nll": lambda: metric(NegativeLogLikelihood, X.softmax(1), Y),
    "metric_ece": lambda: metric(ExpectedCalibrationError, X.softmax(1), Y),
    "metric_auroc": lambda: metric(OODAUROC, X[:, 0], Y > 0),
    "metric_crps": lambda: metric(CRPS, (ONE, ONE), TARGET),
    "metric_rmse": lambda: metric(RMSE, (ONE, ONE), TARGET),
    "metric_coverage": lambda: metric(IntervalCoverage, (ONE, ONE), TARGET),
    "metric_quantiles": lambda: metric(QuantileCalibrationError, (ONE, ONE), TARGET, num_levels=9),
    "metric_interval_score": lambda: metric(IntervalScore, (ONE, ONE), TARGET),
    "metric_pit": lambda: metric(PITHistogram, (ONE, ONE), TARGET),
    "metric_ause": lambda: metric(AUSE, (ONE, ONE.cumsum(1)), TARGET),
    "temperature": lambda: fit_temperature(X, Y),
    "temperature_grid": lambda: fit_temperature(X, Y, method="grid"),
    "ensemble_temperature": lambda: fit_ensemble_temperature(torch.stack([X, 2 * X]), Y),
    "vector_scaling": lambda: torch.stack(fit_vector_scaling(X.repeat(20, 1), Y.repeat(20))[:2]),
    "matrix_scaling": lambda: fit_matrix_scaling(X.repeat(20, 1), Y.repeat(20)).class_matrix,
    "isotonic": lambda: fit_isotonic(X.repeat(20, 1), Y.repeat(20)),
    "bootstrap_poisson": lambda: functional.bootstrap_weights(torch.arange(9), 3, 0, "poisson"),
    "bootstrap_exponential": lambda: functional.bootstrap_weights(torch.arange(9), 3, 0, "exponential"),
    "member_noise": lambda: member_target_noise(torch.arange(9), 3, 0.1),
    "clustered": lambda: functional.clustered_log_likelihood(
        torch.stack([X, 2 * X]),
        Y.reshape(2, 4),
        functional.random_projection(4, 3, generator=torch.Generator().manual_seed(0)),
    ),
    "vim": lambda: functional.vim_score(X, X, functional.fit_vim(X, X, torch.eye(3), None, 1)),
    "joint_nll": lambda: functional.joint_log_likelihood(
        functional.true_class_log_probs(torch.stack([X, 2 * X]), Y)[..., None]
    ),
    "linear_hypermodel_kl": lambda: functional.linear_hypermodel_kl(X[:2], X[0]),
    "conformal_quantile": lambda: functional.conformal_quantile(X, 0.3),
    "group_quantiles": lambda: functional.group_quantiles(X[:, 0], Y % 2, 2, 0.4),
    "weighted_conformal_quantile": lambda: functional.weighted_conformal_quantile(
        X[:, 0], X.exp()[:, 1], X.exp()[:2, 2], 0.3
    ),
    "lac_scores": lambda: functional.lac_scores(X),
    "raps_scores": lambda: functional.raps_scores(X, 0.1, 1, torch.linspace(0, 1, 8)),
    "conformal_interval": lambda: torch.stack(functional.conformal_interval(X, X, 0.5, X.exp())),
    "interval_excess": lambda: functional.interval_excess(X, X, -X, X.exp()),
    "conformal_sets": lambda: (
        uq.ConformalSets(alpha=0.3, method="aps", randomized=True)
        .fit_predictions(uq.CategoricalPrediction(X[None]), Y)
        .change(uq.CategoricalPrediction(X[None]))
        .set_size.float()
    ),
    "conformal_intervals": lambda: torch.stack(
        uq.ConformalIntervals(alpha=0.4, method="normalized")
        .fit_predictions(PREDICTIONS["gaussian_mixture"](), TARGET)
        .intervals(PREDICTIONS["gaussian_mixture"]())
    ),
    "false_negative_threshold": lambda: functional.false_negative_threshold(X, X > 0, 0.4),
    "risk_threshold": lambda: functional.risk_threshold(
        X.sigmoid().sort(1, descending=True).values, torch.arange(3.0), 0.7
    ),
    "selective_threshold": lambda: functional.selective_threshold(X[:, 0], Y == 0, 0.9, 0.5, 1),
    "paired_difference": lambda: torch.tensor(functional.paired_difference(X, X.square()).upper),
    "metric_difference": lambda: torch.tensor(metric_interval(X, X.square()).upper),
    "weighted_metrics": lambda: torch.cat(
        [
            functional.weighted_mean(X[:, 0], X.exp().T),
            functional.weighted_ece(X[:, 0].sigmoid(), Y > 0, X.exp().T),
            functional.weighted_average_precision(X[:, 0], Y > 0, X.exp().T),
            functional.weighted_fpr_at_tpr(X[:, 0], Y > 0, X.exp().T),
        ]
    ),
    "feature_scaler": lambda: FeatureScaler(3)(X),
    "prior_scale": lambda: PriorScale(1.0).measure(torch.stack([X, 2 * X])),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_results_on_a_device_without_float64_are_those_of_float32(call, monkeypatch):
    expected = call()
    with device_without_float64(monkeypatch):
        value = call()
    if expected is not None:
        torch.testing.assert_close(value.double(), expected.double(), rtol=2e-4, atol=2e-5)


def test_modules_train_and_predict_on_a_device_without_float64(monkeypatch):
    with device_without_float64(monkeypatch):
        assert uq.EvidentialModule(nn.Linear(2, 2)).predict(torch.zeros(3, 2)).probs.shape == (3, 2)
        network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        epinet = uq.EpinetModule(network).train()
        assert epinet.training_loss(X, Y, None).isfinite()


def test_logits_move_to_a_device_without_float64_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "DEVICES_WITHOUT_FLOAT64", frozenset({"meta"}))
    gathered = []

    def gather(rows, trainer):
        gathered.append(rows)
        return torch.tensor([[1, 3]])

    monkeypatch.setattr(row_sample, "gather_rows", gather)
    monkeypatch.setattr(row_sample, "first_of_ranks", lambda own, trainer: own)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("meta")))
    sample = row_sample.RowSample(None)
    sample.add(row_sample.row_keys(torch.arange(len(X))), X[:, None].double(), Y)
    sample.gather(trainer, "The test")
    assert [(rows.dtype, rows.device.type) for rows in gathered[-2:]] == [
        (torch.float32, "meta"),
        (torch.int64, "meta"),
    ]


def test_scores_are_drawn_on_a_device_without_float64(monkeypatch):
    with device_without_float64(monkeypatch):
        assert score_histogram(X[:, 0], X[:, 1], score="predictive_entropy").axes


def test_a_density_that_was_moved_loads_a_float64_state(monkeypatch):
    density = GaussianDensity.fit_features(X, Y % 2)
    empty = GaussianDensity()._apply(_move)
    monkeypatch.setattr(precision, "DEVICES_WITHOUT_FLOAT64", frozenset({"cpu"}))
    empty.load_state_dict(density.state_dict())
    assert {buffer.dtype for buffer in empty.buffers()} == {torch.float32}
    torch.testing.assert_close(empty(X), density(X).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*fewer than 20 per class", "ignore:.*no finite positive temperature")
@pytest.mark.parametrize(
    "callback",
    [
        uq.TemperatureScaling(),
        uq.VectorScaling(),
        uq.MatrixScaling(),
        uq.IsotonicScaling(),
        uq.FitKNN(feature_layer="2", k=2),
        uq.FitViM(feature_layer="2", dim=2),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_fit_on_a_device_without_float64(callback, monkeypatch):
    network = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))
    batches = [(X.repeat(8, 1), Y.repeat(8))]
    with device_without_float64(monkeypatch):
        callback.fit(network, batches)
    assert callback.fitted


@pytest.mark.parametrize("make", [lambda: uq.FitKNN(k=2), lambda: uq.FitViM(dim=2)], ids=["knn", "vim"])
def test_predictions_on_a_device_without_float64_carry_the_score(make, monkeypatch):
    network, batches = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)), [(X.repeat(8, 1), Y.repeat(8))]
    module = uq.DeterministicModule(network)
    expected = make().fit(module, batches).score(module, [X])
    with device_without_float64(monkeypatch):
        callback = make().fit(module, batches)
        found, scores = module.predict(X).ood_score, callback.score(module, [X])
    assert found.dtype == scores.dtype == torch.float32
    assert {buffer.dtype for buffer in callback.scorer._apply(_move).buffers()} == {
        torch.float64
    }  # they stay on the CPU
    torch.testing.assert_close(found, scores)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_laplace_on_a_device_without_float64(task, monkeypatch):
    network = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))
    target = Y if task == "classification" else X
    given = {"feature_layer": "2", "held_out": [(X.repeat(8, 1), target.repeat(8, *[1] * (target.ndim - 1)))]}
    given["task"] = uq.Regression(head="mean") if task == "regression" else None
    expected = uq.FitLaplace(**given).fit(network, given["held_out"])
    with device_without_float64(monkeypatch):
        laplace = uq.FitLaplace(**given).fit(network, given["held_out"])
        found, score = laplace.predict(network, X), laplace.score(network, [X])
    tensor = "probs" if task == "classification" else "variance"
    torch.testing.assert_close(
        getattr(found, tensor), getattr(expected.predict(network, X), tensor), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(score.double(), expected.score(network, [X]), rtol=1e-3, atol=1e-4)
