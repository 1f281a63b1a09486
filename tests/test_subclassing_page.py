"""Run the examples of docs/subclassing.md."""

import logging
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

TEXT = (Path(__file__).parents[1] / "docs" / "subclassing.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_example_runs_after_the_one_before(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    page = ModuleType("subclassing_page")  # a checkpoint names what can be imported
    monkeypatch.setitem(sys.modules, page.__name__, page)
    names = vars(page)
    for block in BLOCKS:
        exec(compile(block, "subclassing.md", "exec"), names)
    assert names["trainer"].callback_metrics["val_size"] == 16
    assert names["loaded"].penalty == 0.01
