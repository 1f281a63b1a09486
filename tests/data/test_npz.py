import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_uq.data import NpzDataModule, TableDataModule
from lightning_uq.errors import InputError


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def good():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(60, 3)), "y": np.arange(60) % 4}


def test_npz_is_split_standardised_and_relabelled(tmp_path, good):
    good["y"] = good["y"] * 10  # labels with gaps
    good["x"] = good["x"] * [1, 100, 0] + [5, 0, 1e6]  # the last is constant
    data = NpzDataModule(write(tmp_path / "mine.npz", **good), ood_classes=[30])
    x, y = data.dataset("train").tensors
    assert data.classes == (0, 10, 20)
    assert y.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert x.isfinite().all()
    held_out = data.dataset("ood").tensors[0]
    assert list(data.ood_dataloaders()) == ["mine_30"]
    assert held_out.shape == (15, 3)
    assert held_out.isfinite().all()
    raw = NpzDataModule(write(tmp_path / "mine.npz", **good), standardize=False)
    torch.testing.assert_close(raw.load_arrays()[0], torch.from_numpy(good["x"]).float())


def test_npz_flattens_unless_told(tmp_path):
    path = write(tmp_path / "images.npz", x=np.zeros((12, 1, 2, 2), np.uint8), y=np.arange(12) % 2)
    assert NpzDataModule(path).dataset("train").tensors[0].shape[1:] == (4,)
    images = NpzDataModule(path, flatten=False)
    assert images.dataset("train").tensors[0].shape[1:] == (1, 2, 2)
    assert images.num_features == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"arrays x, y, but x is missing among y"),
        ({"y": np.full(60, 0.5)}, "training targets of bad must vary, but dimension 0 is constant"),
        ({"y": np.stack([np.arange(60), np.ones(60)], 1) / 7}, "but dimension 1 is constant"),
        ({"y": np.arange(59) / 7}, r"must have shape \[60\] or \[60, D\].*but its shape is \[59\]"),
        ({"y": np.zeros((60, 1, 1))}, r"but its shape is \[60, 1, 1\]"),
        ({"y": np.zeros((60, 0))}, r"but its shape is \[60, 0\]"),
        (
            {"y": np.where(np.arange(60) % 9, 0.5, np.nan)},
            "`y` .* 7 of 60 rows hold NaN or infinity, the first at row 0",
        ),
        ({"y": np.arange(60) * 1e300}, "`y` .* finite in float32, but 59 of 60 rows"),
        ({"y": np.arange(60) % 4 - 1}, r"Array `y` of .* must hold labels from 0 on, but it holds -1"),
        ({"y": np.arange(59) % 2}, r"Array `y` of .* must have shape \[60\].*but its shape is \[59\]"),
        (
            {"y": (np.arange(60) % 2)[:, None]},
            r"but its shape is \[60, 1\]. If they are numbers .* pass task='regression'",
        ),
        ({"y": np.array(["a"] * 60)}, "Array `y` .* must hold numbers or booleans, but its dtype is <U1"),
        ({"x": np.zeros(60)}, r"Array `x` .* numbers \[N, ...\], but it is float64 of shape \[60\]"),
        ({"x": np.zeros((60, 0))}, r"Array `x` .* of shape \[60, 0\]"),
        ({"x": np.full((60, 2), "a")}, "Array `x` .* but it is <U1"),
        ({"x": np.where(np.eye(60) > 0, np.nan, 0)[:, :7]}, "Array `x` .* 7 of 60 rows hold NaN .* the first at row 0"),
        ({"x": np.full((60, 2), 1e300)}, "finite in float32, but 60 of 60 rows"),
        (
            {"y": np.minimum(np.arange(60), 2)},
            "class 0 has 1. .* If the targets are numbers rather than classes, pass task='regression'",
        ),
        ({"x": np.array([[None]] * 60)}, "cannot be read: Object arrays"),
    ],
)
def test_bad_arrays(tmp_path, good, change, message):
    arrays = {name: value for name, value in {**good, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        NpzDataModule(write(tmp_path / "bad.npz", **arrays)).setup()


def test_unreadable_files(tmp_path, good):
    with pytest.raises(InputError, match=r"nowhere\.npz must be .* but there is no such file"):
        NpzDataModule(str(tmp_path / "nowhere.npz")).setup()
    (tmp_path / "text.npz").write_text("x, y")
    with pytest.raises(InputError, match=r"text\.npz .*cannot be read"):
        NpzDataModule(str(tmp_path / "text.npz")).setup()
    (tmp_path / "empty.npz").touch()
    with pytest.raises(InputError, match=r"empty\.npz .*cannot be read"):
        NpzDataModule(str(tmp_path / "empty.npz")).setup()
    whole = tmp_path / "cut.npz"
    write(whole, **good)
    whole.write_bytes(whole.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"cut\.npz .*cannot be read"):
        NpzDataModule(str(whole)).setup()
    np.savez_compressed(whole, **good)
    garbled = bytearray(whole.read_bytes())
    garbled[80:120] = bytes(40)
    whole.write_bytes(garbled)
    with pytest.raises(InputError, match=r"cut\.npz .*cannot be read"):
        NpzDataModule(str(whole)).setup()
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="single array"):
        NpzDataModule(str(tmp_path / "single.npz")).setup()
    with pytest.raises(InputError, match="cannot be read"):
        NpzDataModule(str(tmp_path)).setup()


# ------------------------------------------------------------------ regression


@pytest.mark.parametrize("shape", [(60,), (60, 1), (60, 2)])
def test_float_targets_are_regressed_in_their_units(tmp_path, good, shape):
    y = np.random.default_rng(1).normal(5, 3, shape)
    data = NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=y))
    assert data.task == "regression"
    assert data.num_targets == (*shape, 1)[1]
    parts = [data.dataset(part).tensors for part in ("train", "val", "test")]
    assert [len(targets) for _, targets in parts] == [36, 12, 12]
    everything = torch.cat([targets for _, targets in parts])
    expected = torch.from_numpy(y).float().reshape(60, -1)
    torch.testing.assert_close(everything.sort(0).values, expected.sort(0).values)
    std, mean = torch.std_mean(parts[0][1].double(), 0, correction=0)
    torch.testing.assert_close(torch.tensor(data.target_scale).double(), torch.stack([mean, std]), atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[0][0].mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert data.ood_dataloaders() == {}


def test_rows_and_targets_stay_together(tmp_path):
    y = np.arange(60.0) / 7
    data = NpzDataModule(write(tmp_path / "mine.npz", x=y[:, None] * 2, y=y), standardize=False)
    for part in ("train", "val", "test"):
        x, targets = data.dataset(part).tensors
        torch.testing.assert_close(x, 2 * targets)


def test_a_regression_has_no_classes_and_a_classification_no_scale(tmp_path, good):
    regression = NpzDataModule(write(tmp_path / "r.npz", x=good["x"], y=np.arange(60) / 7))
    with pytest.raises(InputError, match="r has no classes, because its targets are numbers"):
        _ = regression.num_classes
    with pytest.raises(InputError, match="`ood_classes` must be empty for r, .* but it is 3"):
        NpzDataModule(write(tmp_path / "r.npz", x=good["x"], y=np.arange(60) / 7), ood_classes=[3]).setup()
    labels = NpzDataModule(write(tmp_path / "c.npz", **good))
    assert labels.task == "classification"
    assert labels.class_names == ("0", "1", "2", "3")
    with pytest.raises(InputError, match="c has no `target_scale`, because its targets are classes"):
        _ = labels.target_scale


def test_float_targets_that_look_like_labels_are_told(tmp_path, good):
    data = NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=good["y"].astype(float)))
    with pytest.warns(UserWarning, match="is regressed, but its values are whole, as .* pass task='classification'"):
        data.setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NpzDataModule(str(data.path), seed=1).setup()  # as for the next seed of a comparison: told once
    assert data.task == "regression"


