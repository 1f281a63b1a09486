"""SelectiveThreshold: the error rate of what is answered."""

import pytest
import torch

from lightning_uq import SelectiveThreshold, TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.functional.selective import certainty
from lightning_uq.functional.selective_threshold import selective_threshold
from lightning_uq.metrics import AnsweredShare, SelectiveError
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction
from lightning_uq.tasks import Segmentation
from tests.callbacks.test_maps import UNet
from tests.callbacks.test_risk_control import pictures
from tests.contract.cases import UsersModule, loader
from tests.contract.running import TRAIN, VAL
from tests.trainers import quiet_trainer


def drawn(num, seed):
    """Predictions that are right with the probability that they say, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return CategoricalPrediction(logits[None]), target


@pytest.mark.parametrize("score", [None, "predictive_entropy"])
def test_the_risk_is_exceeded_as_rarely_as_asked_for(score):
    exceeded, answered = 0, []
    for seed in range(100):
        prediction, target = drawn(6000, seed)
        selective = SelectiveThreshold(risk=0.1, delta=0.1, uncertainty=score).fit_predictions(
            prediction[:1000], target[:1000]
        )
        mask = selective.answered(prediction[1000:])
        wrong = (prediction.label != target)[1000:]
        exceeded += bool(wrong[mask].double().mean() > 0.1)
        answered.append(mask.double().mean())
    assert exceeded <= 15  # 10 in the mean, were the bound tight
    assert torch.stack(answered).mean() > 0.4  # of use


def test_the_threshold_is_that_of_the_functional():
    prediction, target = drawn(500, 0)
    expected = selective_threshold(certainty(prediction.log_probs), prediction.label != target, 0.1, 0.2, 8)
    assert (
        SelectiveThreshold(risk=0.1, delta=0.2, num_levels=8).fit_predictions(prediction, target).threshold == expected
    )


def test_metrics_are_the_share_and_the_error_rate():
    prediction, target = drawn(500, 0)
    changed = SelectiveThreshold(risk=0.1).fit_predictions(prediction, target).change(prediction)
    share, error = AnsweredShare(), SelectiveError()
    for metric in (share, error):
        metric.update(changed, target)
    assert share.compute() == changed.answered.double().mean()
    assert error.compute() == (prediction.label != target)[changed.answered].double().mean()


def test_what_cannot_be_certified_is_not_answered():
    prediction, target = drawn(10, 0)
    with pytest.warns(UserWarning, match="certifies no threshold, so no row is answered"):
        selective = SelectiveThreshold(risk=0.01).fit_predictions(prediction, target)
    assert not selective.answered(prediction).any()


def test_an_input_that_is_not_finite_is_not_answered():
    prediction, target = drawn(500, 0)
    selective = SelectiveThreshold(risk=0.3).fit_predictions(prediction, target)
    bad = CategoricalPrediction(torch.full((1, 1, 4), torch.nan))
    assert not selective.answered(bad).any()


def test_under_a_trainer(tmp_path):
    selective = SelectiveThreshold(risk=0.3, delta=0.3, attach=True, task="classification")
    scaling = TemperatureScaling(attach=True, task="classification")
    trainer = quiet_trainer(tmp_path, callbacks=[scaling, selective], max_epochs=3)
    module, val = UsersModule(), loader("classification", 200, 1)
    trainer.fit(module, loader("classification", TRAIN), val)
    (found,) = trainer.test(module, val, verbose=False)
    (first, *_) = trainer.predict(module, loader("classification", VAL, 2))
    assert first.answered.dtype == torch.bool
    assert "answered" in first.to_dict()
    assert 0 < found["uq/test_answered"] <= 1
    assert found["uq/test_selective_error"] <= 0.3


def test_maps_and_labels_are_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[SelectiveThreshold(task=Segmentation(ignore_index=255))])
    with pytest.raises(InputError, match="the positions of a map are not independent"):
        trainer.fit(UNet(2), pictures(4, 0), pictures(4, 1))
    with pytest.raises(InputError, match="one class per input, but it is a BernoulliPrediction"):
        SelectiveThreshold().fit_predictions(BernoulliPrediction(torch.zeros(1, 5, 3)), torch.zeros(5, 3))
    with pytest.raises(InputError, match="has no score 'variance'"):
        SelectiveThreshold(uncertainty="variance").fit_predictions(*drawn(5, 0))
