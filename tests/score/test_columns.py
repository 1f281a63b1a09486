"""``lightning-uq score`` and the names of a table's columns."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, Factory, TemperatureScaling, export_fitted, load_fitted, save_fitted
from lightning_uq.cli import main
from lightning_uq.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
csv = pytest.importorskip("pyarrow.csv")

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
NAMES = ["a", "b", "c"]
SUFFIXES = pytest.mark.parametrize("suffix", [".ckpt", ".pt2", ".onnx"])
WRITES = {"csv": csv.write_csv, "parquet": pq.write_table}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of one model, by suffix and by whether they name the columns."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = Factory("lightning_uq.networks.MLP", {"in_features": 3, "out_features": 2, "hidden_sizes": [4]})
    module = DeterministicModule(network)
    y = (X[:, 0] > 0).long()
    scaling = TemperatureScaling().fit(module, DataLoader(TensorDataset(X, y), 40))
    found = {}
    for named in (True, False):
        paths = {suffix: folder / f"{named}-uq{suffix}" for suffix in (".ckpt", ".pt2", ".onnx")}
        more = {"columns": NAMES} if named else {}
        save_fitted(paths[".ckpt"], module, [scaling], **more)
        fitted = load_fitted(paths[".ckpt"])
        for suffix in (".pt2", ".onnx"):
            if suffix == ".onnx":
                pytest.importorskip("onnxscript")
            export_fitted(fitted, paths[suffix], X, **more)
        found |= {(suffix, named): path for suffix, path in paths.items()}
    found["probs"] = fitted(X)["probs"].numpy()
    return found


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The rows with their columns in another order and among others."""
    monkeypatch.chdir(tmp_path)
    return pa.table(
        {"key": range(40), "c": X[:, 2].numpy(), "a": X[:, 0].numpy(), "red": ["x"] * 40, "b": X[:, 1].numpy()}
    )


def run(*arguments):
    return main(["score", *map(str, arguments), "--out", "out.parquet", "--overwrite"])


def probs():
    found = pq.read_table("out.parquet")
    return np.stack([found[f"prob_{i}"].to_numpy() for i in range(2)], 1)


@SUFFIXES
@pytest.mark.parametrize("kind", WRITES)
def test_names_in_the_model_find_the_columns_in_any_order(models, suffix, kind, table, capsys):
    WRITES[kind](table, f"rows.{kind}")
    assert run(models[suffix, True], f"rows.{kind}", "--id", "key") == 0
    np.testing.assert_allclose(probs(), models["probs"], rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().err == f"The model ignores 1 column of rows.{kind}.\n"
    WRITES[kind](table.select(["c", "b", "a"]), f"rows.{kind}")
    assert run(models[suffix, True], f"rows.{kind}") == 0
    np.testing.assert_allclose(probs(), models["probs"], rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().err == ""


@SUFFIXES
def test_a_table_that_lacks_a_named_column_is_refused(models, suffix, table, capsys):
    pq.write_table(table.drop_columns(["b", "red"]), "rows.parquet")
    assert run(models[suffix, True], "rows.parquet") == 2
    error = capsys.readouterr().err
    assert "The model needs 3 named columns, but rows.parquet lacks 'b'. Its columns are key, c, a." in error


@SUFFIXES
def test_without_names_the_order_is_printed(models, suffix, table, capsys):
    pq.write_table(table, "rows.parquet")
    assert run(models[suffix, False], "rows.parquet", "--drop", "red", "--id", "key") == 0
    notice = "The columns of rows.parquet are not named in the model, so they are matched by position: c, a, b (3 in this order).\n"
    assert capsys.readouterr().err == notice
    assert not np.allclose(probs(), models["probs"], atol=1e-3)
    pq.write_table(pa.table({f"x{i}": [0.0] for i in range(64)}), "wide.parquet")
    assert run(models[suffix, False], "wide.parquet") == 2
    assert "by position: x0, x1, x2, ..., x63 (64 in this order).\n" in capsys.readouterr().err


def test_columns_given_beside_names_in_the_model(models, table, capsys):
    pq.write_table(table.rename_columns(["key", "third", "first", "red", "b"]), "rows.parquet")
    model = models[".pt2", True]
    assert run(model, "rows.parquet", "--columns", "first,b,third") == 0
    np.testing.assert_allclose(probs(), models["probs"], rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().err == (
        "The columns of rows.parquet have other names than the model's, so they are matched by position: first, b, third (3 in this order).\n"
        "The model ignores 2 columns of rows.parquet.\n"
    )
    assert run(model, "rows.parquet", "--columns", "b,first,third") == 2
    assert "'b' is column 0 instead of 1 (counted from 0)" in capsys.readouterr().err
    pq.write_table(table, "rows.parquet")
    assert run(model, "rows.parquet", "--drop", "a") == 2
    assert "must not name 'a', which the model needs" in capsys.readouterr().err


def test_names_that_do_not_fit_are_refused_before_a_file_is_written(models, tmp_path):
    torch.manual_seed(0)
    fitted, model = load_fitted(models[".ckpt", True]), torch.nn.Linear(3, 2)
    y = torch.distributions.Categorical(logits=model(X)).sample()
    scaling = TemperatureScaling().fit(model, DataLoader(TensorDataset(X, y), 40))
    for columns in ("abc", [], ["a", "a", "b"], [1, 2, 3]):
        with pytest.raises(InputError, match="`columns` must be a list of different names, but it is"):
            export_fitted(fitted, tmp_path / "model.pt2", X, columns=columns)
        with pytest.raises(InputError, match="`columns` must be a list of different names, but it is"):
            save_fitted(tmp_path / "m-uq.ckpt", model, [scaling], columns=columns)
    with pytest.raises(InputError, match=r"holds 2 names and `example` has shape \[40, 3\]"):
        export_fitted(fitted, tmp_path / "model.pt2", X, columns=["a", "b"])
    with pytest.raises(InputError, match="holds 1 names and `example` holds 2 tensors by name"):
        export_fitted(fitted, tmp_path / "model.pt2", {"x": X, "z": X}, columns=["a"])
    assert not list(tmp_path.iterdir())
