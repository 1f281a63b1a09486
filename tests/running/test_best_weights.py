"""Which checkpoint files a fit reads, and how far it trusts them."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq.errors import InputError
from lightning_uq.running.best_weights import read_back


def test_a_file_that_is_not_this_trainings_own_must_hold_plain_data(make_trainer, tmp_path):
    torch.save({"state_dict": {}, "note": Path("x")}, tmp_path / "other.ckpt")
    own = make_trainer(callbacks=[ModelCheckpoint(dirpath=tmp_path)], enable_checkpointing=True)
    assert read_back(str(tmp_path / "other.ckpt"), own)["note"] == Path("x")
    other = make_trainer(callbacks=[ModelCheckpoint(dirpath=tmp_path / "run")], enable_checkpointing=True)
    with pytest.raises(InputError, match="must hold weights and plain data.*nothing in it was run"):
        read_back(str(tmp_path / "other.ckpt"), other)
