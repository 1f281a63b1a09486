import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_uq.functional.true_class import at_class


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 5), st.lists(st.integers(1, 2), max_size=2), st.booleans())
def test_it_is_indexing_at_the_class(members, rows, classes, positions, own_targets):
    values = torch.randn(members, rows, classes, *positions)
    target = torch.randint(classes, (members, rows, *positions) if own_targets else (rows, *positions))
    hot = torch.nn.functional.one_hot(target, classes).movedim(-1, -1 - len(positions)).bool()
    expected = values[hot.expand_as(values)] if not positions else (values * hot).sum(2).flatten()
    torch.testing.assert_close(at_class(values, target, 2).flatten(), expected)
    torch.testing.assert_close(at_class(values, target, -1 - len(positions)).flatten(), expected)
