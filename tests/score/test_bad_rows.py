"""``lightning-uq score`` of rows on which the model fails."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq import export_fitted
from lightning_uq.cli import main
from lightning_uq.networks.fitted import FittedNetwork

pytest.importorskip("pyarrow")
GRAPHS = pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
X[:, 3] = torch.arange(50) % 5


class LooksUp(nn.Module):
    """Its last column is one of five categories."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return (self.linear(x[:, :3]) + self.table(x[:, 3].long())).unsqueeze(0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder, fitted = tmp_path_factory.mktemp("model"), FittedNetwork(LooksUp())
    for suffix in (".pt2", ".onnx"):
        export_fitted(fitted, folder / f"model{suffix}", X[:8])
    return {suffix: folder / f"model{suffix}" for suffix in (".pt2", ".onnx")}


def error(model, capfd, *more):
    """The one line on stderr, where onnxruntime's log would be, too."""
    assert main(["score", str(model), "rows.npy", "--out", "out.parquet", *more]) == 2
    out, text = capfd.readouterr()
    assert out == ""
    assert text.count("\n") == 1
    return text


@GRAPHS
@pytest.mark.parametrize("batch_size", ["1", "10", "100"])
@pytest.mark.parametrize("bad", [[0], [34, 37], range(50)])
def test_a_row_with_an_unknown_category_is_named(models, suffix, bad, batch_size, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    x = X.clone()
    x[list(bad), 3] = 7
    np.save("rows.npy", x.numpy())
    text = error(models[suffix], capfd, "--batch-size", batch_size)
    row = min(bad)
    assert f"fails on row {row} of rows.npy (counted from 0): " in text
    assert "out of range" in text or "out of bounds" in text or "indices element" in text
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


@GRAPHS
def test_rows_of_another_width_are_not_one_rows_fault(models, suffix, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", X[:, :3].numpy())
    text = error(models[suffix], capfd)
    assert "fails on rows of shape [3] and dtype float32: " in text
    if suffix == ".onnx":
        assert "Got: 3 Expected: 4" in text


def test_a_batch_that_is_refused_as_a_whole(models, tmp_path, monkeypatch, capfd):
    """As where the memory is too small: each row alone passes."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", X.numpy())
    from lightning_uq.score.models import GraphModel

    call = GraphModel.__call__

    def limited(self, x):
        if len(x) > 10:
            raise RuntimeError("too large")
        return call(self, x)

    monkeypatch.setattr(GraphModel, "__call__", limited)
    assert "fails on rows of shape [4] and dtype float32: too large" in error(models[".pt2"], capfd)
