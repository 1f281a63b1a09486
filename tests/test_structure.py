"""Limits that keep the package readable; `make lint` runs them."""

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule

import lightning_uq

ROOT = Path(lightning_uq.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MAX_LINES = 400
MAX_ARGUMENTS = 12
MAX_ANCESTORS = 3


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def room(dotted: str) -> str:
    """The first folder or file below the package: `lightning_uq.networks.mlp` is in the room `networks`."""
    return dotted.split(".")[1] if "." in dotted else ""


@cache
def classes() -> list[type]:
    found = []
    for info in pkgutil.walk_packages(lightning_uq.__path__, "lightning_uq."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        found += [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == info.name]
    return found


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long(file):
    num = len((ROOT / file).read_text().splitlines())
    assert num <= MAX_LINES, f"{file} has {num} lines; part it by what it does."


def test_no_constructor_takes_many_arguments():
    long = {}
    for file in FILES:
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.ClassDef):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    given = method.args
                    num = len(given.posonlyargs + given.args + given.kwonlyargs) - 1  # without self
                    if num > MAX_ARGUMENTS:
                        long[f"{file}: {node.name}"] = num
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            if is_dataclass and len(fields) > MAX_ARGUMENTS:
                long[f"{file}: {node.name}"] = len(fields)
    assert not long, f"More than {MAX_ARGUMENTS} arguments: {long}. Group those that belong together in one object."


@pytest.mark.parametrize("kind", [LightningModule, Callback])
def test_inheritance_is_shallow(kind):
    deep = {}
    for cls in classes():
        ancestors = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("lightning_uq")]
        if issubclass(cls, kind) and len(ancestors) > MAX_ANCESTORS:
            deep[cls.__name__] = ancestors
    assert not deep, f"More than {MAX_ANCESTORS} classes of this package above: {deep}. Hold an object instead."


def test_private_names_stay_in_their_room():
    crossing = []
    for file in FILES:
        here = "lightning_uq." + file.removesuffix(".py").replace("/", ".")
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("lightning_uq"):
                continue
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                private = [part for part in dotted.split(".")[1:] if part.startswith("_")]
                # `_lightning` belongs to all rooms: it is private to the package.
                if private and private != ["_lightning"] and room(dotted) != room(here):
                    crossing.append(f"{file}:{node.lineno} imports {dotted}")
    assert not crossing, "\n".join(crossing)


def test_private_names_of_lightning_are_used_in_one_file():
    found = []
    for file in FILES:
        if file == "_lightning.py":
            continue
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
                dotted = [*node.module.split("."), *(alias.name for alias in node.names)]
                found += [f"{file}:{node.lineno} {part}" for part in dotted if part.startswith("_")]
            if isinstance(node, ast.Attribute) and node.attr in LIGHTNING_PRIVATE:
                found.append(f"{file}:{node.lineno} .{node.attr}")
    assert not found, "\n".join(found)


# Private attributes of Trainers, loops and LightningModules.
LIGHTNING_PRIVATE = {
    "_apply_batch_transfer_handler",
    "_call_configure_model",
    "_callback_connector",
    "_checkpoint_connector",
    "_data_connector",
    "_data_source",
    "_hparams_name",
    "_logger_connector",
    "_on_before_batch_transfer",
    "_results",
    "_signature_collector",
}
