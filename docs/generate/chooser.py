"""The table of methods on the page that helps to choose one.

Names, tasks and descriptions come from the methods that ``lightning-uq compare`` finds, numbers from the tables of ``README.md``, which
``make demo`` printed, and from published data (``evidence.py``); the column on DDP comes from ``docs/contract.md``. A method's page names its methods and its rows of the contract in its
front matter::

    ---
    methods: [ensemble, ensemble_mean]
    contract: [Ensemble]
    ---
"""

import functools
import html as entities
import posixpath
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from docs.generate import evidence
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.tasks.names import TASKS

DOCS = Path(__file__).parents[1]
ALL, OF_PAGE = "<!-- table of methods -->", "<!-- methods of this page -->"
PAGES = (*sorted((DOCS / "methods").glob("*.md")), DOCS / "ddu.md", DOCS / "laplace.md")
COSTS = {"Params": "parameters", "Train s": "training", "ms/1k": "prediction"}


class Row(NamedTuple):
    """One method in the table."""

    name: str
    about: str
    tasks: tuple[str, ...]
    reads: str | None  # the method whose trained network it reads
    page: Path | None
    ddp: str
    costs: dict[str, float]
    evidence: str


def front_matter(path: Path) -> dict:
    """What stands between two lines of dashes at the top of a page."""
    found = re.match(r"---\n(.*?)\n---\n", path.read_text(), re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


@functools.cache
def demo() -> dict[str, dict[str, dict[str, str]]]:
    """Each data set's table in ``README.md``: the cells by method and column.

    Raises:
        ValueError: A table is gone, or lacks a column of the costs.
    """
    text = (DOCS.parent / "README.md").read_text()
    found = {}
    for header, body in re.findall(r"^\| method \|(.*)\|\n\|[-:|]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE):
        columns = [cell.strip() for cell in header.split("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
        found["digits" if "Acc." in columns else "diabetes"] = {
            row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows
        }
    if set(found) != {"digits", "diabetes"} or any(
        not set(COSTS) <= set(row) for table in found.values() for row in table.values()
    ):
        raise ValueError(f"README.md needs a table of digits and one of diabetes, with the columns {', '.join(COSTS)}.")
    return found


@functools.cache
def rows() -> list[Row]:
    """Every method that a comparison finds, once, whatever the number of its tasks.

    Raises:
        ValueError: A page names a method that there is not.
    """
    pages = {name: path for path in PAGES for name in front_matter(path).get("methods", ())}
    by_task = {task: methods(task) for task in TASKS}
    names = dict.fromkeys(name for found in by_task.values() for name in found)
    unknown = set(pages) - set(names)
    if unknown:
        raise ValueError(f"The front matter of a page names unknown methods: {', '.join(sorted(unknown))}.")
    made = []
    for name in names:
        tasks = tuple(task for task, found in by_task.items() if name in found)
        method = by_task[tasks[0]][name]
        page = pages.get(name)
        ddp = runs_under_ddp(page) if page else ""
        made.append(Row(name, method.about, tasks, method.trained_as, page, ddp, costs(name), evidence.of(name)))
    return made


def runs_under_ddp(page: Path) -> str:
    """Whether the contract's rows that a page names passed the tests under DDP: "yes", "partly" or "no".

    Raises:
        ValueError: The contract has no such row.
    """
    text = (DOCS / "contract.md").read_text()
    column = next(line for line in text.splitlines() if line.startswith("| |")).split("|").index(" ddp ")
    answers = []
    for name in front_matter(page).get("contract", ()):
        lines = re.findall(rf"^\| {re.escape(name)}(?:,[^|]*)? \|.*$", text, re.MULTILINE)
        if not lines:
            raise ValueError(f"docs/contract.md has no row {name!r}, which {page.name} names.")
        answers += [line.split("|")[column].strip() == "yes" for line in lines]
    return "yes" if answers and all(answers) else "partly" if any(answers) else "no"


def costs(name: str) -> dict[str, float]:
    """Parameters, time of training and of prediction, as multiples of one network's; empty where the demo does not run the method."""
    for table, base in (("digits", "softmax"), ("diabetes", "gaussian")):
        if name in demo()[table]:
            mine, one = demo()[table][name], demo()[table][base]
            return {cost: _number(mine[column]) / _number(one[column]) for column, cost in COSTS.items()}
    return {}


def _number(cell: str) -> float:
    return float(cell.replace("*", "").replace(",", "").split()[0])


def _cell(name: str, table: str, column: str) -> str:
    """A value of the demo without its error, bold where it is the best."""
    found = demo()[table].get(name, {}).get(column, "-")
    text = entities.escape(re.sub(r" ±[\d.]+", "", found))
    return re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", text)


def fill(markdown: str, page: Path) -> str:
    """A page with its tables of methods in the places of the marks."""
    if ALL in markdown:
        markdown = markdown.replace(ALL, table())
    return markdown.replace(OF_PAGE, page_table(page)) if OF_PAGE in markdown else markdown


def page_table(page: Path) -> str:
    """Cost and evidence of the methods that a page is about."""
    lines = [
        "| method | parameters | training time | prediction time | digits: NLL | digits: AUROC | diabetes: NLL |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    mine = [row for row in rows() if row.page == page]
    for row in mine:
        cost = [_multiple(row, name) for name in COSTS.values()]
        values = [_cell(row.name, *column) for column in NUMBERS]
        lines.append(f"| {' | '.join([f'`{row.name}`', *cost, *values])} |")
    notes = [f"- {row.evidence} ([published results]({{results}}))." for row in mine if row.evidence]
    results = posixpath.relpath("results.md", page.parent.relative_to(DOCS).as_posix())
    return "\n".join([*lines, "", CAPTION, "", *notes]).replace("{results}", results)


CAPTION = (
    "Costs are multiples of one network's. All numbers are those of `make demo`, means over three seeds. Bold: the best mean of all methods; "
    "≈: it cannot be distinguished from the best. AUROC is that of the score for out-of-distribution inputs."
)
NUMBERS = (("digits", "NLL"), ("digits", "AUROC"), ("diabetes", "NLL"))


def _multiple(row: Row, cost: str) -> str:
    return f"{row.costs[cost]:.3g} ×" if cost in row.costs else "-"


def table() -> str:
    """The table of all methods, with what the filters above it need as attributes of its rows."""
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    return (
        f'{_filters()}\n<div class="chooser-table"><table id="methods" class="methods"><thead><tr>{heads}</tr></thead><tbody>\n'
        + "\n".join(_line(row) for row in rows())
        + "\n</tbody></table></div>\n"
    )


HEADS = (
    "Method",
    "Tasks",
    "Training",
    "Para\u00admeters",
    "Train\u00ading time",
    "Predic\u00adtion time",
    "Digits: NLL",
    "Digits: AUROC",
    "Diabetes: NLL",
    "DDP",
    "Published data",
)


def _line(row: Row) -> str:
    name = f"<code>{row.name}</code>"
    if row.page:
        name = f'<a href="{row.page.relative_to(DOCS).with_suffix(".html").as_posix()}">{name}</a>'
    training = f"after that of <code>{row.reads}</code>" if row.reads else "its own"
    cells = [
        f"{name}<br><small>{entities.escape(row.about)}</small>",
        "<br>".join(task.replace("_", " ") for task in row.tasks),
        training,
        *(_multiple(row, cost) for cost in COSTS.values()),
        *(_cell(row.name, *column) for column in NUMBERS),
        row.ddp or "-",
        row.evidence or "-",
    ]
    data = {
        "tasks": " ".join(row.tasks),
        "trained": "later" if row.reads else "own",
        "ddp": row.ddp,
        **{cost: f"{value:.3f}" for cost, value in row.costs.items() if cost != "parameters"},
    }
    attributes = " ".join(f'data-{key}="{value}"' for key, value in data.items())
    return f"<tr {attributes}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _filters() -> str:
    tasks = {"": "any", **{task: task.replace("_", " ") for row in rows() for task in row.tasks}}
    times = {"": "any", "1.5": "up to 1.5 ×", "5": "up to 5 ×", "10": "up to 10 ×"}
    chosen = {
        "tasks": ("Task", tasks),
        "trained": ("The network", {"": "may be trained", "later": "is trained already"}),
        "training": ("Training time", times),
        "prediction": ("Prediction time", times),
        "ddp": ("GPUs", {"": "one", "yes": "many (DDP)"}),
    }
    labels = [
        f'<label>{label} <select name="{name}">'
        + "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())
        + "</select></label>"
        for name, (label, options) in chosen.items()
    ]
    return f'<form class="chooser" hidden>{"".join(labels)}<output></output></form>'
