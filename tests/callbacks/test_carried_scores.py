"""The scores of FitKNN and FitViM in predictions, in modules from ``load_fitted`` and in exported graphs."""

import copy
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    ConformalSets,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    FitGMM,
    FitKNN,
    FitViM,
    PredictionWriter,
    Regression,
    Segmentation,
    TemperatureScaling,
    load_fitted,
    read_predictions,
)
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.fitted_predictor import FittedPredictor
from tests.callbacks.test_map_densities import Tokens
from tests.versions import ONNX_EXPORT, skip_on_torch_2_6

GENERATOR = torch.Generator().manual_seed(0)
X, VAL_X, TEST_X = (torch.randn(n, 4, generator=GENERATOR) for n in (60, 41, 13))
Y, VAL_Y = ((x[:, 0] > 0).long() for x in (X, VAL_X))
BAD = TEST_X.clone()
BAD[3, 1], BAD[5, 0] = math.nan, math.inf
ROWS = (torch.arange(len(BAD)) == 3) | (torch.arange(len(BAD)) == 5)
MAKE = {
    "knn": lambda **kwargs: FitKNN(k=3, **kwargs),
    "knn combined": lambda **kwargs: FitKNN(k=3, feature_transform="combined", held_out=[VAL_X], **kwargs),
    "vim": lambda **kwargs: FitViM(dim=2, **kwargs),
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
pytestmark = pytest.mark.filterwarnings("ignore:.*no finite positive temperature", "ignore:.*negative in the mean")


def network(outputs=2):
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, outputs))


MODULES = {
    "deterministic": lambda: DeterministicModule(network()),
    "ensemble": lambda: EnsembleModule(network, num_members=3, seed=0),
    "dropout": lambda: DropoutModule(network(), num_eval_samples=4),
}


class UsersModule(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=16)


TEST = DataLoader(TensorDataset(TEST_X), batch_size=5)


@pytest.fixture
def trained(make_trainer, tmp_path):
    """A module that was trained with callbacks, and their file."""

    def run(module, *callbacks, data=(X, Y), val=(VAL_X, VAL_Y)):
        checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
        trainer = make_trainer(callbacks=[*callbacks, checkpoint], enable_checkpointing=True, max_epochs=2)
        trainer.fit(module, loader(*data), loader(*val))
        module.eval()
        best = torch.load(callbacks[-1].uq_ckpt_path, weights_only=True)["state_dict"]
        module.load_state_dict(best)
        return callbacks[-1].uq_ckpt_path

    return run


def cat(predictions):
    return type(predictions[0]).cat(predictions)


# ---------------------------------------------------------------------- predictions


@each
@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_our_predictions_carry_the_callbacks_score(make, module, make_trainer, trained, tmp_path):
    module, callback = module(), make()
    path = trained(module, callback)
    expected = callback.score(module, TEST)
    prediction = module.predict(TEST_X)
    torch.testing.assert_close(prediction.ood_score, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(prediction.score("ood_score"), prediction.ood_score)
    assert "log_density" not in prediction.to_dict()
    for name in (lambda: prediction.log_density, lambda: prediction.score("log_density")):
        with pytest.raises(NotFittedError, match="carries no `log_density`: no feature density was fitted"):
            name()
    # As a process that knows the file alone, and on the way into a table.
    fresh = copy.deepcopy(module)
    fresh.prediction_transforms.clear()
    with pytest.raises(NotFittedError, match="carries no `ood_score`: no score of features was fitted"):
        fresh.predict(TEST_X).score("ood_score")
    writer = PredictionWriter(tmp_path / "out")
    found = cat(make_trainer(callbacks=[make(), writer]).predict(fresh, TEST, ckpt_path=path, weights_only=True))
    torch.testing.assert_close(found.ood_score, expected)
    columns = read_predictions(tmp_path / "out")
    torch.testing.assert_close(torch.as_tensor(columns["ood_score"]).double(), expected, rtol=1e-5, atol=1e-5)
    assert "log_density" not in columns


@each
def test_without_a_trainer_and_on_other_weights(make):
    module = DeterministicModule(network()).eval()
    callback = make().fit(module, loader())
    torch.testing.assert_close(module.predict(TEST_X).ood_score, callback.score(module, [TEST_X]))
    again = make()
    again.load_state_dict(callback.state_dict())
    module.prediction_transforms.clear()
    again.attach_to(module)
    torch.testing.assert_close(module.predict(TEST_X).ood_score, callback.score(module, [TEST_X]))
    with torch.no_grad():
        module.network.network[0].weight.add_(0.1)
    with pytest.raises(NotFittedError, match="was fitted on other weights"):
        module.predict(TEST_X)


@each
def test_a_users_module_with_attach(make, make_trainer, trained):
    module, callback = UsersModule(), make(attach=True, nonfinite="inf")
    trained(module, callback)
    prediction = cat(make_trainer(callbacks=[callback]).predict(module, TEST))
    torch.testing.assert_close(prediction.ood_score, callback.score(module, TEST))
    (bad,) = make_trainer(callbacks=[callback]).predict(module, DataLoader(BAD, batch_size=len(BAD)))
    assert torch.equal(bad.ood_score == math.inf, ROWS)
    torch.testing.assert_close(bad.ood_score[~ROWS], prediction.ood_score[~ROWS], rtol=1e-5, atol=1e-5)


def test_a_score_of_another_neighbour_is_refused():
    state = FitKNN(k=3).fit(network(), loader()).state_dict()
    with pytest.raises(InputError, match="has k=5, but its state was fitted with k=3"):
        FitKNN(k=5).load_state_dict(state)


def test_predictions_carry_the_score_of_the_last_callback(make_trainer, caplog):
    module, knn = DeterministicModule(network()), FitKNN(k=3, weights="last")
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[FitGMM(weights="last"), knn]).fit(module, loader(), loader(VAL_X, VAL_Y))
    told = "Predictions carry only one density: that of FitKNN, which comes after FitGMM in the Trainer's callbacks."
    assert told in [record.message for record in caplog.records]
    prediction = module.eval().predict(TEST_X)
    torch.testing.assert_close(prediction.ood_score, knn.score(module, [TEST_X]))
    with pytest.raises(
        NotFittedError, match="If several callbacks score features, predictions carry the score of the last"
    ):
        _ = prediction.log_density


