"""``lightning-uq score``: every kind of model and of file gives the same rows, in constant memory, or leaves nothing."""

import os
import re
import subprocess
import sys
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    ConformalSets,
    DeterministicModule,
    Factory,
    FitGMM,
    PredictionWriter,
    TemperatureScaling,
    export_fitted,
    load_fitted,
)
from lightning_uq.cli import main
from lightning_uq.errors import InputError, NotFiniteError
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.score import Settings, load_model, open_rows, score
from lightning_uq.score.output import make_block
from tests.trainers import quiet_trainer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
csv = pytest.importorskip("pyarrow.csv")

X = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
NAMES = ["a", "b", "c", "d"]
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 20 per class")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint and its graphs, by suffix, and the columns that PredictionWriter writes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = Factory("lightning_uq.networks.MLP", {"in_features": 4, "out_features": 3, "hidden_sizes": [8]})
    module = DeterministicModule(network, optimizer=Factory("torch.optim.Adam", {"lr": 0.02}))
    callbacks = [FitGMM(feature_transform="raw"), TemperatureScaling(), ConformalSets()]
    best = ModelCheckpoint(folder, monitor="val_loss")
    trainer = quiet_trainer(folder, callbacks=[*callbacks, best], enable_checkpointing=True, max_epochs=2)
    trainer.fit(
        module, DataLoader(TensorDataset(X[:150], Y[:150]), 50), DataLoader(TensorDataset(X[150:], Y[150:]), 50)
    )
    writer = PredictionWriter(folder / "written")
    quiet_trainer(folder, callbacks=[*callbacks, writer]).predict(
        module, DataLoader(TensorDataset(X), 64), ckpt_path=callbacks[-1].uq_ckpt_path, return_predictions=False
    )
    found = {".ckpt": callbacks[-1].uq_ckpt_path, "written": folder / "written" / "predictions-rank0.parquet"}
    fitted = load_fitted(found[".ckpt"])
    for suffix, extra in ((".pt2", "torch"), (".onnx", "onnxscript")):
        pytest.importorskip(extra)
        found[suffix] = folder / f"model{suffix}"
        export_fitted(fitted, found[suffix], X[:8])
    return found


def table(x=X, **more):
    return pa.table({name: x[:, i].numpy() for i, name in enumerate(NAMES)} | more)


def files(folder):
    """The same rows in each kind of file."""
    csv.write_csv(table(), folder / "rows.csv")
    pq.write_table(table(), folder / "rows.parquet", row_group_size=70)
    np.save(folder / "rows.npy", X.numpy())
    np.save(folder / "columns.npy", np.asfortranarray(X.double().numpy()))
    np.save(folder / "big_endian.npy", X.numpy().astype(">f4"))
    np.savez(folder / "rows.npz", x=X.numpy(), y=Y.numpy())
    np.savez_compressed(folder / "compressed.npz", y=Y.numpy(), x=X.numpy())
    return sorted(folder.iterdir())


