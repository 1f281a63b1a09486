import csv
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import lightning_uq
from lightning_uq import DeterministicModule, Factory
from lightning_uq.cli import main
from lightning_uq.report import COLUMNS
from lightning_uq.tasks import describe
from tests.result_keys import CLASSIFICATION_KEYS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

USERS_MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule, LightningModule


class MyModule(LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Linear(width, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class MyData(LightningDataModule):
    def __init__(self, problem: str = ""):
        super().__init__()
        self.problem = problem

    def train_dataloader(self):
        x, y = torch.randn(20, 4), torch.arange(20) % 3
        if self.problem == "bug":
            raise RuntimeError("a bug of my own")
        if self.problem == "nan":
            x[3, 1] = torch.nan
        if self.problem == "label":
            y[7] = 3
        return DataLoader(TensorDataset(x, y), 5)
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A directory of one's own, which the command line may add to the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", ["lightning-uq"])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    return tmp_path


@pytest.fixture
def users_project(workplace, monkeypatch):
    """A project in the working directory, and a configuration that names it; gives the configuration's path."""
    name = f"project_{workplace.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (workplace / f"{name}.py").write_text(USERS_MODULE)
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    config = {
        "seed_everything": 0,
        "model": {"class_path": f"{name}.MyModule"},
        "data": {"class_path": f"{name}.MyData"},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0, **dict.fromkeys(quiet, False)},
    }
    path = workplace / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    yield path
    sys.modules.pop(name, None)


def change(path, **changes):
    config = yaml.safe_load(path.read_text())
    config.update(changes)
    path.write_text(yaml.safe_dump(config))
    return str(path)


OUR_MODEL = {
    "class_path": "lightning_uq.DeterministicModule",
    "init_args": {
        "network": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}},
        "task": {"class_path": "lightning_uq.tasks.Classification", "init_args": {"num_classes": 3}},
    },
}


def fails(capsys, *arguments):
    """The one line on stderr that a command ends with."""
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-uq: error:")]
    assert len(lines) == 1
    return lines[0].removeprefix("lightning-uq: error: ")


# ------------------------------------------------------------------ compare

QUICK = ("compare", "--methods", "softmax", "--seeds", "1", "--max-epochs", "1")


def test_compare_prints_one_table_and_writes_all_files(capsys, workplace, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # another command of this process may have set it
    assert main(["compare", "--methods", "softmax,ensemble", "--seeds", "2", "--seed", "3", "--max-epochs", "1"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [
        column.label for column in COLUMNS if column.key in CLASSIFICATION_KEYS and column.label not in lines[0]
    ] == [], out
    verdict = [line for line in lines if line.endswith(".")]
    assert max(len(line) for line in lines if line not in verdict) <= 120
    assert len(verdict) >= 2
    assert [line.split()[0] for line in lines if re.match(r"[a-z]+ ", line)] == ["softmax", "ensemble"]
    assert lines[-1] == "Wrote results.json, report.html and 7 figures to runs/compare"
    # Not a terminal: a line for each training, and no bar.
    assert re.fullmatch(r"(\d/4 \w+, seed [34]: 1 epochs in \d+\.\d s(, about \d+ s left)?\n){4}", err)
    results = json.loads((workplace / "runs/compare/results.json").read_text())
    assert [set(row) for row in results["rows"]] == [{"method", *CLASSIFICATION_KEYS}] * 2
    assert sorted(path.name for path in workplace.iterdir()) == ["runs"]


def test_compare_options_reach_the_comparison(workplace):
    np.savez("mine.npz", x=np.random.default_rng(0).normal(size=(60, 3)), y=np.arange(60) % 3)
    assert main([*QUICK, "--data", "mine.npz", "--ood-classes", "2", "--out", "there"]) == 0
    page = Path("there/report.html").read_text()
    for fact in ("2 classes on mine", "Class 2 is held out", "mlp, the same for all methods", "24 training"):
        assert fact in page
    assert json.loads(Path("there/results.json").read_text())["data"] == "mine.npz"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "softmax,magic"], "methods: unknown for classification: 'magic'. Choose from softmax, "),
        (["--methods", ""], "methods: no method is named"),
        (["--ood-classes", "8,12"], "but it holds 12"),
        (["--ood-classes", "eight"], r"--ood-classes must hold labels of digits \(0, .*\), but it holds eight"),
        (["--ood-classes", "0,1,2,3,4,5,6,7,8"], "at least 2 classes"),
        (["--data", "mnist"], "--data must be digits, diabetes, shapes, the path of"),
        (["--data", "nowhere.npz"], "nowhere.npz must be .* but there is no such file"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seeds", "many"], "--seeds must be a whole number, but it is 'many'"),
        (["--accelerator", "abacus"], "--accelerator must be one of auto, cpu, cuda, gpu, mps, but it is 'abacus'"),
        (["--frobnicate"], "[Uu]nrecognized arguments: --frobnicate"),
        (["--out", "file"], "--out: file is a file, not a directory."),
    ],
)
def test_compare_refuses_in_one_line(capsys, workplace, arguments, message):
    Path("file").touch()
    assert re.search(message, fails(capsys, *QUICK, *arguments))
    assert [path.name for path in workplace.iterdir()] == ["file"]


