"""What an import of this package costs beside Lightning, which it needs anyway, and what the help of the command costs."""

import json
import subprocess
import sys

import pytest

IMPORTS = """
import json, sys, time
began = time.process_time()
import lightning.pytorch, torchmetrics
lightning = time.process_time() - began
before = set(sys.modules)
began = time.process_time()
import lightning_uq.callbacks, lightning_uq.modules
print(json.dumps({"share": (time.process_time() - began) / lightning, "loaded": sorted(set(sys.modules) - before)}))
"""
LATER = (
    "jsonargparse",
    "jinja2",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "optuna",
    "botorch",
    "onnx",
    "lightning_uq.compare",
    "lightning_uq.cli",
)
"""Loaded where they are used: extras, the command, and the comparison's rooms."""


def test_the_import_is_light():
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert [name for name in found["loaded"] if name.startswith(LATER)] == []
    # Under .3 s where Lightning takes 2.5 s: about a tenth.
    assert found["share"] < 0.2


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_help_needs_neither_torch_nor_lightning(arguments):
    code = f"import sys; from lightning_uq.cli import main; main({arguments}); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "lightning", "numpy"}.isdisjoint(run.stdout.splitlines()[-1].split())


def test_public_names_are_loaded_at_their_first_use():
    code = """
import sys, lightning_uq
before = "torch" in sys.modules
from lightning_uq import *
kinds = [lightning_uq.UncertaintyReport, UncertaintyReport, EnsembleModule, Classification, export_fitted]
print(before, *(kind.__module__ for kind in kinds), hasattr(lightning_uq, "Nothing"), set(lightning_uq.__all__) <= set(dir(lightning_uq)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report = "lightning_uq.compare.uncertainty_report.callback"
    rooms = ["modules.ensemble", "tasks.classification", "networks.export"]
    assert run.stdout.split() == ["False", report, report, *(f"lightning_uq.{room}" for room in rooms), "False", "True"]
