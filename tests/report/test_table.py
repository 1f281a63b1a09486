import io

import pytest
from rich.console import Console

from lightning_uq.errors import InputError
from lightning_uq.report import (
    COLUMNS,
    DENSITY_TITLES,
    RESULT_KEYS,
    best_methods,
    cell,
    marks,
    print_table,
    shown_columns,
)
from tests.result_keys import CLASSIFICATION_KEYS

BY_KEY = {column.key: column for column in COLUMNS}


def row(method, **values):
    return {"method": method, **{key: {"mean": mean, "se": se} for key, (mean, se) in values.items()}}


def printed(rows, width, **settings):
    stream = io.StringIO()
    print_table(rows, Console(file=stream, width=width, color_system=None), **settings)
    return stream.getvalue()


@pytest.fixture
def rows():
    names = ("softmax", "relative_mahalanobis", "ensemble")
    return [row(name, **dict.fromkeys(CLASSIFICATION_KEYS, (0.5 + i / 10, 0.01))) for i, name in enumerate(names)]


def test_keys_are_those_of_the_results_file():
    assert RESULT_KEYS == (
        "accuracy",
        "subset_accuracy",
        "hamming",
        "auroc",
        "average_precision",
        "iou",
        "rmse",
        "mae",
        "nll",
        "crps",
        "brier",
        "ece",
        "joint_log_loss",
        "coverage",
        "set_size",
        "coverage_90",
        "width_90",
        "interval_score",
        "ood_auroc",
        "ood_auprc_out",
        "ood_auprc_in",
        "ood_fpr95",
        "parameters",
        "train_seconds",
        "ms_per_1000",
    )


def test_direction_of_every_column():
    higher = {
        "accuracy",
        "subset_accuracy",
        "auroc",
        "average_precision",
        "iou",
        "ood_auroc",
        "ood_auprc_out",
        "ood_auprc_in",
    }
    assert {column.key for column in COLUMNS if column.better == "higher"} == higher
    assert {column.key for column in COLUMNS if column.better is None} == {
        "coverage",
        "set_size",
        "coverage_90",
        "width_90",
    }


def test_best_follows_the_direction():
    rows = [row("a", accuracy=(0.9, None), nll=(0.3, None)), row("b", accuracy=(0.8, None), nll=(0.2, None))]
    assert best_methods(rows, BY_KEY["accuracy"]) == {"a"}
    assert best_methods(rows, BY_KEY["nll"]) == {"b"}


def test_what_prints_alike_is_equally_good():
    rows = [row("a", nll=(0.20001, None)), row("b", nll=(0.20004, None)), row("c", nll=(0.3, None))]
    assert best_methods(rows, BY_KEY["nll"]) == {"a", "b"}
    assert best_methods(rows[:2], BY_KEY["nll"]) == {"a", "b"}
    assert best_methods(rows[:1], BY_KEY["nll"]) == set()  # nothing to compare it with


def test_a_missing_or_failed_value_is_a_dash_and_never_best():
    rows = [row("a", nll=(None, None)), row("b", nll=(9.0, 1.0)), {"method": "c"}, row("d", nll=(9.5, None))]
    assert [cell(one, BY_KEY["nll"]) for one in rows] == [("-", ""), ("9.000", "±1.000"), ("-", ""), ("9.500", "")]
    assert best_methods(rows, BY_KEY["nll"]) == {"b"}
    assert [column.key for column in shown_columns(rows)] == ["nll"]
    assert best_methods([{"method": "c"}], BY_KEY["nll"]) == set()


def test_counts_and_times_have_no_error():
    assert cell(row("a", parameters=(129320, 0.0)), BY_KEY["parameters"]) == ("129,320", "")
    assert cell(row("a", train_seconds=(4.26, 0.3)), BY_KEY["train_seconds"]) == ("4.3", "")