@pytest.mark.parametrize("suffix", [".ckpt", ".pt2", ".onnx"])
def test_every_file_and_model_gives_the_rows_of_prediction_writer(models, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_uq.score.run.load_model", cache(load_model))  # to load a graph takes seconds
    expected = pq.read_table(models["written"])
    data = tmp_path / "data"
    data.mkdir()
    for path in files(data):
        out = tmp_path / "out.parquet"
        summary = score(Settings(models[suffix], path, out, batch_size=37), overwrite=True)
        assert (summary.rows, summary.nonfinite_rows, summary.alarms) == (300, 0, None)
        found = pq.read_table(out)
        assert set(found.column_names) >= {
            "label",
            "prob_2",
            "set_size",
            "prediction_set_0",
            "log_density",
            "ood_score",
        }
        assert set(found.column_names) <= set(expected.column_names)
        for name in found.column_names:
            assert found[name].type == expected[name].type, name
            one, other = found[name].to_numpy(), expected[name].to_numpy()
            if one.dtype.kind == "f":
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
            else:
                assert (one == other).mean() > 0.99, name


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_are_chosen_and_ordered(models, kind, tmp_path):
    path, out = tmp_path / f"rows.{kind}", tmp_path / "out.parquet"
    shuffled = table(target=Y.numpy()).select(["target", "d", "c", "b", "a"])
    (csv.write_csv if kind == "csv" else pq.write_table)(shuffled, path)
    score(Settings(models[".pt2"], path, out, columns=NAMES))
    expected = pq.read_table(models["written"])["prob_1"].to_numpy()
    np.testing.assert_allclose(pq.read_table(out)["prob_1"].to_numpy(), expected, rtol=1e-4, atol=1e-6)
    assert open_rows(path, drop=["target"]).columns == ["d", "c", "b", "a"]
    with pytest.raises(InputError, match=r"fails on the 5 columns target, d, c, b, a \(`columns` or `drop`"):
        score(Settings(models[".ckpt"], path, tmp_path / "other.parquet"))
    with pytest.raises(InputError, match=r"`drop`: .* has no column 'e'. Its columns are target, d"):
        open_rows(path, drop=["e"])


IDS = {
    "text": pa.array([None if i < 250 else f"00{i}" for i in range(300)], pa.string()),
    "large": pa.array([2**53 + 1 + i if i % 2 else None for i in range(300)], pa.int64()),
    "time": pa.array([datetime(2024, 1, 1, 0, i % 60) for i in range(300)], pa.timestamp("us", "UTC")),
    "categories": pa.array(["a", "b", "c"] * 100).dictionary_encode(),
    "list": pa.array([[i, i] for i in range(300)]),
}


@pytest.mark.parametrize("kind", IDS)
def test_a_column_of_any_type_is_copied(models, kind, tmp_path):
    path, out = tmp_path / "rows.parquet", tmp_path / "out.parquet"
    pq.write_table(table(key=IDS[kind]), path)
    score(Settings(models[".ckpt"], path, out, id="key", batch_size=100))
    found = pq.read_table(out)
    assert found.column_names[:2] == ["index", "key"]
    assert found["key"].to_pylist() == IDS[kind].to_pylist()
    assert found["key"].type == getattr(IDS[kind].type, "value_type", IDS[kind].type) or kind == "list"


def test_of_a_csv_file_it_stays_text(models, tmp_path):
    path, out = tmp_path / "rows.csv", tmp_path / "out.parquet"
    path.write_text("key,a,b,c,d\n007,1,2,3,4\n,1,2,3,4\nNA,1,2,3,4\n")
    score(Settings(models[".pt2"], path, out, id="key"))
    assert pq.read_table(out)["key"].to_pylist() == ["007", "", "NA"]


@pytest.mark.parametrize("suffix", [".ckpt", ".pt2", ".onnx"])
def test_a_missing_value(models, suffix, tmp_path):
    path, out = tmp_path / "rows.csv", tmp_path / "out.parquet"
    path.write_text("a,b,c,d\n1,2,3,4\n1,,3,4\n1,2,inf,4\n1,2,3,1e300\n")
    assert score(Settings(models[suffix], path, out)).nonfinite_rows == 3
    rows = pq.read_table(out).to_pylist()
    assert np.isfinite(rows[0]["ood_score"])
    for row in rows[1:]:
        assert row["ood_score"] == np.inf
        assert np.isnan([row["prob_0"], row["confidence"]]).all()
        assert row["label"] == -1
        assert row["set_size"] == 3
    with pytest.raises(NotFiniteError, match=r"Row 1 of .* NaN or infinity in column 'b'"):
        score(Settings(models[suffix], path, tmp_path / "other.parquet", nonfinite="error", batch_size=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "rows.csv"]


def write(path, text):
    path.write_text(text)
    return path


LATE = "a,b,c,d\n" + "1,2,3,4.5\n" * 150_000 + "1,x,3,4\n"
BAD_DATA = {
    "text": ("a,b,c,d\n1,2,3,red\n", r"These columns of .* are not numeric: 'd' \(string\)"),
    "late text": (LATE, r"Row #150002: .* invalid value 'x'"),
    "short line": ("a,b,c,d\n1,2,3,4\n1,2\n", "Row #3: Expected 4 columns, got 2"),
    "no names": (
        "0.5,1,2,3\n1,2,3,4\n",
        "first line .* must hold the column names, but it holds numbers: 0.5, 1, 2",
    ),
    "whole numbers for names": ("5,1,2,3\n1,2,3,4\n", "must hold the column names"),
    "no rows": ("a,b,c,d\n", "holds no rows"),
    "nothing": ("", "cannot be read as CSV"),
    "twice": ("a,b,c,a\n1,2,3,4\n", "two columns named 'a'"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_error_and_leaves_nothing(models, name, tmp_path):
    text, message = BAD_DATA[name]
    path = write(tmp_path / "rows.csv", text)
    with pytest.raises(InputError, match=message):
        score(Settings(models[".ckpt"], path, tmp_path / "out.parquet", batch_size=10_000))
    assert list(tmp_path.iterdir()) == [path]


def test_names_from_0_are_names(tmp_path):
    assert open_rows(write(tmp_path / "rows.csv", "0,1,2\n5,6,7\n")).columns == ["0", "1", "2"]


def test_a_truncated_array(models, tmp_path):
    np.save(tmp_path / "rows.npy", X.numpy())
    data = (tmp_path / "rows.npy").read_bytes()
    (tmp_path / "rows.npy").write_bytes(data[: len(data) - 20])
    with pytest.raises(InputError, match="incomplete: it ends within row 298 of 300"):
        score(Settings(models[".ckpt"], tmp_path / "rows.npy", tmp_path / "out.parquet"))
    assert not (tmp_path / "out.parquet").exists()


def test_an_interrupt_leaves_what_was_there(models, tmp_path):
    np.save(tmp_path / "rows.npy", X.numpy())
    out = write(tmp_path / "out.parquet", "before")
    settings = Settings(models[".ckpt"], tmp_path / "rows.npy", out, batch_size=100)

    def interrupt(done, total):
        assert total == 300
        if done == 200:
            raise KeyboardInterrupt

    with pytest.raises(InputError, match="already exists"):
        score(settings)
    with pytest.raises(KeyboardInterrupt):
        score(settings, interrupt, overwrite=True)
    assert out.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


class WithAlarm(FittedNetwork):
    """An alarm where the first number is positive."""

    output_names = ("probs", "ood_p_value", "ood_alarm")

    def forward(self, x):
        return {**super().forward(x), "ood_p_value": x[:, 0].double(), "ood_alarm": x[:, 0] > 0}


def test_alarms_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_fitted(WithAlarm(EnsembleNetwork([nn.Linear(4, 3)])), "model.pt2", X[:5])
    np.save("rows.npy", X.numpy())
    assert main(["score", "model.pt2", "rows.npy", "--out", "out.parquet"]) == 0
    share = 100 * (X[:, 0] > 0).double().mean()
    text = capsys.readouterr()
    assert re.fullmatch(rf"300 rows in \d+\.\d s, alarms {share:.2f} %\. Wrote out\.parquet\n", text.out)
    assert text.err == ""
    assert pq.read_table("out.parquet")["ood_alarm"].to_pylist() == (X[:, 0] > 0).tolist()


def test_the_network_inside_from_a_function(models, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_networks.py").write_text(
        "from lightning_uq.networks import MLP\n\ndef make():\n    return MLP(4, 3, hidden_sizes=[8])\n"
    )
    np.save(tmp_path / "rows.npy", X.numpy())
    out = tmp_path / "out.parquet"
    score(Settings(models[".ckpt"], tmp_path / "rows.npy", out, network="users_networks:make"))
    assert pq.read_table(out).num_rows == 300


def test_arguments_that_do_not_fit(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", z=X.numpy())
    write(tmp_path / "rows.csv", "a,b\n1,2\n")
    for name in ("old.parquet", "broken.ckpt"):
        write(tmp_path / name, "")
    model, graph = (str(models[suffix]) for suffix in (".ckpt", ".pt2"))
    cases = {
        "rows.npz has no array 'x'. Set --input to one of z.": [model, "rows.npz"],
        "--columns, --drop and --id apply to tables only": [model, "rows.npz", "--drop", "a"],
        "--network and --task apply to checkpoints only": [graph, "rows.npz", "--input", "z", "--task", "regression"],
        "--network must be the import path": [
            model,
            "rows.npz",
            "--input",
            "z",
            "--network",
            "torch.nn:Lin",
        ],
        "--network: torch.nn:Linear() raised TypeError": [
            model,
            "rows.npz",
            "--input",
            "z",
            "--network",
            "torch.nn:Linear",
        ],
        "--monitor needs a model with an OODAlarm": [model, "rows.npz", "--input", "z", "--monitor", "monitor.json"],
        "--batch-size must be an integer of at least 1": [model, "rows.npz", "--batch-size", "0"],
        "old.parquet already exists. Choose another file, or pass --overwrite.": [
            model,
            "rows.npz",
            "--out",
            "old.parquet",
        ],
        "--drop: rows.csv has no column 'e'. Its columns are a, b.": [model, "rows.csv", "--drop", "e"],
        "Pass either --columns or --drop": [model, "rows.csv", "--drop", "a", "--columns", "b"],
        "fails on the 2 columns a, b (--columns or --drop choose others)": [model, "rows.csv"],
        "MODEL must be a checkpoint": ["broken.ckpt", "rows.npz"],
        "DATA: no.npz does not exist": [model, "no.npz"],
        "MODEL must end in .ckpt, .pt2 or .onnx": ["rows.npz", "rows.npz", "--input", "z"],
        "DATA: this argument is required": [model],
        "--out must end in .parquet": [model, "rows.npz", "--input", "z", "--out", "out.csv"],
    }
    for message, arguments in cases.items():
        assert main(["score", *arguments, *([] if "--out" in arguments else ["--out", "out.parquet"])]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1]
        assert "`" not in lines[-1]
        assert all(line.startswith("The columns of rows.csv are not named in the model") for line in lines[:-1])


def test_columns_of_labels():
    block = make_block({"probs": torch.tensor([[0.9, 0.2], [torch.nan, 0.5]])}, "labels")
    assert block["label"].tolist() == [[1, 0], [-1, 0]]
    np.testing.assert_allclose(block["confidence"][0], [0.9, 0.8], rtol=1e-6)
    assert list(make_block({"probs": torch.ones(2, 1)}, None)) == ["probs"]


MEMORY = r"""
import re, sys
from lightning_uq.callbacks import prediction_files
from lightning_uq.score import Settings, score, tables
prediction_files.FLUSH_BYTES = 2**18  # pieces are kept in memory, up to a constant: here a small one
tables._BLOCK_BYTES = 2**16
peaks = []
for data in sys.argv[2:]:
    score(Settings(sys.argv[1], data, "out.parquet"), overwrite=True)
    # Not getrusage's number, which begins with that of the process that started this one.
    peaks.append(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024)
print(*peaks)
"""


@pytest.mark.parametrize(
    "kind", ["csv", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("parquet", "npz", "npy"))]
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_rows(models, kind, tmp_path):
    paths = []
    for num in (40_000, 400_000):
        x, path = X.repeat(num // 300 + 1, 1)[:num], tmp_path / f"{num}.{kind}"
        if kind == "csv":
            csv.write_csv(table(x), path)
        elif kind == "parquet":
            pq.write_table(table(x), path, use_dictionary=False)
        else:
            np.savez(path, x=x.double().numpy()) if kind == "npz" else np.save(path, x.double().numpy())
        paths.append(path)
    # A new process: in a copy of one that has imported everything, the peak once grew by 12 MB.
    run = [sys.executable, "-c", MEMORY, str(models[".pt2"]), *map(str, paths)]
    # Arrow reads ahead with each of its threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, check=True, text=True).stdout
    small, large = map(int, output.split())
    assert large - small < 12  # MB; the rows alone are 13, and the outputs 34
