"""The verdict says what the numbers allow to say, and under which condition."""

import pytest

from lightning_uq.compare.statistics.verdict import make_verdict


def rows(key="nll", **values):
    return [
        {"method": name, **({} if one is None else {key: {"mean": one, "se": None}})} for name, one in values.items()
    ]


def found(best, to_best, over="rows", left_out=(), num_rows=360):
    """Differences to the best: for each other method the ends of its interval."""
    return {
        "best": best,
        "tied": [best, *(name for name, (low, high) in to_best.items() if low <= 0 <= high)][1:],
        "same": [name for name, ends in to_best.items() if ends == EQUAL],
        "rows": num_rows,
        "to_best": {name: {"difference": (a + b) / 2, "lower": a, "upper": b, "over": over} for name, (a, b) in to_best.items()},
        "left_out": dict.fromkeys(left_out, "infinite"),
    }  # fmt: skip


def verdict(table, differences, seeds=3, **options):
    return make_verdict(table, differences, seeds, data="digits", **{"baseline": "softmax", **options})


TIED, WORSE, EQUAL = (-0.1, 0.2), (0.1, 0.3), (0.0, 0.0)


HERE = "for the networks trained here (3 seeds; 5 would cover retraining), "


@pytest.mark.parametrize(
    ("values", "to_best", "expected"),
    [
        ({"ensemble": 0.2}, {"softmax": WORSE}, "ensemble is best on digits (0.200; softmax 0.400); softmax is worse."),
        (
            {"ensemble": 0.2},
            {"softmax": TIED},
            "no method stands out on digits: ensemble has the best mean (0.200; softmax 0.400), but softmax cannot be distinguished from it.",
        ),
        ({"a": 0.2}, {"b": WORSE, "softmax": WORSE}, "a is best on digits (0.200; softmax 0.400); both others are worse."),
        (
            {"a": 0.2},
            {"b": TIED, "softmax": TIED},
            "no method stands out on digits: a has the best mean (0.200; softmax 0.400), but neither b nor softmax can be distinguished from it.",
        ),
        (
            {"a": -0.5},
            dict.fromkeys("bcdefg", TIED) | {"softmax": WORSE},  # better than the baseline
            "a is best on digits (−0.500; softmax 0.400); b, c, d and 3 others cannot be distinguished from it.",
        ),
        (
            {"a": 0.2},
            {"softmax": TIED, "b": TIED, **dict.fromkeys("cde", WORSE)},  # better than most
            "a is best on digits (0.200; softmax 0.400); softmax and b cannot be distinguished from it.",
        ),
        (
            {"a": 0.2},
            {"softmax": TIED, **dict.fromkeys("bcde", TIED), "f": WORSE},
            "no method stands out on digits: a has the best mean (0.200; softmax 0.400), but only f is worse.",
        ),
        (
            {"softmax": 0.2},
            {"energy": EQUAL, "b": WORSE},
            "softmax (as energy, with the same values) is best on digits (0.200); b is worse.",
        ),
        ({"softmax": 0.2}, {"energy": EQUAL}, "all methods are equal on digits (0.200): each test row has the same value."),
    ],
)  # fmt: skip
def test_which_method_is_best(values, to_best, expected):
    (best,) = values
    table = rows(**values, **dict.fromkeys(to_best, 0.4))
    assert verdict(table, {"nll": found(best, to_best)}) == [f"By NLL, {HERE}{expected}"]


@pytest.mark.parametrize(
    ("times", "cheapest"),
    [
        ({"a": (9, 1), "b": (3, 9), "softmax": (3.1, 1), "c": (1, 1)}, "softmax"),  # c is worse
        ({"a": (9, 1), "b": (3, 1), "softmax": (3.1, 1), "c": (1, 1)}, "softmax"),  # b is not cheaper beyond noise
        ({"a": (9, 1), "b": (3, 1), "softmax": (5, 1), "c": (1, 1)}, "b"),
        ({"a": (1, 1), "b": (3, 1), "softmax": (5, 1), "c": (1, 1)}, "a"),
    ],
)
def test_the_cheapest_of_the_tied_methods_is_named(times, cheapest):
    table = rows(a=0.2, b=0.3, softmax=0.3, c=0.9)
    for row in table:
        row |= {key: {"mean": time} for key, time in zip(("train_seconds", "ms_per_1000"), times[row["method"]], strict=True)}  # fmt: skip
    said = verdict(table, {"nll": found("a", {"b": TIED, "softmax": TIED, "c": WORSE})})[0]
    assert said.endswith(f"but only c is worse, and {cheapest} is the cheapest.")
    del table[1]["train_seconds"]
    assert "cheapest" not in verdict(table, {"nll": found("a", {"b": TIED, "softmax": TIED, "c": WORSE})})[0]


