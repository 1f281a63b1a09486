import pytest

from lightning_uq.errors import InputError
from lightning_uq.report import writable_directory, write_files


def test_files_replace_and_stale_ones_go(tmp_path):
    for name in ("a.json", "scores_old.png", "scores_new.png", "mine.png"):
        (tmp_path / name).write_text("old")
    write_files(tmp_path, {"a.json": b"new", "scores_new.png": b"new"}, stale=("scores_*.png",))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.json": "new", "scores_new.png": "new", "mine.png": "old"}


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "scores_old.png").write_text("old")
    with pytest.raises(TypeError):
        write_files(tmp_path, {"a.json": b"new", "b.json": object()}, stale=("scores_*.png",))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old", "scores_old.png": "old"}


def test_directory_is_made_with_its_parents(tmp_path):
    assert writable_directory(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert writable_directory(tmp_path / "a" / "b").is_dir()


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file, not a directory."):
        writable_directory(tmp_path / "file")
    with pytest.raises(InputError, match="The directory .*below cannot be written to: Not a directory"):
        writable_directory(tmp_path / "file" / "below")