@pytest.mark.parametrize("make", [MAKE["knn"], MAKE["vim"]], ids=["knn", "vim"])
def test_positions_of_a_map(make, trained):
    x, val_x = X.repeat(1, 2).unsqueeze(2), VAL_X.repeat(1, 2).unsqueeze(2)
    module = DeterministicModule(Tokens(), task=Segmentation(class_axis=-1))
    callback = make(pool="positions")
    path = trained(module, callback, data=(x, (x[..., 0] > 0).long()), val=(val_x, (val_x[..., 0] > 0).long()))
    found = module.predict(x).ood_score
    assert found.shape == (60, 8)
    torch.testing.assert_close(found, callback.score(module, [x]))
    torch.testing.assert_close(load_fitted(path, module)(x)["ood_score"], found)


# ---------------------------------------------------------------------- a plain module, and a graph of it


def exported(fitted):
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(fitted, (TEST_X[:7],), dynamic_shapes=batch, strict=False)


@each
@pytest.mark.parametrize("kind", ["deterministic", "ensemble"])
def test_a_plain_module_gives_the_score_and_so_do_its_graphs(make, kind, trained, tmp_path):
    module, callback = MODULES[kind](), make()
    path = trained(module, TemperatureScaling(), callback)
    expected = module.predict(TEST_X)
    fitted = load_fitted(path, module, nonfinite="inf")
    assert isinstance(fitted, FittedNetwork)
    assert fitted.output_names == list(fitted(TEST_X)) == ["probs", "ood_score"]
    torch.testing.assert_close(fitted(TEST_X)["probs"], expected.probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fitted(TEST_X)["ood_score"], expected.ood_score, rtol=1e-5, atol=1e-5)
    graph = exported(fitted).module()
    for run in (fitted, graph):
        for num in (1, 13):
            torch.testing.assert_close(run(TEST_X[:num])["ood_score"], expected.ood_score[:num], rtol=1e-5, atol=1e-5)
        bad = run(BAD)["ood_score"]
        assert torch.equal(bad == math.inf, ROWS)
        torch.testing.assert_close(bad[~ROWS], expected.ood_score[~ROWS], rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(fitted).half()
    assert {buffer.dtype for buffer in half.feature_score.buffers()} == {torch.float64}
    torch.testing.assert_close(half(TEST_X.half())["ood_score"], expected.ood_score, rtol=2e-2, atol=2e-2)


@each
def test_an_onnx_graph(make, trained, tmp_path):
    skip_on_torch_2_6(ONNX_EXPORT)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = MODULES["ensemble"]()
    fitted = load_fitted(trained(module, make()), module, nonfinite="inf")
    names, batch = fitted.output_names, ({0: torch.export.Dim("batch")},)
    path = tmp_path / "a.onnx"
    torch.onnx.export(fitted, (TEST_X[:7],), path, dynamo=True, dynamic_shapes=batch, output_names=names, verbose=False)
    session = onnxruntime.InferenceSession(path)
    expected = module.predict(TEST_X).ood_score
    for x in (TEST_X[:1], TEST_X, BAD):
        (found,) = session.run(["ood_score"], {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), fitted(x)["ood_score"], rtol=1e-5, atol=1e-5)
    good = torch.as_tensor(found)[~ROWS]
    torch.testing.assert_close(good, expected[~ROWS], rtol=1e-5, atol=1e-5)


@each
def test_with_sets_and_with_numbers(make, trained):
    module, callback = DeterministicModule(network()), make()
    path = trained(module, callback, ConformalSets())
    regressor, own = DeterministicModule(network(1), task=Regression(head="mean")), make()
    with_numbers = trained(regressor, own, data=(X, X[:, :1]), val=(VAL_X, VAL_X[:, :1]))
    for one, file, names in (
        (module, path, ["probs", "prediction_set", "ood_score"]),
        (regressor, with_numbers, ["mean", "ood_score"]),
    ):
        fitted = load_fitted(file, one, nonfinite="inf")
        assert isinstance(fitted, FittedPredictor)
        for run in (fitted, exported(fitted).module()):
            found = run(TEST_X)
            assert list(found) == names
            torch.testing.assert_close(found["ood_score"], one.predict(TEST_X).ood_score, rtol=1e-5, atol=1e-5)
            assert torch.equal(run(BAD)["ood_score"] == math.inf, ROWS)


def test_a_graph_holds_no_more_than_the_distances_to_all_rows(trained):
    module = DeterministicModule(network())
    graph = exported(load_fitted(trained(module, FitKNN(k=3)), module)).graph
    shapes = [node.meta["val"].shape for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    rows = [shape for shape in shapes if any(isinstance(size, torch.SymInt) for size in shape)]
    assert max(math.prod(size for size in shape if isinstance(size, int)) for shape in rows) == len(X)
