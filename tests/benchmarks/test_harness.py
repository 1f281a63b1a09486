"""The harness of `make bench`: results are compared before anything is timed, contenders take turns, and missing peers are named."""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness import SHORTEST, Contender, Work, clock_for, interleaved, measure, peak, quartiles
from benchmarks.page import page, rows

WHERE = {
    "date": "2026-01-02",
    "device": "a processor, 2 cores",
    "threads": 1,
    "repeats": 3,
    "clock": "processor time",
    "load": 0.5,
    "python": "3.12.0",
    "torch": "2.9.0",
    "lightning": "2.6.0",
}


class Ticks:
    """A clock that the calls move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds, log, name, result):
        self.now += seconds
        log.append(name)
        return torch.tensor(result)


def contender(clock, log, name, seconds, result=1.0, **kwargs):
    return Contender(name, lambda: partial(clock.spend, seconds, log, name, result), **kwargs)


def missing():
    raise ImportError("No module named 'nobody'")


def test_contenders_take_turns_and_short_calls_are_repeated():
    clock, log = Ticks(), []
    prepares = {name: contender(clock, log, name, seconds).prepare for name, seconds in [("ours", 0.1), ("peer", 0.3)]}
    times = interleaved(prepares, {"ours": 2, "peer": 1}, repeats=3, clock=clock)
    assert log == ["ours", "ours", "peer"] * 3
    assert times["ours"] == pytest.approx([0.1] * 3)
    assert times["peer"] == pytest.approx([0.3] * 3)


def test_measurements_are_of_at_least_the_shortest_time():
    clock, log = Ticks(), []
    seconds = SHORTEST / 10
    found = measure(Work("w", [contender(clock, log, "ours", seconds)]), repeats=1, clock=clock)
    assert found["ms"]["ours"] == pytest.approx([1e3 * seconds])
    assert len(log) * seconds >= SHORTEST
    once = Work("w", [contender(clock, log := [], "ours", seconds)], calls=1)
    measure(once, repeats=2, clock=clock)
    assert len(log) == 4  # the comparison, the peak, and two measurements


def test_unequal_results_are_an_error_before_any_time_is_taken():
    clock, log = Ticks(), []
    work = Work(
        "sums",
        [contender(clock, log, "ours", 0.1), contender(clock, log, "peer", 0.1, result=1.001)],
        rtol=1e-4,
        calls=1,
    )
    with pytest.raises(AssertionError, match=r"^sums: the results of peer and ours differ\."):
        measure(work, repeats=3, clock=clock)
    assert log == ["ours", "peer"]


def test_a_reference_need_not_agree():
    clock, log = Ticks(), []
    bare = contender(clock, log, "one pass", 0.1, result=7.0, agrees=False)
    found = measure(Work("w", [contender(clock, log, "ours", 0.2), bare]), repeats=1, clock=clock)
    assert found["checked"] == ["ours"]
    assert set(found["ms"]) == {"ours", "one pass"}


def test_a_peer_that_is_not_installed_is_left_out_and_named():
    clock = Ticks()
    work = Work("w", [contender(clock, [], "ours", 0.1), Contender("theirs", missing, "nobody")])
    found = measure(work, repeats=1, clock=clock)
    assert found["left_out"] == {"nobody": "No module named 'nobody'"}
    assert set(found["ms"]) == {"ours"}
    text = page({"g": {"title": "T", "about": "", "where": WHERE, "works": [found]}})
    assert "nobody was left out: No module named 'nobody'." in text


def test_an_import_error_of_our_own_is_no_missing_peer():
    with pytest.raises(ImportError):
        measure(Work("w", [Contender("ours", missing)]), repeats=1, clock=Ticks())


def test_the_page_tells_ratios_within_a_turn_and_where_it_was_measured():
    work = {
        "work": "sums",
        "ms": {"peer": [3.0, 4.0, 4.0], "ours": [1.0, 2.0, 4.0]},  # in any order, as a file may have them
        "peak_mb": {"ours": 0.5, "peer": 1.0},
        "versions": {"peer": "nobody 1.2"},
        "left_out": {},
        "checked": ["ours", "peer"],
    }
    assert rows(work) == [
        "| sums | ours | = | 2 [1.5, 3] | 0.5 |  |",
        "|  | peer (nobody 1.2) | = | 4 [3.5, 4] | 1 | 2.00 [1.50, 2.50] |",
    ]
    text = page({"g": {"title": "T", "about": "What.", "where": WHERE, "works": [work]}})
    assert (
        "## T\n\nWhat.\n\n2026-01-02, a processor, 2 cores, 1 thread(s), processor time, 3 measurements, load average 0.5"
        in text
    )


def test_the_page_says_so_while_nothing_was_measured_on_a_gpu():
    group = {"title": "T", "about": "", "where": WHERE, "works": []}
    assert "No row was measured on a GPU yet." in page({"g": group})
    assert "No row was measured on a GPU" not in page({"g": group, "g, cuda": group})
    target = "Rows that wait for a GPU"
    assert f"## {target}" in (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()


def test_one_measurement_has_no_spread():
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_peak_counts_temporary_tensors_but_not_those_before():
    held = torch.ones(1000)
    assert peak(lambda: held.sum(), "cpu") < 4000
    assert peak(lambda: (held + 1).sum(), "cpu") >= 4000


def test_several_threads_are_timed_by_the_time_that_passes():
    assert clock_for("cpu", 1) is not clock_for("cpu", 2)


def test_every_group_has_works_and_texts():
    import importlib

    assert command.GROUPS
    for name in command.GROUPS:
        group = importlib.import_module(f"benchmarks.timings.{name}")
        assert group.TITLE
        assert group.ABOUT
        assert callable(group.works)


def test_a_group_keeps_its_results_while_another_is_measured(tmp_path, monkeypatch):
    import types

    clock = Ticks()
    group = types.SimpleNamespace(
        TITLE="Mine", ABOUT="Of two.", works=lambda device: [Work("w", [contender(clock, [], "ours", 0.1)])]
    )
    monkeypatch.setattr(command.importlib, "import_module", lambda name: group)
    monkeypatch.setattr(command, "clock_for", lambda device, threads: clock)
    first, second = command.GROUPS[:2]
    threads = torch.get_num_threads()
    try:
        for name in (first, second):
            command.main(["--only", name, "--out", str(tmp_path), "--repeats", "2"])
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "results.md").read_text()
    assert text.count("## Mine") == 2
    assert "| w | ours |  | 100 [100, 100] |" in text