def test_compare_refuses_bad_arrays_in_one_line(capsys):
    x, y = np.zeros((60, 3)), np.arange(60) % 3
    for name, arrays, message in (
        ("nan.npz", {"x": np.where(np.eye(60)[:, :3] > 0, np.nan, x), "y": y}, "Array `x` of nan.npz must be finite"),
        ("labels.npz", {"x": x, "y": y - 1}, "Array `y` of labels.npz must hold labels from 0 on, but it holds -1"),
        ("no_y.npz", {"x": x}, "y is missing"),
    ):
        np.savez(name, **arrays)
        assert message in fails(capsys, *QUICK, "--data", name)


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("sklearn.datasets", "data", QUICK),
        ("matplotlib.figure", "report", QUICK),
        ("jinja2", "report", QUICK),
        ("jsonargparse", "cli", QUICK),
        ("rich.console", "cli", QUICK),
        ("jsonargparse", "cli", ("fit", "--config", "x.yaml")),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_trained(capsys, monkeypatch, module, extra, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    message = fails(capsys, *arguments)
    assert f"extra `{extra}`" in message
    assert f"pip install 'lightning-uq[{extra}]'" in message


def test_a_failure_leaves_an_earlier_result_alone(capsys, monkeypatch):
    assert main([*QUICK, "--out", "there"]) == 0
    before = {path.name: path.read_bytes() for path in Path("there").glob("*.*")}
    with monkeypatch.context() as broken:
        broken.setattr("lightning_uq.compare.directory.writing.render_html", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
            main([*QUICK, "--methods", "energy", "--out", "there"])
    after = {path.name: path.read_bytes() for path in Path("there").glob("*.*")}
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"results.json", "run.json"}
    assert [row["method"] for row in json.loads(after["results.json"])["rows"]] == ["softmax", "energy"]
    assert main(["report", "there"]) == 0  # no training is lost
    assert "energy" in Path("there/report.html").read_text()


# ------------------------------------------------------------------ fit, validate, test, predict


# `validate` repeats the validation of `fit`, so one configuration of each task is enough for every run.
VALIDATED = {"softmax_digits", "gaussian_curve"}
RUNS = [pytest.param(path, ("test", "predict"), id=path.stem) for path in CONFIGS if path.stem not in VALIDATED] + [
    pytest.param(
        path,
        ("validate", "test", "predict"),
        id=f"{path.stem}-validated",
        marks=[] if path.stem in VALIDATED else pytest.mark.slow,
    )
    for path in CONFIGS
]


@pytest.mark.filterwarnings("ignore:Classes .* are never predicted")  # two batches teach little
@pytest.mark.parametrize(("config", "commands"), RUNS)
def test_every_configuration_fits_tests_and_loads_bare(config, commands, workplace):
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    run = ["--config", str(config), "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2", *quiet]
    assert main(["fit", *run, "--trainer.max_epochs=1"]) == 0
    (checkpoint,) = [path for path in workplace.rglob("*.ckpt") if "-uq" not in path.name]
    assert str(checkpoint.relative_to(workplace)) in config.read_text()
    for command in commands:
        limit = f"--trainer.limit_{command.replace('idate', '')}_batches=1"
        assert main([command, "--config", str(config), *quiet, limit, "--ckpt_path", str(checkpoint)]) == 0
    (written,) = workplace.rglob("predictions-rank0.csv")
    with written.open() as file:
        header, *rows = csv.reader(file)
    assert header[0] == "index"
    assert {"label", "mean_0"} & set(header)
    assert len(rows) > 1
    name = yaml.safe_load(config.read_text())["model"]["class_path"].rpartition(".")[2]
    module = getattr(lightning_uq, name).load_from_checkpoint(checkpoint, weights_only=True)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


def test_fast_dev_run_of_a_density_on_more_classes_than_a_batch_holds(workplace):
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    config = ["--config", str(ROOT / "configs" / "ddu_digits.yaml")]
    assert main(["fit", *config, "--trainer.fast_dev_run=true", *quiet]) == 0
    assert not list(workplace.rglob("*.ckpt"))


OWN_TASK = """
from dataclasses import dataclass
import torch
from lightning_uq.predictions import GaussianMixturePrediction
from lightning_uq.tasks import RegressionTask

@dataclass(frozen=True)
class KnownNoise(RegressionTask):
    std: float = 1.0
    outputs_per_target = 1
    ood_score = "epistemic_variance"
    score_names = GaussianMixturePrediction.score_names
    def predict(self, outputs):
        return GaussianMixturePrediction(outputs, torch.full_like(outputs, self.std**2))
    def losses(self, output, target, progress=None):
        return (output - target).square()
"""


@pytest.mark.parametrize(
    ("task", "outputs", "expected"),
    [
        ("regression", 2, "Regression()"),
        ({"class_path": "lightning_uq.tasks.EvidentialRegression", "init_args": {"loss": "meinert"}}, 3, None),
        ({"class_path": "own_task.KnownNoise", "init_args": {"std": 0.5}}, 1, "KnownNoise(std=0.5)"),
        (
            {
                "class_path": "lightning_uq.tasks.Regression",
                "init_args": {"head": "quantiles", "levels": [0.2, 0.5], "target_scale": [[1.0], 2.0]},
            },
            2,
            "Regression(head='quantiles', levels=(0.2, 0.5), target_scale=((1.0,), 2.0))",
        ),
    ],
    ids=["a name", "a class path", "a task of the user's own", "fields that hold sequences"],
)
def test_a_task_is_a_name_or_a_class_path(workplace, monkeypatch, task, outputs, expected):
    Path("own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(workplace)
    config = yaml.safe_load((ROOT / "configs" / "gaussian_curve.yaml").read_text())
    config["model"]["init_args"]["task"] = task
    config["model"]["init_args"]["network"]["init_args"]["kwargs"]["out_features"] = outputs
    Path("task.yaml").write_text(yaml.safe_dump(config).replace("val_nll", "val_loss"))  # not every task has the former
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "task.yaml", *quick]) == 0
    (checkpoint,) = workplace.rglob("*.ckpt")
    module = lightning_uq.DeterministicModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert expected is None or describe(module.task) == expected
    assert module.predict(torch.zeros(2, 1)).point.shape == (2, 1)
    sys.modules.pop("own_task", None)


