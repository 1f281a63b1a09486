"""``export_fitted``: a graph leaves only if it gives what the module gives."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq import (
    ConformalIntervals,
    ConformalSets,
    DeterministicModule,
    Factory,
    FitGMM,
    QuantileRecalibration,
    TemperatureScaling,
    export_fitted,
    load_fitted,
    save_fitted,
)
from lightning_uq.errors import InputError, NotFiniteError, UnsupportedError
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.fitted_predictor import FittedChange, FittedPredictor
from lightning_uq.networks.graph_files import read_graph
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.tasks import Regression
from tests.trainers import quiet_trainer

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("suffix", [".pt2", ".onnx"])


def network():
    torch.manual_seed(0)
    return EnsembleNetwork([nn.Linear(4, 3), nn.Linear(4, 3)])


@BOTH
@pytest.mark.parametrize("num", [1, 6])
def test_any_number_of_rows_from_any_example(suffix, num, tmp_path, capfd):
    fitted, path = FittedNetwork(network(), temperature=torch.tensor(2.0)), tmp_path / f"model{suffix}"
    export_fitted(fitted, path, X[:num])
    assert capfd.readouterr() == ("", "")
    graph = read_graph(path)
    for size in (1, 2, 5):
        torch.testing.assert_close(graph(X[:size]), fitted(X[:size]))
    assert list(tmp_path.iterdir()) == [path]
    assert fitted.nonfinite == "error"
    assert (graph.info.inputs, graph.info.outputs, graph.info.result) == (["x"], ["probs"], "classes")


class LooksUp(nn.Module):
    """Its last column is a category, for which NaN is an index out of range."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return (self.linear(x[:, :3]) + self.table(x[:, 3].long())).unsqueeze(0)


@BOTH
@pytest.mark.parametrize("kind", ["network", "predictor"])
def test_a_missing_category_spoils_its_row_alone(suffix, kind, tmp_path):
    inner = LooksUp()
    fitted = (
        FittedNetwork(inner, nonfinite="inf")
        if kind == "network"
        else FittedPredictor(inner, CategoricalPrediction, [], nonfinite="inf")
    )
    x = torch.cat([X[:, :3], torch.arange(6.0)[:, None] % 5], 1)
    expected = fitted(x)["probs"]
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    expected[1:3] = torch.nan
    export_fitted(fitted, tmp_path / f"model{suffix}", x[:1])
    for found in (fitted(x), read_graph(tmp_path / f"model{suffix}")(x)):
        torch.testing.assert_close(found["probs"], expected, equal_nan=True)


def trained(module, callbacks, folder, batches):
    best = ModelCheckpoint(folder, monitor="val_loss")
    trainer = quiet_trainer(folder, callbacks=[*callbacks, best], enable_checkpointing=True)
    trainer.fit(module, batches, batches)
    return callbacks[-1].uq_ckpt_path


