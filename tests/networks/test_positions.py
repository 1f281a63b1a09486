"""Features at the positions of maps, and maps on other grids."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks.pooling import pool_features
from lightning_uq.networks.positions import position_rows, resized, score_positions


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 20), sizes=st.data())
def test_the_nearest_position_is_torch_s(shape, seed, sizes):
    values = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed))
    other = [sizes.draw(st.integers(1, 9)) for _ in shape]
    assert torch.equal(resized(values, other), F.interpolate(values, other, mode="nearest-exact"))
    assert resized(values, shape) is values


def test_rows_and_scores_are_those_of_each_position():
    features = torch.randn(2, 3, 5, 4, 6)  # members, batch, features, height, width
    scores = score_positions(lambda rows: rows.square().sum((0, 2)), features)
    assert torch.allclose(scores, features.square().sum((0, 2)))
    rows = position_rows(features[0])
    assert torch.equal(rows[4 * 6 + 7], features[0, 1, :, 1, 1])


def test_features_keep_their_positions():
    x = torch.randn(2, 5, 4, 6)
    assert torch.equal(pool_features(x, nn.Conv2d(5, 3, 1), "positions"), x)
    assert torch.equal(pool_features(x, nn.Linear(6, 3), "positions"), x.movedim(-1, 1))
    with pytest.raises(InputError, match=r"`pool='positions'` needs features at each position .* is \[2, 6\]"):
        pool_features(x[:, 0, 0], nn.Linear(6, 3), "positions")
