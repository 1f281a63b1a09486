"""The files of configs/cluster: torchrun trains members on two processes, and the batch scripts name files and options that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_uq import EnsembleModule
from lightning_uq.cli import main

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "cluster"


def test_torchrun_trains_members_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "lightning_uq", "fit", "--config", str(FOLDER / "members.yaml"), "--trainer.devices", "2"]
    options = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.default_root_dir", str(tmp_path)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, *arguments, *options], capture_output=True, text=True, cwd=tmp_path, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "checkpoints"
    loaded = EnsembleModule.load_from_checkpoint(folder / "best.ckpt")
    assert loaded.predict(torch.zeros(2, 64)).logits.shape == (4, 2, 10)
    assert (folder / "best-uq.ckpt").exists()  # with the temperature


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sbatch")), ids=lambda path: path.name)
def test_a_batch_script_calls_a_command_that_parses(path, capsys):
    text = path.read_text()
    command = re.search(r"python -m lightning_uq (fit .*)", text.replace("\\\n", " "))[1]
    command = re.sub(r'"(\$\w+)"', "2", command).replace("$SLURM_ARRAY_TASK_ID", "2").replace('"', "")
    arguments = [str(ROOT / part) if part.startswith("configs/") else part for part in command.split()]
    if "strategy" in (ROOT / re.search(r"configs/\S+", command)[0]).read_text():
        arguments += ["--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--print_config"])
    assert ended.value.code in (0, None)
    assert "class_path: lightning_uq" in capsys.readouterr().out