def test_one_method_is_not_compared():
    assert verdict(rows(softmax=0.2), {}) == [
        "softmax is the only method on digits, so there is nothing to compare it with (NLL 0.200)."
    ]
    assert verdict([{"method": "mine"}], {}) == []
    assert verdict([], {}) == []


def test_methods_without_the_number_are_named():
    table = rows(a=0.2, b=0.3, quantile=None, broken=float("nan"))
    said = verdict(table, {"nll": found("a", {"b": WORSE}, left_out=["broken"])})
    assert said[0].endswith("b is worse. quantile has no NLL. broken has no finite NLL.")
    said = verdict([table[0], table[3]], {"nll": found("a", {}, left_out=["broken"])})
    assert said == ["By NLL, a is the only method with a value on digits (0.200). broken has no finite NLL."]
    assert verdict(table[:1] + table[2:], {"nll": found("a", {}, left_out=["broken"])}) == []  # most have no number


def test_a_number_that_is_infinite_for_most_methods_does_not_judge():
    table = rows(a=None, b=None, c=0.4)
    for row, value in zip(table, (2.0, 3.0, 4.0), strict=True):
        row["interval_score"] = {"mean": value, "se": None}
    for row in table[:2]:
        row["nll"] = {"mean": None, "se": None}
    said = verdict(table, {"nll": found("c", {}), "interval_score": found("a", {"b": WORSE, "c": WORSE})})
    assert said[0] == f"By Int. score, {HERE}a is best on digits (2.00); both others are worse."
    assert said[1] == "a and b have no finite NLL."
    assert verdict(rows(softmax=None), {}) == []


def test_numbers_that_one_row_decides_are_doubted():
    table = rows(a=3e8, softmax=0.4)
    said = verdict(
        table, {"nll": found("a", {"softmax": TIED})}, single_rows={"nll": {"a": 17}, "rmse": {"softmax": 3}}
    )
    assert "(3.00e+08; softmax 0.400)" in said[0]
    assert said[1] == "A single test row makes up more than half of the NLL of a (row 17); rows count from 0."
    assert len(said) == 2
    assert len(verdict(table[:1], {}, single_rows={"nll": {"a": 17}})) == 2


def test_detection_has_its_own_sentence_where_there_is_any():
    table = rows(a=0.2, softmax=0.4)
    for row, value in zip(table, (0.9, 0.8), strict=True):
        row["ood_auroc"] = {"mean": value, "se": None}
    predicts = {"nll": found("a", {"softmax": WORSE})}
    assert len(verdict(table, predicts)) == 1
    said = verdict(table, predicts | {"ood_auroc": found("a", {"softmax": (-0.2, -0.1)})})
    assert said[1] == "By AUROC, a detects out-of-distribution inputs best on digits (0.900; softmax 0.800); softmax is worse."  # fmt: skip
    for row, value in zip(table, (0.53, 0.41), strict=True):
        row["ood_auroc"] = {"mean": value, "se": None}
    said = verdict(table, predicts | {"ood_auroc": found("a", {"softmax": (-0.2, -0.1)})})
    assert said[1].endswith("softmax is worse. Even the best AUROC is close to chance, 0.5.")


def test_the_condition_is_that_of_the_intervals_the_verdict_rests_on():
    table = rows(a=0.2, softmax=0.4)

    def first(over, seeds, **others):
        return verdict(table, {"nll": found("a", {"softmax": WORSE}, over), **others}, seeds)[0]

    assert first("rows", 2).startswith(
        "By NLL, for the networks trained here (2 seeds; 5 would cover retraining), a is"
    )
    assert first("rows", 1).startswith("By NLL, for the networks trained here (1 seed; 5 would")
    assert first("rows and seeds", 5).startswith("By NLL, for further test rows and trainings (5 seeds), a is best")
    # Intervals of a number that no sentence is about do not weaken the sentences.
    unrelated = found("a", {"softmax": WORSE}, "rows")
    assert first("rows and seeds", 5, brier=unrelated) == first("rows and seeds", 5)


def test_methods_without_any_difference_in_value_need_not_have_the_same_values():
    """Two detectors that both are perfect have a difference of exactly 0, and other scores."""
    table = rows(a=0.2, softmax=0.4)
    perfect = found("a", {"softmax": EQUAL}) | {"same": []}
    assert verdict(table, {"nll": perfect})[0].endswith("but softmax cannot be distinguished from it.")


def test_few_rows_are_named():
    table = rows(a=0.2, softmax=0.4)
    for row in table:
        row["ood_auroc"] = {"mean": 0.9, "se": None}
    many, few = found("a", {"softmax": WORSE}, num_rows=100), found("a", {"softmax": WORSE}, num_rows=99)
    assert "rest on only 99 rows" in verdict(table, {"nll": few})[-1]
    assert "rest on only 99 rows" in verdict(table, {"nll": many, "ood_auroc": few})[-1]
    assert not any("rest on" in one for one in verdict(table, {"nll": many, "brier": few}))