MAPS = """
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Last(nn.Module):
    def __init__(self, outputs, last):
        super().__init__()
        self.layer, self.last = nn.Conv2d(1, outputs, 1), last
    def forward(self, x):
        return self.layer(x).movedim(1, -1) if self.last else self.layer(x)

class Maps(LightningDataModule):
    def __init__(self, labels: bool):
        super().__init__()
        self.labels = labels
    def train_dataloader(self):
        x = torch.arange(8.0).reshape(2, 1, 2, 2) / 8
        y = (x[:, 0] > 0.5).long() if self.labels else x[:, 0]
        return DataLoader(TensorDataset(x, y), batch_size=2)
    val_dataloader = predict_dataloader = train_dataloader
"""


@pytest.mark.parametrize(
    ("task", "fields", "shown"),
    [
        ("Segmentation", {"ignore_index": 255, "class_axis": -1}, "Segmentation(ignore_index=255, class_axis=-1)"),
        ("PixelRegression", {"head": "quantiles", "levels": [0.25, 0.75]}, "head='quantiles', levels=(0.25, 0.75)"),
    ],
)
def test_maps_are_trained_and_written_from_a_configuration(workplace, monkeypatch, task, fields, shown):
    Path("maps.py").write_text(MAPS)
    monkeypatch.syspath_prepend(workplace)
    factory = {"target": "maps.Last", "kwargs": {"outputs": 2, "last": "class_axis" in fields}}
    config = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "model": {
            "class_path": "lightning_uq.DeterministicModule",
            "init_args": {
                "network": {"class_path": "lightning_uq.networks.Factory", "init_args": factory},
                "task": {"class_path": f"lightning_uq.tasks.{task}", "init_args": fields},
            },
        },
        "data": {"class_path": "maps.Maps", "init_args": {"labels": task == "Segmentation"}},
    }
    Path("maps.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "maps.yaml"]) == 0
    (checkpoint,) = workplace.rglob("*.ckpt")
    assert shown in describe(lightning_uq.DeterministicModule.load_from_checkpoint(checkpoint, weights_only=True).task)
    assert main(["predict", "--config", "maps.yaml", "--ckpt_path", str(checkpoint)]) == 0
    arrays = lightning_uq.read_predictions(workplace)
    assert arrays["label" if task == "Segmentation" else "quantile_0.25"].shape[-2:] == (2, 2)
    sys.modules.pop("maps", None)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_untrained_weights_are_run_only_if_they_are_asked_for(capsys, workplace, command):
    config = str(ROOT / "configs" / "softmax_digits.yaml")
    run = [command, "--config", config, "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    message = fails(capsys, *run)
    assert message.startswith(f"{command} needs trained weights: pass --ckpt_path FILE")
    assert not list(workplace.iterdir())
    assert main([*run, "--untrained"]) == 0
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--untrained" in capsys.readouterr().out
    assert "untrained" in fails(capsys, "fit", "--config", config, "--untrained")


def test_there_is_a_configuration_for_each_kind_of_module():
    named = {yaml.safe_load(path.read_text())["model"]["class_path"] for path in CONFIGS}
    assert named >= {"lightning_uq.DeterministicModule", "lightning_uq.EnsembleModule"}


def test_a_users_own_module_is_found_in_the_working_directory(users_project):
    assert main(["fit", "--config", str(users_project)]) == 0


def test_a_checkpoint_written_in_python_is_tested_here(make_trainer, workplace):
    network = Factory(
        "lightning_uq.networks.mlp.MLP", {"in_features": 64, "out_features": 8, "hidden_sizes": [128, 128]}
    )
    module = DeterministicModule(network)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint("python.ckpt")
    config = str(ROOT / "configs" / "softmax_digits.yaml")
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    assert main(["test", "--config", config, *quiet, "--ckpt_path", "python.ckpt"]) == 0


def test_the_given_configuration_counts_and_not_the_checkpoints(capsys, workplace):
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=1")
    softmax, ensemble = (str(ROOT / "configs" / f"{name}_digits.yaml") for name in ("softmax", "ensemble"))
    assert main(["fit", "--config", softmax, *quiet, "--trainer.max_epochs=1"]) == 0
    (checkpoint,) = workplace.rglob("*.ckpt")
    capsys.readouterr()
    refused = fails(capsys, "test", "--config", ensemble, *quiet[:2], "--ckpt_path", str(checkpoint))
    assert "the checkpoint does not fit the configured module" in refused


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        (
            {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": -1.0}}},
            "`optimizer`.*Invalid learning rate",
        ),
        (
            {"network": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 5, "out_features": 3}}},
            r"The network does not take an input of shape \[5, 4\]",
        ),
    ],
)
def test_what_fails_at_the_first_batch_is_one_line(capsys, users_project, init_args, message):
    change(users_project, model={**OUR_MODEL, "init_args": {**OUR_MODEL["init_args"], **init_args}})
    assert re.search(message, fails(capsys, "fit", "--config", str(users_project)))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("nan", "The input must be finite, but 1 of 5 rows of batch 0"),
        ("label", r"labels in \[0, 3\), but their values go from 0 to 3"),
    ],
)
def test_bad_training_data_is_one_line(capsys, users_project, problem, message):
    change(users_project, model=OUR_MODEL)
    assert re.search(message, fails(capsys, "fit", "--config", str(users_project), f"--data.problem={problem}"))


