import sys

import pytest
import torch

from lightning_uq.data import DigitsDataModule, stratified_split
from lightning_uq.errors import InputError, MissingExtraError

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


# ------------------------------------------------------------------ what a comparison reads


def test_digits_say_what_networks_and_tasks_need():
    data = DigitsDataModule()
    assert (data.name, data.task, data.num_outputs, data.notes) == ("digits", "classification", 8, ())
    assert data.task_arguments == {"num_classes": 8}
    assert data.class_names == tuple("01234567")
    assert data.input_shape == (64,)
    assert DigitsDataModule(flatten=False).input_shape == (1, 8, 8)


def test_test_rows_are_positions_in_the_whole_data():
    data, other = DigitsDataModule(), DigitsDataModule(seed=1)
    everything = data.load_arrays()[0].flatten(1)
    assert data.test_rows.dtype == torch.int64
    assert torch.equal(everything[data.test_rows], data.dataset("test").tensors[0])
    assert not torch.equal(data.test_rows, other.test_rows)


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
