"""Run the example of docs/laplace.md."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parents[1] / "docs" / "laplace.md"


def test_the_example_runs(tmp_path, monkeypatch, make_trainer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", lambda **given: make_trainer(max_epochs=1, **given))
    x = torch.randn(40, 2)
    rows, others = (TensorDataset(one, one.sum(1, keepdim=True)) for one in (x, x + 1))
    names = {
        "network": nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)),
        "train_loader": DataLoader(rows, batch_size=8),
        "val_loader": DataLoader(others, batch_size=8),
        "x": x,
        "y": x[:, :1],
    }
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(compile(block, PAGE.name, "exec"), names)
    assert bool((names["prediction"].epistemic_variance > 0).all())


def test_the_numbers_in_the_text_are_those_of_the_table():
    """The default's wins, counted anew from the rows."""
    text = PAGE.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \w+( \(choosing\))? \| \d \|", line)]
    assert len(rows) == 9
    won = [sum(float(row[4]) < float(row[i]) for row in rows) for i in (2, 3)]
    assert f"- `auto`: NLL at most that of the training variance on {won[0]} of 9" in text
    assert f"of the held-out variance on {won[1]} of 9" in text
