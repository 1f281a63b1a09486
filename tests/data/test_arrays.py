import sys

import numpy as np
import pytest
import torch

from lightning_uq.data import DigitsDataModule, NpzDataModule, stratified_split
from lightning_uq.errors import InputError, MissingExtraError


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def good():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(60, 3)), "y": np.arange(60) % 4}


# ------------------------------------------------------------------ the split


def test_split_is_a_stratified_partition():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    parts = stratified_split(labels, seed=3)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(73))
    assert [labels[part].bincount().tolist() for part in parts] == [[30, 12, 1], [10, 4, 1], [10, 4, 1]]


def test_split_follows_the_seed_and_leaves_the_global_state():
    labels = torch.arange(100) % 5
    state = torch.get_rng_state()
    first, again, other = (stratified_split(labels, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.get_rng_state())


def test_neighbours_in_a_part_are_of_unrelated_classes():
    labels = torch.arange(4000) % 4
    test = labels[stratified_split(labels, 0)[2]]
    same = (test[0::2] == test[1::2]).double().mean()
    assert abs(float(same) - 0.25) < 0.07


# ------------------------------------------------------------------ digits


@pytest.mark.parametrize("held_out", [(8, 9), (3, 5), (0, 6)])
def test_digits_splits(held_out):
    data = DigitsDataModule(ood_classes=held_out)
    x, y = data.dataset("train").tensors
    assert x.shape == (data.num_train, 64)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() == 1
    sizes = {part: len(data.dataset(part)) for part in ("train", "val", "test", "ood")}
    assert sum(sizes.values()) == 1797
    inside = 1797 - sizes["ood"]
    assert abs(sizes["train"] - 0.6 * inside) < 5
    assert abs(sizes["test"] - 0.2 * inside) < 5
    assert y.unique().tolist() == list(range(8))
    assert data.classes == tuple(label for label in range(10) if label not in held_out)
    assert sorted(data.dataset("ood").tensors[1].unique().tolist()) == list(held_out)


def test_relabelling_keeps_the_images_class():
    data = DigitsDataModule(ood_classes=(3, 5))
    everything, digits = data.load_arrays()
    everything = everything.flatten(1)
    x, y = data.dataset("test").tensors
    for image, label in zip(x[:20], y[:20], strict=True):
        row = (everything == image).all(1).nonzero()[0, 0]
        assert data.classes[label] == digits[row]


def test_loaders_repeat_and_follow_the_seed():
    first, again, other = (
        torch.cat([y for _, y in DigitsDataModule(seed=seed).train_dataloader()]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    data = DigitsDataModule()
    epochs = [torch.cat([y for _, y in loader]) for loader in [data.train_dataloader()] for _ in range(2)]
    assert not torch.equal(*epochs)
    test = torch.cat([y for _, y in data.predict_dataloader()])
    assert torch.equal(test, data.dataset("test").tensors[1])


def test_images_keep_their_shape_on_request():
    assert DigitsDataModule(flatten=False).dataset("test").tensors[0].shape[1:] == (1, 8, 8)


def test_nothing_held_out():
    data = DigitsDataModule(ood_classes=())
    assert data.num_classes == 10
    assert data.ood_dataloaders() == {}


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ((8, 12), r"`ood_classes` must hold labels of digits \(0, 1, 2, .*9\), but it holds 12"),
        ((-1,), "but it holds -1"),
        (tuple(range(9)), r"at least 2 classes of digits in distribution.* leaves 1"),
    ],
)
def test_impossible_held_out_classes(held_out, message):
    with pytest.raises(InputError, match=message):
        DigitsDataModule(ood_classes=held_out).setup()


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"extra `data`.*lightning-uq\[data\]"):
        DigitsDataModule().setup()


def test_batch_size_is_checked():
    with pytest.raises(InputError, match="`batch_size` must be at least 1, but it is 0"):
        DigitsDataModule(batch_size=0)


# ------------------------------------------------------------------ a user's file


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
        ({"y": np.arange(60) / 2}, r"Array `y` of .*\.npz must hold integer labels, but its dtype is float64.*astype"),
        ({"y": np.arange(60) - 1}, r"Array `y` of .* must hold labels from 0 on, but it holds -1"),
        ({"y": np.arange(59) % 2}, r"Array `y` of .* must have shape \[60\].*but its shape is \[59\]"),
        ({"y": (np.arange(60) % 2)[:, None]}, r"but its shape is \[60, 1\]"),
        ({"y": np.array(["a"] * 60)}, "Array `y` .* integer labels, but its dtype is <U1"),
        ({"x": np.zeros(60)}, r"Array `x` .* numbers \[N, ...\], but it is float64 of shape \[60\]"),
        ({"x": np.zeros((60, 0))}, r"Array `x` .* of shape \[60, 0\]"),
        ({"x": np.full((60, 2), "a")}, "Array `x` .* but it is <U1"),
        ({"x": np.where(np.eye(60) > 0, np.nan, 0)[:, :7]}, "Array `x` .* 7 of 60 rows hold NaN .* the first at row 0"),
        ({"x": np.full((60, 2), 1e300)}, "finite in float32, but 60 of 60 rows"),
        ({"y": np.minimum(np.arange(60), 2)}, "class 0 has 1"),
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
