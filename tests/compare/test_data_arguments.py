"""A user's own data: arguments of a table in the file of --config, a file of out-of-distribution rows, and tasks that are overruled."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.cli import main
from lightning_uq.compare import Configuration, Recipe, compare
from lightning_uq.compare.problem import make_problem
from lightning_uq.errors import InputError


def counts(num=90):
    rng = np.random.default_rng(0)
    x = rng.normal(size=num)
    return pd.DataFrame(
        {"id": np.arange(num), "x": x, "side": ["east", "west"] * (num // 2), "cars": 5 + np.arange(num) % 30}
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts().to_csv("cars.csv", index=False)
    counts().to_csv("german.csv", index=False, sep=";", decimal=",")
    far = counts(30).assign(x=lambda table: table["x"] + 50, side="north").drop(columns="cars")
    far.to_csv("far.csv", index=False)

    def config(**arguments):
        (tmp_path / "run.yaml").write_text(json.dumps({"data": {"init_args": arguments}}))
        return "run.yaml"

    return config


def quick(**arguments):
    given = {"data": "cars.csv", "target": ("cars",), "seeds": 1, "recipe": Recipe(max_epochs=1), **arguments}
    return Configuration(**given)


def test_arguments_of_a_table_come_from_the_file(folder):
    config = folder(sep=";", decimal=",", drop=["id"])
    data = make_problem(quick(data="german.csv", config=config), 0).data
    plain = make_problem(quick(config=folder(drop=["id"])), 0).data
    assert data.feature_names == ["x", "side=east", "side=west", "unseen"]
    assert torch.equal(data.dataset("train").tensors[0], plain.dataset("train").tensors[0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"spe": ";"}, {}, "TableDataModule has no argument `spe`"),
        ({"seed": 3, "target": "x"}, {}, "`config`: data.init_args must not hold target, seed, which the comparison"),
        ({"path": "a.csv"}, {}, "data.init_args must not hold path, .* pass its class as `data_module`"),
        ({"drop": ["id"]}, {"data": "digits", "target": ()}, "data='digits' takes no argument `drop`"),
        (
            {"drop": ["id"]},
            {"data": "testbed", "target": (), "problem": "x.npz", "recipe": Recipe()},
            "takes no data.init",
        ),
        ({}, {"data": "digits", "target": (), "ood": "far.csv"}, "`ood` is a table beside a .csv or .parquet table"),
        ({}, {"data_module": "a:B", "data": "a:B", "target": (), "ood": "far.csv"}, "`data_module` takes no `ood`"),
    ],
)
def test_arguments_that_do_not_belong_to_the_data(folder, arguments, options, message):
    with pytest.raises(InputError, match=message):
        make_problem(quick(config=folder(**arguments), **options), 0)


def test_errors_say_what_a_user_of_the_command_writes(folder, capsys):
    assert main(["compare", "--data", "german.csv", "--target", "cars"]) == 2
    assert 'in the file of --config: {data: {init_args: {sep: ";"}}}' in capsys.readouterr().err
    table = counts().assign(cars=np.minimum(np.arange(90), 9)[::-1])
    table.to_csv("rare.csv", index=False)
    assert main(["compare", "--data", "rare.csv", "--target", "cars"]) == 2
    assert "class 0 has 1. Merge it" in (error := capsys.readouterr().err)
    assert "rather than classes, pass --task regression." in error


def test_a_file_of_out_of_distribution_rows_is_detected(folder):
    done = compare(quick(methods=("gaussian", "ensemble"), config=folder(drop=["id"]), ood="far.csv"))
    results = done.results()
    assert results["problem"]["sizes"]["ood"] == 30
    assert "Out-of-distribution data: 30 rows of far.csv." in results["problem"]["notes"]
    assert results["rows"][1]["ood_auroc"]["mean"] > 0.9
    assert "--ood far.csv --" in results["command"]


class Counts(LightningDataModule):
    """Targets as integers or booleans, in a mapping, with a hook of its own."""

    dtype = torch.int64

    def loader(self):
        table = counts()
        x, y = torch.tensor(table["x"].to_numpy()).float().unsqueeze(1), torch.tensor(table["cars"].to_numpy())
        y = y > 19 if self.dtype == torch.bool else y
        return DataLoader([{"x": one, "y": label} for one, label in zip(x, y, strict=True)], 16)

    train_dataloader = val_dataloader = test_dataloader = loader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "x": 2 * batch["x"]}


class Flags(Counts):
    dtype = torch.bool


@pytest.mark.parametrize(("kind", "task"), [("Counts", "classification"), ("Flags", "binary")])
def test_integers_and_booleans_of_a_data_module_are_regressed_if_told(kind, task):
    given = {"data_module": f"{__name__}:{kind}", "data": f"{__name__}:{kind}", "target": ()}
    assert make_problem(quick(**given), 0).data.task == task
    results = compare(
        quick(**given, task="regression", methods=("gaussian", "dropout", "laplace", "conformal"))
    ).results()
    assert results["task"] == "regression"
    assert not results["left_out"]
    assert all(np.isfinite(row["rmse"]["mean"]) for row in results["rows"])


def test_a_target_in_an_object_cannot_be_cast():
    from lightning_uq.running.foreign_targets import with_target

    class Graph:
        y = torch.tensor([1, 2])

    with pytest.raises(InputError, match="in a batch of type Graph are torch.int64. Convert them with `.float"):
        with_target(Graph(), Graph.y, Graph.y.float())
    x, y = torch.zeros(2, 1), torch.tensor([1, 2])
    assert with_target([x, y], y, y.float())[1].is_floating_point()


def test_a_doubt_about_the_task_is_told_once(folder):
    table = counts().assign(cars=lambda table: (table["cars"] % 2).astype(float))
    table.to_csv("flags.csv", index=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compare(quick(data="flags.csv", methods=("gaussian",), seeds=3))
    assert sum("is regressed, but its values are whole" in str(one.message) for one in told) == 1


def test_arrays_take_arguments_too(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 1, 4, 4))
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(60) % 3)
    (tmp_path / "run.yaml").write_text("data: {init_args: {flatten: false}}")
    data = make_problem(quick(data=str(tmp_path / "images.npz"), target=(), config=str(tmp_path / "run.yaml")), 0).data
    assert data.input_shape == (1, 4, 4)
    assert isinstance(data.dataset("train"), TensorDataset)
