"""docs/acting.md: its table is that of the kept results."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "acting.md").read_text()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bandit

    return bandit


def test_the_table_shows_the_kept_results(script):
    results = json.loads(script.RESULTS.read_text())
    assert PAGE.split(script.BEGIN)[1].split(script.END)[0] == script.table(results)
    assert len(results["seeds"]) == 15
    for row in results["rows"]:
        runs = results["curves"][row["method"]]
        assert row["regret"]["mean"] == pytest.approx(sum(run[-1] for run in runs) / len(runs))
        assert row["regret_median"]["mean"] == sorted(run[-1] for run in runs)[len(runs) // 2]
