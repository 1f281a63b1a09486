from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_uq.batches import num_rows, own_batch, sample_index, unpack_batch, unpadded_rows
from lightning_uq.data import Indexed
from lightning_uq.errors import InputError

X, Y = torch.zeros(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], (X, Y, Y), {"input": X, "target": Y}])
def test_input_and_target(batch):
    x, y = unpack_batch(batch)
    assert x is X
    assert y is Y


@pytest.mark.parametrize("batch", [X, (X,), {"input": X}])
def test_input_alone(batch):
    x, y = unpack_batch(batch)
    assert x is X
    assert y is None


def test_what_cannot_be_read_says_what_to_do():
    with pytest.raises(InputError, match=r"its keys are \['image', 'text'\].*unpack_batch"):
        unpack_batch({"image": X, "text": X})
    with pytest.raises(InputError, match="empty sequence"):
        unpack_batch([])
    assert num_rows("text") is None


def test_index_is_found_where_it_is_and_not_guessed():
    assert sample_index((X, Y)) is None
    assert sample_index((X, Y, Y)) is None  # a group, perhaps
    (batch,) = DataLoader(Indexed(TensorDataset(X, Y)), batch_size=3)
    assert torch.equal(sample_index(batch), torch.arange(3))
    assert unpack_batch(batch)[0] is batch.input
    assert sample_index({"input": X, "index": Y}) is Y


def test_size_of_nested_input():
    assert num_rows({"ids": X, "mask": X}) == 3


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 16, 17])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_row_counts_exactly_once(n, world, drop_last):
    data = TensorDataset(torch.arange(n))
    seen: list[int] = []
    for rank in range(world):
        loader = DataLoader(
            data, batch_size=3, drop_last=drop_last, sampler=DistributedSampler(data, world, rank, shuffle=False)
        )
        for i, (x,) in enumerate(loader):
            keep = unpadded_rows(loader, i, len(x))
            seen += (x if keep is None else x[keep]).tolist()
    assert len(seen) == len(set(seen))
    if not drop_last:
        assert sorted(seen) == list(range(n))


def test_an_ordinary_loader_has_no_padding():
    assert unpadded_rows(DataLoader(TensorDataset(X), batch_size=2), 0, 2) is None


class MolGraph:
    """As chemprop's: `to` moves in place and returns nothing."""

    def __init__(self):
        self.V = torch.zeros(9, 4)

    def to(self, device):
        self.V = self.V.to(device)


class TrainingBatch(NamedTuple):
    bmg: Any
    V_d: Any
    X_d: Any
    Y: Any


def test_a_named_tuple_says_where_its_target_is():
    graph = MolGraph()
    x, y = unpack_batch(TrainingBatch(graph, X, None, Y))
    assert x is graph
    assert y is Y
    moved = move_data_to_device(TrainingBatch(graph, X, None, Y), "cpu")
    assert moved.bmg is graph
    assert num_rows(x, y) == 3
    own = own_batch(TrainingBatch(graph, X, None, Y))
    assert own.bmg.V is not graph.V


def test_an_object_with_a_target_is_its_own_input():
    graph = MolGraph()
    assert unpack_batch(graph) == (graph, None)
    graph.y = Y
    assert unpack_batch(graph)[1] is Y
    graph.labels = Y  # two of them: which one?
    assert unpack_batch(graph)[1] is None


def test_rows_that_are_not_the_samplers_are_no_padding():
    data = TensorDataset(X)
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, 0, shuffle=False))
    with pytest.raises(InputError, match="A batch of 2 samples gave 6 rows.*use_distributed_sampler=False"):
        unpadded_rows(loader, 0, 6)
