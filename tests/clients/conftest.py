"""Runs the clients where `--clients` names the page to write; `make test` leaves them out, since their packages are not installed."""

import importlib
import inspect
import warnings
from collections import defaultdict
from pathlib import Path

import pytest

from tests.clients.client import REFUSALS, TOOLS, Client

FOLDER = Path(__file__).parent
NO_CLIENTS = {"__init__", "client", "conftest"}
MODULES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem not in NO_CLIENTS and not f.stem.startswith("test_"))


def pytest_addoption(parser):
    parser.addoption("--clients", type=Path, help="run the clients and write what came of it to this Markdown file")


def pytest_ignore_collect(collection_path, config):
    """The other modules here import packages that may be missing: nobody looks for doctests in them."""
    asked = config.getoption("--clients", None) is not None
    return None if collection_path.name == "test_clients.py" and asked else True


def found_clients() -> tuple[list[Client], dict[str, str]]:
    """The clients whose packages can be imported, and why the others cannot."""
    clients, missing = [], {}
    for name in MODULES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other packages
                clients += importlib.import_module(f"tests.clients.{name}").CLIENTS
        except ImportError as error:
            missing[name.replace("_", "-")] = str(error).partition("\n")[0]
    return clients, missing


def pytest_generate_tests(metafunc):
    if "client" in metafunc.fixturenames:
        clients, _ = found_clients()
        metafunc.parametrize("client", [pytest.param(one, id=one.name.replace(" ", "_")) for one in clients])


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("tool")
        if marker is not None and hasattr(item, "callspec"):
            item.user_properties.append(("client", [item.callspec.params["client"].name, marker.args[0]]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        for name, value in report.user_properties:
            if name == "client":
                _CELLS[tuple(value)].add(report.outcome)


_CELLS = defaultdict(set)


def pytest_sessionfinish(session):
    path = session.config.getoption("--clients", None)
    if path is None or hasattr(session.config, "workerinput") or not _CELLS:
        return
    clients, missing = found_clients()
    path.write_text(page(clients, missing), encoding="utf-8")


def page(clients: list[Client], missing: dict[str, str]) -> str:
    """The page, in Markdown."""
    head = (FOLDER / "page.md").read_text(encoding="utf-8")
    rows = [
        "| project | predicts | " + " | ".join(f"`{tool}`" for tool in TOOLS) + " |",
        "|---" * (len(TOOLS) + 2) + "|",
    ]
    for client in clients:
        rows.append(f"| {client.name} | {client.predicts} | " + " | ".join(cell(client, tool) for tool in TOOLS) + " |")
    rows += [f"| {name} | | " + " | ".join(["not tried"] * len(TOOLS)) + " |" for name in missing]
    told = [f"- **{name}** was not tried: {why}." for name, why in missing.items()]
    return "\n".join([head, *rows, "", *told, "", *(section(client) for client in clients)])


def cell(client: Client, tool: str) -> str:
    """What came of one tool: refusals are tested as well."""
    outcomes = _CELLS.get((client.name, tool), set())
    if not outcomes or outcomes == {"skipped"}:
        return "not run"
    if "failed" in outcomes:
        return "**failed**"
    return "not" if tool in client.refused else "with a line" if client.line(tool) else "as it is"


def section(client: Client) -> str:
    """Versions, lines and reasons of one client."""
    lines = [f"## {client.name}", "", f"{client.versions}."]
    if client.lines:
        sources = [inspect.getsource(one).rstrip() for one in client.names]
        lines += ["", "```python", *[line for source in sources for line in (*source.splitlines(), "")]]
        lines += [*(client.expression(tool) for tool in TOOLS if client.line(tool)), "```"]
    refused = [(tool, REFUSALS.get((client.name, tool), "")) for tool in client.refused]
    lines += ["", *(f"- `{tool}` is refused: {text}" for tool, text in refused)] if refused else []
    return "\n".join([*lines, ""])
