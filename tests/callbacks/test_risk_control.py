"""Conformal risk control: the share that is missed, on labels and maps, against its definition and under a Trainer."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import ConformalRiskControl, TemperatureScaling
from lightning_uq.callbacks.risk_control import LEVELS, missed_shares
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.conformal import conformal_quantile
from lightning_uq.metrics import FalseNegativeRate
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction, PointPrediction
from lightning_uq.tasks import Multilabel, Segmentation
from tests.callbacks.test_maps import VOID, UNet
from tests.trainers import quiet_trainer


def labels(num, seed, num_labels=4):
    """Noisy logits of labels, of which an input has two in the mean."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, num_labels, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(logits.shape, generator=generator) < logits.sigmoid()).long()


def maps(num, seed, classes=3, size=6):
    """Noisy maps of logits [N, C, H, W], and their classes with some positions that do not count."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(num, 1, 1, 1, generator=generator)  # some images are harder than others
    logits = offset.abs() * torch.randn(num, classes, size, size, generator=generator)
    target = torch.distributions.Categorical(logits=logits.movedim(1, -1)).sample()
    target[:, 0] = -1
    return logits.double(), target


def share_missed(sets, target):
    """By definition, one input after the other."""
    shares = []
    for own, y in zip(sets, target, strict=True):
        if own.ndim == 1:
            on = y == 1
            if on.any():
                shares.append((on & ~own).sum() / on.sum())
        else:
            counted = (y >= 0).nonzero().tolist()
            missed = [not own[y[i, j], i, j] for i, j in counted]
            if missed:
                shares.append(torch.tensor(sum(missed) / len(missed)))
    return torch.stack(shares).mean()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_the_expected_share_of_missed_labels_is_the_one_asked_for(alpha):
    found = []
    for seed in range(200):
        logits, target = labels(1100, seed)
        control = ConformalRiskControl(alpha=alpha).fit_predictions(
            BernoulliPrediction(logits[None, :100]), target[:100]
        )
        sets = control.sets(BernoulliPrediction(logits[None, 100:]))
        metric = FalseNegativeRate()
        metric.update(BernoulliPrediction(logits[None, 100:]).replace(prediction_set=sets), target[100:])
        found.append(metric.compute())
    mean = torch.stack(found).mean()
    assert alpha - 0.02 < mean < alpha + 0.005  # at most alpha in the mean, and hardly less


@pytest.mark.parametrize("by_class", [False, True])
def test_the_metric_is_the_mean_share_of_its_definition(by_class):
    logits, target = labels(40, 0)
    control = ConformalRiskControl(alpha=0.3, by_class=by_class)
    prediction = BernoulliPrediction(logits[None])
    sets = control.fit_predictions(prediction, target).sets(prediction)
    metric = FalseNegativeRate()
    metric.update(control.change(prediction), target)
    torch.testing.assert_close(metric.compute(), share_missed(sets, target).double())
    images, classes = maps(12, 1)
    prediction = CategoricalPrediction(images[None])
    sets = control.fit_predictions(prediction, classes).sets(prediction)
    metric = FalseNegativeRate()
    metric.update(control.change(prediction), classes)
    torch.testing.assert_close(metric.compute(), share_missed(sets, classes).double())


def test_a_label_on_its_own_has_the_quantile_of_its_positive_rows():
    logits, target = labels(60, 3)
    control = ConformalRiskControl(alpha=0.2, by_class=True).fit_predictions(BernoulliPrediction(logits[None]), target)
    expected = [conformal_quantile(-logits[target[:, i] == 1, i], 0.2) for i in range(4)]
    torch.testing.assert_close(control.threshold, torch.stack(expected))


def test_unknown_labels_are_no_missed_ones():
    logits, target = labels(60, 3)
    unknown = target.double()
    unknown[::3, 1] = torch.nan
    known = torch.where(unknown.isnan(), 0, target)
    one, other = (
        ConformalRiskControl(alpha=0.2).fit_predictions(BernoulliPrediction(logits[None]), y).threshold
        for y in (unknown, known)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("by_class", [False, True])
def test_the_shares_of_maps_are_those_of_their_definition(by_class):
    images, target = maps(5, 4)
    scores = 3 * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = missed_shares(scores, target, by_class)
    for level in (0, 700, 1000, 1043, 2000):
        for n in range(5):
            for c in range(3) if by_class else [None]:
                counted = target[n] == c if by_class else target[n] >= 0
                own = scores[n].gather(0, target[n].clamp_min(0)[None])[0][counted]
                expected = (own > LEVELS[level]).double().mean()  # NaN without a position
                torch.testing.assert_close(
                    shares[n, c or 0, level].double(), expected, equal_nan=True, rtol=1e-6, atol=1e-6
                )


def test_the_expected_share_of_missed_positions_is_at_most_the_one_asked_for():
    found = []
    for seed in range(60):
        logits, target = maps(240, seed)
        control = ConformalRiskControl(alpha=0.1).fit_predictions(CategoricalPrediction(logits[None, :40]), target[:40])
        rest = CategoricalPrediction(logits[None, 40:])
        metric = FalseNegativeRate()
        metric.update(control.change(rest), target[40:])
        found.append(metric.compute())
    assert 0.07 < torch.stack(found).mean() < 0.103


def test_too_few_inputs_put_everything_into_every_set():
    logits, target = labels(5, 0)
    prediction = BernoulliPrediction(logits[None])
    with pytest.warns(UserWarning, match="all labels or classes into every set, because there are too few inputs"):
        control = ConformalRiskControl(alpha=0.1).fit_predictions(prediction, target)
    assert control.sets(prediction).all()
    target[:, 2] = 0
    with pytest.warns(UserWarning, match=r"label or class \[0, 1, 2, 3\] into every set"):
        ConformalRiskControl(alpha=0.01, by_class=True).fit_predictions(prediction, target)


def test_a_row_from_which_nothing_can_be_predicted_keeps_everything():
    logits, target = labels(60, 0)
    control = ConformalRiskControl(alpha=0.2).fit_predictions(BernoulliPrediction(logits[None]), target)
    assert control.sets(BernoulliPrediction(torch.full((1, 1, 4), torch.nan))).all()
    images, classes = maps(30, 0)
    control = ConformalRiskControl(alpha=0.2).fit_predictions(CategoricalPrediction(images[None]), classes)
    images[0, :, 2, 3] = torch.nan
    sets = control.sets(CategoricalPrediction(images[None]))
    assert sets[0, :, 2, 3].all()
    assert not sets.all()


@pytest.mark.parametrize(
    ("prediction", "text"),
    [
        (CategoricalPrediction(torch.zeros(1, 5, 3)), "several labels or maps of classes"),
        (PointPrediction(torch.zeros(1, 5, 1)), "but it is a PointPrediction"),
    ],
)
def test_other_predictions_are_refused(prediction, text):
    with pytest.raises(InputError, match=text):
        ConformalRiskControl().fit_predictions(prediction, torch.zeros(5, dtype=torch.long))


def test_nothing_fitted_is_said():
    with pytest.raises(NotFittedError, match="`fit_predictions`"):
        ConformalRiskControl().sets(BernoulliPrediction(torch.zeros(1, 2, 3)))


# ---------------------------------------------------------------------- under a Trainer, on modules as their authors write them


class Tagger(LightningModule):
    """Several labels per input, with a threshold of its own at prediction."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y.float())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).sigmoid() > 0.5

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def tags(num, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 6, generator=generator)
    y = (x[:, :4] + torch.randn(num, 4, generator=generator) > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=64)


