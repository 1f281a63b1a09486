"""docs/active_learning.md: its table is that of the kept results, and it names every strategy."""

import json
import sys
from pathlib import Path

import pytest

from lightning_uq.active_learning import STRATEGIES
from lightning_uq.compare.active import paired_t_test

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "active_learning.md").read_text()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import active_digits

    return active_digits


def test_the_table_shows_the_kept_results(script):
    results = json.loads(script.RESULTS.read_text())
    shown = PAGE.split(script.BEGIN)[1].split(script.END)[0]
    assert shown == script.table(results)
    assert len(results["curves"]["random"]["accuracy"]) == 5
    assert results["labels"][0] == 20
    assert results["labels"][-1] == 300


def test_the_kept_results_agree_with_their_curves(script):
    import torch

    results = json.loads(script.RESULTS.read_text())
    labels = torch.tensor(results["labels"], dtype=torch.float64)

    def area(name):
        curve = torch.tensor(results["curves"][name]["accuracy"], dtype=torch.float64)
        return torch.trapezoid(curve, labels, dim=1) / (labels[-1] - labels[0])

    for row in results["rows"]:
        assert row["area"]["mean"] == pytest.approx(float(area(row["method"]).mean()))
        if row["method"] != "random":
            assert row["p"]["mean"] == pytest.approx(paired_t_test(area(row["method"]) - area("random"))["p"])


def test_every_strategy_is_listed():
    for name in STRATEGIES:
        assert f"`{name}`" in PAGE