# ------------------------------------------------------------------ the task


def test_integers_of_zero_and_one_in_columns_are_labels(tmp_path, good):
    y = np.stack([np.arange(60) % 2, np.arange(60) % 3 == 0], 1).astype(int)
    data = NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=y))
    assert (data.task, data.num_outputs, data.task_arguments) == ("multilabel", 2, {"num_labels": 2})
    assert data.class_names == ("0", "1")
    assert torch.equal(data.dataset("test").tensors[1], torch.from_numpy(y)[data.test_rows])
    with pytest.raises(InputError, match="mine has no classes, but 2 labels per input"):
        _ = data.classes
    with pytest.raises(InputError, match="`ood_classes` must be empty for mine, since a multilabel has no classes"):
        NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=y), ood_classes=[1]).setup()


def test_one_hot_classes_are_doubtful_labels(tmp_path, good):
    path = write(tmp_path / "mine.npz", x=good["x"], y=np.eye(3, dtype=int)[np.arange(60) % 3])
    with pytest.warns(
        UserWarning, match=r"each row has exactly one 1. If its columns are classes, save `y.argmax\(1\)`"
    ):
        NpzDataModule(path).setup()
    NpzDataModule(path, task="multilabel").setup()  # no warning


@pytest.mark.parametrize(("labels", "kind"), [((0, 1), bool), ((3, 7), int), ((-1, 1), int), ((0, 1), float)])
def test_two_labels_of_a_binary_task(tmp_path, good, labels, kind):
    y = np.array(labels, dtype=kind)[np.arange(60) % 2]
    data = NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=y), task="binary")
    assert (data.task, data.num_outputs, data.task_arguments, data.classes) == ("binary", 1, {}, labels)
    expected = torch.arange(60) % 2
    assert torch.equal(data.dataset("test").tensors[1], expected[data.test_rows])
    assert data.notes == (f"Label 1 stands for {labels[1]}, and 0 for {labels[0]}.",)


