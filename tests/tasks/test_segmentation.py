"""One label per position of a map."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule
from lightning_uq.errors import InputError
from lightning_uq.functional.calibration import expected_calibration_error
from lightning_uq.modules.targets import Targets
from lightning_uq.predictions import CategoricalPrediction
from lightning_uq.tasks import Classification, OutputShapeError, Segmentation

MAPS = [(7,), (3, 4), (2, 3, 2)]
IGNORE = 255


def problem(axes, classes=3, rows=4, seed=0):
    """Logits [B, C, *P] and labels [B, *P], some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(rows, classes, *axes, generator=generator)
    target = torch.randint(classes, (rows, *axes), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORE
    return output, target


def batch_loss(task, output, target):
    sums, counts = task.sample_losses(output, target)
    assert sums.shape == counts.shape == (len(output),)
    return sums.sum() / counts.sum()


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("ignore_index", [None, IGNORE, -100, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 3.0)])
@pytest.mark.parametrize("axes", MAPS)
def test_the_loss_is_torch_s_with_its_gradient(axes, weights, smoothing, ignore_index):
    output, target = problem(axes)
    if ignore_index != IGNORE:
        target[target == IGNORE] = 1 if ignore_index is None else ignore_index
    task = Segmentation(ignore_index=ignore_index, class_weights=weights, label_smoothing=smoothing)
    ours, theirs = (output.clone().requires_grad_() for _ in range(2))
    value = batch_loss(task, ours, target)
    expected = F.cross_entropy(
        theirs,
        target,
        None if weights is None else torch.tensor(weights),
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@given(seed=st.integers(0, 99), rows=st.integers(1, 5), axes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=30)
def test_positions_are_rows(seed, rows, axes):
    """A map's loss is that of its positions as rows of a classifier, in any order."""
    output, target = problem(axes, rows=rows, seed=seed)
    sums, counts = Segmentation(ignore_index=IGNORE).sample_losses(output, target)
    flat, labels = output.movedim(1, -1).reshape(-1, 3), target.reshape(-1)
    kept = labels != IGNORE
    assert counts.sum() == kept.sum()
    if kept.any():
        row_sums, _ = Classification().sample_losses(flat[kept], labels[kept])
        torch.testing.assert_close(sums.sum(), row_sums.sum(), rtol=1e-5, atol=1e-5)
    alone = [Segmentation(ignore_index=IGNORE).sample_losses(output[b : b + 1], target[b : b + 1]) for b in range(rows)]
    torch.testing.assert_close(sums, torch.cat([part[0] for part in alone]))
    torch.testing.assert_close(counts, torch.cat([part[1] for part in alone]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ignored_positions_reach_neither_the_loss_nor_the_gradient(wrong, smoothing):
    output, target = problem((3, 4))
    ignored = (target == IGNORE).unsqueeze(1).expand_as(output)
    task = Segmentation(ignore_index=IGNORE, label_smoothing=smoothing)
    clean, spoilt = output.clone().requires_grad_(), output.masked_fill(ignored, wrong).requires_grad_()
    for logits in (clean, spoilt):
        batch_loss(task, logits, target).backward()
    assert batch_loss(task, spoilt, target) == batch_loss(task, clean, target)
    assert torch.equal(spoilt.grad, clean.grad)
    assert (spoilt.grad[ignored] == 0).all()


def test_where_nothing_counts_the_loss_is_0_and_so_is_its_gradient():
    module = DeterministicModule(nn.Conv2d(2, 3, 1), task=Segmentation(ignore_index=IGNORE))
    x, target = torch.randn(4, 2, 5, 5), torch.full((4, 5, 5), IGNORE)
    loss = module.training_loss(x, target, (x, target))
    assert loss == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in module.parameters())
    batch = {"input": x, "target": torch.zeros_like(target), "weight": torch.zeros(4)}
    assert module.training_loss(x, batch["target"], batch) == 0


def test_maps_of_the_batch_count_by_their_positions():
    module = DeterministicModule(nn.Identity(), task=Segmentation(ignore_index=IGNORE))
    output, target = problem((3, 4))
    target[0] = IGNORE
    target[1, :2] = IGNORE
    torch.testing.assert_close(
        module.index_losses(output[None], target)[0], F.cross_entropy(output, target, ignore_index=IGNORE)
    )
    weights = torch.tensor([5.0, 1.0, 0.0, 2.0])
    each = F.cross_entropy(output, target, ignore_index=IGNORE, reduction="none").flatten(1).sum(1)
    count = (target != IGNORE).flatten(1).sum(1)
    value = module.index_losses(output[None], Targets(target, weights=weights))
    torch.testing.assert_close(value[0], (weights * each).sum() / (weights * count).sum())


def test_half_precision_counts_every_position():
    output, target = torch.zeros(1, 2, 3000).bfloat16(), torch.zeros(1, 3000, dtype=torch.long)
    sums, counts = Segmentation().sample_losses(output, target)
    assert counts.tolist() == [3000]
    assert sums.item() == pytest.approx(3000 * math.log(2), rel=1e-5)
    module = DeterministicModule(nn.Identity(), task="segmentation", loss=lambda a, b: a.sum(1) + 1)
    _, count = module.losses_and_count(output[None], Targets(target))
    assert count == 3000


# ---------------------------------------------------------------------- fields and checks


@pytest.mark.parametrize("ignore_index", [1.5, "255", [255]])
def test_a_bad_ignore_index(ignore_index):
    with pytest.raises(InputError, match="`ignore_index` must be an integer or None, but it is"):
        Segmentation(ignore_index=ignore_index)


def test_its_other_fields_are_a_classifier_s():
    for fields in ({"num_classes": 1}, {"label_smoothing": 2}, {"class_weights": [-1.0, 1.0]}, {"loss": "dice"}):
        with pytest.raises(InputError):
            Segmentation(**fields)


@pytest.mark.parametrize("axes", MAPS)
def test_outputs(axes):
    task = Segmentation(num_classes=3)
    outputs = torch.randn(2, 4, 3, *axes)
    task.check_output(outputs)
    assert task.predict(outputs).label.shape == (4, *axes)
    with pytest.raises(InputError, match='instead of logits.*output="probs"'):
        task.check_output(outputs.softmax(2))
    with pytest.raises(InputError, match="must return 3 logits .* but it returned 4"):
        task.check_output(torch.randn(2, 4, 4, *axes))
    with pytest.raises(OutputShapeError, match=r"a map of logits \[B, C, ...\] .* `task=Classification\(\)`"):
        task.check_output(torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.float(), "must be integer class labels, but they are torch.float32"),
        (lambda y: y[:, None], r"must have shape \[4, 3, 4\], .* but they have \[4, 1, 3, 4\]"),
        (lambda y: y[:, 0, 0], r"must have shape \[4, 3, 4\], .* but they have \[4\]"),
        (lambda y: torch.where(y == 2, 3, y), r"class labels in \[0, 3\), but their values go from 0 to 3"),
        (lambda y: torch.where(y == 2, -100, y), r"class labels in \[0, 3\), but their values go from -100 to 1"),
    ],
)
def test_bad_targets(change, message):
    output, target = problem((3, 4))
    task = Segmentation(ignore_index=IGNORE)
    task.check_target(target, output[None])
    with pytest.raises(InputError, match=message):
        task.check_target(change(target), output[None])


