"""What `import lightning_uq` costs beside Lightning, which it needs anyway."""

import json
import subprocess
import sys

IMPORTS = """
import json, sys, time
began = time.process_time()
import lightning.pytorch, torchmetrics
lightning = time.process_time() - began
before = set(sys.modules)
began = time.process_time()
import lightning_uq
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


def test_a_name_that_is_imported_late():
    code = "import lightning_uq; from lightning_uq import UncertaintyReport; print(UncertaintyReport.__module__, hasattr(lightning_uq, 'Nothing'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["lightning_uq.compare.uncertainty_report.callback", "False"]
