"""Run the examples of docs/streams.md."""

from tests.docs.pages import run_page


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    assert run_page("streams.md", tmp_path, monkeypatch, capsys) == set()
    assert list((tmp_path / "progress").iterdir()) == []