@pytest.mark.parametrize(("width", "num_tables"), [(140, 1), (120, 2), (80, 2), (60, 4)])
def test_a_table_is_whole_or_in_as_few_parts_as_fit(rows, width, num_tables):
    rows = [{**one, "parameters": {"mean": 1_293_200, "se": 0.0}} for one in rows]
    text = printed(rows, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert text.count("relative_mahalanobis") == num_tables
    assert all(BY_KEY[key].label in text for key in CLASSIFICATION_KEYS)


@pytest.mark.parametrize("width", [35, 60])
def test_a_group_that_does_not_fit_is_split_and_no_value_is_cut_off(width):
    rows = [row("relative_mahalanobis", **dict.fromkeys(RESULT_KEYS, (1234.5, 0.01)))]
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert all(column.label in text for column in COLUMNS)


def test_only_the_best_is_bold(rows):
    stream = io.StringIO()
    print_table(rows, Console(file=stream, width=140, force_terminal=True, color_system="standard", no_color=True))
    text = stream.getvalue()
    ensemble = next(line for line in text.splitlines() if line.startswith("ensemble"))
    softmax = next(line for line in text.splitlines() if line.startswith("softmax"))
    better = [BY_KEY[key].better for key in CLASSIFICATION_KEYS]
    assert ensemble.count("\x1b[1m") == better.count("higher")
    assert softmax.count("\x1b[1m") == better.count("lower")


def test_a_method_name_is_no_markup():
    assert "[bold]x" in printed([row("[bold]x", nll=(1.0, None))], 60)


# ------------------------------------------------------------------ ties


def test_marks_are_the_best_mean_and_its_ties():
    rows = [
        row("a", nll=(0.2, None), accuracy=(0.9, None), coverage=(0.9, None)),
        row("b", nll=(0.3, None), accuracy=(0.8, None), coverage=(0.8, None)),
        row("c", nll=(0.9, None), coverage=(0.7, None)),
    ]
    tied = {"nll": {"a", "b"}, "accuracy": None, "coverage": {"a", "b"}}
    assert marks(rows, shown_columns(rows), tied) == {
        ("a", "nll"): "best",
        ("b", "nll"): "tied",
        ("a", "accuracy"): "best",
    }
    assert set(marks(rows, shown_columns(rows)).values()) == {"best"}


def test_a_method_without_a_value_is_not_tied():
    rows = [row("a", nll=(0.2, None)), row("b", nll=(None, None)), {"method": "c"}, row("d", nll=(0.3, None))]
    assert marks(rows, shown_columns(rows), {"nll": set("abc")}) == {("a", "nll"): "best"}


def test_equal_means_are_all_best():
    rows = [row("a", nll=(0.2, None)), row("b", nll=(0.2, None))]
    for tied in ({"a"}, {"b"}, {"a", "b"}, set()):
        assert marks(rows, shown_columns(rows), {"nll": tied}) == {("a", "nll"): "best", ("b", "nll"): "best"}


def test_a_tied_method_without_a_row_is_refused():
    rows = [row("a", nll=(0.2, None))]
    with pytest.raises(InputError, match=r"`tied\['nll'\]` names methods that have no row: b, c"):
        marks(rows, shown_columns(rows), {"nll": {"c", "b", "a"}})


def test_the_terminal_marks_ties_and_keeps_the_digits_aligned():
    rows = [row("a", nll=(0.2, 0.01)), row("b", nll=(0.3, 0.01)), row("c", nll=(0.9, 0.01))]
    lines = printed(rows, 60, tied={"nll": {"a", "b"}}).splitlines()
    assert lines[-1] == "•: best mean; *: cannot be distinguished from the best"
    assert "•0.200" in lines[2]
    assert "*0.300" in lines[4]
    assert len({line.index("0.") for line in lines[2:-1] if line[0] in "abc"}) == 1
    assert "*" not in printed(rows, 60)


def test_without_bold_type_a_sign_marks_the_best():
    rows, stream = [row("a", nll=(-0.2, None)), row("b", nll=(0.3, None))], io.StringIO()
    assert printed(rows, 60).splitlines()[2:] == ["a       •−0.200", "b         0.300", "•: best mean"]
    print_table(rows, Console(file=stream, width=60, force_terminal=True, color_system="standard"))
    assert "•" not in stream.getvalue()
    assert stream.getvalue().splitlines()[-1] == "bold: best mean"


# ------------------------------------------------------------------ the target's units


@pytest.mark.parametrize(
    ("means", "texts"),
    [
        ((53.218, 9.876), ("53.2", "9.9")),
        ((0.71234, 0.5), ("0.712", "0.500")),
        ((0.000012345, 0.00001), ("0.0000123", "0.0000100")),
        ((12345.6, 1.0), ("12,346", "1")),
        ((3e12, 1.0), ("3.00e+12", "1.00e+00")),
        ((1e7, 1.0), ("1.00e+07", "1.00e+00")),
        ((1e-9, 0.0), ("1.00e−09", "0.00e+00")),
        ((0.0, 0.0), ("0.00", "0.00")),
        ((5.0, None), ("5.00", "-")),
        ((5.0, float("inf")), ("5.00", "-")),
    ],
)
def test_decimals_follow_the_largest_mean(means, texts):
    rows = [row(str(i), rmse=(mean, None)) for i, mean in enumerate(means)]
    (column,) = shown_columns(rows)
    assert tuple(cell(one, column)[0] for one in rows) == texts


def test_large_numbers_have_an_exponent_and_counts_have_none():
    rows = [row("a", nll=(3e7, 2e8), parameters=(23_520_842, None)), row("b", nll=(0.5, 0.1), parameters=(10, None))]
    nll, parameters = shown_columns(rows)
    assert [cell(one, nll) for one in rows] == [("3.00e+07", "±2.00e+08"), ("0.500", "±0.100")]
    assert cell(rows[0], parameters)[0] == "23,520,842"


def test_titles_may_be_replaced():
    rows = [row("a", nll=(0.2, None), rmse=(1.0, None))]
    titles = {column.key: column.title for column in shown_columns(rows, DENSITY_TITLES)}
    assert "may be negative" in titles["nll"]
    assert titles["rmse"] == BY_KEY["rmse"].title
