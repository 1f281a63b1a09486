"""Importing a class or function by its path, ``my.module:Name`` or ``my.module.Name``."""

import importlib
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_subclass


def import_object(path: str, argument: str = "target", kind: str = "class or function") -> Any:
    """Import a class or function by its path; it may be nested in a class.

    Args:
        path: For example ``"torch.nn.Linear"`` or ``"torch.nn:Linear"``.
        argument: Name of the argument that holds the path, for the error.
        kind: Kind of object that the path should lead to, for the error.

    Raises:
        InputError: No callable has this path; the error names the part that is missing.

    Example:
        >>> import_object("torch.nn:Linear").__name__
        'Linear'
    """
    module_path, _, name = path.replace(":", ".").rpartition(".")
    problem = f"there is no module {module_path}" if module_path else "it names no module, as `my.module:Name` does"
    # The path of a nested class contains its owner, so shorten the module part until it can be imported.
    names = [name]
    while module_path:
        try:
            found: Any = importlib.import_module(module_path)
        except ModuleNotFoundError as error:
            if error.name is not None and not module_path.startswith(error.name):
                raise  # the module exists, but one of its own imports is missing
            module_path, _, outer = module_path.rpartition(".")
            names.insert(0, outer)
            continue
        owner = module_path
        for part in names:
            if not hasattr(found, part):
                close = get_close_matches(part, dir(found), n=1)
                problem = f"{owner} has no {part}" + (f", but it has {close[0]}" if close else "")
                break
            found, owner = getattr(found, part), f"{owner}.{part}"
        else:
            if callable(found):
                return found
            problem = f"{owner} is a {type(found).__name__}"
        break
    raise InputError(f"`{argument}` must be the import path of a {kind}, but it is {path!r}: {problem}.")


def import_class(path: str, base: type, argument: str = "target") -> Any:
    """Import a class by its path.

    Args:
        path: For example ``"lightning_uq.DeterministicModule"``, or ``"my.module:MyModule"``.
        base: The class that it must be or inherit from. A Lightning class also stands for its twin in `pytorch_lightning`.
        argument: Name of the argument that holds the path, for the error.

    Raises:
        InputError: The class does not exist, or does not inherit from ``base``.

    Example:
        >>> import torch
        >>> import_class("torch.nn.Linear", torch.nn.Module) is torch.nn.Linear
        True
    """
    found = import_object(path, argument, base.__name__)
    if not (inspect.isclass(found) and is_subclass(found, base)):
        raise InputError(f"`{argument}` must be the import path of a {base.__name__}, but {path!r} is not one.")
    return found


def as_function(value: Any, argument: str) -> Callable[..., Any]:
    """Return a function, or import the one that a path names.

    Args:
        value: A function, or its dotted path.
        argument: Name of the argument that holds it, for the error.

    Raises:
        InputError: The value is neither a function nor the path of one.

    Example:
        >>> as_function("math.sqrt", "output")(4)
        2.0
    """
    found = import_object(value, argument) if isinstance(value, str) else value
    if not callable(found):
        raise InputError(f"`{argument}` must be a function or its import path, but its type is {type(value).__name__}.")
    return found  # type: ignore[no-any-return]  # anything callable
