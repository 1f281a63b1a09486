"""What ``load_fitted`` gives of sets, intervals, thresholds and posteriors: the predictions of the callbacks, in a plain module that exports."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    CategoricalRegressionModule,
    ConformalIntervals,
    ConformalRiskControl,
    ConformalSets,
    DeterministicModule,
    EnsembleModule,
    FitGMM,
    FitLaplace,
    QuantileRecalibration,
    SelectiveThreshold,
    TemperatureScaling,
    UncertaintyModule,
    VarianceScaling,
    load_fitted,
    save_fitted,
)
from lightning_uq.errors import InputError, NotFiniteError
from lightning_uq.networks import Factory
from lightning_uq.predictions import Prediction
from lightning_uq.tasks import Multilabel, Regression, Segmentation
from tests.trainers import quiet_trainer

MEAN = Regression(head="mean")


def network(num_outputs):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, num_outputs))


def convolution():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


def data(kind, num, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "maps":
        x = torch.randn(num, 1, 6, 6, generator=generator)
        return TensorDataset(x, (x[:, 0] > 0).long())
    x = torch.randn(num, 4, generator=generator)
    noise = torch.randn(num, 3, generator=generator)
    targets = {
        "classes": (x[:, :3] + noise).argmax(1),
        "labels": (x[:, :3] > noise).long(),
        "numbers": x[:, :2] + noise[:, :2],
    }
    return TensorDataset(x, targets[kind])


def fit(module, kind, callbacks, folder):
    torch.manual_seed(0)
    best = ModelCheckpoint(folder, monitor="val_loss")
    trainer = quiet_trainer(folder, callbacks=[*callbacks, best], enable_checkpointing=True, max_epochs=3)
    trainer.fit(module, DataLoader(data(kind, 60, 0), 20), DataLoader(data(kind, 60, 1), 20))
    predicted = Prediction.cat(trainer.predict(module, DataLoader(data(kind, 30, 2), 10), ckpt_path="best"))
    return callbacks[-1].uq_ckpt_path, predicted, data(kind, 30, 2).tensors[0]


CASES = {
    "sets": ("classes", lambda: [ConformalSets()]),
    "adaptive sets": ("classes", lambda: [TemperatureScaling(), ConformalSets(method="aps", randomized=True)]),
    "regularized sets": ("classes", lambda: [ConformalSets(method="raps", k_reg=1, alpha=0.2, allow_empty=False)]),
    "sets by class": ("classes", lambda: [TemperatureScaling(scope="shared"), ConformalSets(by_class=True, alpha=0.3)]),
    "selected": ("classes", lambda: [FitGMM(feature_transform="raw"), SelectiveThreshold(risk=0.7, delta=0.5)]),
    "draws": ("classes", lambda: [FitLaplace(num_samples=4), TemperatureScaling(), ConformalSets()]),
    "labels": ("labels", lambda: [ConformalRiskControl(alpha=0.2)]),
    "maps": ("maps", lambda: [ConformalRiskControl(alpha=0.2)]),
    "intervals": ("numbers", lambda: [ConformalIntervals()]),
    "scaled": ("numbers", lambda: [VarianceScaling(), ConformalIntervals(method="normalized")]),
    "recalibrated": (
        "numbers",
        lambda: [VarianceScaling(), QuantileRecalibration(), ConformalIntervals(method="cqr", alpha=0.4)],
    ),
    "posterior": ("numbers", lambda: [FitLaplace(), ConformalIntervals(method="normalized")]),
}
TASKS = {"classes": "classification", "labels": Multilabel(), "maps": Segmentation(), "numbers": MEAN}


def factory(kind):
    if kind == "maps":
        return Factory(f"{__name__}.convolution")
    return Factory(f"{__name__}.network", {"num_outputs": 2 if kind == "numbers" else 3})


@pytest.mark.filterwarnings(
    "ignore:.*fewer than 20 per class", "ignore:.*certifies no threshold", "ignore:.*of a class.*"
)
@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_it_predicts_as_the_callbacks_do(name, num_members, tmp_path):
    kind, callbacks = CASES[name]
    options = {"task": TASKS[kind], "optimizer": Factory("torch.optim.Adam", {"lr": 0.02})}
    if num_members > 1:
        module = EnsembleModule(factory(kind), num_members=num_members, seed=0, **options)
    else:
        module = DeterministicModule(factory(kind), **options)
    path, predicted, x = fit(module, kind, callbacks(), tmp_path)
    fitted = load_fitted(path)
    found = fitted(x)
    expected = predicted.to_dict()
    assert set(found) <= set(expected)
    assert {"prediction_set", "answered", "conformal_lower"} & set(expected) == {
        "prediction_set",
        "answered",
        "conformal_lower",
    } & set(found)
    assert fitted.output_names == ["prediction_mean" if name == "mean" else name for name in found]
    for key, values in found.items():
        torch.testing.assert_close(
            values, expected[key].to(values.dtype), rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    for copied in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        for key, values in copied(x).items():
            torch.testing.assert_close(values, found[key], rtol=0, atol=0)
    if name == "recalibrated":
        return  # a graph of a map's mean and variance is thousands of operators large
    program = torch.export.export(
        fitted, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=2**62)}}, strict=False
    )
    graph = program.module()
    for size in (30, 5):
        for key, values in graph(x[:size]).items():
            if values.dtype == torch.bool:
                assert (
                    values == found[key][:size]
                ).double().mean() > 0.99  # a score on the threshold may round to either side
            else:
                torch.testing.assert_close(values, found[key][:size], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sets", "intervals", "scaled", "posterior"])
def test_onnx_gives_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    kind, callbacks = CASES[name]
    path, _, x = fit(DeterministicModule(factory(kind), task=TASKS[kind]), kind, callbacks(), tmp_path)
    fitted = load_fitted(path)
    found = fitted(x)
    file = tmp_path / "model.onnx"
    torch.onnx.export(fitted, (x,), file, output_names=fitted.output_names, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for (key, values), other in zip(found.items(), results, strict=True):
        other = torch.from_numpy(other)
        if values.dtype == torch.bool:
            assert (values == other).double().mean() > 0.99
        else:
            torch.testing.assert_close(other, values, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_an_input_that_is_not_finite(tmp_path):
    module = DeterministicModule(factory("numbers"), task=MEAN)
    path, _, x = fit(module, "numbers", [FitLaplace(), ConformalIntervals(method="normalized")], tmp_path)
    x[1, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="nonfinite='inf'"):
        load_fitted(path)(x)
    found = load_fitted(path, nonfinite="inf")(x)
    assert found["mean"][1].isnan().all()
    assert (found["conformal_lower"][1] == -torch.inf).all()
    assert (found["conformal_upper"][1] == torch.inf).all()
    assert found["conformal_upper"][0].isfinite().all()


def test_a_function_of_the_input_is_in_no_file(tmp_path):
    module = DeterministicModule(factory("numbers"), task=MEAN)
    conformal = ConformalIntervals(groups=lambda x: (x[:, 0] > 0).long(), alpha=0.3)
    path, _, _ = fit(module, "numbers", [conformal], tmp_path)
    with pytest.raises(InputError, match="`groups`, a function of the input that a file cannot hold"):
        load_fitted(path)


ATOMS = {"atoms": torch.linspace(-4, 4, 9).tolist(), "in_features": 4, "num_outputs": 2}


class Doubling(DeterministicModule):
    """A subclass that changes the input in a ``forward`` of its own."""

    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CategoricalRegressionModule(
            Factory("lightning_uq.networks.CatMLPEnsemble", ATOMS | {"num_members": 2})
        ),
        lambda: Doubling(factory("numbers"), task=MEAN),
    ],
    ids=["outputs of its own", "a forward of its own"],
)
def test_a_module_that_evaluates_other_outputs_than_its_networks(make, tmp_path):
    rows = data("numbers", 40, 0)
    module = make().eval()
    scaling, density = VarianceScaling().fit(module, DataLoader(rows, 20)), FitGMM().fit(module, DataLoader(rows, 20))
    save_fitted(tmp_path / "model-uq.ckpt", module, [scaling, density])
    x = rows.tensors[0]
    with torch.no_grad():
        expected = module.predict(x).to_dict()
        fitted = load_fitted(tmp_path / "model-uq.ckpt", make())
        found = fitted(x)
        assert set(found) >= {"mean", "ood_score"}
        program = torch.export.export(
            fitted, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=2**62)}}, strict=False
        )
        graph = program.module()(x[:7])
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name].to(values.dtype), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(graph[name], values[:7], rtol=1e-4, atol=1e-5)


def test_no_module_of_ours_hides_its_outputs_from_load_fitted():
    """``load_fitted`` asks for outputs at indices that it holds, so a ``forward`` that differs from them would be lost."""
    kinds = [UncertaintyModule]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = [kind for kind in kinds if kind.__module__.startswith("lightning_uq.")]
    assert len(ours) > 8
    assert {kind.forward for kind in ours} == {UncertaintyModule.forward}
