"""A sample of rows is a matter of which rows there are, and not of batches or ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.running.row_sample import RowSample, keys_of, row_keys
from lightning_uq.tasks import Classification, EvidentialClassification, Segmentation


def sampled(parts, max_rows):
    sample = RowSample(max_rows)
    for numbers in parts:
        keys = row_keys(numbers)
        chosen = sample.choose(keys)
        sample.add(keys[chosen], numbers[chosen, None, None].double(), numbers[chosen])
    logits, labels = sample.gather(None, "The test")
    assert torch.equal(logits[:, 0, 0].long(), labels)
    return labels


@given(num=st.integers(1, 60), batch=st.integers(1, 60), max_rows=st.integers(1, 70), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_batches_and_order_do_not_matter(num, batch, max_rows, seed):
    numbers = torch.arange(num)
    whole = sampled([numbers], max_rows)
    assert len(whole) == min(num, max_rows)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sampled(numbers.split(batch), max_rows), whole)
    assert torch.equal(sampled(order.split(batch), max_rows).sort().values, whole)


def test_rows_that_fit_are_all_kept_as_they_came():
    numbers = torch.arange(50).flip(0)
    assert torch.equal(sampled(numbers.split(7), 50), numbers)
    assert torch.equal(sampled(numbers.split(7), None), numbers)
    assert RowSample(5).gather(None, "The test") == ()


def test_no_more_is_kept_than_twice_the_budget():
    sample = RowSample(100)
    largest = 0
    for numbers in torch.arange(20_000).split(500):
        keys = row_keys(numbers)
        chosen = sample.choose(keys)
        assert len(keys[chosen]) <= 100
        sample.add(keys[chosen], numbers[chosen, None, None].double(), numbers[chosen])
        largest = max(largest, sum(len(part.keys) for part in sample._parts))
    assert largest <= 200


def test_a_long_stream_does_not_add_a_part_per_batch():
    sample = RowSample(100)
    for numbers in torch.arange(20_000).split(10):
        keys = row_keys(numbers)
        chosen = sample.choose(keys)
        sample.add(keys[chosen], numbers[chosen])
    assert len(sample._parts) < 10


def test_rows_that_do_not_count_tell_the_shapes():
    sample = RowSample(100)
    sample.add(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))
    assert [part.shape for part in sample.gather(None, "The test")] == [(0, 3)]


def test_the_sample_is_as_likely_to_hold_any_pixel():
    """Chi-squared of 20 bins of samples and of 20 bins of pixels: 19 degrees of freedom, whose 99.99 % point is 50."""
    target = torch.zeros(200, 20, 20, dtype=torch.long)
    keys = keys_of(Segmentation(), target, torch.arange(200))
    assert len(keys.unique()) == len(keys)
    kept = keys.argsort()[:4000]
    for bins in (kept // 400 // 10, kept % 400 // 20):
        counts = torch.bincount(bins, minlength=20).double()
        assert ((counts - 200) ** 2 / 200).sum() < 50


def test_a_row_has_its_key_in_any_batch():
    target = torch.randint(3, (6, 4, 5), generator=torch.Generator().manual_seed(0))
    target[0, :2], target[3] = 255, 255
    for task in (Segmentation(ignore_index=255), EvidentialClassification(ignore_index=255)):
        numbers = torch.tensor([4, 9, 2, 7, 0, 1])
        whole = keys_of(task, target, numbers)
        assert len(whole) == (target != 255).sum()
        alone = [keys_of(task, target[b : b + 1], numbers[b : b + 1]) for b in range(6)]
        assert torch.equal(torch.cat(alone), whole)
        assert len(keys_of(task, target[:0], numbers[:0])) == 0
    everything = keys_of(Segmentation(), target, numbers)
    assert torch.equal(everything[target.reshape(-1) != 255], whole)
    assert torch.equal(keys_of(Classification(), target[:, 0, 0], numbers), row_keys(numbers))


@pytest.mark.parametrize("max_rows", [0, -1, 2.5, "many"])
def test_a_wrong_budget(max_rows):
    with pytest.raises(InputError, match="`max_rows` must be an integer of at least 1, but it is"):
        RowSample(max_rows)
