"""What docs/after_training.md shows is run."""

import logging
import re
from pathlib import Path

import torch

from lightning_uq import callbacks

PAGE = (Path(__file__).parents[1] / "docs" / "after_training.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "after_training.md", "exec"), names)
    assert names["prediction"].prediction_set.shape == (200, 3)
    assert 0.75 < names["again"].sets(names["prediction"])[range(200), names["y"][200:]].double().mean() < 0.9


def test_every_callback_that_fits_is_named():
    fitted = [name for name in callbacks.__all__ if isinstance(getattr(callbacks, name), type)]
    others = {"CalibratedNLL", "ConformalStream", "OODDetection", "OODScorer", "PredictionWriter"}
    assert {name for name in fitted if f"`{name}`" not in PAGE} <= others
