"""Streams: the share of missed targets tends to alpha, whatever comes."""

import io

import pytest
import torch

from lightning_uq import ConformalIntervals, ConformalSets
from lightning_uq.errors import InputError
from lightning_uq.predictions import CategoricalPrediction, GaussianMixturePrediction, PointPrediction
from tests.callbacks.conformal import labelled

ZERO = PointPrediction(torch.zeros(1, 1, 1))


def intervals(num=200, **kwargs):
    target = torch.randn(num, generator=torch.Generator().manual_seed(0))
    return ConformalIntervals(**kwargs).fit_predictions(PointPrediction(torch.zeros(1, num, 1)), target)


def run(stream, targets, prediction=ZERO):
    """Which of the targets were missed."""
    missed = []
    for y in targets:
        one = stream.predict(prediction)
        y = torch.tensor([y]) if not callable(y) else torch.tensor([y(one)])
        missed.append(not bool(one.conformal_lower <= y <= one.conformal_upper))
        stream.update(one, y)
    return torch.tensor(missed).double()


@pytest.mark.parametrize("step_size", [0.01, 0.05])
@pytest.mark.parametrize("window", [None, 50])
def test_the_bound_holds_against_an_adversary(step_size, window):
    """It puts each target just outside its interval, wherever there is an outside."""
    stream, times = intervals().stream(step_size, window), 400
    missed = run(stream, [lambda one: min(max(float(one.conformal_upper), 0.0) + 1, 1e6)] * times)
    assert abs(missed.mean() - 0.1) <= (0.9 + step_size) / (step_size * times)
    assert missed.mean() > 0  # it is an adversary


@pytest.mark.parametrize("step_size", [0.01, 0.05])
def test_the_bound_holds_where_all_is_easy(step_size):
    stream, times = intervals().stream(step_size), 400
    missed = run(stream, [0.0] * times)
    assert abs(missed.mean() - 0.1) <= (0.9 + step_size) / (step_size * times)


def test_a_drift_is_followed_and_a_window_forgets():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(1200, generator=generator) * torch.linspace(1, 5, 1200)
    conformal = intervals()
    widths = {}
    for window in (None, 100):
        stream = conformal.stream(0.02, window)
        missed = run(stream, targets.tolist())
        assert missed[600:].mean().item() == pytest.approx(0.1, abs=0.03)
        assert len(stream.state_dict()["scores"]) == (1400 if window is None else 100)
        widths[window] = float(stream.predict(ZERO).conformal_upper)
    fixed = (targets.abs() > conformal.margin).double()
    assert fixed[600:].mean() > 0.4  # else nothing was shown
    assert conformal.state["scores"].shape == (200, 1)  # the callback stays as it is


def test_sets_follow_the_labels_too():
    prediction, target = labelled(600)
    conformal = ConformalSets(method="aps", randomized=True).fit_predictions(prediction[:200], target[:200])
    flat = CategoricalPrediction(torch.zeros(1, 1, 5))  # now the network knows nothing
    stream, missed = conformal.stream(0.05), []
    for i in range(400):
        one = stream.predict(flat if i % 2 else prediction[200 + i])
        y = torch.tensor([i // 2 % 5]) if i % 2 else target[200 + i : 201 + i]
        missed.append(not bool(one.prediction_set[0, y]))
        stream.update(one, y)
    assert abs(torch.tensor(missed).double().mean() - 0.1) <= (0.9 + 0.05) / (0.05 * 400)


def test_beyond_the_levels_everything_or_nothing_is_covered():
    stream = intervals().stream()
    stream.load_state_dict({**stream.state_dict(), "level": -0.01})
    one = stream.predict(ZERO)
    assert (float(one.conformal_lower), float(one.conformal_upper)) == (-torch.inf, torch.inf)
    stream.load_state_dict({**stream.state_dict(), "level": 1.01})
    one = stream.predict(ZERO)
    assert one.conformal_lower > one.conformal_upper
    prediction, target = labelled(60)
    sets = ConformalSets().fit_predictions(prediction, target).stream()
    for level, expected in ((-0.01, True), (1.01, False)):
        sets.load_state_dict({**sets.state_dict(), "level": level})
        assert bool((sets.predict(prediction).prediction_set == expected).all())


def test_a_batch_counts_by_its_share_and_missing_targets_not_at_all():
    stream, prediction = intervals().stream(0.5), PointPrediction(torch.zeros(1, 4, 1))
    one = stream.predict(prediction)
    stream.update(one, torch.tensor([0.0, 99.0, torch.nan, torch.nan]))
    assert stream.level == pytest.approx(0.1 + 0.5 * (0.1 - 0.5))
    stream.update(one, torch.full((4,), torch.nan))
    assert stream.level == pytest.approx(-0.1)


def test_steps_together():
    target = torch.randn(200, 3, 1, generator=torch.Generator().manual_seed(0))
    conformal = ConformalIntervals(simultaneous=True).fit_predictions(
        PointPrediction(torch.zeros(1, 200, 3, 1)), target
    )
    stream, band = conformal.stream(0.1), PointPrediction(torch.zeros(1, 1, 3, 1))
    stream.update(stream.predict(band), torch.tensor([0.0, 99.0, 0.0]).reshape(1, 3, 1))
    assert stream.level == pytest.approx(0.1 - 0.1 * 0.9)  # one of three steps is missed, hence the band


def test_a_checkpoint_goes_on_where_it_was():
    first = intervals().stream(0.05, 100)
    run(first, torch.randn(30).tolist())
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = intervals().stream(0.05, 100)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    targets = (3 * torch.randn(50)).tolist()
    assert torch.equal(run(first, targets), run(again, targets))
    assert first.level == again.level


def test_what_a_stream_cannot_follow_is_refused():
    prediction, target = labelled(60)
    groups = {"groups": torch.zeros(60).long()}
    point = PointPrediction(torch.zeros(1, 60, 1)), torch.randn(60)
    for conformal in (
        ConformalSets(by_class=True, alpha=0.5).fit_predictions(prediction, target),
        ConformalIntervals(groups=torch.ones_like).fit_predictions(*point, **groups),
        ConformalIntervals(density_ratio=torch.ones_like).fit_predictions(*point, weights=torch.ones(60)),
    ):
        with pytest.raises(InputError, match="has groups, classes or weights"):
            conformal.stream()
    with pytest.raises(InputError, match="Pass `allow_empty=True`"):
        ConformalSets(allow_empty=False).fit_predictions(prediction, target).stream()
    with pytest.raises(InputError, match="`window` must"):
        intervals().stream(window=0)
    with pytest.raises(InputError, match="`step_size` must"):
        intervals().stream(step_size=0.0)


def test_normalized_intervals_follow_the_scale():
    mean, variance = torch.zeros(1, 200, 1), torch.linspace(0.1, 2, 200).reshape(1, 200, 1)
    target = variance[0].sqrt() * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    conformal = ConformalIntervals(method="normalized").fit_predictions(
        GaussianMixturePrediction(mean, variance), target
    )
    two = conformal.stream().predict(
        GaussianMixturePrediction(torch.zeros(1, 2, 1), torch.tensor([1.0, 4.0]).reshape(1, 2, 1))
    )
    assert float(two.conformal_upper[1] / two.conformal_upper[0]) == pytest.approx(2.0)
