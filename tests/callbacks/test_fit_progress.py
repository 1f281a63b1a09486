"""A fit that is interrupted continues after the batches that it has read, and ends with the state of an uninterrupted one."""

import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_uq import ConformalSets, FitGMM, FitKNN, FitLaplace, OODAlarm, TemperatureScaling, VectorScaling
from lightning_uq.errors import InputError, NotFiniteError
from tests.callbacks.test_streams import CLASSES, N, fits, loader_of, modules
from tests.contract import cases
from tests.contract.cases import UsersModule

ROOT = Path(__file__).parents[2]
SIZE = 4  # rows per batch
MODEL = modules()[id(CLASSES)]


class Lost(IterableDataset):
    """Rows whose connection is lost before row ``at``, unless it is None."""

    def __init__(self, data, at):
        self.data, self.at, self.num_read = data, at, 0

    def __iter__(self):
        for i in range(len(self.data)):
            if i == self.at:
                raise ConnectionError("lost")
            self.num_read += 1
            x, y = self.data[i]
            yield {"input": x, "target": y, "index": i}


class Calls:
    """Counts the calls of a network."""

    def __init__(self, model):
        self.num = 0
        model.register_forward_hook(self.count)

    def count(self, *_):
        self.num += 1


def lost(data, at=None):
    return DataLoader(Lost(data, at), batch_size=SIZE)


def callback_named(name, folder):
    if name in ("knn", "vector"):
        return {"knn": FitKNN, "vector": VectorScaling}[name](progress_dir=folder, save_every=2), CLASSES
    callback, data = fits()[name]
    callback.progress_dir, callback.save_every = folder, 2
    return callback, data


def tensors_of(callback):
    return callback.state_dict()["tensors"]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one) if isinstance(one, torch.Tensor) else found[name] == one, name


