"""Intervals and ties follow from the records, for any measure, and say what they hold for."""

from dataclasses import replace

import torch

from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.differences import find_differences
from lightning_uq.compare.statistics.measures import measured
from lightning_uq.functional import half_widths
from lightning_uq.functional.student_t import student_t_quantile


def records(shift=0.0, *, seeds=5, num=200, fixed=True, ood=True, method="a"):
    found = []
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.arange(num) if fixed else torch.randperm(2 * num, generator=draw)[:num]
        hard = torch.rand(2 * num, generator=torch.Generator().manual_seed(99))[ids].double()
        noise = 0.1 * torch.randn(num, generator=torch.Generator().manual_seed(1000 * seed + len(method)))
        rows = {"nll": hard + noise + shift, "ood_score": torch.randn(num, generator=draw) + shift}
        outside = {"ood_score": 2 + torch.randn(num, generator=draw)} if ood else {}
        found.append(Record(method, seed, {"train_seconds": 1.0}, rows, ids, outside))
    return found


def test_a_clear_difference_is_no_tie_and_a_small_one_is():
    methods = {
        "plain": records(method="plain"),
        "same": records(0.01, method="same"),
        "worse": records(0.5, method="worse"),
    }
    found = find_differences(methods, "plain", 600)["nll"]
    assert found["best"] == "plain"
    assert found["tied"] == ["same"]
    worse = found["to_best"]["worse"]
    assert worse["lower"] <= 0.5 <= worse["upper"]
    assert worse["lower"] > 0.4
    assert found["to_baseline"].keys() == {"same", "worse"}
    expected = [measured(one)["nll"] for one in methods["worse"]], [measured(one)["nll"] for one in methods["plain"]]
    difference = sum(expected[0]) / 5 - sum(expected[1]) / 5
    assert abs(worse["difference"] - difference) < 1e-12


def test_fewer_than_five_seeds_are_over_rows_only():
    for fixed in (True, False):
        for seeds, over in ((1, "rows"), (4, "rows"), (5, "rows and seeds")):
            methods = {name: records(0.1 * i, seeds=seeds, fixed=fixed, method=name) for i, name in enumerate("ab")}
            found = find_differences(methods, "a", 600)
            assert {one["over"] for key in ("nll", "ood_auroc") for one in found[key]["to_best"].values()} == {over}


def test_higher_is_better_for_an_auroc():
    methods = {"good": records(method="good"), "bad": records(1.5, method="bad")}
    found = find_differences(methods, "good", 600)["ood_auroc"]
    assert found["best"] == "good"
    assert found["to_best"]["bad"]["upper"] < 0
    assert "ood_auroc" not in find_differences({name: records(ood=False, method=name) for name in "ab"}, "a", 600)


def test_numbers_that_belong_to_no_row_have_no_interval():
    found = find_differences({name: records(method=name) for name in "ab"}, "a", 600)
    assert "train_seconds" not in found


def test_an_infinite_score_leaves_its_method_out_and_says_so():
    broken = records(method="broken")
    broken[0].rows["nll"][3] = torch.inf
    found = find_differences({"a": records(), "bb": records(0.2, method="bb"), "broken": broken}, "a", 600)["nll"]
    assert found["best"] == "a"
    assert found["to_best"].keys() == {"bb"}
    assert found["left_out"].keys() == {"broken"}


def test_one_method_has_nothing_to_differ_from():
    assert find_differences({"a": records()}, "a", 600) == {}


def test_methods_with_the_same_scores_are_told_apart_from_those_that_are_equally_good():
    perfect = records(ood=True, method="plain")
    for one in perfect:
        one.outside["ood_score"] += 100
    other = [replace(one, outside={"ood_score": one.outside["ood_score"] + 1}) for one in perfect]
    found = find_differences({"plain": perfect, "copy": perfect, "other": other}, "plain", 600)["ood_auroc"]
    assert all(one["lower"] == one["upper"] == 0 for one in found["to_best"].values())
    assert found["same"] == ["copy"]
    assert found["rows"] == 200


def test_a_table_needs_few_t_quantiles(monkeypatch):
    """Below 5 seeds all differences of a number have the same degrees of freedom; a quantile takes a bisection of integrals."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return student_t_quantile(*arguments)

    monkeypatch.setattr(half_widths, "student_t_quantile", counted)
    half_widths._t_quantile.cache_clear()
    find_differences({name: records(seeds=2, num=50, method=name) for name in "abcdef"}, "a", 600)
    assert len(calls) == 2  # the level of the best, and that of the baseline
