"""``save_fitted``: what was fitted without a Trainer, to the file that a Trainer's fit writes."""

import warnings
from itertools import permutations
from pathlib import Path

import fsspec
import lightning.pytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    ConformalIntervals,
    ConformalSets,
    DeterministicModule,
    EnsembleModule,
    Factory,
    FitGMM,
    FitLaplace,
    OODAlarm,
    OODDetection,
    Regression,
    TemperatureScaling,
    VarianceScaling,
    load_fitted,
    save_fitted,
)
from lightning_uq.errors import InputError, NotFittedError
from tests.contract.cases import FEATURES, UsersModule
from tests.contract.cases import loader as rows

pl = pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The checkpoint holds what"),  # where a file's weights alone are compared
    pytest.mark.filterwarnings("ignore:.*no finite positive temperature"),
]
GENERATOR = torch.Generator().manual_seed(1)
X, VAL_X, TEST_X = (torch.randn(n, 4, generator=GENERATOR) for n in (80, 90, 31))
Y, VAL_Y = ((x[:, 0] + torch.randn(len(x), generator=GENERATOR) > 0).long() for x in (X, VAL_X))
LINEAR = Factory("torch.nn.Linear", {"in_features": 4, "out_features": 2})


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=16)


VAL = loader(VAL_X, VAL_Y)


class Plain(nn.Module):
    """No LightningModule; it takes no arguments."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.net(x)


class Narrow(Plain):
    """Its layers depend on an argument."""

    def __init__(self, width=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


class _Steps:
    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)

    def test_step(self, batch, batch_idx):
        self.log("nll", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Lit(_Steps, lightning.pytorch.LightningModule):
    pass


class OtherTree(_Steps, pl.LightningModule):
    pass


class Renames(Lit):
    """Its file has other names than it has itself."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {
            name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()
        }