@pytest.mark.filterwarnings("ignore:.*fewer than 20 per class")
@pytest.mark.parametrize("name", [*fits(), "knn", "vector"])
def test_a_continued_fit_equals_an_uninterrupted_one(name, tmp_path):
    """Bit for bit: the sums are added in the same order."""
    callback, data = callback_named(name, None)
    model = modules()[id(data)]
    held_out = cases.dataset("classification", 30, 2)
    if name == "combined":
        callback.coordinates.held_out.given = lost(held_out)
    expected = tensors_of(callback.fit(model, lost(data)))
    calls = Calls(model)

    interrupted, _ = callback_named(name, tmp_path)
    with pytest.raises(ConnectionError):
        interrupted.fit(model, lost(data, at=5 * SIZE))
    assert not interrupted.fitted
    assert [path.name.split(".")[1:] for path in tmp_path.iterdir()] == [["pass0", "rank0-of-1", "pt"]]

    continued, _ = callback_named(name, tmp_path)
    if name == "combined":  # interrupted once more, in the held-out rows
        continued.coordinates.held_out.given = lost(held_out, at=5 * SIZE)
        with pytest.raises(ConnectionError):
            continued.fit(model, lost(data))
        assert len(list(tmp_path.iterdir())) == 2
        continued, _ = callback_named(name, tmp_path)
        continued.coordinates.held_out.given = lost(held_out)
    before, stream = calls.num, lost(data)
    assert_equal(tensors_of(continued.fit(model, stream)), expected)
    num_batches = -(-len(data) // SIZE) if name != "combined" else -(-len(held_out) // SIZE)
    per_batch = 2 if name == "gmm" else 1
    assert calls.num - before <= per_batch * (num_batches - 4) + 2  # the first batch that is run is checked
    assert stream.dataset.num_read == (0 if name == "combined" else N)
    assert list(tmp_path.iterdir()) == []


class Stateful:
    """A loader that continues where it was, as torchdata's ``StatefulDataLoader``."""

    def __init__(self, data, lost_at=None):
        self.batches, self.lost_at, self.start, self.num_read, self.position = list(data), lost_at, 0, 0, 0

    def __iter__(self):
        for i in range(self.start, len(self.batches)):
            if i == self.lost_at:
                raise ConnectionError("lost")
            self.position, self.num_read = i + 1, self.num_read + 1
            yield self.batches[i]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = state["position"]


def test_a_loader_with_a_state_continues_by_itself(tmp_path):
    expected = TemperatureScaling().fit(MODEL, lost(CLASSES)).temperature
    with pytest.raises(ConnectionError):
        TemperatureScaling(progress_dir=tmp_path, save_every=2).fit(MODEL, Stateful(lost(CLASSES), lost_at=5))
    rest = Stateful(lost(CLASSES))
    assert torch.equal(TemperatureScaling(progress_dir=tmp_path).fit(MODEL, rest).temperature, expected)
    assert rest.num_read == len(rest.batches) - 4


def test_a_state_that_no_file_can_hold_is_refused(tmp_path):
    loader = Stateful(lost(CLASSES))
    loader.state_dict = lambda: {"connection": object()}
    with pytest.raises(
        InputError, match=r"needs a loader whose `state_dict\(\)` is plain data, but 'state.connection' is not"
    ):
        TemperatureScaling(progress_dir=tmp_path, save_every=2).fit(MODEL, loader)


@pytest.mark.parametrize("loader", [DataLoader(CLASSES, batch_size=SIZE), list(DataLoader(CLASSES, batch_size=SIZE))])
def test_a_data_set_with_a_length_continues_too(loader, tmp_path, monkeypatch):
    expected = TemperatureScaling().fit(MODEL, loader).temperature
    fit_again = TemperatureScaling(progress_dir=tmp_path, save_every=2)
    calls = 0

    def unpack_batch(batch):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise ConnectionError("lost")
        return batch

    with pytest.raises(ConnectionError):
        TemperatureScaling(progress_dir=tmp_path, save_every=2, unpack_batch=unpack_batch).fit(MODEL, loader)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(fit_again.fit(MODEL, loader).temperature, expected)


KILLED = """
import os, signal, sys
from tests.callbacks.test_fit_progress import *
class Killed(Lost):
    def __iter__(self):
        for i, row in enumerate(super().__iter__()):
            if i == 9 * SIZE:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row
FitGMM(feature_transform="raw", progress_dir=sys.argv[1], save_every=2).fit(MODEL, DataLoader(Killed(CLASSES, None), batch_size=SIZE))
"""


def test_a_killed_process_is_continued_by_another(tmp_path, preloaded):
    script, folder = tmp_path / "killed.py", tmp_path / "progress"
    script.write_text(KILLED)
    status, said = preloaded.run(
        script, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, tmp_path, 300, [str(folder)]
    )
    assert status == -signal.SIGKILL, said
    expected = FitGMM(feature_transform="raw").fit(MODEL, lost(CLASSES))
    calls = Calls(MODEL)
    continued = FitGMM(feature_transform="raw", progress_dir=folder).fit(MODEL, lost(CLASSES))
    assert_equal(tensors_of(continued), tensors_of(expected))
    assert calls.num <= 2 * (-(-N // SIZE) - 8) + 1


# ---------------------------------------------------------------------- under a Trainer


def test_a_fit_after_a_training_is_continued_in_a_validation(make_trainer, tmp_path):
    folder, module = tmp_path / "progress", UsersModule()
    data = cases.loader("classification", 20)
    calls = TemperatureScaling(dataloader=lost(CLASSES, at=5 * SIZE), progress_dir=folder, save_every=2)
    trainer = make_trainer(callbacks=[calls])
    with pytest.raises(ConnectionError):
        trainer.fit(module, data, data)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    again = TemperatureScaling(dataloader=lost(CLASSES), progress_dir=folder)
    with pytest.raises(
        InputError,
        match=r"holds an interrupted fit of TemperatureScaling \(TemperatureScaling.pass0.rank0-of-1.pt\), which a training",
    ):
        make_trainer(callbacks=[again]).fit(UsersModule(), data, data)
    make_trainer(callbacks=[again]).validate(UsersModule(), data, ckpt_path=tmp_path / "trained.ckpt", verbose=False)
    assert torch.equal(again.temperature, TemperatureScaling().fit(module, lost(CLASSES)).temperature)
    assert list(folder.iterdir()) == []


RANKS = """
import json, warnings
from lightning.pytorch import Trainer
from tests.callbacks.test_fit_progress import *
warnings.simplefilter("ignore")
from tests.callbacks.test_streams import Divided
class Part(Divided):
    def __iter__(self):
        for i, row in enumerate(super().__iter__()):
            if i == self.lost_at:
                raise ConnectionError("lost")
            if i == self.ends_at:
                return
            yield row
options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
gmm = FitGMM(feature_transform="raw", progress_dir=FOLDER, save_every=2)
trainer = Trainer(devices=2, strategy="ddp", precision="64-true", callbacks=[gmm], **options)
part = Part(CLASSES, trainer.global_rank, 2)
part.lost_at, part.ends_at = LOST_AT[trainer.global_rank], ENDS_AT[trainer.global_rank]
gmm.dataloader = DataLoader(part, batch_size=SIZE)
calls, error = Calls(MODEL), None
try:
    trainer.validate(MODEL, DataLoader(CLASSES, batch_size=8), verbose=False)
except Exception as caught:
    error = f"{type(caught).__name__}: {caught}"
if trainer.is_global_zero:
    tensors = {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in (gmm.state_dict() or {"tensors": {}})["tensors"].items()}
    json.dump({"error": error, "tensors": tensors, "num_calls": calls.num}, open(out, "w"))
"""


def test_ranks_continue_from_their_own_batches(run_script, tmp_path):
    folder = tmp_path / "progress"

    def run(lost_at=None, ends_at=None):
        code = RANKS.replace("FOLDER", repr(str(folder)))
        return run_script(code.replace("LOST_AT", str([None, lost_at])).replace("ENDS_AT", str([None, ends_at])))

    first = run(lost_at=5 * SIZE)
    assert "ConnectionError: lost" in first["error"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"FitGMM.pass0.rank{rank}-of-2.pt" for rank in range(2)]  # rank 0 had read all of its batches
    with pytest.raises(
        InputError, match=r"interrupted fit of FitGMM on another number of ranks than 1 \(FitGMM.pass0.rank0-of-2.pt\)"
    ):
        FitGMM(feature_transform="raw", progress_dir=folder).fit(MODEL, lost(CLASSES))
    refused = run(ends_at=2 * SIZE)
    assert "to at least 4 batches, but the data end after 2" in refused["error"]
    assert sorted(path.name for path in folder.iterdir()) == names
    second = run()
    assert second["error"] is None
    expected = tensors_of(FitGMM(feature_transform="raw").fit(MODEL, loader_of(CLASSES, stream=False)))
    for name, one in expected.items():
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(
                torch.as_tensor(second["tensors"][name], dtype=one.dtype), one, rtol=1e-7, atol=1e-9
            )
    assert second["num_calls"] < first["num_calls"]
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------- what is refused


def interrupt(folder, **options):
    with pytest.raises(ConnectionError):
        FitGMM(feature_transform="raw", progress_dir=folder, save_every=2, **options).fit(
            MODEL, lost(CLASSES, at=5 * SIZE)
        )


def test_other_settings_weights_and_files_are_refused_and_the_files_kept(tmp_path):
    interrupt(tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    fit = FitGMM(feature_transform="raw", progress_dir=tmp_path, save_every=2)
    with pytest.raises(
        InputError, match="interrupted fit of FitGMM with other settings: covariance='full'. Continue that fit, or pass"
    ):
        FitGMM(feature_transform="raw", covariance="diagonal", progress_dir=tmp_path).fit(MODEL, lost(CLASSES))
    with pytest.raises(InputError, match="interrupted fit of FitGMM with other weights"):
        fit.fit(UsersModule().double(), lost(CLASSES))
    with pytest.raises(InputError, match="interrupted fit of FitGMM to an unknown number of batches, not 16"):
        fit.fit(MODEL, DataLoader(CLASSES, batch_size=SIZE))
    with pytest.raises(InputError, match="interrupted fit of FitGMM to at least 4 batches, but the data end after 2"):
        fit.fit(MODEL, lost(torch.utils.data.Subset(CLASSES, range(2 * SIZE))))
    assert file.read_bytes() == before
    file.write_bytes(before[:-400])
    with pytest.raises(
        InputError, match="`progress_dir` must hold files of an interrupted fit, but .*pt cannot be read"
    ):
        fit.fit(MODEL, lost(CLASSES))


def test_a_file_with_other_objects_is_refused(tmp_path):
    interrupt(tmp_path)
    (file,) = tmp_path.iterdir()
    torch.save({"head": {}, "sums": Calls(MODEL)}, file)
    with pytest.raises(InputError, match="must hold files of an interrupted fit"):
        FitGMM(feature_transform="raw", progress_dir=tmp_path).fit(MODEL, lost(CLASSES))


def test_invalid_data_end_a_fit_for_good(tmp_path):
    """Without the invalid row, later rows would have other positions than those that were read."""
    rows = list(CLASSES)
    rows[6 * SIZE] = (torch.full((cases.FEATURES,), torch.nan), rows[6 * SIZE][1])
    with pytest.raises(NotFiniteError):
        ConformalSets(progress_dir=tmp_path, save_every=2).fit(MODEL, lost(rows))
    assert list(tmp_path.iterdir()) == []


def test_earlier_callbacks_must_have_the_same_results(tmp_path):
    scaling = TemperatureScaling().fit(MODEL, lost(CLASSES))
    with pytest.raises(ConnectionError):
        ConformalSets(progress_dir=tmp_path, save_every=2).fit(MODEL, lost(CLASSES, at=5 * SIZE), after=[scaling])
    scaling._tensors["temperature"] *= 2
    with pytest.raises(InputError, match="ConformalSets was fitted to predictions with a temperature of"):
        ConformalSets(progress_dir=tmp_path).fit(MODEL, lost(CLASSES), after=[scaling])


@pytest.mark.parametrize("make", [FitLaplace, OODAlarm])
def test_callbacks_that_cannot_continue_say_so(make):
    with pytest.raises(
        InputError, match=f"{make.__name__} cannot continue an interrupted fit. Leave out `progress_dir`"
    ):
        make(progress_dir="progress")


def test_two_callbacks_share_a_folder(tmp_path):
    interrupt(tmp_path, name="a/b")
    interrupt(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "FitGMM-a%2Fb.pass0.rank0-of-1.pt",
        "FitGMM.pass0.rank0-of-1.pt",
    ]
    FitGMM(feature_transform="raw", progress_dir=tmp_path).fit(MODEL, lost(CLASSES))
    assert len(list(tmp_path.iterdir())) == 1
