"""What a constructor was called with: kept for the checkpoint, and an unknown argument is named with those that exist."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

from lightning_uq.errors import InputError
from lightning_uq.modules.arguments import restore_argument


def recorded(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that first notes its arguments in ``self.given_arguments``, a dictionary by name.

    The arguments of the outermost constructor count, since ``load_from_checkpoint`` calls that one. The inner constructors
    add the defaults of arguments that nobody passed. An argument that a subclass passes to its base by itself is left out:
    the subclass will pass it again. A constructor with ``*args`` leaves the notes to the next one. Plain data that stands for
    an argument in a checkpoint is restored first: see :func:`~lightning_uq.modules.arguments.restore_argument`.

    Raises:
        InputError: The constructor has no such argument, or a checkpoint could not hold one of them.
    """
    parameters = list(inspect.signature(init).parameters.values())
    kinds = {parameter.kind for parameter in parameters}

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if Parameter.VAR_KEYWORD not in kinds:
            _check_known(type(self), kwargs.keys() - {parameter.name for parameter in parameters})
        if Parameter.VAR_POSITIONAL not in kinds:
            names = [parameter.name for parameter in parameters[1:]]
            passed = {**dict(zip(names, args, strict=False)), **kwargs}
            if "given_arguments" not in vars(self):
                vars(self)["given_arguments"] = passed.copy()
                restored = [restore_argument(value, name) for name, value in zip(names, args, strict=False)]
                args = (*restored, *args[len(names) :])
                kwargs = {name: restore_argument(value, name) for name, value in kwargs.items()}
            for parameter in parameters:
                if parameter.name not in passed and parameter.default is not Parameter.empty:
                    self.given_arguments.setdefault(parameter.name, parameter.default)
        init(self, *args, **kwargs)

    # `load_from_checkpoint` leaves out what a constructor does not take, but does not look behind a wrapper.
    constructor.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    return constructor


def _check_known(kind: type, unknown: set[str]) -> None:
    for name in sorted(unknown):
        options = _options(kind)
        for option, parameter in options.items():
            default = parameter.default
            if dataclasses.is_dataclass(default) and name in {field.name for field in dataclasses.fields(default)}:
                raise InputError(
                    f"{kind.__name__} has no argument `{name}`: it is a field of `{option}`. Pass "
                    f"`{option}={type(default).__name__}({name}=...)`."
                )
        raise InputError(f"{kind.__name__} has no argument `{name}`. Its arguments are {', '.join(options)}.")


def _options(kind: type) -> dict[str, Parameter]:
    """The named arguments of a class, those included that its constructor passes on to its base's."""
    found: dict[str, Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        rest = [p for p in parameters if p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        for parameter in parameters:
            if parameter not in rest:
                found.setdefault(parameter.name, parameter)
        if not rest:
            break
    return found
