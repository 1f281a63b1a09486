"""JointLogLoss: what is carried from batch to batch, and what an index makes irrelevant."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import joint_log_loss
from lightning_uq.metrics import AURC, JointLogLoss
from lightning_uq.predictions import CategoricalPrediction, DirichletPrediction

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(4, 25, 3, generator=GENERATOR)
TARGET = torch.randint(3, (25,), generator=GENERATOR)


def joint_of(parts, index=None, **options):
    metric = JointLogLoss(**options)
    for rows in parts:
        metric.update(LOGITS[:, rows], TARGET[rows], None if index is None else index[rows])
    return metric.compute().item()


SETTINGS = [{}, {"tau": 3}, {"sampling": "consecutive", "tau": 4}, {"sampling": "sampled", "kappa": 3, "tau": 5}]


@pytest.mark.parametrize("options", SETTINGS)
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 9), min_size=3, max_size=8))
def test_any_cut_into_batches_is_the_same(options, sizes):
    rows = torch.arange(25)
    cuts = torch.tensor(sizes).cumsum(0).clamp(max=25).tolist()
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, 25], strict=True)]
    assert joint_of(parts, **options) == pytest.approx(joint_of([rows], **options), abs=1e-12)


@pytest.mark.parametrize("options", SETTINGS[:3])
def test_equals_the_functional(options):
    assert joint_of([torch.arange(25)], **options) == pytest.approx(joint_log_loss(LOGITS, TARGET, **options).item())


def joint_metric(rows, index=None, **options):
    metric = JointLogLoss(**options)
    metric.update(LOGITS[:, rows], TARGET[rows], None if index is None else index[rows])
    return metric


def test_merging_makes_blocks_of_the_rows_left_over():
    first, second = joint_metric(torch.arange(5)), joint_metric(torch.arange(5, 12))
    first.merge_state(second)
    order = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 4, 11])
    assert first.compute().item() == pytest.approx(joint_of([order]))
    first.update(LOGITS[:, 12:14], TARGET[12:14])  # and goes on
    assert first.compute().item() == pytest.approx(joint_of([torch.cat([order, torch.arange(12, 14)])]))


def test_merging_with_an_index_makes_the_parts_irrelevant():
    index = torch.arange(25).flip(0)
    first, second = (joint_metric(rows, index) for rows in (torch.arange(0, 25, 2), torch.arange(1, 25, 2)))
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(joint_of([torch.arange(25)], index))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: JointLogLoss(tau=3), "but it is one with other settings: JointLogLoss"),
        (lambda: AURC(), "but it is of another class: AURC"),
        (lambda: joint_metric(torch.arange(4), torch.arange(25)), "`index` must be passed to every update or to none"),
    ],
)
def test_what_does_not_merge(other, message):
    with pytest.raises(InputError, match=message):
        joint_metric(torch.arange(4)).merge_state(other())
    fewer = JointLogLoss()
    fewer.update(LOGITS[:2], TARGET)
    with pytest.raises(InputError, match="must have 4 members like this metric, but it has 2"):
        joint_metric(torch.arange(4)).merge_state(fewer)


def test_one_carried_row_is_used_and_the_last_dropped():
    first = joint_of([torch.arange(3), torch.arange(3, 4)])
    assert first == pytest.approx(joint_log_loss(LOGITS[:, :4], TARGET[:4]).item())
    assert joint_of([torch.arange(5)]) == pytest.approx(first)


@pytest.mark.parametrize("options", SETTINGS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 30))
def test_an_index_makes_order_batch_and_repetition_irrelevant(options, seed, batch):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(25, generator=generator)
    order = torch.cat([order, order[:5]])  # padding repeats samples
    index = torch.arange(25) * 7 + 100
    shuffled = joint_of(order.split(batch), index, **options)
    assert shuffled == pytest.approx(joint_of([torch.arange(25)], **options), abs=1e-12)


def test_indexed_rows_pair_by_index_not_by_arrival():
    metric = JointLogLoss()
    order = torch.tensor([2, 0, 3, 1])
    metric.update(LOGITS[:, order], TARGET[order], index=order)
    assert metric.compute().item() == pytest.approx(joint_log_loss(LOGITS[:, :4], TARGET[:4]).item())
    naive = joint_of([order])
    assert naive != pytest.approx(metric.compute().item(), abs=1e-3)


def test_prediction_objects():
    metric = JointLogLoss()
    metric.update(CategoricalPrediction(LOGITS), TARGET)
    assert metric.compute().item() == pytest.approx(joint_log_loss(LOGITS, TARGET).item())
    with pytest.raises(InputError, match="A DirichletPrediction has no member `logits`"):
        metric.update(DirichletPrediction(torch.ones(1, 25, 3)), TARGET)
    with pytest.raises(InputError, match=r"return_members = True"):
        metric.update(CategoricalPrediction(LOGITS).pool(), TARGET)
    with pytest.raises(InputError, match=r"`logits` must be a floating-point tensor \[Z, B, C\]"):
        metric.update(SimpleNamespace(logits=LOGITS[0]), TARGET)


def test_a_calibration_of_one_network_counts_and_one_of_a_mean_does_not():
    T = torch.tensor(3.0, dtype=LOGITS.dtype)
    metric = JointLogLoss()
    metric.update(CategoricalPrediction(LOGITS[:1], temperature=T), TARGET)
    assert metric.compute().item() == pytest.approx(joint_log_loss(LOGITS[:1] / T, TARGET).item())
    members = JointLogLoss()  # the `scope="pooled"` of TemperatureScaling leaves the hypotheses as they are
    members.update(CategoricalPrediction(LOGITS, temperature=T), TARGET)
    assert members.compute().item() == pytest.approx(joint_log_loss(LOGITS, TARGET).item())


def test_seed_of_the_draws():
    options = {"sampling": "sampled", "tau": 5}
    rows = [torch.arange(25)]
    assert joint_of(rows, **options) == joint_of(rows, **options)
    assert joint_of(rows, **options) != joint_of(rows, seed=1, **options)


def test_falls_with_the_number_of_members():
    """The documented caution: more members of one and the same posterior, a lower value."""
    generator = torch.Generator().manual_seed(3)
    target = torch.zeros(400, dtype=torch.long)
    logits = 2 * torch.randn(64, 400, 3, generator=generator)
    values = [joint_log_loss(logits[:z], target).item() for z in (1, 4, 16, 64)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 5


def test_an_incomplete_block_is_nan_with_a_warning():
    metric = JointLogLoss(sampling="consecutive", tau=10)
    metric.update(LOGITS[:, :9], TARGET[:9])
    with pytest.warns(UserWarning, match="JointLogLoss has not seen 10 rows with a joint prediction"):
        assert metric.compute().isnan()
    indexed = JointLogLoss()
    indexed.update(LOGITS[:, :1], TARGET[:1], torch.tensor([0]))
    indexed.update(LOGITS[:, :1], TARGET[:1], torch.tensor([0]))  # the same sample is no pair
    with pytest.warns(UserWarning, match="JointLogLoss has not seen 2 rows"):
        assert indexed.compute().isnan()


def test_carried_rows_are_small():
    metric = JointLogLoss()
    for _ in range(10):
        metric.update(LOGITS, TARGET)
    assert sum(part.numel() for part in metric.carried) == 0  # 250 rows: pairs
    metric.update(LOGITS[:, :1], TARGET[:1])
    assert sum(part.numel() for part in metric.carried) == 4
    assert metric.count == 125


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 3}, "Use sampling='sampled' for kappa anchors"),
        ({"tau": 0}, "`tau` must be an integer of at least 1, but it is 0"),
        ({"sampling": "sampled", "kappa": 0}, "`kappa` must be an integer of at least 1, but it is 0"),
        ({"sampling": "all"}, "`sampling` must be one of"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, but it is -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        JointLogLoss(**options)


def test_bad_batches():
    metric = JointLogLoss()
    metric.update(LOGITS, TARGET)
    with pytest.raises(InputError, match="`prediction` must have 4 members as before, but it has 3"):
        metric.update(LOGITS[:3], TARGET)
    with pytest.raises(
        InputError, match="`index` must be passed to every update or to none, but earlier updates had none"
    ):
        metric.update(LOGITS, TARGET, torch.arange(25))
    indexed = JointLogLoss()
    indexed.update(LOGITS, TARGET, torch.arange(25))
    with pytest.raises(
        InputError, match="`index` must be passed to every update or to none, but earlier updates had it"
    ):
        indexed.update(LOGITS, TARGET)
    with pytest.raises(
        InputError, match=r"`index` must be integers of shape \[25\], but it is torch.float32 of shape \[25\]"
    ):
        indexed.update(LOGITS, TARGET, torch.arange(25.0))
    with pytest.raises(InputError, match=r"`index` must be integers of shape \[25\], but it is a list"):
        indexed.update(LOGITS, TARGET, list(range(25)))
    with pytest.raises(InputError, match=r"class indices in \[0, 3\), but it holds 3"):
        metric.update(LOGITS, TARGET + 1)