@pytest.mark.filterwarnings("ignore:.*reads the training data")
def test_a_regressor_keeps_the_name_of_its_mean(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    factory = Factory("lightning_uq.networks.MLP", {"in_features": 4, "out_features": 1, "hidden_sizes": [5]})
    module = DeterministicModule(factory, task=Regression(head="mean"))
    rows = torch.utils.data.TensorDataset(X.repeat(9, 1), X.repeat(9, 1)[:, :1])
    path = trained(module, [ConformalIntervals()], tmp_path / "c", DataLoader(rows, 18))
    fitted = load_fitted(path)
    export_fitted(fitted, tmp_path / "m.onnx", X)
    names = [one.name for one in onnxruntime.InferenceSession(tmp_path / "m.onnx").get_outputs()]
    assert names == fitted.output_names
    assert names[0] == "prediction_mean"
    (entry,) = [one for one in onnx.load(tmp_path / "m.onnx").metadata_props if one.key == "lightning_uq"]
    info = json.loads(entry.value)
    assert info["renamed"] == {"prediction_mean": "mean"}
    assert info["outputs"] == list(fitted(X))
    assert info["version"]
    export_fitted(fitted, tmp_path / "m.pt2", X)
    extra = {"lightning_uq.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert json.loads(extra["lightning_uq.json"]) == info | {"renamed": {}}
    for file in ("m.onnx", "m.pt2"):
        torch.testing.assert_close(read_graph(tmp_path / file)(X), fitted(X))


@BOTH
@pytest.mark.parametrize("options", [{"method": "aps", "randomized": True}, {"method": "raps", "k_reg": 1}], ids=str)
def test_adaptive_sets(suffix, options, tmp_path):
    rows = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    model = network().members[0]
    labels = torch.distributions.Categorical(logits=model(rows)).sample()
    sets = ConformalSets(alpha=0.2, **options).fit(model, [(rows, labels)])
    save_fitted(tmp_path / "m-uq.ckpt", model, [sets])
    fitted = load_fitted(tmp_path / "m-uq.ckpt", model)
    export_fitted(fitted, tmp_path / f"m{suffix}", rows[:5])
    found = read_graph(tmp_path / f"m{suffix}")(rows)["prediction_set"]
    assert (found == fitted(rows)["prediction_set"]).double().mean() > 0.99
    assert 1 < found.sum(1).double().mean() < 3


@BOTH
@pytest.mark.parametrize(
    "make", [QuantileRecalibration, lambda **options: ConformalIntervals(method="cqr", alpha=0.3, **options)]
)
@pytest.mark.filterwarnings("ignore:.*of the targets of QuantileRecalibration lie where")
def test_quantiles_keep_their_names(suffix, make, tmp_path):
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    task = Regression(head="quantiles", levels=(0.05, 0.5, 0.95))
    fitted_to = 2 * rows[:, :1] + torch.randn(200, 1)
    save_fitted(tmp_path / "m-uq.ckpt", model, [make(task=task).fit(model, [(rows, fitted_to)])])
    fitted = load_fitted(tmp_path / "m-uq.ckpt", model)
    with pytest.raises(InputError, match="names of quantiles are unknown before the first call"):
        torch.export.export(fitted, (rows,), strict=False)
    export_fitted(fitted, tmp_path / f"m{suffix}", rows[:5])
    found, expected = read_graph(tmp_path / f"m{suffix}")(rows), fitted(rows)
    assert list(found) == list(expected)
    assert {"quantile_0.05", "quantile_0.95"} <= found.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TwoInputs(LightningModule):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, wide, narrow):
        return self.last(torch.relu(self.one(wide) + self.two(narrow)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(**batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@BOTH
@pytest.mark.filterwarnings("ignore:.*reads the training data", "ignore:.*no finite positive temperature")
def test_a_mapping(suffix, tmp_path):
    inputs = {"wide": X, "narrow": X[:, :2]}
    module, path = TwoInputs(), tmp_path / f"model{suffix}"
    rows = [({"wide": x, "narrow": x[:2]}, i % 3) for i, x in enumerate(X.repeat(20, 1))]
    file = trained(
        module, [FitGMM(feature_transform="raw"), TemperatureScaling()], tmp_path / "c", DataLoader(rows, 30)
    )
    fitted = load_fitted(file, TwoInputs())
    export_fitted(fitted, path, inputs)
    graph = read_graph(path)
    assert graph.info.inputs == ["wide", "narrow"]
    torch.testing.assert_close(graph(X[:2], X[:2, :2]), fitted({key: x[:2] for key, x in inputs.items()}))


class OfTuple(nn.Module):
    def forward(self, x):
        return (x[0] + x[1]).unsqueeze(0)


@BOTH
def test_a_tuple(suffix, tmp_path):
    fitted = FittedNetwork(OfTuple())
    export_fitted(fitted, tmp_path / f"m{suffix}", (X, 2 * X))
    graph = read_graph(tmp_path / f"m{suffix}")
    torch.testing.assert_close(graph(X, X), fitted((X, X)))


class Liar(FittedNetwork):
    """Its graph differs from what it gives."""

    lie: str = ""

    def forward(self, x):
        found = super().forward(x)
        if not torch.compiler.is_compiling():
            return {"probs": found["probs"] + 0.1} if self.lie == "one row" and len(x) == 1 else found
        probs = found["probs"]
        return {
            "scale": {"probs": probs * 1.01},
            "nan": {"probs": probs.nan_to_num()},
            "name": {"probabilities": probs},
            "dtype": {"probs": probs.double()},
            "one row": {"probs": probs},
            "six rows": {"probs": probs.softmax(0)},
        }[self.lie]


@BOTH
@pytest.mark.parametrize("lie", ["scale", "nan", "dtype", "one row", "six rows"])
def test_another_graph_is_refused(suffix, lie, tmp_path):
    fitted, path = Liar(network()), tmp_path / f"model{suffix}"
    fitted.lie = lie
    path.write_text("before")
    with pytest.raises(UnsupportedError, match="returns another `probs` than the module|cannot be exported"):
        export_fitted(fitted, path, X)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_other_names_are_refused(tmp_path):
    fitted = Liar(network())
    fitted.lie = "name"
    with pytest.raises(UnsupportedError, match=r"returns \['probabilities'\], but the module returns \['probs'\]"):
        export_fitted(fitted, tmp_path / "m.pt2", X)


class Rounding(nn.Module):
    """Its graph rounds the last digit otherwise."""

    def forward(self, x):
        return (x[:, :3] * (1 + 2e-7 * torch.compiler.is_compiling())).unsqueeze(0)


def test_a_score_at_the_threshold_may_fall_on_either_side(tmp_path):
    threshold = CategoricalPrediction(X[:, :3].unsqueeze(0)).probs[0, 0]

    def change(far, prediction):
        return prediction.replace(prediction_set=prediction.probs >= threshold + far)

    fitted = FittedPredictor(Rounding(), CategoricalPrediction, [FittedChange(lambda p: change(0.0, p))])
    export_fitted(fitted, tmp_path / "m.pt2", X)

    def other(prediction):
        return change(0.2 if torch.compiler.is_compiling() else 0.0, prediction)

    fitted = FittedPredictor(Rounding(), CategoricalPrediction, [FittedChange(other)])
    with pytest.raises(UnsupportedError, match="other `prediction_set`"):
        export_fitted(fitted, tmp_path / "n.pt2", X)


class Branch(nn.Module):
    def forward(self, x):
        return (x if x.sum() > 0 else -x).unsqueeze(0)


@BOTH
def test_a_module_that_is_no_graph(suffix, tmp_path):
    with pytest.raises(UnsupportedError, match=f"This module cannot be exported as {suffix}: "):
        export_fitted(FittedNetwork(Branch()), tmp_path / f"m{suffix}", X)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    fitted, path = FittedNetwork(network()), tmp_path / "m.pt2"
    with pytest.raises(InputError, match="`fitted` must be a module from `load_fitted`, but its type is Linear"):
        export_fitted(nn.Linear(1, 1), path, X)
    with pytest.raises(InputError, match=r"`path` must end in .pt2 or .onnx, but it is .*m\.pth"):
        export_fitted(fitted, tmp_path / "m.pth", X)
    with pytest.raises(InputError, match="but it is ndarray"):
        export_fitted(fitted, path, X.numpy())
    with pytest.raises(InputError, match="but it holds Tensor, list"):
        export_fitted(fitted, path, {"a": X, "b": [X]})
    with pytest.raises(InputError, match=r"same number of rows, at least one, but they have \[2, 6\]"):
        export_fitted(fitted, path, (X, X[:2]))
    with pytest.raises(NotFiniteError, match="must be finite"):
        export_fitted(fitted, path, X * torch.nan)
    assert not list(tmp_path.iterdir())
