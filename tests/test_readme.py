"""What README.md shows is run: its Python, and its table."""

import logging
import re
from pathlib import Path

from lightning_uq.compare.planning.discovery import methods

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_example_runs_after_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict = {"__name__": "readme"}
    for block in BLOCKS[1:]:  # the first is the outline at the top
        exec(compile(block, "README.md", "exec"), names)
    assert names["prediction"].logits.shape == (5, 256, 3)
    assert names["result"]["ood_auroc/shifted/mutual_information"] > 0.5


def test_the_tables_have_a_row_for_every_method_that_the_demo_runs():
    rows = re.findall(r"^\| ([a-z_]+) \|.*±", TEXT, flags=re.MULTILINE)
    of_numbers = {name for name, method in methods("regression").items() if not method.detects_only}
    assert set(rows) == set(methods()) | of_numbers
    assert len(rows) == len(methods()) + len(of_numbers)
