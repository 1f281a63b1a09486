"""Reading checkpoint files as plain data, and writing them whole."""

import errno
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from lightning_uq import AtomicCheckpointIO, FitGMM, InputError
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.checkpoint_files import plain_part, read_checkpoint, read_file, read_weights
from lightning_uq.writing import replacing
from tests.contract.cases import UsersModule, loader
from tests.trainers import quiet_trainer

STATE = {"state_dict": {"weight": torch.ones(2)}}


class Harmful:
    """What runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as caught:
        read_file(path)
    return str(caught.value)


def test_other_objects_are_refused_by_name_and_nothing_is_run(tmp_path):
    path, ran = tmp_path / "a.ckpt", tmp_path / "ran"
    message = refused(path, {**STATE, "x": Harmful(ran)})
    assert message == (
        f"`path` must name a checkpoint, but {path} cannot be read: it holds {os.mkdir.__module__}.mkdir, which "
        "is neither weights nor plain data; nothing in it was run."
    )
    assert not ran.exists()
    assert "it holds pathlib" in refused(path, {**STATE, "x": tmp_path})
    assert "it holds torch.nn.modules.linear.Linear" in refused(path, {**STATE, "x": nn.Linear(1, 1)})
    torch.load(path, weights_only=False)  # it was no other fault
    assert "weights_only" not in message


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(STATE, path)
    whole = path.read_bytes()
    for content in (b"not a checkpoint", b"", whole[: len(whole) // 2], whole[:-1]):
        assert "cannot be read: it is damaged, or torch did not write it (" in refused(path, content)
    path.unlink()
    for nothing in (path, tmp_path):
        with pytest.raises(InputError, match="cannot be read: .*No such file|Is a directory"):
            read_file(nothing)
    with pytest.raises(InputError, match="^`x` must be good, but .*a.ckpt cannot be read"):
        read_file(path, "`x` must be good")


def test_what_holds_no_weights(tmp_path):
    path = tmp_path / "a.ckpt"
    for content in ([1], {"weight": torch.ones(1)}, {"state_dict": 3}):
        torch.save(content, path)
        with pytest.raises(InputError, match="holds no `state_dict`"):
            read_checkpoint(path)
    for content in ([1], {"epoch": 3}, {"state_dict": {}}):
        torch.save(content, path)
        with pytest.raises(InputError, match="must hold a state dict, alone or under `state_dict`"):
            read_weights(path)
    torch.save(STATE["state_dict"], path)
    assert torch.equal(read_weights(path)["state_dict"]["weight"], torch.ones(2))


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------- under a Trainer


def fit(make_trainer, tmp_path, module=None, **kwargs):
    gmm, best = FitGMM(), ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    trainer = make_trainer(max_epochs=2, callbacks=[best, gmm], enable_checkpointing=True, **kwargs)
    trainer.fit(
        UsersModule() if module is None else module, loader("classification", 40), loader("classification", 21, 1)
    )
    return gmm, trainer


class Slow(TorchCheckpointIO):
    """Takes its time, so that a thread that writes is still at it when the training ends."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        time.sleep(0.2)
        torch.save(checkpoint, path)


