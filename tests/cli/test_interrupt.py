"""A Ctrl-C is one line and exit code 130, whichever command it reaches, and leaves no file."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq import FitGMM, save_fitted
from lightning_uq.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A model, and more rows than a run scores in time."""
    torch.manual_seed(0)
    x, model = torch.randn(100, 4), nn.Linear(4, 2)
    save_fitted(
        tmp_path / "model-uq.ckpt", model, [FitGMM(feature_transform="raw").fit(model, [(x, x[:, 0].gt(0).long())])]
    )
    np.save(tmp_path / "rows.npy", x.repeat(20_000, 1).numpy())
    (tmp_path / "users_network.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(4, 2)\n")
    return tmp_path


SCORE = [
    "score",
    "model-uq.ckpt",
    "rows.npy",
    "--network",
    "users_network:make",
    "--batch-size",
    "1",
    "--out",
    "new/out.parquet",
]
COMPARE = ["compare", "--methods", "softmax", "--seeds", "50", "--out", "new/compare"]


# A shell's background processes, and their children, ignore the signal unless they say so.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lightning_uq.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
@pytest.mark.parametrize(("command", "started"), [(SCORE, "new/.out.parquet.partial"), (COMPARE, "new/compare")])
def test_a_signal(folder, command, started):
    pytest.importorskip("pyarrow")
    before = sorted(folder.iterdir())
    run = [sys.executable, "-c", MAIN, *command]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(run, cwd=folder, env=environment, text=True, stdout=-1, stderr=-1) as process:
        try:
            for _ in range(1200):
                if (folder / started).exists() or process.poll() is not None:
                    break
                time.sleep(0.05)
            time.sleep(0.5)  # in the midst of it
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, ""), error
    assert error.splitlines()[-1] == "lightning-uq: interrupted"
    assert "Traceback" not in error
    assert sorted(folder.iterdir()) == before


def interrupted():
    raise KeyboardInterrupt


def exits_as_a_trainer_does():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("function", [interrupted, exits_as_a_trainer_does])
@pytest.mark.parametrize("command", ["compare", "fit"])
def test_every_command(monkeypatch, capsys, function, command):
    monkeypatch.setattr("lightning_uq.cli.compare.compare", function)
    monkeypatch.setattr("lightning_uq.cli.fit.run_lightning", lambda *args, **kwargs: function())
    assert main([command]) == 130
    assert capsys.readouterr() == ("", "lightning-uq: interrupted\n")
    monkeypatch.setenv("LIGHTNING_UQ_DEBUG", "1")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([command])


def test_an_exit_that_is_no_interrupt_stays_one(monkeypatch):
    monkeypatch.setattr("lightning_uq.cli.fit.run_lightning", lambda *args, **kwargs: sys.exit(2))
    with pytest.raises(SystemExit) as ended:
        main(["fit"])
    assert ended.value.code == 2
