"""Recording constructor arguments for the checkpoint, and an error for an unknown argument that lists the known ones."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

from lightning_uq.errors import InputError
from lightning_uq.modules.arguments import restore_argument


def recorded(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that it first stores its arguments by name in the dictionary ``self.given_arguments``.

    The outermost constructor's arguments count, since ``load_from_checkpoint`` calls that one. Inner constructors add the defaults
    of arguments that were not passed. Arguments that a subclass passes to its base are left out, because the subclass will pass
    them again. A constructor with ``*args`` leaves the recording to the next one. Arguments that a checkpoint holds as plain data
    are restored first: see :func:`~lightning_uq.modules.arguments.restore_argument`.

    Raises:
        InputError: The constructor has no such argument, or a checkpoint could not store the argument.
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

    # `load_from_checkpoint` drops arguments that a constructor does not take, but does not look behind a wrapper.
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
    """The named arguments of a class's constructor, and of base constructors to which it passes ``**kwargs``."""
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