def test_a_bug_keeps_its_traceback(users_project):
    with pytest.raises(RuntimeError, match="a bug of my own"):
        main(["fit", "--config", str(users_project), "--data.problem=bug"])


def test_debug_gives_the_traceback(monkeypatch):
    monkeypatch.setenv("LIGHTNING_UQ_DEBUG", "1")
    with pytest.raises(lightning_uq.UQError, match="unknown command"):
        main(["frobnicate"])


@pytest.mark.parametrize("value", ["0", ""])
def test_debug_can_be_off(monkeypatch, capsys, value):
    monkeypatch.setenv("LIGHTNING_UQ_DEBUG", value)
    assert "unknown command" in fails(capsys, "frobnicate")


def test_checkpoints_and_logs_follow_default_root_dir(workplace):
    config = ["--config", str(ROOT / "configs" / "softmax_digits.yaml"), "--trainer.default_root_dir", "mine"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=1"]
    assert main(["fit", *config, *quiet, "--trainer.max_epochs=1"]) == 0
    assert [path.name for path in workplace.iterdir()] == ["mine"]
    assert (workplace / "mine" / "checkpoints" / "best.ckpt").is_file()
    assert (workplace / "mine" / "logs" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "File does not exist: .*nowhere.yaml"),
        (["--config", "broken.yaml"], "Problems parsing config: while parsing a flow sequence"),
        ([], "(arguments are required: .*model|'fit.model' is required)"),
        (["--config", "config.yaml", "--frobnicate=1"], "--frobnicate"),
        (["--config", "config.yaml", "--trainer.max_epoch=1"], "max_epoch"),
        (["--config", "config.yaml", "--trainer.max_epochs=few"], "max_epochs.*few"),
        (["--config", "config.yaml", "--trainer.accelerator=abacus"], "abacus"),
        (["--config", "config.yaml", "--model=lightning_uq.NoModule"], "NoModule"),
        (["--config", "config.yaml", "--model.init_args.width=wide"], "wide"),
        (["--config", "config.yaml", "--ckpt_path=nowhere.ckpt"], "Checkpoint file not found: nowhere.ckpt"),
        (
            ["--config", "config.yaml", "--ckpt_path=broken.yaml"],
            "`ckpt_path` must be a checkpoint of plain data, but broken.yaml cannot be read: it is damaged",
        ),
        (
            ["--config", "config.yaml", "--ckpt_path=list.ckpt"],
            "`ckpt_path` must be a checkpoint of plain data, but list.ckpt holds no `state_dict`",
        ),
        (["--config", "config.yaml", "--ckpt_path=other.ckpt"], "the checkpoint does not fit the configured module"),
    ],
)
def test_fit_refuses_in_one_line(capsys, users_project, arguments, message):
    Path("broken.yaml").write_text("model: [1, 2\n")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, "other.ckpt")
    assert re.search(message, fails(capsys, "fit", *arguments))


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"num_clases": 3}, "Option 'num_clases' is not accepted"),
        (
            {"task": {"class_path": "lightning_uq.tasks.Classification", "init_args": {"num_classes": 1}}},
            "`num_classes` must be an integer of at least 2",
        ),
        ({"task": "ranking"}, "`task` must be a Task, or one of 'classification', 'binary'"),
        (
            {"network": {"class_path": "lightning_uq.Factory", "init_args": {"target": "torch.nn.Linnear"}}},
            "`target` must be the import path of a class or function, but it is 'torch.nn.Linnear': torch.nn has no Linnear, but it has Linear.",
        ),
    ],
)
def test_a_refused_argument_of_a_module_is_one_short_line(capsys, users_project, init_args, message):
    change(users_project, model={**OUR_MODEL, "init_args": {**OUR_MODEL["init_args"], **init_args}})
    line = fails(capsys, "fit", "--config", str(users_project))
    assert message in line
    assert len(line) < 300


