"""Run the examples of README.md. As a script, this needs an installed package and nothing else, so it also runs in a bare environment."""

import importlib.metadata
import logging
import os
import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def run_examples() -> dict:
    """The names that the examples define, run one after another in the working directory."""
    names: dict = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    return names


def check_numbers(names: dict) -> None:
    """Hold the examples to the numbers in their comments, as far as these agree between machines."""
    accuracy = (names["near"].label == names["y"][1000:]).float().mean()
    assert accuracy > 0.96, accuracy
    near, far = (names[name].mutual_information.mean() for name in ("near", "far"))
    assert far > 10 * near, (near, far)
    metrics = names["metrics"]
    assert metrics["ood_auroc/far/density"] > 0.99, metrics
    assert metrics["ood_auroc/far/max_softmax"] < metrics["ood_auroc/far/density"], metrics
    assert metrics["uq/test_nll_calibrated"] < 0.1, metrics
    assert metrics["uq/test_ece_calibrated"] < 0.05, metrics
    coverage = names["inside"].float().mean()
    assert 0.85 < coverage < 0.95, coverage
    usual, unusual = (names[name].ood_alarm.float().mean() for name in ("usual", "unusual"))
    assert usual < 0.1, usual
    assert unusual > 0.9, unusual
    assert names["monitor"].drift_row is not None


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names = run_examples()
        os.chdir(ROOT)  # so that the folder can be removed
    check_numbers(names)
    found = Path(names["uq"].__file__)
    assert ROOT / "lightning_uq" not in found.parents, (
        f"this is the repository's package, not the installed one: {found}"
    )
    print(f"README.md runs with lightning-uq {importlib.metadata.version('lightning-uq')} in {found.parent}")
