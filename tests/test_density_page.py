"""Run the example of docs/density.md, and hold its tables against the study's results."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "density.md").read_text()
COLUMNS = ("raw held_out", "polar held_out", "combined held_out", "knn", "energy", "entropy")


def test_the_example_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, "density.md", "exec"), names)
    assert names["tested"]["ood_auroc/far/density"] > 0.7
    assert names["prediction"].ood_score.shape == (100,)


@pytest.mark.parametrize("half", ["choose", "report"])
def test_the_tables_are_the_results(half):
    found = json.loads((ROOT / "benchmarks" / f"density_{half}.json").read_text())["auroc"]
    for pair, values in found.items():
        row = "| " + " | ".join([*pair.split(" / "), *(f"{values[name]:.3f}" for name in COLUMNS)]) + " |"
        assert row in TEXT
    means = {name: sum(values[name] for values in found.values()) / len(found) for name in next(iter(found.values()))}
    (line,) = re.findall(r"\| \*\*combined \(the default\)\*\* \| ([\d.]+) \| ([\d.]+) \|", TEXT)
    assert line[half == "report"] == f"{means['combined held_out']:.3f}"
    assert means["combined held_out"] > max(means[name] for name in ("knn", "energy", "entropy"))


def test_the_halves_share_no_pair():
    choose, report = (
        {*json.loads((ROOT / "benchmarks" / f"density_{half}.json").read_text())["auroc"]}
        for half in ("choose", "report")
    )
    assert not choose & report
