"""A record comes back from its file as it was, and no other file passes for one."""

import json

import numpy as np
import pytest
import torch

from lightning_uq.compare.records import Record, record_path
from lightning_uq.errors import InputError


def make_record(**changes):
    arguments = {
        "method": "softmax",
        "seed": 3,
        "values": {"parameters": 10.0, "train_seconds": 0.25},
        "rows": {"nll": torch.rand(5, dtype=torch.float64), "correct": torch.tensor([True, False, True, True, False])},
        "row_ids": torch.tensor([4, 1, 9, 7, 0]),
        "outside": {"ood_score": torch.rand(3)},
        "num_indices": 5,
    }
    return Record(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"outside": {}}, {"num_indices": None}, {"rows": {"bins": torch.rand(5, 3, 15)}}]
)
def test_it_comes_back_as_it_was(tmp_path, changes):
    record = make_record(**changes)
    record.save(tmp_path)
    again = Record.load(record_path(tmp_path, "softmax", 3))
    for name in ("method", "seed", "values", "num_indices"):
        assert getattr(again, name) == getattr(record, name)
    torch.testing.assert_close(again.row_ids, record.row_ids, rtol=0, atol=0)
    for part in ("rows", "outside"):
        saved, loaded = getattr(record, part), getattr(again, part)
        assert saved.keys() == loaded.keys()
        for name in saved:
            torch.testing.assert_close(loaded[name], saved[name], rtol=0, atol=0)


def test_a_file_that_was_cut_is_no_record(tmp_path):
    make_record().save(tmp_path)
    path = record_path(tmp_path, "softmax", 3)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="is not a record of a comparison"):
        Record.load(path)


def test_another_format_is_named(tmp_path):
    path = tmp_path / "new.npz"
    np.savez(path, facts=np.array(json.dumps({"format": 99})), row_ids=np.arange(2))
    with pytest.raises(InputError, match="has format 99, but this version reads format 2"):
        Record.load(path)


def test_an_interrupted_save_leaves_the_earlier_record(tmp_path, monkeypatch):
    make_record().save(tmp_path)
    path = record_path(tmp_path, "softmax", 3)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda self, content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_record(values={}).save(tmp_path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]
