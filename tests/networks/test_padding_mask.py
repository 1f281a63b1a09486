"""The padding mask that a network is called with, however it is passed."""

import copy
from collections import UserDict

import pytest
import torch
from torch import nn

from lightning_uq.networks.padding_mask import PaddingMask

IDS = torch.tensor([[4, 5, 0], [6, 0, 0]])
MASK = (IDS != 0).long()
EXPECTED = MASK.bool()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(9, 2))

    def forward(self, ids, kind=None, attention_mask=None):
        return self.inner(ids)


class Outer(nn.Module):
    """Calls the encoder as ``call(encoder, x)`` says."""

    def __init__(self, call) -> None:
        super().__init__()
        self.encoder, self.call = Encoder(), call

    def forward(self, x, **kwargs):
        return self.call(self.encoder, x, **kwargs)


def mask_of(network, *args, **kwargs):
    mask = PaddingMask()
    handles = mask.watch(network)
    mask.start()
    network(*args, **kwargs)
    found = mask.tokens
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "read",
    [
        lambda: mask_of(Encoder(), IDS, attention_mask=MASK),
        lambda: mask_of(Encoder(), IDS, None, MASK.float()),
        lambda: mask_of(Outer(lambda e, x, attention_mask: e(x)), IDS, attention_mask=MASK),
        lambda: mask_of(Outer(lambda e, x: e(x["input_ids"])), {"input_ids": IDS, "attention_mask": MASK}),
        lambda: mask_of(Outer(lambda e, x: e(x["ids"])), UserDict(ids=IDS, attention_mask=MASK)),
        lambda: mask_of(Outer(lambda e, x: e(x[0], attention_mask=x[1])), (IDS, MASK)),
        lambda: mask_of(Outer(lambda e, x: e(x[0], None, x[1])), (IDS, MASK)),
    ],
    ids=[
        "by name",
        "by position",
        "of the whole",
        "in a mapping",
        "in a user's mapping",
        "inside",
        "inside, by position",
    ],
)
def test_an_attention_mask_is_found(read):
    assert torch.equal(read(), EXPECTED)


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min])
def test_an_attention_mask_that_is_added_is_negative_at_padding(low):
    added = torch.zeros(2, 3).masked_fill(~EXPECTED, low)
    assert torch.equal(mask_of(Encoder(), IDS, attention_mask=added), EXPECTED)
    assert mask_of(Encoder(), IDS, attention_mask=torch.zeros(2, 3)).all()


def test_a_transformers_own_mask_is_true_at_padding():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    x, network = torch.randn(2, 3, 4), nn.TransformerEncoder(layer, 1)
    assert torch.equal(mask_of(network, x, src_key_padding_mask=~EXPECTED), EXPECTED)
    additive = torch.zeros(2, 3).masked_fill(~EXPECTED, -torch.inf)
    assert torch.equal(mask_of(network, x, src_key_padding_mask=additive), EXPECTED)


def test_without_one_there_is_none():
    assert mask_of(Encoder(), IDS) is None
    assert mask_of(Encoder(), IDS, attention_mask=torch.ones(2, 1, 3, 3)) is None
    assert mask_of(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(2, 3, 4)) is None


def test_the_outer_call_counts_and_of_several_the_latest():
    def other_inside(encoder, x, attention_mask):
        return encoder(x, attention_mask=torch.tril(torch.ones(3, 3)))

    assert torch.equal(mask_of(Outer(other_inside), IDS, attention_mask=MASK), EXPECTED)

    def twice(encoder, x):
        return encoder(x, attention_mask=torch.ones_like(MASK)) + encoder(x, attention_mask=MASK)

    assert torch.equal(mask_of(Outer(twice), IDS), EXPECTED)


def test_nothing_is_read_or_held_unless_it_was_started():
    network, mask = Encoder(), PaddingMask()
    mask.watch(network)
    network(IDS, attention_mask=MASK)
    assert mask.tokens is None
    copied, mask = copy.deepcopy((network, mask))
    mask.start()
    copied(IDS, attention_mask=MASK)
    assert torch.equal(mask.tokens, EXPECTED)
    mask.stop()
    copied(IDS, attention_mask=MASK)
    assert mask.tokens is None
    mask.start()
    with pytest.raises(IndexError):
        copied(IDS + 99, attention_mask=MASK)
    mask.start()  # after a call that failed, the next is as any other
    copied(IDS, attention_mask=MASK)
    assert torch.equal(mask.tokens, EXPECTED)