def test_a_tagger_as_it_is(tmp_path):
    scaling = TemperatureScaling(task=Multilabel(), attach=True)
    control = ConformalRiskControl(alpha=0.1, task=Multilabel(), attach=True)
    trainer = quiet_trainer(tmp_path, callbacks=[scaling, control], max_epochs=3)
    module = Tagger()
    trainer.fit(module, tags(300, 0), tags(400, 1))
    (found,) = trainer.test(module, tags(2000, 2), verbose=False)
    assert found["uq/test_false_negative_rate"] == pytest.approx(0.1, abs=0.025)
    (first, *_) = trainer.predict(module, tags(100, 3))
    assert first.prediction_set.shape == (64, 4)
    assert first.calibrations["temperature"] == scaling.temperature.float()
    torch.testing.assert_close(found["uq/test_set_size"], float(first.set_size.double().mean()), atol=0.5, rtol=0)
    with pytest.raises(InputError, match="predictions with a temperature of .*, but this one has no temperature"):
        control.sets(BernoulliPrediction(torch.zeros(1, 2, 4)))


def pictures(num, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(num, 1, 8, 8, generator=generator)
    mask = (image[:, 0] + 0.7 * torch.randn(num, 8, 8, generator=generator) > 0).long()
    mask[:, :, 0] = VOID
    return DataLoader(TensorDataset(image, mask), batch_size=16)


def test_a_segmentation_network_as_it_is(tmp_path):
    control = ConformalRiskControl(alpha=0.1, task=Segmentation(ignore_index=VOID), attach=True)
    trainer = quiet_trainer(tmp_path, callbacks=[control], max_epochs=3)
    module = UNet(2)
    trainer.fit(module, pictures(80, 0), pictures(100, 1))
    (found,) = trainer.test(module, pictures(300, 2), verbose=False)
    assert found["uq/test_false_negative_rate"] == pytest.approx(0.1, abs=0.02)
    (first, *_) = trainer.predict(module, pictures(20, 3))
    assert first.prediction_set.shape == (16, 2, 8, 8)
    assert first.set_size.shape == (16, 8, 8)


@pytest.mark.parametrize(
    ("task", "text"),
    [("classification", r"Use ConformalSets, or pass `task=Multilabel\(\)`"), ("regression", "Use ConformalIntervals")],
)
def test_other_tasks_are_refused_before_the_training(task, text, tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ConformalRiskControl(task=task)])
    with pytest.raises(InputError, match=text):
        trainer.fit(Tagger(), tags(10, 0), tags(10, 1))
    assert trainer.global_step == 0
