"""A process is killed while it writes a checkpoint: the previous one is whole, and no half file has a checkpoint's name."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq.callbacks.sibling import fitted_states
from tests.contract.cases import UsersModule, loader, rows
from tests.contract.running import TEST, TRAIN, VAL, assert_equal_states

if sys.platform == "win32":
    pytest.skip("processes are forked and limited as POSIX has it", allow_module_level=True)
from tests.contract.killing import dies, files_end_at


@pytest.mark.axis("kill")
def test_modules(make_trainer, module_case, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where Lightning begins to write
    trainer, module = make_trainer(), module_case.build()
    trainer.fit(module, loader(module_case.task, TRAIN), loader(module_case.task, VAL, 1))
    trainer.save_checkpoint(path)
    size, x = path.stat().st_size, rows(TEST, 2)[0]
    expected = module.eval().predict(x).to_dict()

    def write():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        files_end_at(size // 2)
        trainer.save_checkpoint(path)

    assert dies(write)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    again = type(module).load_from_checkpoint(path)
    assert_equal_states(again.eval().predict(x).to_dict(), expected)
    resumed = module_case.build()
    make_trainer(max_epochs=2).fit(
        resumed, loader(module_case.task, TRAIN), loader(module_case.task, VAL, 1), ckpt_path=path, weights_only=True
    )
    assert resumed.current_epoch == 2


class InPlace(TorchCheckpointIO):
    """A user's plugin, as careless as can be."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        torch.save(checkpoint, path)


@pytest.mark.axis("kill")
@pytest.mark.parametrize("weights", ["best", "last"])
def test_callbacks(make_trainer, fitting_case, tmp_path, weights):
    first, second = (fitting_case.build(weights=weights, name=name) for name in ("first", "second"))
    options = {"plugins": [InPlace()], "enable_checkpointing": True}
    trainer = make_trainer(callbacks=[ModelCheckpoint(tmp_path, monitor="val_loss"), first], **options)
    module, train, val = UsersModule(), loader("classification", TRAIN), loader("classification", VAL, 1)
    trainer.fit(module, train, val)
    path = Path(first.uq_ckpt_path)
    before, size = path.read_bytes(), path.stat().st_size
    names = {file.name for file in tmp_path.glob("*.ckpt")}

    def write(limit=None):
        """As at the end of a training with two callbacks: the second adds its state to the file of the first."""
        second.default_loader = lambda trainer: val
        trainer.callbacks.insert(1, second)
        if limit is not None:
            files_end_at(limit)
        second.on_train_end(trainer, module)

    assert dies(lambda: write(size // 2))
    assert {file.name for file in tmp_path.glob("*.ckpt")} == names
    assert path.read_bytes() == before
    assert fitted_states(path).keys() == {first.state_key}
    fresh = fitting_case.build(weights=weights, name="first")
    make_trainer(callbacks=[fresh]).test(
        UsersModule(), loader("classification", TEST, 2), ckpt_path=path, weights_only=True, verbose=False
    )
    assert_equal_states(fresh.state_dict(), first.state_dict())
    # Where there was none, there is none: no half file is taken for one.
    path.unlink()
    assert dies(lambda: write(size // 2))
    assert {file.name for file in tmp_path.glob("*.ckpt")} == names - {path.name}
    # What was left behind is in nobody's way.
    assert not dies(write)
    assert fitted_states(path).keys() == {first.state_key, second.state_key}
