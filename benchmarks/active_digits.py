"""The table of docs/active_learning.md, from the results of `lightning-uq active`:

    lightning-uq active --score random,predictive_entropy,mutual_information,epig,badge,core_set,density_then_entropy@ddu,log_density@ddu \
        --out runs/active
    python benchmarks/active_digits.py runs/active/results.json

It keeps the results as benchmarks/active_digits.json, from which the site draws its figure.
"""

import sys
from pathlib import Path

from kept import publish

from lightning_uq.compare.active import COLUMNS
from lightning_uq.report import markdown_table

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "active_learning.md"
BEGIN, END = "<!-- digits -->\n", "<!-- end of digits -->"


def table(results: dict) -> str:
    """What the page shows of results."""
    rows = results["rows"]
    columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
    lines = [line for line in markdown_table(rows, columns=columns).splitlines() if line.startswith("|")]
    return "\n" + "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    publish(Path(sys.argv[1]), RESULTS, PAGE, table, BEGIN, END)
