"""Importing a class or function by its dotted path."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_subclass


def import_object(path: str, argument: str = "target") -> Any:
    """The class or function of a dotted path, which may be nested in a class.

    Args:
        path: Such as ``"torch.nn.Linear"``.
        argument: Name of the argument that holds the path, for the error.

    Raises:
        InputError: Nothing that can be called has this path.

    Example:
        >>> import_object("torch.nn.Linear").__name__
        'Linear'
    """
    module_path, _, name = path.rpartition(".")
    # A nested class has its owner in the path: shorten the module's part until it imports.
    names = [name]
    while module_path:
        try:
            found: Any = importlib.import_module(module_path)
        except ModuleNotFoundError as error:
            if error.name is not None and not module_path.startswith(error.name):
                raise  # the module exists, but one of its own imports does not
            module_path, _, outer = module_path.rpartition(".")
            names.insert(0, outer)
            continue
        for part in names:
            found = getattr(found, part, None)
        if callable(found):
            return found
        break
    raise InputError(f"`{argument}` must be the import path of a class or function, but it is {path!r}.")


def import_class(path: str, base: type, argument: str = "target") -> Any:
    """The class of a dotted path.

    Args:
        path: Such as ``"lightning_uq.DeterministicModule"``.
        base: A class that it must be, or inherit from; a class of Lightning stands for its twin in `pytorch_lightning`, too.
        argument: Name of the argument that holds the path, for the error.

    Raises:
        InputError: There is no such class, or it does not inherit from ``base``.

    Example:
        >>> import torch
        >>> import_class("torch.nn.Linear", torch.nn.Module) is torch.nn.Linear
        True
    """
    try:
        found = import_object(path, argument)
    except InputError:
        found = None
    if not (inspect.isclass(found) and is_subclass(found, base)):
        raise InputError(f"`{argument}` must be the import path of a {base.__name__}, but it is {path!r}.")
    return found


def as_function(value: Any, argument: str) -> Callable[..., Any]:
    """A function, or the one that an import path names.

    Args:
        value: A function, or its dotted path.
        argument: Name of the argument that holds it, for the error.

    Raises:
        InputError: It is neither.

    Example:
        >>> as_function("math.sqrt", "output")(4)
        2.0
    """
    found = import_object(value, argument) if isinstance(value, str) else value
    if not callable(found):
        raise InputError(f"`{argument}` must be a function or its import path, but its type is {type(value).__name__}.")
    return found  # type: ignore[no-any-return]  # anything callable
