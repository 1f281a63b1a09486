"""A row that holds NaN or infinity never passes as a confident answer."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    DeterministicModule,
    EnsembleModule,
    FitGMM,
    FitKNN,
    FitViM,
    InputError,
    OODDetection,
    TemperatureScaling,
    load_fitted,
)
from lightning_uq.errors import NotFiniteError
from lightning_uq.functional.ood_features import fit_vim, knn_distance, vim_score
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.running.finite import check_numbers
from lightning_uq.tasks import Classification, PixelRegression, Regression
from tests.versions import ONNX_EXPORT, skip_on_torch_2_6

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
BAD = X[:8].clone()
BAD[2, 1], BAD[5, 0], BAD[6, 3] = math.nan, math.inf, -math.inf
ROWS = torch.tensor([False, False, True, False, False, True, True, False])
LOADER, BAD_LOADER = DataLoader(TensorDataset(X, Y), batch_size=20), DataLoader(TensorDataset(BAD, Y[:8]), batch_size=8)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


SCORERS = {
    "gmm": FitGMM,
    "mahalanobis": lambda **kw: FitGMM(covariance="tied", score="mahalanobis", **kw),
    "relative": lambda **kw: FitGMM(covariance="tied", score="relative_mahalanobis", **kw),
    "knn": lambda **kw: FitKNN(k=3, **kw),
    "vim": FitViM,
}


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_finite_outputs_whose_sum_overflows_are_a_prediction(value):
    outputs = torch.full((2, 4, 3), value)
    outputs[..., 0] = 0.0
    assert not outputs.sum().isfinite()
    check_numbers(outputs, Classification())
    check_numbers(outputs, Regression(head="mean"))


def test_an_excluded_class_is_a_prediction_but_nan_beside_it_is_not():
    outputs = torch.zeros(2, 4, 3)
    outputs[:, 1, 2] = -math.inf
    check_numbers(outputs, Classification())
    with pytest.raises(NotFiniteError, match="1 of 4 rows hold NaN or infinity"):
        check_numbers(outputs, Regression(head="mean"))
    outputs[0, 3, 0] = math.nan
    with pytest.raises(NotFiniteError, match="1 of 4 rows hold NaN or infinity"):
        check_numbers(outputs, Classification())


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_of_a_row_with_nan_is_an_error_or_infinite(name):
    module = Lit().eval()
    with pytest.raises(NotFiniteError, match="input must be finite, but 3 of 8 rows of batch 0 hold NaN or infinity"):
        SCORERS[name]().fit(module, LOADER).score(module, BAD_LOADER)
    scorer = SCORERS[name](nonfinite="inf").fit(module, LOADER)
    scores = scorer.score(module, BAD_LOADER)
    assert torch.equal(scores == math.inf, ROWS)
    clean = scorer.score(module, [(X[:8], Y[:8])])
    torch.testing.assert_close(scores[~ROWS], clean[~ROWS])


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, 3e38])
def test_features_that_overflow_score_infinity_or_more_than_any_other(name, value):
    class Overflowing(Lit):
        def forward(self, x):
            h = self.net[:3](x)
            return self.net[3](torch.where(x[:, :1] > 50, value, h))

    module = Overflowing().eval()
    scorer = SCORERS[name](feature_layer="net.3").fit(module, LOADER)
    far = X[:8].clone()
    far[2, 0] = 100.0
    scores = scorer.score(module, [(far, Y[:8])])
    assert not scores.isnan().any()
    assert scores[2] > scorer.score(module, LOADER).max() * 100 or scores[2] == math.inf


def test_features_that_overflow_in_half_precision():
    class Huge(Lit):
        def forward(self, x):
            return self.net[3](self.net[:3](x) * torch.where(x[:, :1] > 50, 1e30, 1.0).to(x.dtype) ** 2)

    module = Huge().to(torch.bfloat16).eval()
    far = X[:8].clone()
    far[2, 0] = 100.0
    for name, scorer in SCORERS.items():
        scores = scorer(feature_layer="net.3").fit(module, LOADER).score(module, [(far, Y[:8])])
        assert scores[2] == math.inf, name
        assert scores[torch.arange(8) != 2].isfinite().all(), name


def test_functions_of_features_score_infinity():
    features = torch.randn(40, 4)
    bad = features[:4].clone()
    bad[1, 0], bad[2, 0], bad[3, 0] = math.nan, math.inf, -math.inf
    density = GaussianDensity.fit_features(features, torch.arange(40) % 2)
    assert torch.equal(density.score(bad).isinf(), torch.tensor([False, True, True, True]))
    assert torch.equal(density.log_density(bad) == -math.inf, torch.tensor([False, True, True, True]))
    assert torch.equal(knn_distance(bad, features, k=2).isinf(), torch.tensor([False, True, True, True]))
    weight = torch.randn(3, 4)
    fit = fit_vim(features, features @ weight.T, weight, None, dim=2)
    logits = bad @ weight.T
    logits[0, 1] = math.inf  # the energy alone would make it the surest of all
    assert torch.equal(vim_score(bad, logits, fit) == math.inf, torch.tensor([True] * 4))


def fitted(make_trainer, tmp_path, module, **options):
    callbacks = [FitGMM(**options), TemperatureScaling(**options), ModelCheckpoint(tmp_path, monitor="val_loss")]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, LOADER, LOADER)
    return trainer, callbacks[1].uq_ckpt_path


def test_an_unmodified_module_with_attached_callbacks(make_trainer, tmp_path):
    module = Lit()
    trainer, _ = fitted(make_trainer, tmp_path, module, attach=True)
    with pytest.raises(NotFiniteError, match="3 of 8 rows of batch 0"):
        trainer.predict(module, BAD_LOADER)
    module = Lit()
    trainer, _ = fitted(make_trainer, tmp_path / "b", module, attach=True, nonfinite="inf")
    (found,) = trainer.predict(module, BAD_LOADER)
    (clean,) = trainer.predict(module, DataLoader(TensorDataset(X[:8], Y[:8]), batch_size=8))
    assert_alarming(found, clean)


def assert_alarming(found, clean):
    assert torch.equal(found.probs.isnan().all(1), ROWS)
    assert torch.equal(found.log_density == -math.inf, ROWS)
    torch.testing.assert_close(found.probs[~ROWS], clean.probs[~ROWS])
    torch.testing.assert_close(found.log_density[~ROWS], clean.log_density[~ROWS])
    for name in (*found.score_names, "log_density"):
        assert torch.equal(found.score(name) == math.inf, ROWS), name
        assert (found.score(name) > 1e9)[ROWS].all()


def test_our_own_modules(make_trainer, tmp_path):
    for module in (DeterministicModule(network()), EnsembleModule(Lit, num_members=2, seed=0)):
        trainer, _ = fitted(make_trainer, tmp_path / type(module).__name__, module)
        with pytest.raises(NotFiniteError, match="input must be finite, but 3 of 8 rows"):
            module.predict(BAD)
        with pytest.raises(NotFiniteError, match="input must be finite, but 3 of 8 rows of batch 0"):
            trainer.predict(module, BAD_LOADER)
        clean = module.predict(X[:8])
        module.nonfinite = "inf"
        assert_alarming(module.predict(BAD), clean)
        (found,) = trainer.predict(module, BAD_LOADER)
        assert_alarming(found, clean)


MAPS = {
    "classes": (CategoricalPrediction, torch.randn(2, 3, 4, 5, 6)),
    "numbers": (lambda x: PixelRegression(head="mean").predict(x), torch.randn(2, 3, 2, 5, 6)),
    "quantiles": (lambda x: PixelRegression(head="quantiles").predict(x), torch.randn(2, 3, 6, 5, 6)),
    "mixtures": (lambda x: PixelRegression(head="mixture", components=2).predict(x), torch.randn(2, 3, 12, 5, 6)),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("pool", [False, True])
def test_a_map_alarms_at_the_position_alone(kind, pool):
    predict, outputs = MAPS[kind]
    outputs = outputs.clone()
    outputs[1, 2, 0, 3, 4] = math.nan
    prediction = predict(outputs).pool() if pool else predict(outputs)
    where = torch.zeros(3, 5, 6, dtype=torch.bool)
    where[2, 3, 4] = True
    for name in prediction.score_names:
        assert torch.equal(prediction.score(name).isinf(), where), name


def test_a_network_that_hides_nan_does_not_hide_it_from_us():
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x.nan_to_num(0.0, 0.0, 0.0))

    module = DeterministicModule(Hiding()).eval()
    with pytest.raises(NotFiniteError):
        module.predict(BAD)
    module.nonfinite = "inf"
    assert torch.equal(module.predict(BAD).probs.isnan().all(1), ROWS)


@pytest.mark.parametrize("build", [Lit, lambda: DeterministicModule(network())])
def test_a_fitted_network_and_its_exported_graph(make_trainer, tmp_path, build):
    module = build()
    _, path = fitted(make_trainer, tmp_path, module)
    network = load_fitted(path, module)
    expected = network(X[:8])
    with pytest.raises(NotFiniteError, match="3 of 8 rows hold NaN or infinity. Pass `nonfinite='inf'`"):
        network(BAD)
    lenient = load_fitted(path, module, nonfinite="inf")
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(network, (X[:8],), dynamic_shapes=batch, strict=False).module()
    compiled = torch.compile(lenient, backend="aot_eager")
    for run in (lenient, exported, compiled):
        found = run(BAD)
        assert torch.equal(found["probs"].isnan().all(1), ROWS)
        assert torch.equal(found["log_density"] == -math.inf, ROWS)
        assert torch.equal(found["ood_score"] == math.inf, ROWS)
        for name, values in found.items():
            torch.testing.assert_close(values[~ROWS], expected[name][~ROWS])
    torch.compiler.reset()


def test_an_onnx_graph(make_trainer, tmp_path):
    skip_on_torch_2_6(ONNX_EXPORT)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Lit()
    _, path = fitted(make_trainer, tmp_path, module)
    network = load_fitted(path, module)
    torch.onnx.export(
        network,
        (X[:8],),
        tmp_path / "a.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("b")},),
        output_names=network.output_names,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    probs, score = (
        torch.from_numpy(out)
        for out in session.run(["probs", "ood_score"], {session.get_inputs()[0].name: BAD.numpy()})
    )
    assert torch.equal(probs.isnan().all(1), ROWS)
    assert torch.equal(score == math.inf, ROWS)
    torch.testing.assert_close(probs[~ROWS], network(X[:8])["probs"][~ROWS], atol=1e-5, rtol=1e-4)


def test_outputs_that_overflow_inside_are_no_confident_energy(make_trainer):
    class Infinite(Lit):
        def forward(self, x):
            return self.net(x).masked_fill(x[:, :1] > 50, math.inf)

    far = DataLoader(TensorDataset(100 + X[:8].abs(), Y[:8]), batch_size=8)
    with pytest.raises(InputError, match="Score 'energy' is NaN for 8 of 8"):
        OODDetection(scores="energy").score(Infinite().eval(), far)


def test_an_unknown_choice():
    with pytest.raises(InputError, match="`nonfinite` must be"):
        FitGMM(nonfinite="ignore")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FitGMM(attach=True), TemperatureScaling(output=lambda out: 3 * out, attach=True)),
        (FitGMM(attach=True, nonfinite="inf"), TemperatureScaling(attach=True)),
    ],
    ids=["output", "nonfinite"],
)
def test_attached_callbacks_that_read_a_model_differently_are_refused(make_trainer, first, second):
    """One prediction is made of both: the second would be applied to what the first one reads."""
    module, trainer = Lit(), make_trainer(max_epochs=1, callbacks=[first, second])
    with pytest.raises(InputError, match="build predictions of Lit together, but their `(output|nonfinite)` differs"):
        trainer.fit(module, LOADER, LOADER)
    assert trainer.global_step == 0
