"""``lightning-uq score --monitor``: a DriftMonitor that goes on from run to run."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    DeterministicModule,
    DriftMonitor,
    Factory,
    FitGMM,
    OODAlarm,
    export_fitted,
    load_fitted,
    save_fitted,
)
from lightning_uq.cli import main
from lightning_uq.errors import InputError, NotFiniteError
from lightning_uq.networks.export import GraphInfo
from lightning_uq.networks.graph_files import save_torch
from lightning_uq.score import Settings, score

pq = pytest.importorskip("pyarrow.parquet")

X = torch.randn(1200, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 20 per class")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint with an alarm, its graphs, and a checkpoint without one, by name; the alarm as well."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = Factory("lightning_uq.networks.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [8]})
    module = DeterministicModule(network)
    loaders = [DataLoader(TensorDataset(X[half], Y[half]), 100) for half in (slice(400), slice(400, 600))]
    gmm = FitGMM(feature_transform="raw").fit(module, loaders[0])
    found = {
        name: folder / name for name in ("plain-uq.ckpt", "alarm-uq.ckpt", "other-uq.ckpt", "alarm.pt2", "plain.pt2")
    }
    save_fitted(found["plain-uq.ckpt"], module, [gmm])
    for name, held_out in (("other", loaders[0]), ("alarm", loaders[1])):
        found["alarm"] = OODAlarm().fit(module, held_out)
        save_fitted(found[f"{name}-uq.ckpt"], module, [gmm, found["alarm"]])
    for name in ("alarm", "plain"):
        export_fitted(load_fitted(found[f"{name}-uq.ckpt"]), found[f"{name}.pt2"], X[:8])
    return found


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two files of rows: 600 as they were, one of them with NaN, and 300 that are further out."""
    monkeypatch.chdir(tmp_path)
    same = X[600:].clone()
    same[17, 2] = torch.nan
    np.save("same.npy", same.numpy())
    np.save("far.npy", 3 * X[:300].numpy())
    return tmp_path


def ood_scores(path):
    return torch.from_numpy(pq.read_table(path)["ood_score"].to_numpy().copy())


@pytest.mark.parametrize("model", ["alarm-uq.ckpt", "alarm.pt2"])
def test_it_goes_on_over_runs_as_one_monitor_would(models, model, rows, capsys):
    expected = DriftMonitor(models["alarm"])
    if model.endswith(".pt2"):
        (rows / "monitor.json").write_text(expected.to_json())
    texts = []
    for name in ("same", "far"):
        arguments = ["score", str(models[model]), f"{name}.npy", "--out", f"{name}.parquet", "--batch-size", "37"]
        assert main([*arguments, "--monitor", "monitor.json"]) == 0
        texts.append(capsys.readouterr().out)
        expected.update(ood_scores(f"{name}.parquet"))
    found = DriftMonitor.from_json((rows / "monitor.json").read_text())
    assert found.num_rows == 900
    assert torch.equal(found._test.counts, expected._test.counts)
    assert found.drift_row == expected.drift_row
    assert found.log10_evidence == pytest.approx(expected.log10_evidence)
    assert re.fullmatch(
        r"600 rows in \S+ s, 1 with NaN or infinity, alarms \S+ %, no drift in 600 monitored rows\. "
        r"Wrote same\.parquet and monitor\.json\n",
        texts[0],
    )
    assert f", drift after row {found.drift_row} of 900 monitored rows. Wrote far.parquet" in texts[1]
    assert 600 < found.drift_row <= 900
    assert int(torch.isinf(ood_scores("same.parquet")).sum()) == 1


def test_a_run_that_fails_leaves_the_monitor_as_it_was(models, rows):
    monitor = rows / "monitor.json"
    before = DriftMonitor(models["alarm"]).to_json()
    monitor.write_text(before)
    with pytest.raises(NotFiniteError):
        score(
            Settings(models["alarm.pt2"], "same.npy", "out.parquet", nonfinite="error", batch_size=10), monitor=monitor
        )

    def interrupt(done, total):
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Settings(models["alarm.pt2"], "same.npy", "out.parquet", batch_size=10), interrupt, monitor=monitor)
    assert monitor.read_text() == before
    monitor.unlink()
    with pytest.raises(KeyboardInterrupt):
        score(Settings(models["alarm-uq.ckpt"], "same.npy", "out.parquet", batch_size=10), interrupt, monitor=monitor)
    assert sorted(path.name for path in rows.iterdir()) == ["far.npy", "same.npy"]


def test_what_does_not_fit_is_refused_before_the_first_batch(models, rows):
    (rows / "monitor.json").write_text(DriftMonitor(models["alarm"]).to_json())
    (rows / "alarm.json").write_text(models["alarm"].to_json())
    (rows / "bytes.json").write_bytes(b"\xff\xfe{")
    cases = [
        (
            "plain-uq.ckpt",
            "monitor.json",
            r"`monitor` needs a model with an OODAlarm, but .* It holds the states FitGMM",
        ),
        ("plain.pt2", "monitor.json", r"`monitor` needs a model with an OODAlarm, .* outputs are probs, log_density"),
        (
            "alarm.pt2",
            "missing.json",
            r"missing\.json does not exist, and a graph cannot create it.* DriftMonitor\(alarm\)\.to_json\(\)",
        ),
        ("alarm.pt2", "alarm.json", r"alarm\.json cannot be read .* JSON of lightning_uq.DriftMonitor, but it holds l"),
        ("alarm.pt2", "bytes.json", r"bytes\.json cannot be read"),
        (
            "other-uq.ckpt",
            "monitor.json",
            r"monitor\.json belongs to another alarm than that in",
        ),
        ("alarm.pt2", "out.parquet", r"`monitor` must differ from MODEL, DATA and `out`, but out\.parquet is one"),
    ]
    for model, monitor, message in cases:
        with pytest.raises(InputError, match=message):
            score(
                Settings(models[model], "same.npy", "out.parquet"), lambda *_: pytest.fail("a batch"), monitor=monitor
            )
    assert not (rows / "out.parquet").exists()


def test_a_graph_that_does_not_say_what_it_gives(models, rows):
    """Somebody else's graph: its names are known after the first batch."""
    (rows / "monitor.json").write_text(DriftMonitor(models["alarm"]).to_json())
    program = torch.export.load(models["plain.pt2"])
    save_torch(program, GraphInfo(), rows / "foreign.pt2")
    with pytest.raises(InputError, match="`monitor` needs a model with an OODAlarm"):
        score(Settings("foreign.pt2", "same.npy", "out.parquet"), monitor="monitor.json")
    assert not (rows / "out.parquet").exists()