class NeedsTrainer(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["devices"] = self.trainer.num_devices


def ours():
    return DeterministicModule(LINEAR)


def ensemble():
    return EnsembleModule(LINEAR, num_members=3)


def fitted(model):
    return [FitGMM().fit(model, loader()), TemperatureScaling().fit(model, VAL)]


# ---------------------------------------------------------------------- it comes back


@pytest.mark.parametrize("make", [ours, ensemble, Plain, Lit, lambda: Lit(width=5), OtherTree, Renames])
def test_the_file_gives_back_what_was_fitted(make, tmp_path):
    model = make()
    callbacks = gmm, temperature = fitted(model)
    assert gmm.uq_ckpt_path is None  # a fit without a Trainer writes none
    path = tmp_path / "model-uq.ckpt"
    save_fitted(path, model, callbacks)
    assert gmm.uq_ckpt_path == temperature.uq_ckpt_path == str(path)
    assert list(tmp_path.iterdir()) == [path]
    found = load_fitted(path).double()(TEST_X.double())
    model.double().eval()
    with torch.no_grad():
        logits = model(TEST_X.double())
        logits = logits if logits.ndim == 3 else logits.unsqueeze(0)
        pooled = logits.log_softmax(2).logsumexp(0) / temperature.temperature
    torch.testing.assert_close(found["probs"], pooled.softmax(1), rtol=1e-5, atol=1e-5)
    expected = gmm.score(model, DataLoader(TensorDataset(TEST_X.double()), batch_size=31))
    torch.testing.assert_close(found["ood_score"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_fitted(path, make()).double()(TEST_X.double()), found)


@pytest.mark.parametrize(
    ("make", "tree"),
    [(ours, lightning.pytorch), (Lit, lightning.pytorch), (Renames, lightning.pytorch), (OtherTree, pl)],
)
def test_a_trainer_takes_the_states_from_it(make, tree, tmp_path):
    model = make()
    _, temperature = callbacks = fitted(model)
    path = tmp_path / "model-uq.ckpt"
    save_fitted(path, model, callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    again = [FitGMM(), TemperatureScaling()]
    trainer = tree.Trainer(callbacks=again, default_root_dir=tmp_path, **quiet)
    trainer.test(make(), VAL, ckpt_path=path, weights_only=True, verbose=False)
    assert again[1].temperature == temperature.temperature
    predicting = tree.Trainer(callbacks=[TemperatureScaling(attach=True)], default_root_dir=tmp_path, **quiet)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*callbacks used to create the checkpoint"
        )  # Lightning's own, of the density
        parts = predicting.predict(make(), VAL, ckpt_path=path, weights_only=True)
    assert "temperature" in str(parts[0])
    temperature.check_fitted(make().__class__.load_from_checkpoint(path, weights_only=True))


def test_a_training_does_not_resume_from_it(tmp_path, make_trainer):
    model = Lit()
    save_fitted(tmp_path / "a.ckpt", model, fitted(model))
    with pytest.raises(KeyError, match="contains only the model|optimizer"):
        make_trainer(max_epochs=2).fit(Lit(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_fits_that_depend_on_each_other_may_come_in_any_order(tmp_path):
    model = ours()
    temperature = TemperatureScaling().fit(model, VAL)
    sets = ConformalSets(alpha=0.2).fit(model, VAL)  # to calibrated predictions
    assert any(name.startswith("carried.") for name in sets.state)
    gmm = FitGMM().fit(model, loader())
    expected = model.predict(TEST_X)
    for i, callbacks in enumerate(permutations([temperature, sets, gmm])):
        path = tmp_path / f"{i}.ckpt"
        save_fitted(path, model, callbacks)
        found = load_fitted(path)(TEST_X)
        torch.testing.assert_close(found["probs"], expected.probs, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["prediction_set"], expected.prediction_set)
        assert torch.equal(model.predict(TEST_X).prediction_set, expected.prediction_set)  # nothing was reordered
    with pytest.raises(InputError, match="ConformalSets was fitted to calibrated predictions"):
        save_fitted(tmp_path / "alone.ckpt", model, [sets])


def test_numbers_with_a_posterior_a_scale_and_intervals(tmp_path):
    model = DeterministicModule(LINEAR, task=Regression(head="mean"))
    train, val = loader(X, X[:, :2] + 0.1 * torch.randn(80, 2)), loader(VAL_X, VAL_X[:, :2])
    callbacks = [
        FitLaplace().fit(model, train),
        VarianceScaling().fit(model, val),
        ConformalIntervals().fit(model, val),
    ]
    expected = model.predict(TEST_X).to_dict()
    save_fitted(tmp_path / "a.ckpt", model, callbacks[::-1])
    found = load_fitted(tmp_path / "a.ckpt")(TEST_X)
    assert {"mean", "variance", "conformal_lower"} <= found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_a_plain_module_with_arguments_is_asked_for(tmp_path):
    model, path = Narrow(width=3), tmp_path / "a.ckpt"
    save_fitted(path, model, [TemperatureScaling().fit(model, VAL)])
    with pytest.raises(
        InputError,
        match=r"Narrow, which cannot be built from the file: it lacks the arguments width\. Pass an instance",
    ):
        load_fitted(path)
    assert load_fitted(path, Narrow())(TEST_X)["probs"].shape == (31, 2)
    assert load_fitted(path, Narrow().net)(TEST_X)["probs"].shape == (31, 2)


def test_a_compiled_model_is_saved_as_the_plain_one(tmp_path):
    model = Plain()
    compiled = torch.compile(model, backend="eager")
    save_fitted(tmp_path / "a.ckpt", compiled, [TemperatureScaling().fit(compiled, VAL)])
    assert load_fitted(tmp_path / "a.ckpt")(TEST_X)["probs"].shape == (31, 2)


def test_a_remote_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, path = Plain(), "memory://bucket/model-uq.ckpt"
    try:
        save_fitted(path, model, fitted(model))
        save_fitted(path, model, fitted(model))  # it may be replaced
        assert "ood_score" in load_fitted(path)(TEST_X)
        assert not list(tmp_path.iterdir())
    finally:
        fsspec.filesystem("memory").store.clear()


# ---------------------------------------------------------------------- the file that is named


def test_errors_name_the_file_that_was_written_and_no_other(tmp_path, make_trainer):
    model = ours()
    temperature = TemperatureScaling().fit(model, VAL)
    other = ours()
    with pytest.raises(NotFittedError, match=r"Load the weights of the fit, or call `fit\(model, loader\)` again"):
        temperature.check_fitted(other)
    with pytest.raises(NotFittedError, match="It was fitted on other weights: load those .`save_fitted` writes"):
        make_trainer(callbacks=[temperature]).test(other, VAL, verbose=False)
    path = tmp_path / "model-uq.ckpt"
    save_fitted(path, model, [temperature])
    with pytest.raises(NotFittedError, match=r"weights of the fit \(.*model-uq.ckpt\), or call"):
        temperature.check_fitted(other)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(NotFittedError, match=r"Load the weights of the fit \(.*model-uq.ckpt\)"):
        model.predict(TEST_X)
    temperature.fit(other, VAL)  # of which no file tells
    assert temperature.uq_ckpt_path is None
    with pytest.raises(NotFittedError, match=r"Load the weights of the fit, or"):
        temperature.check_fitted(model)
    with pytest.raises(NotFittedError, match="Pass the -uq.ckpt that the fit or `save_fitted` wrote as `ckpt_path`"):
        make_trainer(callbacks=[TemperatureScaling()]).test(ours(), VAL, verbose=False)


def test_a_state_of_other_weights_takes_the_path_away():
    one, two = ours(), ours()
    first, second = (TemperatureScaling().fit(model, VAL) for model in (one, two))
    first.uq_ckpt_path = "one-uq.ckpt"
    first.load_state_dict(first.state_dict())
    assert first.uq_ckpt_path == "one-uq.ckpt"
    first.load_state_dict(second.state_dict())
    assert first.uq_ckpt_path is None


# ---------------------------------------------------------------------- what is refused


def changed(model):
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    return model


def test_callbacks_that_do_not_go_into_a_file(tmp_path):
    model, path = Plain(), tmp_path / "a.ckpt"
    one = TemperatureScaling().fit(model, VAL)
    of_predictions = ConformalSets().fit_predictions(DeterministicModule(LINEAR).predict(VAL_X), VAL_Y)
    for callbacks, error, match in (
        ([], InputError, "`callbacks` must be a list of fitted callbacks, but it is empty"),
        (one, InputError, "`callbacks` must be a list .* but it is a TemperatureScaling"),
        ([one, OODDetection({"far": loader()})], InputError, "but OODDetection has no such state. Leave it out"),
        ([one, TemperatureScaling()], InputError, "two callbacks with the key 'TemperatureScaling'. Pass a `name=`"),
        ([one, FitGMM()], NotFittedError, r"FitGMM is not fitted. Call `fit\(model, loader\)` first"),
        (
            [of_predictions],
            NotFittedError,
            "ConformalSets was fitted to predictions in memory, so its weights are unknown",
        ),
        ([TemperatureScaling().fit(Plain(), VAL)], NotFittedError, "was fitted on other weights than those of `model`"),
    ):
        with pytest.raises(error, match=match):
            save_fitted(path, model, callbacks)
    save_fitted(path, model, [one, TemperatureScaling(name="two").fit(model, VAL)])
    for cast in (model.bfloat16(), changed(model)):
        with pytest.raises(
            NotFittedError, match=r"other weights than those of `model`, or before their precision changed"
        ):
            save_fitted(path, cast, [one])
    with pytest.raises(InputError, match="`model` must be a torch.nn.Module, but its type is str"):
        save_fitted(path, "model", [one])
    with pytest.raises(InputError, match="`path` must be the path of a file, but its type is Plain"):
        save_fitted(model, path, [one])


def test_paths_that_cannot_be(tmp_path):
    model = Plain()
    callbacks = [TemperatureScaling().fit(model, VAL)]
    training = tmp_path / "training.ckpt"
    torch.save({"state_dict": model.state_dict(), "optimizer_states": []}, training)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for path, match in (
        (tmp_path / "missing" / "a.ckpt", "must be in an existing directory, but .*missing does not exist. Create it"),
        (tmp_path, "must be a file, but .* is a directory"),
        (
            tmp_path / "last-uq.ckpt",
            "would resume from a file named last-uq.ckpt. Use a name such as model-uq",
        ),
        (training, "a training checkpoint, which would be overwritten"),
        (tmp_path / "text.ckpt", "must not exist, or be a file of this kind, but .* cannot be read"),
    ):
        with pytest.raises(InputError, match=match):
            save_fitted(path, model, callbacks)
    assert callbacks[0].uq_ckpt_path is None
    assert "optimizer_states" in torch.load(training, weights_only=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.ckpt", "training.ckpt"]


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    model, path = Plain(), tmp_path / "a.ckpt"
    save_fitted(path, model, [TemperatureScaling().fit(model, VAL)])
    before = path.read_bytes()
    gmm = FitGMM().fit(model, loader())

    def fail(content, file, *_, **__):
        Path(file).write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_fitted(path, model, [gmm])
    assert path.read_bytes() == before
    assert gmm.uq_ckpt_path is None
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_hook_that_needs_a_trainer_is_named(tmp_path):
    model = NeedsTrainer()
    with pytest.raises(InputError, match="`on_save_checkpoint` of NeedsTrainer failed without a Trainer"):
        save_fitted(tmp_path / "a.ckpt", model, [TemperatureScaling().fit(model, VAL)])


def test_hyper_parameters_that_are_no_plain_data_are_left_out(tmp_path):
    model, path = Lit(width=6), tmp_path / "a.ckpt"
    model.hparams["act"] = nn.ReLU()
    save_fitted(path, model, [TemperatureScaling().fit(model, VAL)])
    with pytest.raises(InputError, match="lacks the hyper-parameters act, which are not plain data"):
        load_fitted(path)
    assert load_fitted(path, Lit())(TEST_X)["probs"].shape == (31, 2)


# ---------------------------------------------------------------------- two ranks

TWO_RANKS = """
import json, os, time
from datetime import timedelta
import torch
import torch.multiprocessing as mp
from lightning_uq import TemperatureScaling, load_fitted, save_fitted
from lightning_uq.callbacks import save

write, num_written = save.write_checkpoint, 0

def write_slowly(*args):
    global num_written
    time.sleep(1)
    num_written += 1
    write(*args)

def main(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    save.write_checkpoint = write_slowly
    torch.manual_seed(0)
    model, x = torch.nn.Linear(2, 2), torch.randn(64, 2)
    temperature = TemperatureScaling().fit(model, [(x, (x[:, 0] > 0).long())])
    path, found = f"{folder}/model-uq.ckpt", []
    save_fitted(path, model, [temperature])
    found += [temperature.uq_ckpt_path == path, list(load_fitted(path, torch.nn.Linear(2, 2))(x))]
    broken = [temperature] if rank == 0 else [TemperatureScaling()]
    for where, callbacks in ((f"{folder}/missing/a.ckpt", [temperature]), (f"{folder}/b.ckpt", broken)):
        try:
            save_fitted(where, model, callbacks)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}".split(folder)[0])
    found += [os.path.exists(f"{folder}/b.ckpt"), num_written]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.barrier()
    os._exit(0)  # at once: see tests/conftest.py

if __name__ == "__main__":
    folder = os.path.dirname(out)
    mp.spawn(main, (folder,), nprocs=2)
    json.dump([json.load(open(f"{folder}/{rank}.json")) for rank in range(2)], open(out, "w"))
"""


def test_two_ranks_write_one_file_and_fail_together(run_script):
    first, second = run_script(TWO_RANKS, timeout=120)
    assert (first.pop(), second.pop()) == (1, 0)  # who has written
    assert first == second
    assert first[:2] == [True, ["probs"]]
    assert first[2].startswith("InputError: `path` must be in an existing directory")
    assert first[3].startswith("NotFittedError: TemperatureScaling is not fitted")
    assert first[4] is False


def test_callbacks_that_have_not_read_each_other_are_refused(tmp_path):
    module, val = UsersModule(), rows("classification", 100, 1)
    temperature = TemperatureScaling().fit(module, val)
    gmm = FitGMM(feature_transform="raw").fit(module, rows("classification", 100))
    apart = "was fitted to predictions without the result of"
    with pytest.raises(InputError, match=f"ConformalSets {apart} TemperatureScaling"):
        save_fitted(tmp_path / "a.ckpt", module, [ConformalSets().fit(module, val), temperature])
    with pytest.raises(InputError, match=f"OODAlarm {apart} FitGMM"):
        save_fitted(tmp_path / "a.ckpt", module, [gmm, OODAlarm().fit(module, val)])
    sets = ConformalSets().fit(module, val, after=[temperature])
    alarm = OODAlarm().fit(module, val, after=[gmm, temperature])
    by_entropy = OODAlarm(score="max_softmax", name="entropy").fit(module, val, after=[temperature])
    save_fitted(tmp_path / "a.ckpt", module, [gmm, temperature, sets, alarm, by_entropy])
    keys = [one.state_key for one in (gmm, temperature, sets, alarm)]
    found = load_fitted(tmp_path / "a.ckpt", UsersModule(), states=keys)(torch.zeros(2, FEATURES))
    assert list(found) == ["probs", "prediction_set", "log_density", "ood_score", "ood_p_value", "ood_alarm"]


def test_a_task_that_is_the_default_goes_with_none(tmp_path):
    module, val = UsersModule(), rows("classification", 100, 1)
    gmm = FitGMM(feature_transform="raw").fit(module, rows("classification", 100))
    temperature = TemperatureScaling(task="classification").fit(module, val)
    alarm = OODAlarm().fit(module, val, after=[gmm, temperature])
    save_fitted(tmp_path / "a.ckpt", module, [gmm, temperature, alarm])
    assert "ood_alarm" in load_fitted(tmp_path / "a.ckpt", UsersModule())(torch.zeros(2, FEATURES))
    x = torch.randn(60, FEATURES)
    regressor = nn.Linear(FEATURES, 1)
    unlabelled = FitGMM(feature_transform="raw", num_components=1).fit(regressor, [x])
    alarm = OODAlarm(task=Regression(head="mean")).fit(regressor, [x], after=[unlabelled])
    save_fitted(tmp_path / "b.ckpt", regressor, [unlabelled, alarm])
    assert list(load_fitted(tmp_path / "b.ckpt", regressor)(x))[-3:] == ["ood_score", "ood_p_value", "ood_alarm"]


def test_what_was_read_goes_into_the_file_too(tmp_path):
    module, val = UsersModule(), rows("classification", 100, 1)
    gmm = FitGMM(feature_transform="raw").fit(module, rows("classification", 100))
    temperature = TemperatureScaling().fit(module, val)
    alarm = OODAlarm().fit(module, val, after=[gmm])
    with pytest.raises(
        InputError, match="OODAlarm was fitted to the score of a density or distance, such as FitGMM's. Pass that"
    ):
        save_fitted(tmp_path / "a.ckpt", module, [alarm, temperature])
    with pytest.raises(
        InputError, match="ConformalSets was fitted to calibrated predictions. Pass the callback that calibrates"
    ):
        save_fitted(tmp_path / "a.ckpt", module, [gmm, ConformalSets().fit(module, val, after=[temperature])])
    # No calibration changes a density's score, so the alarm need not have read it.
    save_fitted(tmp_path / "a.ckpt", module, [gmm, temperature, alarm])
    assert "ood_alarm" in load_fitted(tmp_path / "a.ckpt", UsersModule())(torch.zeros(2, FEATURES))
    assert not list(tmp_path.glob("*.partial"))
