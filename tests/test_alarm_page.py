"""Run the examples of docs/alarm.md, and compare its tables with the study's results."""

import re
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.contract.users import TupleModule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "alarm.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch, make_trainer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", lambda **given: make_trainer(max_epochs=2, **given))
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    train, val, held_out = (
        DataLoader(TensorDataset(x[rows], y[rows]), batch_size=32)
        for rows in (slice(150), slice(150, 280), slice(280, 400))
    )
    user = TupleModule()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(user, train, val)
    trainer.save_checkpoint("model.ckpt")
    names = {
        "network": nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
        "LitClassifier": TupleModule,
        "train_loader": train,
        "val_loader": val,
        "held_out_loader": held_out,
        "x": x[:9],
        "stream": (x[280:] + 4).split(16),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "alarm.md", "exec"), names)
    assert names["prediction"].ood_alarm.dtype == torch.bool
    assert list(names["fitted"](x)) == ["probs", "log_density", "ood_score", "ood_p_value", "ood_alarm"]
    assert names["monitor"].drifted
    assert torch.equal(names["alarms"], names["p_values"] <= 0.05)
    assert names["found"].shape == names["alarms"].shape
    assert names["of_arrays"].num_rows == 200
    assert (tmp_path / "model.pt2").exists()


def test_the_monitors_text_is_as_small_as_the_page_says():
    from lightning_uq import DriftMonitor

    monitor = DriftMonitor(torch.randn(5000))
    monitor.update(torch.randn(200_000))
    assert "is 2 kB after a million rows" in PAGE
    assert len(monitor.to_json()) < 2500


def test_the_tables_are_those_of_the_study():
    study = (ROOT / "benchmarks" / "drift_study.md").read_text()
    for name, title in (("fixed", "fixed held-out rows"), ("restarted", "bets that begin at every row")):
        shares = re.findall(rf"\| {name} \| \d+ \| +(\S+ \+- \S+) \|\n", study)
        assert len(shares) == 3
        (line,) = (line for line in PAGE.splitlines() if line.startswith("| o") and title in line)
        assert [one.strip().removesuffix(" %") for one in line.split("|")[2:-1]] == shares
    rows = re.findall(
        r"\| (scikit-learn's digits|MNIST) \| (\w+) \| restarted \| (\d+) \| +(.*?) \| +(.*?) \| (\w+) \|", study
    )
    assert len(rows) == 8
    for data, score, n, false, found, delay in rows:
        assert f"| {data} | {score} | {int(n):,} | {false} | {found} | {delay} |" in PAGE