class Full(TorchCheckpointIO):
    """The disk has no room for a ``-uq.ckpt``."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if "lightning_uq_written_by" in checkpoint:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        torch.save(checkpoint, path)


def test_checkpoints_that_another_thread_writes_are_waited_for(make_trainer, tmp_path):
    gmm, _ = fit(make_trainer, tmp_path, plugins=[AsyncCheckpointIO(Slow())])
    assert Path(gmm.uq_ckpt_path).name == "best-uq.ckpt"
    assert fitted_states(gmm.uq_ckpt_path).keys() == {"FitGMM"}
    best, written = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("best.ckpt", "best-uq.ckpt"))
    assert all(torch.equal(written[name], best[name]) for name in best)


def test_a_full_disk_leaves_no_half_file(make_trainer, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        fit(make_trainer, tmp_path, plugins=[Full()])
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


class Mode(str, Enum):
    FAST = "fast"


class Settings(Mapping):
    """Somebody's own mapping, as a configuration's."""

    def __init__(self, **values):
        self.values = values

    def __getitem__(self, key):
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def test_what_is_plain_stays_as_it_is(tmp_path):
    state = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).state_dict()
    content = {"state_dict": state, "a": None, "b": {"c": [torch.ones(1), "x", (2.0, {3})], "d": torch.Size([1])}}
    plain, left_out = plain_part(content)
    assert not left_out
    assert plain["state_dict"] is state  # with the versions of its modules
    assert plain["b"]["c"][2] == (2.0, {3})
    torch.save(plain, tmp_path / "a.ckpt")
    read_checkpoint(tmp_path / "a.ckpt")


def test_what_is_not_plain_is_left_out_by_name(tmp_path):
    content = {
        "state_dict": {"weight": torch.ones(1)},
        "hyper_parameters": {
            "width": np.int64(4),
            "net": nn.Sequential(nn.Linear(1, 1)),
            "act": functools.partial(F.relu, inplace=True),
            "mode": Mode.FAST,
            "nested": {"where": Path("x"), "lr": 1.0},
            "config": Settings(lr=0.1, sizes=Settings(a=1)),
        },
        "callbacks": {"Theirs": {"seen": [object()], "count": 1}, "Other": {"count": 2}},
        "vocabulary": {"a": 1, "of": object},
        "loader": iter([1]),
    }
    plain, left_out = plain_part(content)
    hyper_parameters = ["hyper_parameters." + name for name in ("net", "act", "mode", "nested")]
    assert left_out == [*hyper_parameters, "callbacks.Theirs", "vocabulary.of", "loader"]
    assert plain["hyper_parameters"] == {"width": 4, "config": {"lr": 0.1, "sizes": {"a": 1}}}
    assert plain["callbacks"] == {"Other": {"count": 2}}
    assert plain["vocabulary"] == {"a": 1}
    torch.save(plain, tmp_path / "a.ckpt")
    read_checkpoint(tmp_path / "a.ckpt")


# ---------------------------------------------------------------------- killed on another file system


def save_where_renaming_fails(path, is_ours):
    """As where a file is to move to another file system, half of which is written when the process is killed."""
    from tests.contract.killing import die

    def other_file_system(source, target, *args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    def half(source, target, **kwargs):
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        die()

    def half_saved(content, file):
        Path(file).write_bytes(b"half")
        die()

    tempfile.tempdir = str(path.parent)
    trainer = quiet_trainer(path.parent, plugins=[AtomicCheckpointIO()] if is_ours else [])
    trainer.fit(UsersModule(), loader("classification", 40), loader("classification", 21, 1))
    trainer.save_checkpoint(path)
    os.rename, shutil.copyfile = other_file_system, half
    if is_ours:
        torch.save = half_saved
    trainer.save_checkpoint(path)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as POSIX has it")
def test_the_plugin_is_whole_where_temporary_files_lie_on_another_file_system(tmp_path):
    from tests.contract.killing import dies

    ours, lightnings = tmp_path / "ours.ckpt", tmp_path / "lightnings.ckpt"
    assert dies(save_where_renaming_fails, ours, True)
    read_checkpoint(ours)
    # The fault that the plugin is for. Should this fail, Lightning has mended it.
    assert dies(save_where_renaming_fails, lightnings, False)
    assert lightnings.stat().st_size <= 100


def test_the_plugin_saves_and_loads(make_trainer, tmp_path):
    gmm, trainer = fit(make_trainer, tmp_path, plugins=[AtomicCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "new" / "folder" / "a.ckpt")
    read_checkpoint(tmp_path / "new" / "folder" / "a.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "best-uq.ckpt", "new"}
    trainer.test(UsersModule(), loader("classification", 21), ckpt_path="best", verbose=False)
    assert gmm.fitted
