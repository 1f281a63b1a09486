"""``lightning-uq score`` with models of maps: what they say of a whole image is written."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import OODAlarm, export_fitted, load_fitted, save_fitted
from lightning_uq.cli import main
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.score.output import without_maps
from lightning_uq.tasks import Segmentation

pq = pytest.importorskip("pyarrow.parquet")
X = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Conv2d(1, 3, 3, padding=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", X.numpy())
    return tmp_path


def test_the_alarm_of_each_image_is_written(folder, capsys):
    model = network()
    alarm = OODAlarm(task=Segmentation()).fit(model, DataLoader(TensorDataset(X, torch.zeros(60, 4, 4).long()), 20))
    save_fitted("model-uq.ckpt", model, [alarm])
    fitted = load_fitted("model-uq.ckpt", network())
    export_fitted(fitted, "model.pt2", X[:2])
    assert main(["score", "model.pt2", "rows.npy", "--out", "out.parquet", "--batch-size", "7"]) == 0
    assert capsys.readouterr().err == "out.parquet does not contain the maps `probs` [3, 4, 4].\n"
    found, expected = pq.read_table("out.parquet"), fitted(X)
    assert found.column_names == ["index", "ood_score", "ood_p_value", "ood_alarm"]
    assert expected["ood_score"].shape == (60,)
    np.testing.assert_allclose(found["ood_score"].to_numpy(), expected["ood_score"].numpy(), rtol=1e-5)
    assert found["ood_alarm"].to_pylist() == expected["ood_alarm"].tolist()


def test_a_model_with_nothing_but_maps_is_refused(folder, capsys):
    class Maps(nn.Module):
        def forward(self, x):
            return x.expand(-1, 3, -1, -1).unsqueeze(0)

    export_fitted(FittedNetwork(Maps()), "model.pt2", X[:2])
    assert main(["score", "model.pt2", "rows.npy", "--out", "out.parquet"]) == 2
    assert (
        "returns only maps, which a table cannot hold: `probs` [3, 4, 4]. Use `PredictionWriter(format='npz')`."
        in capsys.readouterr().err
    )
    assert not (folder / "out.parquet").exists()


def test_what_is_a_map():
    one, horizon, maps = torch.ones(2), torch.ones(2, 5, 5), torch.ones(2, 3, 5, 5)
    assert list(without_maps({"mean": horizon, "variance": horizon})) == ["mean", "variance"]
    assert list(without_maps({"mean": maps, "answered": horizon, "ood_alarm": one})) == ["ood_alarm"]
    assert list(without_maps({"probs": torch.ones(2, 3, 5), "ood_alarm": one})) == ["ood_alarm"]
    assert list(without_maps({"probs": torch.ones(2, 3), "ood_alarm": one})) == ["probs", "ood_alarm"]
