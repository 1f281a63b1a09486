import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import true_class as module
from lightning_uq.functional.true_class import at_class, true_class_log_probs

LOGITS = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(1))


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 5), st.lists(st.integers(1, 2), max_size=2), st.booleans())
def test_it_is_indexing_at_the_class(members, rows, classes, positions, own_targets):
    values = torch.randn(members, rows, classes, *positions)
    target = torch.randint(classes, (members, rows, *positions) if own_targets else (rows, *positions))
    hot = torch.nn.functional.one_hot(target, classes).movedim(-1, -1 - len(positions)).bool()
    expected = values[hot.expand_as(values)] if not positions else (values * hot).sum(2).flatten()
    torch.testing.assert_close(at_class(values, target, 2).flatten(), expected)
    torch.testing.assert_close(at_class(values, target, -1 - len(positions)).flatten(), expected)


def test_log_probs_in_chunks_and_along_any_class_axis(monkeypatch):
    whole = true_class_log_probs(LOGITS, LABELS)
    expected = LOGITS.double().log_softmax(-1).gather(-1, LABELS.expand(6, -1, -1)[..., None])[..., 0]
    torch.testing.assert_close(whole, expected)
    assert torch.equal(true_class_log_probs(LOGITS.movedim(-1, 2), LABELS, 2), whole)
    converted = []
    monkeypatch.setattr(module, "_CHUNK", 120)  # two members at a time
    monkeypatch.setattr(module, "widen", lambda x: converted.append(len(x)) or x.double())
    assert torch.equal(true_class_log_probs(LOGITS, LABELS), whole)
    assert converted == [2, 2, 2]


def test_log_probs_of_wrong_values_are_an_error():
    with pytest.raises(InputError, match=r"`target` must hold class indices in \[0, 3\)"):
        true_class_log_probs(LOGITS, LABELS + 1)
    with pytest.raises(InputError, match=r"`target` must have shape \[5, 4\]"):
        true_class_log_probs(LOGITS, LABELS[:1])
    with pytest.raises(InputError, match="`logits` must hold numbers, but it holds NaN"):
        true_class_log_probs(LOGITS * torch.nan, LABELS)
    with pytest.raises(InputError, match=r"`logits` must be \[Z, ..., C\] with Z > 0"):
        true_class_log_probs(LOGITS[:0], LABELS)
