"""Options from a function: its arguments become the options, their types check the values, and its docstring is the help.

``run(compare, ["--seeds", "2"])`` calls ``compare(seeds=2)``. A required argument is a required option, and ``max_epochs`` is
``--max-epochs``. An argument that can be passed by position is positional here as well.
"""

import argparse
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin

from lightning_uq.cli.errors import UsageError, missing_extra
from lightning_uq.errors import UQError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Accelerator = Literal["auto", "cpu", "cuda", "gpu", "mps"]
Repeated = list[list[str]]
"""An option that may be given several times, each time with several values."""


class Names(tuple[str, ...]):
    """Names separated by commas.

    Example:
        >>> Names.parse("softmax, ensemble")
        ('softmax', 'ensemble')
    """

    @classmethod
    def parse(cls, text: str) -> "Names":
        """The names of a text."""
        return cls(part.strip() for part in text.split(",") if part.strip())


class Integers(tuple[int, ...]):
    """Whole numbers separated by commas.

    Example:
        >>> Integers.parse("8,9")
        (8, 9)
    """

    @classmethod
    def parse(cls, text: str) -> "Integers":
        """The numbers of a text.

        Raises:
            ValueError: A part is not a whole number.
        """
        try:
            return cls(int(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise ValueError(f"not whole numbers separated by commas. Got value: {text}") from None


_KINDS: dict[Any, tuple[str | None, str]] = {
    int: ("N", "a whole number"),
    float: ("X", "a number"),
    str: (None, "a text"),
    Path: ("PATH", "a path"),
    Names: ("NAMES", "names separated by commas"),
    Integers: ("NUMBERS", "whole numbers separated by commas, such as 8,9"),
    dict: ("JSON", 'a JSON object, such as {"batch_size": 256}'),
}
"""For each type of an option: its placeholder in the help (None: the option's name), and its name in an error."""


def run(function: Callable[..., None], arguments: Sequence[str]) -> None:
    """Call a function with the options of a command line. Its errors name options, as by :func:`naming_options`.

    Args:
        function: Its keyword arguments are the options.
        arguments: The command line behind the command's name.

    Raises:
        UsageError: An option is unknown, missing or has a value of another type.
        MissingExtraError: jsonargparse is not installed.
    """
    parsed = vars(make_parser(function).parse_args(list(arguments)))
    with naming_options(function):
        function(**{name: parsed[name] for name in inspect.signature(function).parameters})


@contextmanager
def naming_options(function: Callable[..., None]) -> Iterator[None]:
    """A context whose errors name the options of a function in place of its arguments: --batch-size for `batch_size`, MODEL for `model`.

    An option that can be repeated is also named by its plural: --run for `runs`.

    Raises:
        UQError: That of the context.
    """
    try:
        yield
    except UQError as error:
        parameters = inspect.signature(function).parameters
        display_names = {name: _display_name(one) for name, one in parameters.items()}
        display_names |= {
            f"{name}s": display_names[name] for name, one in parameters.items() if one.annotation == Repeated
        }
        text = _ARGUMENT.sub(lambda found: display_names.get(found[1], found[0]), str(error))
        error.args = (_VALUE.sub(lambda found: _with_value(found, parameters), text),)
        raise


_ARGUMENT = re.compile(r"(?:arguments? )?`(\w+)`")
"""An argument in the text of this package's errors."""

_VALUE = re.compile(r"\b(\w+)='([^' ]+)'")
"""An argument with its value."""


def _with_value(found: re.Match[str], parameters: Mapping[str, inspect.Parameter]) -> str:
    parameter = parameters.get(found[1])
    return found[0] if parameter is None or _is_positional(parameter) else f"{_option(found[1])} {found[2]}"


def make_parser(function: Callable[..., None]) -> "ArgumentParser":
    """The parser of a function's options.

    Raises:
        MissingExtraError: jsonargparse is not installed.
    """
    try:
        from docstring_parser import parse
        from jsonargparse import ArgumentParser
        from jsonargparse.typing import register_type
    except ImportError as error:
        raise missing_extra("jsonargparse") from error
    for kind in (Names, Integers):
        register_type(kind, lambda value: ",".join(map(str, value)), kind.parse, fail_already_registered=False)
    documented = parse(inspect.getdoc(function) or "")
    parameters = inspect.signature(function).parameters

    class Parser(ArgumentParser):
        """Raises an error instead of printing it with the usage."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:  # jsonargparse tries one type after another
                super().error(message, ex)
            raise UsageError(_rephrased(message, parameters)) from ex

    text = " ".join(filter(None, (documented.short_description, documented.long_description)))
    parser = Parser(
        prog=f"lightning-uq {function.__name__}",
        description=" ".join(text.split()),
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    helps = {one.arg_name: " ".join((one.description or "").split()) for one in documented.params}
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty
        if _is_positional(parameter):
            text = helps[name].replace("%", "%%")
            parser.add_argument(name, type=parameter.annotation, metavar=name.upper(), help=text)
            continue
        details: dict[str, Any] = {"dest": name, "help": helps[name].replace("%", "%%")}
        details |= {"required": True} if required else {"default": parameter.default}
        if not required and parameter.default is not False and parameter.default not in (None, (), {}):
            details["help"] = f"{details['help'].rstrip('.')} (default: {parameter.default})"
        if parameter.annotation is bool:
            details["action"] = "store_true"
        elif parameter.annotation == Repeated:
            details |= {"action": "append", "nargs": "+", "metavar": "FILE"}
        else:
            details |= {"type": parameter.annotation}
            details |= _placeholder(parameter.annotation)
        parser.add_argument(_option(name), **details)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _display_name(parameter: inspect.Parameter) -> str:
    """An argument as the help shows it: ``MODEL`` or ``--batch-size``."""
    return parameter.name.upper() if _is_positional(parameter) else _option(parameter.name)


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without None."""
    union = get_origin(annotation) in (Union, types.UnionType)
    found = get_args(annotation) if union else (annotation,)
    return [get_origin(kind) if get_origin(kind) is dict else kind for kind in found if kind is not type(None)]


def _placeholder(annotation: Any) -> dict[str, str]:
    choices: list[str] = []
    metavar = None
    for kind in _kinds(annotation):
        if get_origin(kind) is Literal:
            choices += get_args(kind)
        else:
            metavar = _KINDS[kind][0]
    if choices:
        return {"metavar": "{" + ",".join([*choices, *filter(None, [metavar])]) + "}"}
    return {} if metavar is None else {"metavar": metavar}


def _describe(annotation: Any) -> str:
    """The name of this type in an error."""
    texts = [
        f"one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else _KINDS[kind][1]
        for kind in _kinds(annotation)
    ]
    return " or ".join(texts)


def _rephrased(message: str, parameters: Any) -> str:
    """jsonargparse's error with the names of the command line."""
    key, values = re.match(r'Parser key "(\w+)":', message), re.findall(r"(?:Got|Given) value: (.*)", message)
    if key is not None and values:
        return f"{_display_name(parameters[key[1]])} must be {_describe(parameters[key[1]].annotation)}, but it is {values[-1]!r}."
    # The second form is that of older releases of jsonargparse.
    missing = re.search(r"""arguments are required: (.*)|(?:Key|Option) ["'](\w+)["'] is required""", message)
    if missing is not None:
        names = (missing[1] or missing[2]).split(", ")
        required = [parameters[name] for name in names]
        kind = "argument is" if any(map(_is_positional, required)) else "option is"
        return (
            f"{', '.join(map(_display_name, required))}: {f'this {kind}' if len(names) == 1 else 'these are'} required."
        )
    return message
