"""Every tool on every client. The assertions are what the page promises."""

import gc
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_uq.callbacks import read_predictions
from lightning_uq.errors import UQError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.lightning_trees import in_tree_of
from lightning_uq.predictions import Prediction
from lightning_uq.running.streams import RandomStream
from tests.clients.client import REFUSALS

pytestmark = pytest.mark.filterwarnings("default")  # other packages warn of much

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _collected():
    """Modules and Trainers refer to each other; those of one test are gone before the next."""
    yield
    gc.collect()


def batches(client, split):
    """The batches of a split. Members and a module alone draw the same numbers if the loader draws its own."""
    loader = client.loader(split)
    loader.generator = torch.Generator()
    return loader


def make_trainer(client, tmp_path, *callbacks, ours=False, checkpoint=False):
    """A Trainer of the client's own tree, or of the one that our modules run under."""
    if ours or client.trainer == "lightning":
        import lightning.pytorch as tree
    else:
        import pytorch_lightning as tree
    saving = [tree.callbacks.ModelCheckpoint(tmp_path, "trained")] if checkpoint else []
    return tree.Trainer(
        max_epochs=2,
        callbacks=[*callbacks, *saving],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoint,
        default_root_dir=tmp_path,
    )


@contextmanager
def possibly_refused(client, tool, trainer=None):
    """What cannot work is refused; where the block trains with ``trainer``, before the first step."""
    if tool not in client.refused:
        yield
        return
    with pytest.raises(UQError, match=client.refused[tool]) as refusal:
        yield
    assert trainer is None or trainer.global_step == 0
    REFUSALS[client.name, tool] = str(refusal.value)


def trained_alone(client, tmp_path, seed=0, callbacks=()):
    """The client's module after its own training, in a process (so to speak) with this seed."""
    with RandomStream(seed).active():
        module = client.build()
        trainer = make_trainer(client, tmp_path, *callbacks)
        trainer.fit(module, batches(client, "train"), batches(client, "val"))
    return module, trainer


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def num_rows(client, split):
    return sum(len(client.target_of(batch)) for batch in batches(client, split))


@pytest.mark.tool("EnsembleModule")
def test_an_ensemble_of_it(client, tmp_path):
    tool = "EnsembleModule"
    trainer = make_trainer(client, tmp_path, ours=True)
    with possibly_refused(client, tool, trainer):
        ensemble = client.call(tool)
        trainer.fit(ensemble, batches(client, "train"), batches(client, "val"))
    if tool in client.refused:
        return
    for i in range(2):
        alone, _ = trained_alone(client, tmp_path / str(i), member_seed(1, i))
        assert_same_weights(ensemble.network.member_state_dict(i), alone.state_dict())
    (tested,) = trainer.test(ensemble, batches(client, "test"), verbose=False)
    assert any(name.startswith("ensemble/test_") for name in tested), "nothing is measured of the ensemble as a whole"
    predictions = trainer.predict(ensemble, batches(client, "test"))
    assert all(isinstance(one, Prediction) for one in predictions)
    assert sum(map(len, predictions)) == num_rows(client, "test")
    for one in predictions:
        assert all(bool(value.isfinite().all()) for value in one.to_dict().values())


def fitted(client, tool, tmp_path, *others, checkpoint=False):
    """The module and the callback after a training with it; the weights are those without it."""
    callback = client.call(tool)
    with RandomStream(0).active():
        module = client.build()
        trainer = make_trainer(client, tmp_path, callback, *others, checkpoint=checkpoint)
        with possibly_refused(client, tool, trainer):
            trainer.fit(module, batches(client, "train"), batches(client, "val"))
    if tool not in client.refused:
        alone, _ = trained_alone(client, tmp_path / "alone")
        assert_same_weights(module.state_dict(), alone.state_dict())
    return module, callback, trainer


@pytest.mark.tool("FitGMM")
def test_a_density(client, tmp_path):
    module, gmm, _ = fitted(client, "FitGMM", tmp_path)
    if "FitGMM" not in client.refused:
        assert_scores(client, module, gmm)


@pytest.mark.tool("FitKNN")
def test_distances_to_neighbours(client, tmp_path):
    module, knn, _ = fitted(client, "FitKNN", tmp_path)
    if "FitKNN" not in client.refused:
        assert_scores(client, module, knn)


def assert_scores(client, module, callback):
    near, far = (callback.score(module, batches(client, split)) for split in ("test", "far"))
    for scores, split in ((near, "test"), (far, "far")):
        assert len(scores) == num_rows(client, split)
        assert bool(scores.isfinite().all())
    assert bool((far != far[0]).any()), "all inputs have one score"


@pytest.mark.tool("TemperatureScaling")
def test_a_temperature(client, tmp_path):
    _, scaling, _ = fitted(client, "TemperatureScaling", tmp_path)
    if "TemperatureScaling" not in client.refused:
        assert 0 < float(scaling.temperature) < float("inf")


