import io
import re

import pandas
import pytest

from lightning_uq.errors import InputError
from lightning_uq.report import format_table, latex_table, markdown_table, shown_columns

ROWS = [
    {"method": "a", "accuracy": {"mean": 0.9123456789012345, "se": 0.01, "seeds": [0.9, 0.92]}, "nll": {"mean": -0.5, "se": None}},
    {"method": "b_%", "accuracy": {"mean": 0.91, "se": 0.02, "seeds": [0.9]}, "nll": {"mean": None, "se": None}},
    {"method": "c", "nll": {"mean": 1.25, "se": 0.5}},
]  # fmt: skip
TIED = {"accuracy": {"a", "b_%"}, "nll": None}


def test_markdown_marks_ties_and_says_so():
    lines = markdown_table(ROWS, TIED).splitlines()
    assert lines == [
        "| method | Acc. | NLL |",
        "|---|---:|---:|",
        "| a | **0.912** ±0.010 | **−0.500** |",
        "| b_% | 0.910 ±0.020 ≈ | - |",
        "| c | - | 1.250 ±0.500 |",
        "",
        "Bold: best mean. ≈: cannot be distinguished from the best.",
    ]
    assert "≈" not in markdown_table(ROWS)


@pytest.mark.parametrize("name", ["a|b", "a\nb", "**a**", "`a`", "<b>", "[a](b)"])
def test_a_name_does_not_break_the_markdown(name):
    lines = markdown_table([{"method": name, "nll": {"mean": 1.0, "se": None}}]).splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)\|", lines[2])) == 3
    assert not re.search(r"(?<!\\)[*`<\[]", lines[2].removesuffix("1.000 |"))


def test_latex_has_one_cell_per_column_and_marks():
    lines = latex_table(ROWS, TIED).splitlines()
    start = lines.index(r"\begin{tabular}{lrr}")
    assert lines[:start] == [
        r"% Needs \usepackage{booktabs}.",
        r"% Bold: best mean. $\approx$: cannot be distinguished from the best.",
    ]
    assert lines[start + 1 :] == [
        r"\toprule",
        r"Method & Acc. $\uparrow$ & NLL $\downarrow$ \\",
        r"\midrule",
        r"a & \textbf{0.912} {\scriptsize $\pm$0.010} & \textbf{$-$0.500} \\",
        r"b\_\% & 0.910$^{\approx}$ {\scriptsize $\pm$0.020} & -- \\",
        r"c & -- & 1.250 {\scriptsize $\pm$0.500} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize("name", ["a_b", "50%", "a & b", "$x$", "#1", "{", "}", "~", "^", "\\input{x}", "a\nb"])
def test_latex_escapes_every_name(name):
    """What is left of the row has no character with a meaning but our own."""
    (row,) = [
        line for line in latex_table([{"method": name, "nll": {"mean": 1.0, "se": None}}]).splitlines() if "1.0" in line
    ]
    rest = re.sub(r"\\text(?:backslash|asciitilde|asciicircum)\{\}|\\[{}$&#_%]", "", row)
    assert rest.count("&") == 1
    assert rest.endswith(r"\\")
    assert not set(rest.removesuffix(r"\\").replace("&", "")) & set("\\{}$#_%~^")


@pytest.mark.parametrize("name", ["[a]", "*a"])
def test_latex_name_is_no_argument_of_the_line_before(name):
    row = next(
        line for line in latex_table([{"method": name, "nll": {"mean": 1.0, "se": None}}]).splitlines() if "1.0" in line
    )
    assert row.startswith("{}" + name)


def test_csv_is_read_back_in_full_precision():
    text = format_table(ROWS, "csv", TIED)
    frame = pandas.read_csv(io.StringIO(text), index_col="method")
    assert list(frame.columns) == ["accuracy_mean", "accuracy_se", "accuracy_seeds", "nll_mean", "nll_se", "nll_seeds"]
    assert frame.loc["a", "accuracy_mean"] == ROWS[0]["accuracy"]["mean"]
    assert frame.loc["a", "accuracy_seeds"] == 2
    assert frame.loc["b_%", "accuracy_seeds"] == 1
    assert frame.loc[["b_%", "c"]].isna().sum().sum() == 3 + 4
    tricky = 'a,"b"\nc'
    one = format_table([{"method": tricky, "nll": {"mean": 1e-300, "se": None}}], "csv")
    frame = pandas.read_csv(io.StringIO(one))
    assert (frame.loc[0, "method"], frame.loc[0, "nll_mean"]) == (tricky, 1e-300)


@pytest.mark.parametrize("format", ["markdown", "latex", "csv"])
def test_columns_may_be_chosen(format):
    text = format_table(ROWS, format, columns=shown_columns(ROWS)[:1])
    assert "nll" not in text.lower()
    assert format_table([], format)


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match="`format` must be markdown, latex or csv, but it is 'html'"):
        format_table(ROWS, "html")
    with pytest.raises(InputError, match=r"`tied\['nll'\]` names methods that have no row: d"):
        format_table(ROWS, "latex", {"nll": {"d"}})
