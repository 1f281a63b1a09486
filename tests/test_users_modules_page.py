"""What docs/users_modules.md shows is run."""

import logging
import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[1] / "docs" / "users_modules.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_example_runs_after_the_one_before(tmp_path, monkeypatch):
    for package in ("transformers", "timm"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "users_modules.md", "exec"), names)
    assert names["tested"]["ood_auroc/far/density"] > 0.9
    assert names["prediction"].log_density.shape == (96,)
    torch.testing.assert_close(names["prediction"].probs.sum(1), torch.ones(96))
    assert names["collected"].network.num_indices == 3
    x, _ = names["text_epinet"].unpack_batch(next(iter(names["texts"])))
    assert names["text_epinet"].predict(x).probs.shape == (16, 2)
    assert names["image_epinet"].network.is_initialized