def test_a_label_to_ignore_needs_its_field():
    output, target = problem((3, 4))
    with pytest.raises(InputError, match=r"class labels in \[0, 3\), but their values go from 0 to 255"):
        Segmentation().check_target(target, output[None])
    assert Segmentation(ignore_index=-1).accepts(torch.tensor([[-1, 0]])) is None
    assert Segmentation().accepts(torch.tensor([[-1, 0]])) == "the targets are not class labels"


def test_rows_are_the_positions_that_count():
    output, target = problem((3, 4))
    prediction, labels = Segmentation(ignore_index=IGNORE).rows(CategoricalPrediction(output[None]), target)
    kept = target.reshape(-1) != IGNORE
    assert torch.equal(labels, target.reshape(-1)[kept])
    probs = output.softmax(1).movedim(1, -1).reshape(-1, 3)[kept]
    torch.testing.assert_close(prediction.probs, probs)
    _, everything = Segmentation().rows(CategoricalPrediction(output[None]), target)
    assert len(everything) == target.numel()


# ---------------------------------------------------------------------- classes in the last axis


@pytest.mark.parametrize("axes", MAPS)
def test_classes_last_are_the_same_maps(axes):
    output, target = problem(axes)
    first, last = Segmentation(ignore_index=IGNORE), Segmentation(ignore_index=IGNORE, class_axis=-1)
    moved = output.movedim(1, -1)
    assert all(
        torch.equal(*pair)
        for pair in zip(last.sample_losses(moved, target), first.sample_losses(output, target), strict=True)
    )
    outputs = torch.stack([output, -output])
    assert torch.equal(last.predict(outputs.movedim(2, -1)).logits, outputs)
    last.check_output(outputs.movedim(2, -1))
    last.check_target(target, outputs.movedim(2, -1))
    outputs[1, 2, :, 0] = -math.inf
    assert int(last.invalid(outputs.movedim(2, -1)).any(2).sum()) == int(first.invalid(outputs).any(2).sum()) > 0
    with pytest.raises(InputError, match=r"must return 4 logits .* but it returned 3"):
        Segmentation(num_classes=4, class_axis=-1).check_output(moved[None])


