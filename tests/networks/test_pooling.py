"""Features [B, D] from what a layer sees: which axis holds them, and how the others are pooled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks.pooling import check_pool, num_features, pool_features, pool_setting

B, T, D = 3, 5, 4
TOKENS = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
HEAD = nn.Linear(D, 2)


def block(*layers):
    return nn.Sequential(nn.Identity(), nn.Dropout(0.1), *layers)


@pytest.mark.parametrize("shape", [(B, D), (B, T, D), (B, 6, T, D)])
@pytest.mark.parametrize("layer", [HEAD, nn.LSTM(D, 2), nn.MultiheadAttention(D, 1), block(HEAD)])
def test_the_last_axis_of_a_linear_layers_input_is_its_features(shape, layer):
    x = torch.randn(shape)
    features = pool_features(x, layer, "mean")
    torch.testing.assert_close(features, x if x.ndim == 2 else x.mean(tuple(range(1, x.ndim - 1))))
    if x.ndim > 2:
        with pytest.raises(InputError, match=r"the others must be pooled\. Pass .*'mean'"):
            pool_features(x, layer)
    else:
        assert torch.equal(pool_features(x, layer), x)


def test_a_transposed_input_is_read_by_its_axes_and_not_by_its_memory():
    x = torch.randn(B, D, T).transpose(1, 2)
    torch.testing.assert_close(pool_features(x, HEAD, "mean"), x.mean(1))
    assert torch.equal(pool_features(x, HEAD, "last_token"), x[:, -1])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(D, 2, 1), (B, D, T)),
        (nn.Conv2d(D, 2, 1), (B, D, 6, T)),
        (nn.ConvTranspose2d(D, 2, 1), (B, D, 6, T)),
        (nn.BatchNorm2d(D), (B, D, 6, T)),
        (nn.GroupNorm(2, D), (B, D, 6, T)),
        (nn.AdaptiveAvgPool2d(1), (B, D, 6, T)),
        (nn.MaxPool2d(2), (B, D, 6, T)),
        (block(nn.Conv3d(D, 2, 1), HEAD), (B, D, 6, T, 2)),
    ],
)
def test_a_convolutions_maps_are_averaged(layer, shape):
    x = torch.randn(shape)
    for pool in (None, "mean"):
        torch.testing.assert_close(pool_features(x, layer, pool), x.flatten(2).mean(2))


def test_a_convolution_over_tokens_has_a_last_one():
    x, layer = TOKENS.transpose(1, 2), nn.Conv1d(D, 2, 1)
    for pool in ("mean", "last_token", "cls"):
        torch.testing.assert_close(pool_features(x, layer, pool, MASK), pool_features(TOKENS, HEAD, pool, MASK))


def test_what_the_names_mean():
    assert torch.equal(pool_features(TOKENS, HEAD, "cls"), TOKENS[:, 0])
    assert torch.equal(pool_features(TOKENS, HEAD, "last_token"), TOKENS[:, -1])
    last = pool_features(TOKENS, HEAD, "last_token", MASK)
    assert torch.equal(last, torch.stack([TOKENS[0, 4], TOKENS[1, 1], TOKENS[2, 4]]))
    mean = pool_features(TOKENS, HEAD, "mean", MASK)
    torch.testing.assert_close(mean, torch.stack([TOKENS[0].mean(0), TOKENS[1, :2].mean(0), TOKENS[2, 3:].mean(0)]))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    junk=st.sampled_from([0.0, 1e30, math.inf, math.nan]),
    pool=st.sampled_from(["mean", "last_token"]),
)
def test_padding_does_not_count(lengths, side, junk, pool):
    length = max(lengths) + 2
    x, mask = torch.full((len(lengths), length, D), junk), torch.zeros(len(lengths), length, dtype=torch.bool)
    rows = [torch.randn(n, D) for n in lengths]
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        x[i, place], mask[i, place] = row, True
    alone = torch.cat([pool_features(row[None], HEAD, pool) for row in rows])
    torch.testing.assert_close(pool_features(x, HEAD, pool, mask), alone)


def test_a_row_of_padding_alone_has_no_features():
    mask = MASK.clone()
    mask[1] = False
    for pool in ("mean", "last_token"):
        features = pool_features(TOKENS, HEAD, pool, mask)
        assert features[1].isnan().all()
        assert features[[0, 2]].isfinite().all()


def test_half_precision_is_upcast_before_the_mean():
    x = torch.tensor([[[256.0], [1.0], [1.0], [1.0]]])
    assert pool_features(x.bfloat16(), nn.Linear(1, 1), "mean") == x.mean()
    assert pool_features(TOKENS.double(), HEAD, "mean").dtype == torch.float64


def test_a_function_gets_the_input_as_it_is():
    seen = []

    def pool(x, mask):
        seen.append((x, mask))
        return x.flatten(1)

    assert pool_features(TOKENS, nn.ReLU(), pool, MASK).shape == (B, T * D)
    assert seen[0][0] is TOKENS
    assert seen[0][1] is MASK
    with pytest.raises(
        InputError, match=r"`pool` must return features \[B, D\] for an input \[3, 5, 4\], but it returned"
    ):
        pool_features(TOKENS, HEAD, lambda x, mask: x)


@pytest.mark.parametrize(
    ("x", "layer", "pool", "mask", "match"),
    [
        (TOKENS, nn.ReLU(), "mean", None, r"Layer 'h' does not determine which axis of its input \[3, 5, 4\] holds"),
        (torch.randn(B, D, 6, 6), nn.Flatten(), None, None, "does not determine which axis"),
        (
            TOKENS,
            nn.Conv1d(D, 2, 1),
            None,
            None,
            "does not determine which axis",
        ),  # [B, T, D], which its block transposes
        (
            TOKENS,
            HEAD,
            None,
            None,
            r"input of layer 'h' is \[3, 5, 4\]. Its last axis .* 'mean', 'last_token', 'cls' or a fu",
        ),
        (torch.randn(B, 6, T, D), HEAD, None, None, "Pass 'mean' or a function"),
        (
            torch.randn(B, 6, T, D),
            HEAD,
            "cls",
            None,
            r"`pool='cls'` needs tokens \[B, T, D\], but the input of layer 'h' is",
        ),
        (TOKENS, HEAD, "mean", MASK[:, 1:], r"a padding mask for the tokens .* but the mask is \[3, 4\]"),
        (TOKENS.transpose(0, 1), HEAD, "last_token", MASK, r"input \[5, 3, 4\] of layer 'h', but the mask is \[3, 5\]"),
        (
            TOKENS.long(),
            nn.Embedding(9, 2),
            "mean",
            None,
            r"must be a floating-point tensor .* is torch.int64 of shape",
        ),
        ((TOKENS,), HEAD, "mean", None, "but it is a tuple"),
        (torch.randn(3), HEAD, None, None, r"shape \[3\]"),
        (
            torch.nested.nested_tensor([TOKENS[0], TOKENS[1, :2]], layout=torch.jagged),
            HEAD,
            "mean",
            None,
            "a nested tensor",
        ),
    ],
)
def test_what_cannot_be_pooled_is_named(x, layer, pool, mask, match):
    with pytest.raises(InputError, match=match):
        pool_features(x, layer, pool, mask, name="h")


def test_settings_and_sizes():
    assert [pool_setting(pool) for pool in (None, "cls", torch.add)] == [None, "cls", "function add"]
    assert pool_setting(nn.Bilinear(1, 1, 1)) == "function Bilinear"
    with pytest.raises(
        InputError, match="`pool` must be 'mean', 'last_token', 'cls', 'positions' or a function, but it is 'max'"
    ):
        check_pool("max")
    assert [num_features(one) for one in (HEAD, nn.Conv1d(6, 2, 1), nn.BatchNorm1d(7), nn.MaxPool1d(2))] == [
        4,
        6,
        7,
        None,
    ]
