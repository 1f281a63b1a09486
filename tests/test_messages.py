"""Messages are whole sentences: each ends with one period, and no word is missing before it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_uq

ROOT = Path(lightning_uq.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
CUT_SHORT = re.compile(r"(^|\s)(no|an|the)\.(\s|$)|(?<!\.)\.\.\s*$")
"""A sentence that ends with an article or "no", or with two periods (three are an ellipsis)."""
CLEAN = {"without_period", "type", "isinstance", "len", "repr", "_reason"}
"""Functions whose results end with no period, whatever error they take; `_reason` ends its sentences itself."""


def faults(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each fault in a file."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant | ast.JoinedStr) and (text := template(inner)) and CUT_SHORT.search(text):
            yield inner.lineno, text
        if isinstance(inner, ast.FunctionDef):
            errors = carriers(inner)
            for joined in (part for part in ast.walk(inner) if isinstance(part, ast.JoinedStr)):
                for value, after in zip(joined.values, joined.values[1:], strict=False):
                    ends = isinstance(after, ast.Constant) and str(after.value).startswith(".")
                    if ends and isinstance(value, ast.FormattedValue) and carries(value.value, errors):
                        yield joined.lineno, template(joined)


def template(node: ast.AST) -> str:
    """The text of a string, with {...} for values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def carriers(function: ast.FunctionDef) -> set[str]:
    """The names of caught errors, and of variables that hold their texts."""
    names = {one.name for one in ast.walk(function) if isinstance(one, ast.ExceptHandler) and one.name}
    for one in ast.walk(function):
        if isinstance(one, ast.Assign) and carries(one.value, names):
            names |= {target.id for target in one.targets if isinstance(target, ast.Name)}
    return names


def carries(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression may end with the text of an error, and so with a period."""
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name):
            return function.id not in CLEAN and any(carries(one, names) for one in node.args)
        return isinstance(function, ast.Attribute) and function.attr != "rstrip" and carries(function.value, names)
    if isinstance(node, ast.JoinedStr):
        return bool(node.values) and carries(node.values[-1], names)
    if isinstance(node, ast.FormattedValue):
        return carries(node.value, names)
    if isinstance(node, ast.IfExp):
        return carries(node.body, names) or carries(node.orelse, names)
    return isinstance(node, ast.Name) and node.id in names


@pytest.mark.parametrize("file", FILES)
def test_no_message_is_cut_short(file):
    found = [f"{file}:{line} {text}" for line, text in faults(ast.parse((ROOT / file).read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "raise InputError(f'{x} needs a loader, but the Trainer has no.')",
        "raise InputError('The Trainer has no. Pass a loader.')",
        "raise InputError('It cannot be read..')",
        "def f():\n try: g()\n except ValueError as error: raise InputError(f'It is: {error}.') from error",
        "def f():\n try: g()\n except E as e: raise InputError(f'It is: {str(e).strip()}. Do that.') from e",
        "def f():\n try: g()\n except E as e: reason = f'It is {e}'\n return f'{reason}.'",
    ],
)
def test_a_message_that_is_cut_short_is_found(code):
    assert list(faults(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "raise InputError(f'{x} has none. Pass one, and so on ...')",
        "def f():\n try: g()\n except E as e: raise InputError(f'{type(e).__name__}: {without_period(e)}.') from e",
        "def f():\n try: g()\n except E as e: raise InputError(f'It is: {e}') from e",
        "def f():\n try: g()\n except OSError as e: raise InputError(f'It is: {e.strerror}.') from e",
    ],
)
def test_a_whole_message_is_let_pass(code):
    assert not list(faults(ast.parse(code)))
