"""The DDU experiments' training, a configuration a network: each parses into what the original has, and trains."""

import json
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from lightning.pytorch import Trainer
from torch.nn.utils import parametrize

from lightning_uq import FitGMM, TemperatureScaling
from lightning_uq.cli import main

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "cifar10").glob("*.yaml"))
COUNTS = json.loads((Path(__file__).parent / "reference" / "ddu_model_counts.json").read_text())
NETWORKS = {
    "lenet": "lenet_sn0_mod0",
    "resnet18": "resnet18_sn1_mod1",
    "resnet50": "resnet50_sn1_mod1",
    "vgg16": "vgg16_sn1_mod1",
    "wide_resnet": "wrn_sn1_mod1",
}


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Forty random images, four a class, as CIFAR-10's files."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {"data": rng.integers(0, 256, (8, 3072), dtype=np.uint8), "labels": [0] * 8}
        if name != "test_batch":
            first = 8 * (int(name[-1]) - 1)
            content["labels"] = [(first + i) % 10 for i in range(8)]
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.chdir(tmp_path)


def test_there_is_one_for_each_network():
    assert [path.stem for path in RECIPES] == [f"ddu_{name}" for name in NETWORKS]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_parses(path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(path), "--print_config"])
    assert ended.value.code in (0, None)
    parsed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    assert parsed["model"]["init_args"]["network"] == given["model"]["init_args"]["network"]
    assert parsed["model"]["init_args"]["optimizer"]["init_args"].items() >= {"lr": 0.1, "nesterov": False}.items()


SLOW = [
    pytest.param(path, marks=[pytest.mark.slow] * ("resnet50" in path.stem or "wide" in path.stem)) for path in RECIPES
]


@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.stem)
def test_it_is_the_originals_and_trains(path, cifar10, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", ["lightning-uq"])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    trainers = []
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, *args, **kwargs: (trainers.append(self), fit(self, *args, **kwargs))
    )
    small = ("--trainer.fast_dev_run=1", "--data.init_args.batch_size=6", "--data.init_args.num_workers=0")
    quiet = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    assert main(["fit", "--config", str(path), *small, *quiet]) == 0

    (trainer,) = trainers
    (optimizer,), (scheduler,) = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    assert type(optimizer) is torch.optim.SGD
    wanted = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "dampening": 0}
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in wanted} == wanted
    assert (dict(scheduler.milestones), scheduler.gamma) == ({150: 1, 250: 1}, 0.1)
    assert trainer.lr_scheduler_configs[0].interval == "epoch"
    config = yaml.safe_load(path.read_text())
    assert config["trainer"]["max_epochs"] == 350
    assert config["data"]["init_args"]["batch_size"] == 128
    assert trainer.datamodule.augment
    assert trainer.global_step == 1

    name = path.stem.removeprefix("ddu_")
    network = trainer.lightning_module.network.network
    counts = COUNTS[NETWORKS[name]]
    bounds = [m.parametrizations.weight[0].coefficient for m in network.modules() if parametrize.is_parametrized(m)]
    assert bounds == [3.0] * counts["sn_layers"]
    wider = 6 * 2 * 25 + 120 * 16 * (5**2 - 4**2)  # LeNet's counts are those of 28x28 inputs of one channel
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == counts["params"] + (wider if name == "lenet" else 0)

    (gmm,) = [callback for callback in trainer.callbacks if isinstance(callback, FitGMM)]
    assert gmm.densities[0].mean.shape == (10, counts["feature_dim"])
    (temperature,) = [callback for callback in trainer.callbacks if isinstance(callback, TemperatureScaling)]
    assert 0.1 <= float(temperature.temperature) <= 10