def test_integers_that_are_regressed_and_floats_that_are_classes(tmp_path, good):
    counts = np.stack([np.arange(60), np.arange(60) % 7], 1)
    data = NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=counts), task="regression")
    assert (data.task, data.num_outputs, data.class_names) == ("regression", 2, ())
    assert data.task_arguments == {"target_scale": data.target_scale}
    assert torch.equal(data.dataset("test").tensors[1], torch.from_numpy(counts).float()[data.test_rows])
    classes = NpzDataModule(write(tmp_path / "mine.npz", x=good["x"], y=good["y"].astype(float)), task="classification")
    assert (classes.task, classes.num_outputs, classes.task_arguments) == ("classification", 4, {"num_classes": 4})


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (np.arange(60) % 20, "classification"),
        (np.arange(60) > 29, "classification"),
        (np.arange(60) // 2 * 3, "regression"),
        (np.stack([np.arange(60), np.arange(60) % 7], 1), "regression"),
        (np.arange(60) / 7, "regression"),
        (np.arange(60)[:, None] % [2, 3] == 0, "multilabel"),
    ],
)
def test_tables_and_arrays_have_the_same_rule(tmp_path, good, y, task):
    path = write(tmp_path / "mine.npz", x=good["x"], y=y)
    columns = {f"y{k}": one for k, one in enumerate(y.reshape(60, -1).T)}
    pd.DataFrame({"x": good["x"][:, 0], **columns}).to_csv(tmp_path / "mine.csv", index=False)
    assert NpzDataModule(path).task == TableDataModule(str(tmp_path / "mine.csv"), [*columns]).task == task
    cast = NpzDataModule(path, task="regression")
    table = TableDataModule(str(tmp_path / "mine.csv"), [*columns], task="regression")
    expected = torch.from_numpy(y).float().reshape(60, -1)
    for data in (cast, table):
        assert torch.equal(data.dataset("test").tensors[1], expected[data.test_rows])


def test_numbered_integers_that_are_regressed_are_doubtful(tmp_path, good):
    path = write(tmp_path / "mine.npz", x=np.random.default_rng(0).normal(size=(90, 2)), y=np.arange(90) % 30)
    with pytest.warns(UserWarning, match="its values are whole, as class labels are"):
        assert NpzDataModule(path).task == "regression"
    with pytest.raises(InputError, match="`ood_classes` must be empty .* If its targets are classes, pass task='class"):
        NpzDataModule(path, ood_classes=[3]).setup()
    assert NpzDataModule(path, ood_classes=[3], task="classification").num_classes == 29


def test_an_extreme_cell_is_named(tmp_path, good):
    x, y = good["x"], np.arange(60) / 7
    x[7, 2] = 1e30
    with pytest.raises(
        InputError, match=r"`x` of .* holds 1e\+30 in row 7 \(from 0\), column 2, more than 1e\+06 times"
    ):
        NpzDataModule(write(tmp_path / "mine.npz", x=x, y=y)).setup()
    x[7, 2], y[3] = 0.0, -1e12
    with pytest.raises(InputError, match=r"`y` of .* holds -1e\+12 in row 3 \(from 0\), column 0"):
        NpzDataModule(write(tmp_path / "mine.npz", x=x, y=y)).setup()


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        ("ranking", np.arange(60) % 2, "`task` must be one of auto, classification, .* but it is 'ranking'"),
        ("classification", np.arange(60) / 7, "task='classification' needs labels, but array `y` .* holds 0.142857"),
        ("binary", np.arange(60) % 3, "task='binary' needs 2 classes, but bad has 3 in distribution"),
        ("binary", np.eye(60, 2, dtype=int), r"must have shape \[60\], one label"),
        ("multilabel", np.arange(60) % 2, r"A multilabel task needs labels \[60, L\].* has shape \[60\]"),
        ("multilabel", np.arange(120).reshape(60, 2), "A multilabel task needs labels 0 and 1, but .* holds 2"),
        ("regression", np.array(["a", "b"] * 30), "must hold numbers or booleans, but its dtype is <U1"),
    ],
)
def test_targets_that_contradict_the_task(tmp_path, good, task, y, message):
    with pytest.raises(InputError, match=message):
        NpzDataModule(write(tmp_path / "bad.npz", x=good["x"], y=y), task=task).setup()