def test_labels_that_fit_classes_last_name_the_field():
    output, target = problem((7,))
    with pytest.raises(InputError, match=r"returns \[4, 7, 3\]. Pass `task=Segmentation\(class_axis=-1\)`"):
        Segmentation().check_target(target.clamp(max=2), output.movedim(1, -1)[None])
    with pytest.raises(InputError, match=r"`class_axis` must be 1 .* or -1 .*, but it is 2"):
        Segmentation(class_axis=2)


# ---------------------------------------------------------------------- under a Trainer


def network():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 3, 1))


MODULES = {
    "deterministic": lambda task: DeterministicModule(network, task=task),
    "ensemble": lambda task: EnsembleModule(network, num_members=2, task=task, seed=0),
    "vmap ensemble": lambda task: EnsembleModule(network, num_members=2, task=task, seed=0, execution="vmap"),
    "dropout": lambda task: DropoutModule(network(), task=task, num_eval_samples=3),
    "pooled dropout": lambda task: DropoutModule(network(), task=task, num_eval_samples=3, return_members=False),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("ignore_index", [None, IGNORE])
def test_maps_are_trained_tested_and_predicted(make_trainer, name, ignore_index):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(11, 2, 6, 6, generator=generator), torch.randint(3, (11, 6, 6), generator=generator)
    if ignore_index is not None:
        y[:, 0] = ignore_index
        y[4:8] = ignore_index  # a batch of which nothing counts
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    module = MODULES[name](Segmentation(ignore_index=ignore_index))
    trainer = make_trainer()
    trainer.fit(module, data, data)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)

    module.eval()
    with torch.no_grad():
        outputs = module(x)
    log_probs = outputs.double().log_softmax(2).logsumexp(0) - math.log(len(outputs))
    rows, labels = log_probs.movedim(1, -1).reshape(-1, 3), y.reshape(-1)
    kept = labels != IGNORE
    rows, labels = rows[kept], labels[kept]
    ignored = -100 if ignore_index is None else ignore_index
    expected = {
        "loss": torch.stack([F.cross_entropy(output, y, ignore_index=ignored) for output in outputs]).mean(),
        "accuracy": (rows.argmax(1) == labels).double().mean(),
        "nll": F.nll_loss(rows, labels),
        "ece": expected_calibration_error(rows.exp(), labels),
        "miou": jaccard(rows.argmax(1), labels),
        "brier": (rows.exp() - F.one_hot(labels, 3)).square().sum(1).mean(),
    }
    assert set(tested) == {f"test_{key}" for key in expected}
    for key, value in expected.items():
        assert tested[f"test_{key}"] == pytest.approx(float(value), rel=1e-5), key
        if key != "brier":
            assert validated[f"val_{key}"] == pytest.approx(float(value), rel=1e-5), key
    prediction = type(module.predict(x)).cat(trainer.predict(module, data))
    torch.testing.assert_close(prediction.log_probs.double(), log_probs, rtol=1e-4, atol=1e-5)


def jaccard(label, target):
    overlaps = [((label == c) & (target == c)).sum() / ((label == c) | (target == c)).sum() for c in range(3)]
    return torch.stack([one for one in overlaps if not one.isnan()]).mean()


class Spoilt(nn.Module):
    """Returns its input, and NaN where a mask says so."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        return x.masked_fill(self.where, math.nan)


def test_an_evaluation_names_nan_at_ignored_positions_too(make_trainer):
    """The loss leaves ignored positions alone, but a prediction of them would be of NaN."""
    output, target = problem((3, 4))
    module = DeterministicModule(Spoilt((target == IGNORE).unsqueeze(1)), task=Segmentation(ignore_index=IGNORE))
    loss = module.training_loss(output, target, None)
    torch.testing.assert_close(loss, F.cross_entropy(output, target, ignore_index=IGNORE))
    with pytest.raises(InputError, match="outputs for 4 of 4 rows hold NaN"):
        make_trainer().validate(module, DataLoader(TensorDataset(output, target), batch_size=4), verbose=False)
