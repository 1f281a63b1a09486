"""The Neural Testbed's script: its problems, tables of known numbers, and what was published."""

import json
import math
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "reproduce" / "published"


def numbers(module: ModuleType, **ten: float) -> dict[str, Any]:
    """A problem's results, in which an agent's divergence of ten labels is as given, else 2."""
    return {
        row: {
            "kl_tau1": 0.25,
            "kl_tau10": ten.get(row, 2.0),
            "test_acc": 0.5,
            "weights": 1000 * (i + 1),
            "seconds": 3.0,
        }
        for i, row in enumerate(module.ROWS)
    }


def cells(table: str, start: str) -> list[str]:
    """The cells of the first line that starts with a name."""
    return [
        cell.strip() for cell in next(x for x in table.splitlines() if x.startswith(f"| {start} |")).split("|")[1:-1]
    ]


@pytest.mark.parametrize("module", ["testbed"], indirect=True)
def test_each_nine_problems_hold_every_setting_three_times(module: ModuleType):
    names = list(module.jobs(Namespace(stored=None, repeats=2, steps=1)))
    problems = list(module.generated(dict.fromkeys(names)))
    assert len(problems) == 54
    assert len({seed for *_, seed in problems}) == 54
    assert len({(d, n, t) for d, n, t, _ in problems}) == 27
    for start in range(0, 54, 9):
        nine = problems[start : start + 9]
        for setting in ([d for d, *_ in nine], [n // d for d, n, *_ in nine], [t for _, _, t, _ in nine]):
            assert sorted(Counter(setting).values()) == [3, 3, 3]


@pytest.mark.parametrize("module", ["testbed"], indirect=True)
def test_the_tables_of_known_numbers(module: ModuleType):
    results = {
        "10-10-0.01-1": numbers(module, epinet=1.0, MLP=3.0),
        "10-1000-0.5-2": numbers(module, epinet=0.5, MLP=4.0),
        "2-20-0.5-3": numbers(module, epinet=3.0),
        "stored-80-0": {row: numbers(module, epinet=0.7)[row] for row in module.REFERENCE[80]},
        "stored-80-1": {row: numbers(module, epinet=0.8)[row] for row in module.SEED_SPREAD},
    }
    table = module.table(results)
    # (3 + 4 + 2) / 3 = 3; the differences are 2, 3.5 and -1, their mean 1.5, their standard error sqrt(5.25 / 3) = 1.32.
    assert cells(table, "MLP") == ["MLP", "1,000", "3.0", "0.250", "3.000", "+1.50 ±1.32", "0.500"]
    assert cells(table, "epinet") == ["epinet", "9,000", "3.0", "0.250", "1.500", "", "0.500"]
    assert cells(table, "T = 0.01") == ["T = 0.01", "1", "3.00", *["2.00"] * 7, "**1.00**"]
    assert cells(table, "T = 0.5") == ["T = 0.5", "2", "3.00", *["2.00"] * 7, "**1.75**"]
    assert cells(table, "d = 10")[1:3] == ["2", "3.50"]
    assert cells(table, "n / d = 1")[1:3] == ["1", "3.00"]
    # Without a problem of ten dimensions its column is empty.
    assert cells(module.table({"2-20-0.5-3": results["2-20-0.5-3"]}), "MLP")[:3] == ["MLP", "", "3.0"]
    stored = table[table.index("problem 80") :]
    assert cells(stored, "epinet") == ["epinet", "0.112", "0.250", "0.643", "0.700", "0.750 ±0.071"]
    assert cells(stored, "MLP") == ["MLP", "0.109", "0.250", "1.090", "2.000", ""]


@pytest.mark.parametrize("module", ["testbed"], indirect=True)
def test_a_run_trains_and_judges_every_agent(module: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "classification_problem", partial(module.classification_problem, num_test=10))
    found = module.run_generated(2, 4, 0.5, seed=3, steps=2)
    assert list(found) == list(module.ROWS)
    mlp = 2 * 50 + 50 + 50 * 50 + 50 + 50 * 2 + 2
    sizes = {"MLP": mlp, "ensemble, 10": 10 * mlp, "ensemble, 30": 30 * mlp, "ensemble+, 30": 60 * mlp}
    for row, size in sizes.items():
        assert found[row]["weights"] == size, row
    assert mlp < found["epinet"]["weights"] < 3 * mlp
    for row, values in found.items():
        assert all(math.isfinite(value) for value in values.values()), row
        assert values["kl_infinite"] == 0
        assert values["seconds"] > 0


@pytest.mark.parametrize("module", ["testbed"], indirect=True)
def test_the_figure_of_known_numbers(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from docs.figures import testbed

    path = tmp_path / "testbed.json"
    results = {"10-10-0.01-1": numbers(module, epinet=1.0), "2-2-0.1-2": numbers(module), "stored-80-0": {}}
    path.write_text(json.dumps({"results": results}))
    monkeypatch.setattr(testbed, "PUBLISHED", path)
    one, ten = testbed.draw().axes
    shown = {line.get_label(): line.get_xydata().tolist() for line in ten.lines}
    assert shown["epinet"] == [[9000.0, 1.5]]
    assert shown["ensemble (1, 10, 30)"] == [[1000.0, 2.0], [2000.0, 2.0], [3000.0, 2.0]]
    assert {y for line in one.lines for y in line.get_ydata()} == {0.25}
    assert {agent for agents, _, _ in testbed.LINES.values() for agent in agents} == set(module.ROWS)


@pytest.mark.parametrize("module", ["testbed"], indirect=True)
def test_the_original_agents_are_met(module: ModuleType):
    results = json.loads((PUBLISHED / "testbed.json").read_text())["results"]
    # Two ensembles that differ in their random numbers alone differ by 0.05 between seeds; draws and indices add to that.
    for number, reference in module.REFERENCE.items():
        found = results[f"stored-{number}-0"]
        for row, (one, ten) in reference.items():
            assert found[row]["kl_tau1"] == pytest.approx(one, abs=0.04), (number, row)
            assert found[row]["kl_tau10"] == pytest.approx(ten, abs=0.2), (number, row)


@pytest.mark.parametrize("module", ["testbed_epinet"], indirect=True)
def test_the_problems_of_the_study_have_both_labels(module: ModuleType):
    names = list(module.jobs(Namespace(problems=2, steps=1)))
    assert names == ["problem-1", "problem-3"]
    assert not module.is_mixed(0)


@pytest.mark.parametrize("module", ["testbed_epinet"], indirect=True)
def test_the_studys_first_variant_is_the_published_agent(module: ModuleType):
    from lightning_uq.compare.testbed import epinet_for_testbed

    assert next(iter(module.VARIANTS.values())) == {}
    settings = module.PUBLISHED_AGENT
    ours = module.make_epinet(**settings)
    published = epinet_for_testbed(module.D, 2, module.N, module.T)
    assert ours.hparams["head"] == published.hparams["head"]
    (found,), (expected,) = (one.configure_optimizers().param_groups for one in (ours, published))
    assert {key: found[key] for key in ("lr", "weight_decay")} == {key: expected[key] for key in ("lr", "weight_decay")}
    half = module.PUBLISHED_AGENT | module.VARIANTS["half the L2 term (the MLP's)"]
    assert half["decay"] == pytest.approx(0.2)


@pytest.mark.parametrize("module", ["testbed_epinet"], indirect=True)
def test_a_run_of_the_study(module: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "classification_problem", partial(module.classification_problem, num_test=10))
    monkeypatch.setattr(module, "VARIANTS", dict(list(module.VARIANTS.items())[:1]))
    found = module.run(1, steps=2)
    epinet = found["epinet, as published"]
    assert all(math.isfinite(value) for value in epinet.values())
    assert 0 <= epinet["acc_pairs"] <= 1
    table = module.table({"problem-1": found})
    assert cells(table, "epinet, as published")[5:8] == [f"{epinet[key]:.3f}" for key in module.COLUMNS]
    assert cells(table, "MLP")[3] == ""
