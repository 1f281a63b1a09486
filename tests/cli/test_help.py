"""The help of a module: every option once, classes of this package once, and no list of torch's."""

import importlib
import re

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

import lightning_uq
from lightning_uq import modules, networks
from lightning_uq.cli import main
from lightning_uq.cli.help import shown_classes

LIMIT = 20_000  # jsonargparse alone writes 108,000 to 212,000


def model_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main(["fit", f"--model.help=lightning_uq.{name}"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def known_classes(text):
    """The classes that each option lists, by the option's name."""
    joined = " ".join(line.strip() for line in text.splitlines())
    options = re.split(r" --model\.(?=\w+ [A-Z{])", joined)[1:]
    lists = {o.split()[0]: re.search(r"known subclasses: ([^)]*)\)", o) for o in options}
    return {name: re.sub(r"\s", "", found[1]).split(",") for name, found in lists.items() if found}


@pytest.mark.parametrize("name", modules.__all__)
def test_it_is_short_and_complete(capsys, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = model_help(capsys, name)
    assert len(text) < LIMIT
    options = re.findall(r"^  --model\.([a-z_]+) ", text, flags=re.MULTILINE)
    assert len(options) == len(set(options))
    base = {"optimizer", "lr_scheduler", "loss", "num_train_samples", "num_eval_samples", "return_members"}
    assert base - {"loss"} | {"network", "data_noise", "regularizer"} <= set(options)
    assert "Untyped" not in text  # an option without a type is one that nobody declared
    assert ":class:" not in text

    listed = known_classes(text)
    for option, paths in listed.items():
        assert len(paths) == len(set(paths)), option
        assert not [path for path in paths if not path.startswith("lightning_uq.")], option
        for path in paths:
            room, _, own = path.removeprefix("lightning_uq.").rpartition(".")
            assert own in importlib.import_module(f"lightning_uq.{room}".rstrip(".")).__all__, path
    assert not [path for path in listed["network"] if ".losses." in path or path.endswith("Module")]
    if "loss" in listed:
        assert "lightning_uq.losses.JointLoss" in listed["loss"]
        assert not [path for path in listed["loss"] if ".networks." in path]
    assert not [path for path in listed["regularizer"] if ".networks." in path]


@pytest.mark.parametrize(("option", "room"), [("model", "lightning_uq"), ("data", "lightning_uq.data")])
def test_without_a_class_it_lists_ours(capsys, option, room):
    assert main(["fit", f"--{option}.help", "--trainer.max_epochs=1"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"`--{option}` takes the import path")
    assert f"`--{option}.help={room}." in last
    names = [line.split()[0] for line in lines]
    base = {"model": LightningModule, "data": LightningDataModule}[option]
    members = {name: getattr(importlib.import_module(room), name) for name in importlib.import_module(room).__all__}
    assert names == sorted(
        f"{room}.{name}" for name, kind in members.items() if isinstance(kind, type) and issubclass(kind, base)
    )
    assert all(len(line.split()) > 3 and "DataModule:`" not in line for line in lines)


def test_all_public_networks_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = set(known_classes(model_help(capsys, "DeterministicModule"))["network"])
    public = {name for name in networks.__all__ if isinstance(getattr(networks, name), type)}
    wanted = {name for name in public if issubclass(getattr(networks, name), torch.nn.Module)}
    abstract = {"EpistemicNetwork"}
    listed = {path.rpartition(".")[2] for path in found}
    assert wanted - abstract <= listed
    assert "lightning_uq.networks.backbones.ResNet" in found


def test_factories_of_plain_networks_list_no_epistemic_ones(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = known_classes(model_help(capsys, "EnsembleModule"))
    for option in ("network", "prior_network"):
        found = {path.rpartition(".")[2] for path in listed[option]}
        assert "Factory" in found  # older releases of jsonargparse list nothing else for a callable
        assert not {"EnsembleNetwork", "DeterministicNetwork"} & found


def test_modules_are_listed_for_the_model_alone():
    paths = ["lightning.LightningModule", "lightning_uq.EnsembleModule", "lightning_uq.modules.base.Nothing"]
    assert shown_classes(paths, "model") == ["lightning_uq.EnsembleModule"]
    assert shown_classes([*paths, "lightning_uq.networks.MLP"], "model.network") == ["lightning_uq.networks.MLP"]
    assert issubclass(lightning_uq.EnsembleModule, LightningModule)


def test_optimizers_and_schedulers_are_still_built_from_class_paths(capsys):
    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    given = {
        "network": network,
        "optimizer": {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 0.25}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 7}},
    }
    model = yaml.safe_dump({"class_path": "lightning_uq.DeterministicModule", "init_args": given})
    with pytest.raises(SystemExit):
        main(["fit", f"--model={model}", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert found["optimizer"]["init_args"]["lr"] == 0.25
    assert found["lr_scheduler"]["init_args"]["step_size"] == 7
    assert found["network"]["init_args"]["out_features"] == 3


@pytest.mark.parametrize(
    "name",
    [
        "FitGMM",
        "FitKNN",
        "FitViM",
        "FitLaplace",
        "TemperatureScaling",
        "VectorScaling",
        "MatrixScaling",
        "IsotonicScaling",
    ],
)
def test_every_option_of_a_callback_once(capsys, name):
    """Those of the base come through `**fitting`."""
    with pytest.raises(SystemExit):
        main(["fit", f"--trainer.callbacks.help=lightning_uq.{name}"])
    text = capsys.readouterr().out
    found = re.findall(r"^  --(?:trainer\.callbacks\.)?(?:init_args\.)?([a-z_]+) ", text, flags=re.MULTILINE)
    assert {"dataloader", "weights", "name", "predict_fn", "unpack_batch", "output", "attach"} <= set(found)
    assert len(found) == len(set(found))
    assert "Untyped" not in text
