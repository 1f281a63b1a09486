"""Predictions of the test rows in files, from which the numbers of the table follow."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_uq.compare import Configuration, Recipe, RunOptions, compare
from lightning_uq.errors import InputError

DIGITS = Configuration(methods=("softmax", "energy"), seeds=1, recipe=Recipe(max_epochs=1))
DIABETES = Configuration(data="diabetes", methods=("gaussian", "quantile"), seeds=1, recipe=Recipe(max_epochs=1))
SAVING = RunOptions(save_predictions=True)


def test_probabilities(tmp_path):
    comparison = compare(DIGITS, None, tmp_path, SAVING)
    softmax, energy = (np.load(tmp_path / f"predictions/{name}-0.npz") for name in ("softmax", "energy"))
    record = comparison.records["softmax"][0]
    assert np.array_equal(softmax["index"], record.row_ids.numpy())
    assert softmax["probs"].shape == (len(record.row_ids), 8)
    target = softmax["target"]
    assert (softmax["probs"].argmax(1) == target).mean() == pytest.approx(comparison.rows[0]["accuracy"]["mean"])
    nll = -np.log(softmax["probs"][np.arange(len(target)), target]).mean()
    assert nll == pytest.approx(comparison.rows[0]["nll"]["mean"], rel=1e-5)
    # Each method has its own score.
    assert np.array_equal(energy["ood_score"], comparison.records["energy"][0].rows["ood_score"].numpy())
    assert not np.array_equal(energy["ood_score"], softmax["ood_score"])
    assert np.array_equal(energy["probs"], softmax["probs"])


def test_labels_are_named(tmp_path):
    np.savez(
        tmp_path / "mine.npz",
        x=np.random.default_rng(0).normal(size=(60, 3)),
        y=np.array([3, 7, 100])[np.arange(60) % 3],
    )
    given = Configuration(data=str(tmp_path / "mine.npz"), methods=("softmax",), seeds=1, recipe=Recipe(max_epochs=1))
    comparison = compare(given, None, tmp_path, SAVING)
    assert comparison.results()["problem"]["class_names"] == ["3", "7", "100"]
    found = np.load(tmp_path / "predictions/softmax-0.npz")
    names = found["class_names"][found["target"]]
    assert names.tolist() == [("3", "7", "100")[index % 3] for index in found["index"]]


def test_numbers_and_intervals(tmp_path):
    comparison = compare(DIABETES, None, tmp_path, SAVING)
    found = np.load(tmp_path / "predictions/gaussian-0.npz")
    error = found["mean"] - found["target"]
    assert np.sqrt((error**2).mean()) == pytest.approx(comparison.rows[0]["rmse"]["mean"], rel=1e-5)
    inside = (found["lower"] <= found["target"]) & (found["target"] <= found["upper"])
    assert inside.mean() == pytest.approx(comparison.rows[0]["coverage_90"]["mean"])
    assert (found["variance"] > 0).all()
    quantiles = np.load(tmp_path / "predictions/quantile-0.npz")
    assert "quantiles" in quantiles or any(name.startswith("quantile") for name in quantiles)


def test_only_when_asked(tmp_path):
    one = replace(DIABETES, methods=("gaussian",))
    compare(one, None, tmp_path)
    assert not (tmp_path / "predictions").exists()
    with pytest.raises(InputError, match=r"`save_predictions` is set, but the comparison in .* was started without it"):
        compare(one, None, tmp_path, SAVING)
    compare(one, None, tmp_path, RunOptions(save_predictions=True, overwrite=True))
    assert (tmp_path / "predictions/gaussian-0.npz").is_file()
    compare(one, None, tmp_path, RunOptions(overwrite=True))
    assert not (tmp_path / "predictions").exists()