@pytest.mark.tool("OODAlarm")
def test_an_alarm_behind_a_density(client, tmp_path):
    if "FitGMM" in client.refused:
        pytest.skip("there is no density")
    alarm = client.call("OODAlarm")
    module, gmm, _ = fitted(client, "FitGMM", tmp_path, alarm)
    near, far = (gmm.score(module, batches(client, split)) for split in ("val", "far"))
    assert alarm.state["score_name"] == "ood_score"
    held_out = near if near.ndim == 1 else near.flatten(1).mean(1)
    assert len(alarm.scores) == num_rows(client, "val")
    torch.testing.assert_close(alarm.scores, held_out.double().sort().values, rtol=1e-3, atol=1e-3)
    batch = next(iter(batches(client, "far")))
    prediction = alarm.predict(module, batch)
    assert prediction.ood_alarm.shape == (len(prediction),)
    assert bool(((prediction.ood_p_value > 0) & (prediction.ood_p_value <= 1)).all())
    assert torch.equal(prediction.ood_alarm, prediction.ood_score > alarm.threshold)
    expected = far if far.ndim == 1 else far.flatten(1).mean(1)
    torch.testing.assert_close(
        prediction.ood_score.double(), expected[: len(prediction)].double(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.tool("OODDetection")
def test_other_data_while_it_is_tested(client, tmp_path):
    tool = "OODDetection"
    module, _ = trained_alone(client, tmp_path)
    if not is_overridden("test_step", module, parent=in_tree_of(module, LightningModule)):
        with possibly_refused(client, tool):
            scores = client.call(tool).score(module, batches(client, "far"))
            assert scores
            assert all(bool(one.isfinite().all()) for one in scores.values())
        return
    (before,) = make_trainer(client, tmp_path).test(module, batches(client, "test"), verbose=False)
    with possibly_refused(client, tool):
        trainer = make_trainer(client, tmp_path, client.call(tool))
        (after,) = trainer.test(module, batches(client, "test"), verbose=False)
    if tool in client.refused:
        return
    assert {name: after[name] for name in before} == pytest.approx(before, nan_ok=True)
    found = {name: value for name, value in after.items() if name.startswith("ood_auroc/far/")}
    assert found
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.tool("EpinetModule")
def test_an_epinet_around_it(client, tmp_path):
    tool = "EpinetModule"
    trainer = make_trainer(client, tmp_path, ours=True)
    with possibly_refused(client, tool, trainer):
        epinet = client.call(tool)
        trainer.fit(epinet, batches(client, "train"), batches(client, "val"))
    if tool in client.refused:
        return
    predictions = trainer.predict(epinet, batches(client, "test"))
    assert sum(map(len, predictions)) == num_rows(client, "test")
    assert all(bool(value.isfinite().all()) for one in predictions for value in one.to_dict().values())


@pytest.mark.tool("PredictionWriter")
def test_a_file_of_predictions(client, tmp_path):
    tool = "PredictionWriter"
    if "EnsembleModule" in client.refused:
        pytest.skip("there is no ensemble whose predictions could be written")
    ensemble = client.call("EnsembleModule")
    trainer = make_trainer(client, tmp_path, client.call(tool, folder=tmp_path / "out"), ours=True)
    trainer.fit(ensemble, batches(client, "train"), batches(client, "val"))
    with possibly_refused(client, tool):
        trainer.predict(ensemble, batches(client, "test"))
    if tool not in client.refused:
        written = read_predictions(tmp_path / "out")
        assert written["index"].tolist() == list(range(num_rows(client, "test")))


REFUSED = 3
"""The script's exit code where ``load_fitted`` raised an error of this package, whose text it then writes; 1 is any other error."""

SCRIPT = f"""
import sys, torch
from pathlib import Path
from lightning_uq.errors import UQError
from tests.clients.conftest import found_clients
name, path, out = sys.argv[1:]
client = next(one for one in found_clients()[0] if one.name == name)
try:
    network = client.call("load_fitted", path=path)
except UQError as refusal:
    Path(out).write_text(str(refusal))
    sys.exit({REFUSED})
batch = next(iter(client.loader("test")))
with torch.no_grad():
    torch.save(network(client.input_of(batch)), out)
"""


@pytest.mark.tool("load_fitted")
def test_a_fresh_process(client, tmp_path):
    tool = "load_fitted"
    fits = [one for one in ("FitGMM", "TemperatureScaling", "OODAlarm") if one not in client.refused]
    if not fits:
        pytest.skip("nothing is fitted")
    others = [client.call(one) for one in fits[1:]]
    module, callback, _ = fitted(client, fits[0], tmp_path, *others, checkpoint=True)
    (path,) = tmp_path.glob("uq-last.ckpt")
    out = tmp_path / "out.pt"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, client.name, str(path), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if tool in client.refused:
        assert done.returncode == REFUSED, done.stderr[-2000:]
        REFUSALS[client.name, tool] = out.read_text()
        assert client.refused[tool] in REFUSALS[client.name, tool]
        return
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(out)
    assert found
    assert all(bool(values.isfinite().all()) for values in found.values())
    if "FitGMM" in fits:
        expected = callback.score(module, batches(client, "test"))[: len(found["ood_score"])]
        expected = expected if expected.ndim == 1 else expected.flatten(1).mean(1)
        torch.testing.assert_close(found["ood_score"].double(), expected, rtol=1e-3, atol=1e-3)
        assert found["ood_p_value"].shape == found["ood_alarm"].shape == expected.shape
