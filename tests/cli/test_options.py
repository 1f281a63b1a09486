"""A function's arguments become options."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_uq.cli.errors import UsageError
from lightning_uq.cli.options import Integers, Names, Repeated, make_parser, naming_options, run
from lightning_uq.errors import InputError

CALLS = []


def example(
    *,
    run: Repeated,
    size: int | None = None,
    rate: float | Literal["auto"] = "auto",
    names: Names = Names(),  # noqa: B008
    labels: Integers | None = None,
    settings: dict[str, Any] = {},  # noqa: B006
    quiet: bool = False,
    out: Path = Path("here"),
) -> None:
    """Do something.

    More about it.

    Args:
        run: Files of a run.
        size: How much, such as 50 % of it.
        rate: How fast.
        names: Names.
        labels: Labels.
        settings: Settings.
        quiet: Say nothing.
        out: Where.
    """
    CALLS.append((run, size, rate, names, labels, settings, quiet, out))


def call(*arguments):
    CALLS.clear()
    run(example, arguments)
    return CALLS.pop()


def test_values_have_the_types_of_the_arguments():
    assert call("--run", "a") == ([["a"]], None, "auto", (), None, {}, False, Path("here"))
    given = ("--run", "a", "b", "--run", "c", "--size=3", "--rate", "1e-3", "--names", "x, y", "--labels", "8,9")
    found = call(*given, "--settings", '{"a": {"b": [1]}}', "--quiet", "--out", "there")
    assert found == ([["a", "b"], ["c"]], 3, 1e-3, ("x", "y"), (8, 9), {"a": {"b": [1]}}, True, Path("there"))
    assert call("--run", "a", "--rate", "auto")[2] == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run: this option is required."),
        (["--run", "a", "--size", "few"], "--size must be a whole number, but it is 'few'."),
        (["--run", "a", "--size", "1.5"], "--size must be a whole number, but it is '1.5'."),
        (["--run", "a", "--rate", "fast"], "--rate must be a number or one of auto, but it is 'fast'."),
        (["--run", "a", "--labels", "a,b"], "--labels must be whole numbers separated by commas, such as 8,9, but it is 'a,b'."),
        (["--run", "a", "--settings", "[1]"], '--settings must be a JSON object, such as {"batch_size": 256}, but it is'),
        (["--run", "a", "--si", "3"], "--si"),
        (["--run", "a", "--out"], "--out"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    assert not CALLS


def test_errors_of_a_command_name_its_options():
    def command(model: Path, *, run: Repeated, batch_size: int = 1, id: str | None = None) -> None: ...

    text = "`batch_size`, `runs` and argument `id`: `model` or `model()` has no `states`, id or `batch size`."
    with pytest.raises(InputError) as raised, naming_options(command):
        raise InputError(text)
    assert str(raised.value) == "--batch-size, --run and --id: MODEL or `model()` has no `states`, id or `batch size`."


def test_errors_inside_any_command_name_its_options():
    def command(*, batch_size: int = 1) -> None:
        """Fail.

        Args:
            batch_size: A size.
        """
        raise InputError("`batch_size` is at fault.")

    with pytest.raises(InputError, match="^--batch-size is at fault"):
        run(command, [])


def test_the_help_has_the_docstrings_texts_and_the_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = make_parser(example).format_help()
    assert "usage: lightning-uq example [-h]" in text
    assert "--run FILE [FILE ...]" in text
    assert "Do something. More about it." in text
    for line in (
        "--size N              How much, such as 50 % of it.",
        "--rate {auto,X}       How fast (default: auto)",
        "--quiet               Say nothing.",
        "--out PATH            Where (default: here)",
    ):
        assert re.sub(" +", " ", line) in re.sub(" +", " ", text)


def test_every_option_of_every_command_has_a_help_text():
    for command in ("compare", "report", "evaluate", "score", "bandit"):
        text = make_parser(getattr(import_module(f"lightning_uq.cli.{command}"), command)).format_help()
        assert "None" not in text
        assert "type:" not in text
