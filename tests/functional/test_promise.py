"""``functional/`` is pure tensor maths: no Lightning, no ``nn.Module``, and no object whose state changes."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_uq import functional

FILES = sorted(Path(functional.__file__).parent.glob("*.py"))
MODULES = [
    importlib.import_module(f"lightning_uq.functional.{info.name}")
    for info in pkgutil.iter_modules(functional.__path__)
]
CLASSES = [
    found
    for module in MODULES
    for _, found in inspect.getmembers(module, inspect.isclass)
    if found.__module__ == module.__name__
]


def is_immutable(kind):
    """Whether instances hold nothing that can be set: a named tuple, a frozen dataclass, a protocol, or an autograd function."""
    if issubclass(kind, tuple) or getattr(kind, "_is_protocol", False):
        return True
    frozen = getattr(kind, "__dataclass_params__", None)
    if frozen is not None:
        return frozen.frozen
    own = [value for name, value in vars(kind).items() if not name.startswith("_")]
    return issubclass(kind, torch.autograd.Function) and all(isinstance(value, staticmethod) for value in own)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_class_has_mutable_state(kind):
    assert not issubclass(kind, nn.Module)
    assert is_immutable(kind)


def test_a_class_with_state_is_recognised():
    class Counter:
        def __init__(self):
            self.count = 0

    assert not is_immutable(Counter)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_imports_lightning_or_modules_or_rebinds_a_global(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        assert not [n for n in names if n.split(".")[0] in ("lightning", "pytorch_lightning", "torchmetrics")]
        assert "torch.nn" not in names, "take torch.nn.functional, or move the function to networks/"
        assert not [
            n for n in names if n.startswith("lightning_uq.") and n.split(".")[1] not in ("functional", "errors")
        ]
