import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_uq import batches
from lightning_uq.data.indexed import Indexed
from lightning_uq.errors import InputError


def test_pairs_carry_their_position_through_subsets_and_shuffling():
    x = torch.arange(10.0)
    dataset = Subset(Indexed(TensorDataset(x, x.long())), [7, 3, 5])
    seen = {}
    for batch in DataLoader(dataset, batch_size=2, shuffle=True):
        index = batches.sample_index(batch)
        assert index is not None
        assert index.dtype == torch.int64
        seen.update(zip(index.tolist(), batch[0].tolist(), strict=True))
    assert seen == {7: 7.0, 3: 3.0, 5: 5.0}


def test_mappings_gain_a_key():
    dataset = Indexed([{"input": torch.zeros(2), "target": 1}] * 3)
    assert len(dataset) == 3
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert batches.sample_index(batch).tolist() == [0, 1, 2]
    assert set(dataset.dataset[0]) == {"input", "target"}


def test_a_negative_position_is_the_sample_it_stands_for():
    assert Indexed([("a", 0), ("b", 1)])[-1] == ("b", 1, 1)


def test_the_end_of_the_data_set_is_an_index_error():
    assert list(Indexed([("a", 0), ("b", 1)])) == [("a", 0, 0), ("b", 1, 1)]


@pytest.mark.parametrize(
    ("item", "description"),
    [
        ((1, 2, 3), "a tuple of length 3"),
        (torch.zeros(2), "a Tensor"),
        ({"input": 1, "index": 4}, "a mapping with `index`"),
    ],
)
def test_other_items_are_an_error(item, description):
    with pytest.raises(InputError, match=rf"The items of `dataset` must be .* but item 0 is {description}\."):
        Indexed([item])[0]


def test_a_stream_is_an_error():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(InputError, match=r"`dataset` must be map-style.*but it is a Stream"):
        Indexed(Stream())
