"""Labels of the next token."""

import pytest
import torch

from lightning_uq.data import next_token_batch
from lightning_uq.errors import InputError

TOKENS = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [0, 0, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])


def test_the_target_of_a_token_is_the_next_label():
    labels = TOKENS.masked_fill(MASK == 0, -100)
    batch = {"input_ids": TOKENS, "attention_mask": MASK, "labels": labels}
    x, target = next_token_batch(batch)
    assert list(x) == ["input_ids", "attention_mask"]
    assert target.tolist() == [[6, 7, 8, -100], [6, -100, -100, -100], [-100, -100, 6, -100]]
    assert torch.equal(batch["labels"], TOKENS.masked_fill(MASK == 0, -100))
    _, target = next_token_batch({"input_ids": TOKENS, "labels": labels}, ignore_index=-1)
    assert target[:, -1].tolist() == [-1, -1, -1]
    assert target[2].tolist() == [-100, 5, 6, -1]  # without a mask, nothing else is known
    assert next_token_batch({"input_ids": TOKENS})[1] is None


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((TOKENS, TOKENS), "must be a mapping with `input_ids` and `labels`, but it is a tuple"),
        ({"input_ids": TOKENS, "labels": TOKENS[:, 0]}, r"one label per token \[B, T\].*but they are \[3\]"),
        ({"attention_mask": MASK[:, 1:], "labels": TOKENS}, r"are \[3, 4\] and `attention_mask` \[3, 3\]"),
    ],
)
def test_other_batches_are_refused(batch, match):
    with pytest.raises(InputError, match=match):
        next_token_batch(batch)
