"""Limits that keep the package readable; `make lint` runs them."""

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule

import lightning_uq

ROOT = Path(lightning_uq.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MAX_LINES = 400
MAX_ARGUMENTS = 12
OPTIONS_OF_A_COMMAND = "compare/configuration.py: Configuration"
"""One field per option of `lightning-uq compare`, all with defaults."""
MAX_ANCESTORS = 3


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def room(dotted: str) -> str:
    """The first folder or file below the package: `lightning_uq.networks.mlp` is in the room `networks`."""
    return dotted.split(".")[1] if "." in dotted else ""


@cache
def lightnings_private_names() -> set[str]:
    """Names with one underscore that Lightning defines, but neither torch nor this package does."""
    folders = [Path(lightning.__file__).parent / "pytorch", Path(lightning.__file__).parent / "fabric"]
    names = {
        name for folder in folders for path in folder.rglob("*.py") for name in defined(ast.parse(path.read_text()))
    }
    ours = {name for file in FILES if file != "_lightning.py" for name in defined(tree(file))}
    torchs = {*dir(torch.nn.Module()), *dir(torch.Tensor), "_metadata"}  # `_metadata`: of a state dict
    return {name for name in names - ours - torchs if name.startswith("_") and not name.startswith("__")}


def defined(node: ast.Module) -> set[str]:
    """The names of functions, classes, variables and attributes that a file defines."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef):
            names.add(inner.name)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names.add(inner.attr)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
    return names


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
    long.pop(OPTIONS_OF_A_COMMAND, None)
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
        crossing += [f"{file}:{line} uses {dotted}" for line, dotted in private_crossings(tree(file), here)]
    assert not crossing, "\n".join(crossing)


def private_crossings(node: ast.Module, here: str) -> list[tuple[int, str]]:
    """Each private name of another room that a file imports, or reads from a module that it imports, with its line."""
    modules, used = {}, []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in inner.names}
            used += [(inner.lineno, alias.name) for alias in inner.names]
        elif isinstance(inner, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"{inner.module}.{alias.name}" for alias in inner.names}
            used += [(inner.lineno, f"{inner.module}.{alias.name}") for alias in inner.names]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and (owner := ast.unparse(inner.value)) in modules:
            used.append((inner.lineno, f"{modules[owner]}.{inner.attr}"))
    crossing = []
    for line, dotted in used:
        parts = dotted.split(".")[1:]
        private = [part for part in parts if part.startswith("_") and not part.startswith("__") and part != "_fields"]
        # `_lightning` belongs to all rooms: it is private to the package.
        if private and private != ["_lightning"] and dotted.startswith("lightning_uq") and room(dotted) != room(here):
            crossing.append((line, dotted))
    return crossing


@pytest.mark.parametrize(
    "code",
    [
        "from lightning_uq.batches import _private",
        "import lightning_uq.batches._private",
        "import lightning_uq.batches\nlightning_uq.batches._private(1)",
        "import lightning_uq.batches as b\nb._private(1)",
        "from lightning_uq import batches\nbatches._private(1)",
    ],
)
def test_a_private_name_of_another_room_is_found(code):
    assert [dotted for _, dotted in private_crossings(ast.parse(code), "lightning_uq.modules.base")] == [
        "lightning_uq.batches._private"
    ]
    assert not private_crossings(ast.parse(code), "lightning_uq.batches")


def test_private_names_of_lightning_are_used_in_one_file():
    found = []
    for file in FILES:
        if file != "_lightning.py":
            found += [f"{file}:{line} {name}" for line, name in private_uses(tree(file))]
    assert not found, "\n".join(found)


def private_uses(node: ast.Module) -> list[tuple[int, str]]:
    """Each use of a private name of Lightning, as an import, an attribute or a string, with its line."""
    found = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").split(".")[0] == "lightning":
            dotted = [*inner.module.split("."), *(alias.name for alias in inner.names)]
            found += [(inner.lineno, part) for part in dotted if part.startswith("_")]
        elif isinstance(inner, ast.Attribute) and inner.attr in lightnings_private_names():
            found.append((inner.lineno, inner.attr))
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            found += [(inner.lineno, inner.value)] if inner.value in lightnings_private_names() else []
    return found


@pytest.mark.parametrize(
    "code",
    [
        "self._trainer",
        "trainer._checkpoint_connector.dump_checkpoint(False)",
        "getattr(module, '_hparams_name', None)",
        "precision._after_closure(module, optimizer)",
        "LightningOptimizer._to_lightning_optimizer(optimizer, strategy)",
        "from lightning.pytorch.utilities.model_helpers import _restricted_classmethod",
    ],
)
def test_a_private_name_of_lightning_is_found(code):
    assert private_uses(ast.parse(code))


def test_classes_of_lightning_are_compared_in_one_file():
    found = []
    for file in FILES:
        if file != "lightning_trees.py":
            found += [f"{file}:{line} {name}" for line, name in class_checks(tree(file))]
    assert not found, "Use lightning_trees.is_instance or is_subclass: " + "\n".join(found)


def class_checks(node: ast.Module) -> list[tuple[int, str]]:
    """Each `isinstance` or `issubclass` with a class that is imported from Lightning, with its line."""
    imported = {
        alias.asname or alias.name
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").split(".")[0] == "lightning"
        for alias in inner.names
    }
    calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return [
        (call.lineno, part.id)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass")
        for part in ast.walk(call.args[1])
        if isinstance(part, ast.Name) and part.id in imported
    ]


@pytest.mark.parametrize(
    "check", ["isinstance(m, Trainer)", "issubclass(m, int | Trainer)", "isinstance(m, (int, Trainer))"]
)
def test_a_comparison_with_a_class_of_lightning_is_found(check):
    assert class_checks(ast.parse(f"from lightning.pytorch import Trainer\n{check}")) == [(2, "Trainer")]