def test_a_callback_is_built_from_its_own_and_its_bases_options(capsys, users_project):
    settings = [
        {"class_path": "lightning_uq.FitKNN", "init_args": {"k": 3, "feature_layer": "auto", "weights": "last"}},
        {
            "class_path": "lightning_uq.TemperatureScaling",
            "init_args": {"scope": "shared", "name": "b", "attach": True},
        },
    ]
    change(users_project, trainer={"callbacks": settings})
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(users_project), "--print_config"])
    text = capsys.readouterr().out
    for line in (
        "k: 3",
        "feature_layer: auto",
        "weights: last",
        "scope: shared",
        "name: b",
        "attach: true",
        "output: logits",
    ):
        assert line in text


# ------------------------------------------------------------------ the commands themselves


def test_help_lists_all_commands_and_options(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("compare", "evaluate", "fit", "validate", "test", "predict"))
    assert main([]) == 0
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--data",
        "--ood-classes",
        "--methods",
        "--seeds",
        "--seed",
        "--out",
        "--max-epochs",
        "--accelerator",
    ):
        assert option in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-uq {lightning_uq.__version__}\n"


def test_an_unknown_command(capsys):
    assert "unknown command 'frobnicate': choose from compare, report, evaluate, score, active, bandit, fit" in fails(
        capsys, "frobnicate"
    )


def test_as_a_process(workplace, users_project):
    """The console script and `python -m`: exit codes, clean streams, and the user's module found without help."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = Path(sys.executable).with_name("lightning-uq")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "lightning_uq"]
    commands = [
        [sys.executable, "-m", "lightning_uq", "compare", "--methods", "magic"],
        [*start, "fit", "--config", str(users_project)],
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, cwd=workplace, **pipes) for command in commands]
    streams = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [2, 0], streams
    (nothing, line), (_, log) = streams
    assert nothing == ""
    assert line.startswith("lightning-uq: error: methods: unknown for classification: 'magic'")
    assert line.count("\n") == 1
    assert "Traceback" not in log
    assert "LeafSpec" not in log
