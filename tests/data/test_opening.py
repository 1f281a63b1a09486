import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_uq.data import open_data
from lightning_uq.errors import InputError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """One of each kind in the current folder."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 3))
    np.savez("arrays.npz", x=x, y=np.arange(60) % 3)
    table = pd.DataFrame(x, columns=["a", "b", "c"]).assign(kind=["u", "v"] * 30)
    table.to_csv("table.csv", index=False)
    table.to_csv("german.csv", index=False, sep=";")
    table.to_parquet("table.parquet")
    for i in range(20):
        (tmp_path / "pets" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 5), 10 * i).save(f"pets/{i % 2}/{i}.png")
    (tmp_path / "uci" / "yacht").mkdir(parents=True)
    np.savetxt("uci/yacht/data.txt", np.random.default_rng(0).normal(size=(60, 4)))


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("digits", {}, ("digits", "classification", (64,), 8, ["digits_8_9"])),
        ("digits", {"ood_classes": ["3"], "flatten": False}, ("digits", "classification", (1, 8, 8), 9, ["digits_3"])),
        ("diabetes", {"task": "regression"}, ("diabetes", "regression", (10,), 1, [])),
        ("shapes", {"num_images": 10}, ("shapes", "segmentation", (3, 32, 32), 4, ["shapes_cross"])),
        ("arrays.npz", {}, ("arrays", "classification", (3,), 3, [])),
        ("arrays.npz", {"ood_classes": [2], "task": "binary"}, ("arrays", "binary", (3,), 1, ["arrays_2"])),
        ("arrays.npz", {"task": "regression"}, ("arrays", "regression", (3,), 1, [])),
        ("table.csv", {"target": "kind"}, ("table", "classification", (3,), 2, [])),
        ("table.csv", {"target": ["a", "b"], "drop": ["kind"]}, ("table", "regression", (1,), 2, [])),
        ("german.csv", {"target": ["kind"], "sep": ";"}, ("german", "classification", (3,), 2, [])),
        ("table.parquet", {"target": "a"}, ("table", "regression", (5,), 1, [])),
        ("pets", {}, ("pets", "classification", (1, 5, 5), 2, [])),
        ("./pets", {"image_size": 4, "task": "binary"}, ("pets", "binary", (1, 4, 4), 1, [])),
        ("yacht", {"root": "uci"}, ("yacht", "regression", (3,), 1, [])),
        ("yacht", {"root": "uci", "split": 3}, ("yacht", "regression", (3,), 1, [])),
    ],
)
def test_data_by_name(files, name, arguments, expected):
    data = open_data(name, seed=2, batch_size=7, **arguments)
    assert (data.name, data.task, data.input_shape, data.num_outputs, list(data.ood_dataloaders())) == expected
    assert (data.seed, data.batch_size) == (2, 7)
    assert len(next(iter(data.train_dataloader()))[0]) == min(7, data.num_train)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "digist",
            {},
            r"`data` must be digits, diabetes, shapes, the path of .* data/uci \(there is none; .* but it is 'digist'",
        ),
        ("boat", {"root": "uci"}, r"a UCI table in uci \(yacht; pass another folder as `root`\), but it is 'boat'"),
        ("table.xlsx", {}, "`data` must be digits, .* but it is 'table.xlsx'"),
        ("nowhere.csv", {"target": "a"}, "There is no file nowhere.csv"),
        ("nowhere.csv", {}, "There is no file nowhere.csv"),
        ("nowhere.npz", {}, "nowhere.npz must be an .npz file"),
        ("table.csv", {}, "data='table.csv' needs `target`, .* one of 'a', 'b', 'c', 'kind'"),
        ("german.csv", {"sep": ";", "drop": ["a"]}, "needs `target`, .* one of 'a', 'b', 'c', 'kind'"),
        (
            "arrays.npz",
            {"target": "y"},
            "`target` names columns of a .csv or .parquet table, but `data` is 'arrays.npz'",
        ),
        ("digits", {"task": "regression"}, "The task of data='digits' is 'classification', but `task` is 'regression'"),
        ("digits", {"task": "ranking"}, "`task` must be one of auto, classification, .* but it is 'ranking'"),
        (
            "diabetes",
            {"ood_classes": [1]},
            "`ood_classes` must be empty for data='diabetes', since a regression has no",
        ),
        ("shapes", {"ood_classes": [1]}, "`ood_classes` must be empty for data='shapes', since a segmentation has no"),
        ("yacht", {"root": "uci", "ood_classes": [1]}, "`ood_classes` must be empty for data='yacht'"),
        (
            "table.csv",
            {"target": "a", "ood_classes": ["u"]},
            "`ood_classes` must be empty for table, since a regression",
        ),
        (
            "digits",
            {"image_size": 4},
            "data='digits' takes no argument `image_size`. Its arguments are ood_classes, seed, batch_size, flatten",
        ),
        ("pets", {"task": "multilabel"}, "is a classification or binary task, but `task` is 'multilabel'"),
    ],
)
def test_names_of_no_data(files, name, arguments, message):
    with pytest.raises(InputError, match=message):
        open_data(name, **arguments)
