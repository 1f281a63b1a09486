"""A process is killed while it writes a checkpoint: the previous one is whole, and no half file has a checkpoint's name."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq.callbacks.sibling import fitted_states
from tests.contract.cases import FITTING, MODULES, UsersModule, loader, rows
from tests.contract.running import TEST, TRAIN, VAL, assert_equal_states
from tests.trainers import quiet_trainer

if sys.platform == "win32":
    pytest.skip("files are limited as POSIX has it", allow_module_level=True)
from tests.contract.killing import dies, files_end_at


def named(cases, name):
    (found,) = [case for case in cases if case.name == name]
    return found


def save_and_change(name, path):
    """Train and save to ``path``, keep what it predicts beside it, and be killed in the middle of the next save."""
    tempfile.tempdir = str(path.parent)  # where Lightning begins to write
    case, trainer = named(MODULES, name), quiet_trainer(path.parent)
    module = case.build()
    trainer.fit(module, loader(case.task, TRAIN), loader(case.task, VAL, 1))
    trainer.save_checkpoint(path)
    torch.save(module.eval().predict(rows(TEST, 2)[0]).to_dict(), path.with_suffix(".expected"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    files_end_at(path.stat().st_size // 2)
    trainer.save_checkpoint(path)


@pytest.mark.axis("kill")
def test_modules(make_trainer, module_case, tmp_path):
    path = tmp_path / "last.ckpt"
    assert dies(save_and_change, module_case.name, path)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    again = type(module_case.build()).load_from_checkpoint(path)
    expected = torch.load(path.with_suffix(".expected"), weights_only=True)
    assert_equal_states(again.eval().predict(rows(TEST, 2)[0]).to_dict(), expected)
    resumed = module_case.build()
    make_trainer(max_epochs=2).fit(
        resumed, loader(module_case.task, TRAIN), loader(module_case.task, VAL, 1), ckpt_path=path, weights_only=True
    )
    assert resumed.current_epoch == 2


class InPlace(TorchCheckpointIO):
    """A user's plugin, as careless as can be."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        torch.save(checkpoint, path)


def fit_two(name, weights, folder, *, is_there, is_killed):
    """As at the end of a training with two callbacks: the second adds its state to the file of the first, if it is there."""
    case, val = named(FITTING, name), loader("classification", VAL, 1)
    first, second = (case.build(weights=weights, name=name) for name in ("first", "second"))
    callbacks = [ModelCheckpoint(folder, monitor="val_loss"), first]
    trainer = quiet_trainer(folder, callbacks=callbacks, plugins=[InPlace()], enable_checkpointing=True)
    module = UsersModule()
    trainer.fit(module, loader("classification", TRAIN), val)
    path = Path(first.uq_ckpt_path)
    whole = path.read_bytes()
    torch.save({"state": first.state_dict(), "path": str(path), "whole": whole}, folder / "before")
    if not is_there:
        path.unlink()
    second.dataloader = val
    trainer.callbacks.insert(1, second)
    if is_killed:
        files_end_at(len(whole) // 2)
    second.on_train_end(trainer, module)


def one_is_there(*args):
    fit_two(*args, is_there=True, is_killed=True)


def none_is_there(*args):
    fit_two(*args, is_there=False, is_killed=True)


def nobody_is_killed(*args):
    fit_two(*args, is_there=False, is_killed=False)


@pytest.mark.axis("kill")
@pytest.mark.parametrize("weights", ["best", "last"])
def test_callbacks(make_trainer, fitting_case, tmp_path, weights):
    def checkpoints():
        return {file.name for file in tmp_path.glob("*.ckpt")}

    assert dies(one_is_there, fitting_case.name, weights, tmp_path)
    before = torch.load(tmp_path / "before", weights_only=True)
    path = Path(before["path"])
    assert path.read_bytes() == before["whole"]
    (plain,) = checkpoints() - {path.name}
    fresh = fitting_case.build(weights=weights, name="first")
    assert fitted_states(path).keys() == {fresh.state_key}
    make_trainer(callbacks=[fresh]).test(
        UsersModule(), loader("classification", TEST, 2), ckpt_path=path, weights_only=True, verbose=False
    )
    assert_equal_states(fresh.state_dict(), before["state"])
    # Where there was none, there is none: no half file is taken for one.
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    assert dies(none_is_there, fitting_case.name, weights, tmp_path)
    assert checkpoints() == {plain}
    # What was left behind is in nobody's way.
    (tmp_path / plain).unlink()
    assert not dies(nobody_is_killed, fitting_case.name, weights, tmp_path)
    second = fitting_case.build(weights=weights, name="second")
    assert fitted_states(path).keys() == {fresh.state_key, second.state_key}
