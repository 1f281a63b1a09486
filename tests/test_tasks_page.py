"""Run the examples of docs/tasks.md."""

import logging
import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:The likelihood has no finite positive temperature")
def test_every_example_runs_after_the_one_before(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "tasks.md", "exec"), names)
    assert names["several"].probs.shape == (200, 4)
    assert names["scaling"].temperature.shape == (4,)
    assert names["tested"]["ood_auroc/far/density"] > 0.9
    assert names["calibrated"].shape == (32, 4)
