"""Finds methods of this package, and those in a user's file or importable module.

A file defines methods by one of two constants: ``METHOD``, a :class:`~lightning_uq.method.Method`, or ``METHODS`` for several.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from lightning_uq.errors import InputError
from lightning_uq.method import Method

ROOMS = ("lightning_uq.modules", "lightning_uq.callbacks")


PLAIN = {"softmax", "sigmoid", "gaussian"}
"""The plain networks, one per task, with which the other methods are compared."""


def methods(task: str = "classification") -> dict[str, Method]:
    """The methods of this package for a task, by name: first a plain network, the baseline, then the others in the order of files.

    Args:
        task: Name of the task.

    Raises:
        InputError: Two methods have the same name.

    Example:
        >>> list(methods())[0], methods()["ddu"].trained_as, list(methods("regression"))[0]
        ('softmax', 'softmax', 'gaussian')
    """
    found: dict[str, Method] = {}
    for room in ROOMS:
        for file in pkgutil.iter_modules(importlib.import_module(room).__path__, room + "."):
            _add(found, methods_of(importlib.import_module(file.name), task), file.name)
    return dict(sorted(found.items(), key=lambda item: item[0] not in PLAIN))


def find_methods(
    names: Sequence[str], known: dict[str, Method], task: str = "classification"
) -> tuple[list[str], dict[str, Method]]:
    """Resolve names, and load files and modules with methods.

    Args:
        names: Each is a known name, the path of a ``.py`` file, or the dotted path of a module.
        known: Known methods for the task, by name.
        task: Name of the task; methods of a file for other tasks are left out.

    Returns:
        The names of the chosen methods in the given order, and all known methods including the loaded ones.

    Raises:
        InputError: A name is unknown, a file does not exist, cannot be imported or holds no method, or two methods have
            the same name.
    """
    known, chosen = dict(known), []
    for name in names:
        if not is_source(name):
            chosen.append(name)
            continue
        offered, known = register([name], known, task)
        chosen += offered
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        problem = f"unknown for {task}: {', '.join(map(repr, unknown))}" if unknown else "no method is named"
        raise InputError(
            f"methods: {problem}. Choose from {', '.join(known)}, or pass a .py file or a module that defines METHOD."
        )
    return list(dict.fromkeys(chosen)), known


def is_source(name: str) -> bool:
    """Whether a name is the path of a ``.py`` file or the dotted path of a module, rather than a method's."""
    return "." in name


def load_source(name: str) -> ModuleType:
    """Import a ``.py`` file, or a module by its dotted path.

    Raises:
        InputError: It cannot be imported.
    """
    return load_file(name) if name.endswith(".py") else load_module(name)


def register(paths: Sequence[str], known: Mapping[str, Method], task: str) -> tuple[list[str], dict[str, Method]]:
    """Load the methods of ``.py`` files and modules.

    Args:
        paths: Paths of files, or dotted paths of modules; one that was already loaded adds nothing.
        known: Known methods for the task by name.
        task: Name of the task; methods for other tasks are left out.

    Returns:
        The names of the files' methods, and all known methods.

    Raises:
        InputError: A file does not exist, cannot be imported or holds no method for the task, or two methods have the same name.
    """
    known, names = dict(known), []
    for path in dict.fromkeys(paths):
        if not is_source(path):
            raise InputError(
                f"`method_file` must hold paths of .py files or dotted paths of modules, but it holds {path!r}."
            )
        module = load_source(path)
        offered = methods_of(module, task)
        if not offered:
            raise InputError(_no_method(path, module, task))
        _add(known, [method for method in offered if known.get(method.name) is not method], path)
        names += [method.name for method in offered]
    return names, known


def _no_method(name: str, module: ModuleType, task: str) -> str:
    others = sorted({other for method in methods_of(module) for other in method.tasks})
    if others:
        return f"methods: {name} has methods for {', '.join(others)}, but the task is {task}. Add it to `tasks` of a Method."
    return f"methods: {name} holds no method. Define METHOD = lightning_uq.Method(...) at its end."


def methods_of(module: ModuleType, task: str | None = None) -> list[Method]:
    """The methods of a module, from ``METHOD`` or ``METHODS``.

    Args:
        module: The module.
        task: Name of their task; None: any task.

    Raises:
        InputError: One of them is not a :class:`Method`.
    """
    offered = [*getattr(module, "METHODS", ()), *([module.METHOD] if hasattr(module, "METHOD") else [])]
    for method in offered:
        if not isinstance(method, Method):
            raise InputError(
                f"{module.__name__} must define METHOD as a lightning_uq.Method, but it is a {type(method).__name__}."
            )
    return [method for method in offered if task is None or task in method.tasks]


def load_module(name: str) -> ModuleType:
    """Import the module of a dotted path.

    Raises:
        InputError: It cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module's code may raise anything
        raise InputError(_import_failed(name, error)) from error


def load_file(path: str) -> ModuleType:
    """Import a ``.py`` file like ``import`` would, with its folder searched for its own imports.

    Raises:
        InputError: The file does not exist or cannot be imported, or another module has its name.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"methods: there is no file {path}.")
    module = sys.modules.get(file.stem)
    if module is not None and getattr(module, "__file__", None) == str(file):
        return module
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if module is not None or spec is None or spec.loader is None:
        raise InputError(f"methods: {path} has the same name as another module, {file.stem}. Rename the file.")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)  # makes its classes importable by name
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file's code may raise anything
        del sys.modules[file.stem]
        raise InputError(_import_failed(path, error)) from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _import_failed(name: str, error: Exception) -> str:
    return f"methods: {name} cannot be imported ({type(error).__name__}: {error})."


def _add(known: dict[str, Method], offered: Iterable[Method], source: str) -> None:
    for method in offered:
        if method.name in known:
            raise InputError(
                f"methods: {source} defines {method.name!r}, but another method has the same name. Rename it."
            )
        known[method.name] = method
