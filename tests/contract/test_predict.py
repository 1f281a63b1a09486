"""`predict` gives one prediction type, whatever the batches look like; what a callback fitted is in it."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_uq import load_fitted
from lightning_uq.callbacks import PredictionWriter, TemperatureScaling, read_predictions
from lightning_uq.predictions import Prediction
from tests.contract.cases import CLASSES, UsersModule, loader, rows
from tests.contract.running import TEST, TRAIN, VAL, assert_sound, density

KIND = "classification"
X, Y = rows(TEST, seed=2)
PARTS = [X[:8], X[8:9], X[9:]]  # of uneven lengths, one of a single row
BATCHES = {
    "tensors": PARTS,
    "tuples": [(x, torch.zeros(len(x))) for x in PARTS],  # a target is not looked at
    "mappings": [{"input": x} for x in PARTS],
    "mappings with targets": [{"input": x, "target": torch.zeros(len(x))} for x in PARTS],
}


def fields(prediction):
    return {k: v for k, v in prediction.to_dict().items() if isinstance(v, torch.Tensor)}


@pytest.mark.axis("predict")
def test_modules(make_trainer, module_case):
    module = module_case.build()
    make_trainer().fit(module, loader(module_case.task, TRAIN))
    found = {}
    for name, batches in BATCHES.items():
        parts = make_trainer().predict(module, DataLoader(batches, batch_size=None))
        assert all(isinstance(part, Prediction) for part in parts)
        assert [len(part) for part in parts] == [len(x) for x in PARTS]
        assert len({type(part) for part in parts}) == 1
        found[name] = type(parts[0]).cat(parts)
        assert_sound(found[name], TEST)
    for name, prediction in found.items():
        for key, value in fields(prediction).items():
            torch.testing.assert_close(value, fields(found["tensors"])[key], msg=f"{name}: {key}")
    one = found["tensors"]
    for key, value in fields(one.to("cpu")).items():
        assert torch.equal(value, fields(one)[key]), key
    if "ddp" not in module_case.unsupported:  # a row's prediction does not depend on its neighbours
        for key, value in fields(module.eval().predict(X)).items():
            torch.testing.assert_close(value.detach(), fields(one)[key], msg=key)


@pytest.mark.axis("predict")
@pytest.mark.filterwarnings("ignore:.*no finite positive temperature")
def test_modules_with_what_was_fitted(make_trainer, classifier_case, tmp_path):
    """One prediction, averaged over its members, calibrated, and with its density; the same without a Trainer."""
    module = classifier_case.build()
    gmm, scaling = density(module, weights="last"), TemperatureScaling(weights="last")
    kept = ModelCheckpoint(tmp_path)
    trainer = make_trainer(callbacks=[*gmm, scaling, kept], enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, loader(KIND, TRAIN), loader(KIND, VAL, 1))
    for batches in BATCHES.values():
        data = DataLoader(batches, batch_size=None)
        module.prediction_transforms.clear()
        plain, parts = make_trainer().predict(module, data), trainer.predict(module, data)
        kind = type(plain[0])
        ours, raw = kind.cat(parts), kind.cat(plain)
        assert_sound(ours, TEST)
        temperature = scaling.temperature.float()
        expected = (raw.log_probs / temperature.to(raw.log_probs.dtype)).softmax(1)
        torch.testing.assert_close(ours.probs, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.uncalibrated_mutual_information, raw.mutual_information)
        assert (temperature == 1) == torch.equal(ours.probs, raw.probs)
        for one in gmm:
            torch.testing.assert_close(ours.ood_score, one.score(module, data))
    if "ddp" not in classifier_case.unsupported:
        for key, value in fields(module.eval().predict(X)).items():
            tolerance = (
                {"rtol": 1e-5, "atol": 1e-5} if key in ("log_density", "ood_score") else {}
            )  # of features in other batches
            torch.testing.assert_close(value.detach(), fields(ours)[key], msg=key, **tolerance)
    outputs = load_fitted(scaling.uq_ckpt_path, module)(X)
    probs, log_density = outputs["probs"], [outputs["log_density"]] if gmm else []
    assert ("ood_score" in outputs) == bool(gmm)
    if "ddp" not in classifier_case.unsupported:  # a row's prediction does not depend on its neighbours
        torch.testing.assert_close(probs.to(ours.probs.dtype), ours.probs, rtol=1e-5, atol=1e-6)
    for found in log_density:
        torch.testing.assert_close(found, ours.log_density, rtol=1e-5, atol=1e-5)  # of features in other batches


@pytest.mark.axis("predict")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.filterwarnings("ignore:.*leaves out `lower` and `upper`")  # of more than 32 indices
def test_what_is_written(make_trainer, module_case, precision, tmp_path):
    """Each row once, in the order of the data, whatever the precision."""
    module, writer = module_case.build(), PredictionWriter(tmp_path / "out", module_case.file_format)
    trainer = make_trainer(precision=precision)
    trainer.fit(module, loader(module_case.task, TRAIN))
    parts = make_trainer(precision=precision, callbacks=[writer]).predict(module, loader(module_case.task, TEST, 2))
    columns, whole = read_predictions(tmp_path / "out"), type(parts[0]).cat(parts)
    assert columns["index"].tolist() == list(range(TEST))
    if module_case.task == "multilabel":
        torch.testing.assert_close(
            torch.from_numpy(columns["prob_1"]), whole.probs[:, 1].double(), rtol=1e-6, atol=1e-6
        )
    elif "mean" in columns:
        torch.testing.assert_close(
            torch.from_numpy(columns["mean"]).double(), whole.mean.double(), rtol=1e-6, atol=1e-6
        )
    elif "label" in columns:
        assert columns["label"].tolist() == whole.label.tolist()
        torch.testing.assert_close(
            torch.from_numpy(columns["confidence"]).double(), whole.confidence.double(), rtol=1e-6, atol=1e-6
        )
    else:
        for name, values in whole.to_dict().items():
            written = torch.from_numpy(columns[f"{name}_0"])
            torch.testing.assert_close(written, values[:, 0].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.axis("predict")
def test_callbacks(make_trainer, fitting_case):
    """On a user's module, whose own predictions stay as they are unless `attach` asks for ours."""
    callback, module = fitting_case.build(), UsersModule()
    trainer = make_trainer(callbacks=[callback], max_epochs=3)
    trainer.fit(module, loader(KIND, TRAIN), loader(KIND, VAL, 1))
    own = trainer.predict(module, DataLoader([(x, x) for x in PARTS], batch_size=None))
    assert torch.equal(torch.cat(own), torch.cat([module(x) for x in PARTS]).detach())
    callback.attach = True
    (first, *rest) = trainer.predict(module, DataLoader([(x, x) for x in PARTS], batch_size=None))
    ours = type(first).cat([first, *rest])
    assert_sound(ours, TEST)
    if fitting_case.name == "ConformalIntervals":
        assert ours.conformal_lower.shape == (TEST, CLASSES)
        return
    if fitting_case.name == "ConformalRiskControl":
        assert ours.prediction_set.shape == (TEST, CLASSES)
        return
    if fitting_case.is_of_numbers:
        assert ours.calibrations.keys() <= {"variance_scale", "recalibration"}
        assert bool((ours.variance > 0).all())
        return
    raw = torch.cat(own).log_softmax(1)
    calibrated = not torch.allclose(ours.probs.log(), raw, atol=1e-3)
    dense = ours.to_dict().get("log_density") is not None
    assert calibrated == callback.recalibrates
    assert ("prediction_set" in ours.to_dict()) == (fitting_case.name == "ConformalSets")
    if dense:
        assert ours.log_density.shape == (TEST,)
    assert ours.probs.shape == (TEST, CLASSES)
