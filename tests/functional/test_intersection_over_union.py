"""The overlap of regions against its definition and other packages."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import class_overlaps, intersection_over_union

labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40)


@given(pairs=labels)
def test_it_is_the_size_of_sets(pairs):
    label, target = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    intersection, union = class_overlaps(label, target, 5)
    for c in range(5):
        predicted, true = ({i for i, pair in enumerate(pairs) if pair[k] == c} for k in range(2))
        assert intersection[c] == len(predicted & true)
        assert union[c] == len(predicted | true)
    iou = intersection_over_union(intersection, union)
    assert torch.equal(iou.isnan(), union == 0)
    assert bool(((iou >= 0) & (iou <= 1) | iou.isnan()).all())


@given(pairs=labels.filter(bool), seed=st.integers(0, 9))
def test_order_and_batches_are_irrelevant_and_the_two_sides_are_alike(pairs, seed):
    label, target = torch.tensor(pairs).unbind(1)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    whole = torch.stack(class_overlaps(label, target, 5))
    assert torch.equal(torch.stack(class_overlaps(label[order], target[order], 5)), whole)
    assert torch.equal(torch.stack(class_overlaps(target, label, 5)), whole)
    cut = len(pairs) // 2
    parts = [torch.stack(class_overlaps(label[s], target[s], 5)) for s in (slice(cut), slice(cut, None))]
    assert torch.equal(parts[0] + parts[1], whole)


def test_it_is_scikit_learn_s_and_torchmetrics():
    sklearn = pytest.importorskip("sklearn.metrics")
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    label, target = (torch.randint(4, (6, 9, 7), generator=generator) for _ in range(2))
    iou = intersection_over_union(*class_overlaps(label, target, 5))
    expected = sklearn.jaccard_score(target.flatten(), label.flatten(), average=None)
    np.testing.assert_allclose(iou[:4], expected)
    theirs = MulticlassJaccardIndex(5)  # class 4 does not occur
    assert float(iou.nanmean()) == pytest.approx(float(theirs(label, target)), rel=1e-6)


def test_what_is_no_class_index_is_named():
    y = torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"`target` must hold class indices in \[0, 2\), but it holds 2"):
        class_overlaps(y, y + 1, 2)
    with pytest.raises(InputError, match=r"`label` must hold class indices in \[0, 2\), but it holds -1"):
        class_overlaps(y - 1, y, 2)
    with pytest.raises(InputError, match="`label` must hold class indices of an integer dtype"):
        class_overlaps(y.float(), y, 2)
    with pytest.raises(InputError, match=r"`target` must have shape \[2\]"):
        class_overlaps(y, y[:1], 2)
    assert math.isnan(intersection_over_union(*class_overlaps(y[:0], y[:0], 2)).nanmean())
