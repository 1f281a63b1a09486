"""What a user sees while a comparison runs."""

import io
import re
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console

from lightning_uq.compare.progress.estimate import Estimate
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.progress.terminal import TerminalProgress
from lightning_uq.compare.progress.warning_notes import reported_warnings
from lightning_uq.compare.training.isolation import IsolatedCallbacks


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def train(estimate, clock, method, seed, epochs, seconds):
    estimate.begin(method, seed)
    for _ in range(epochs):
        clock.now += seconds / epochs
        estimate.epoch(method, seed)
    estimate.end(method, seed, epochs)


def test_other_seeds_of_a_method_tell_its_time(clock):
    estimate = Estimate(6, 100, clock=clock)
    assert estimate.seconds_left() is None
    train(estimate, clock, "slow", 0, 20, 100.0)
    train(estimate, clock, "slow", 1, 20, 100.0)
    train(estimate, clock, "quick", 0, 20, 10.0)
    estimate.begin("slow", 2)
    typical = (100 + 100 + 10 + 100) / 4  # of those that wait, the methods are not known
    assert estimate.seconds_left() == pytest.approx(100 + 2 * typical)
    clock.now += 40
    assert estimate.seconds_left() == pytest.approx(60 + 2 * typical)


def test_a_training_that_stops_early_does_not_make_it_jump(clock):
    """The second training stops after 20 epochs of 100 as the first did: until then the estimate expects 20."""
    estimate = Estimate(4, 100, clock=clock)
    train(estimate, clock, "a", 0, 20, 20.0)
    assert estimate.share == pytest.approx(0.25)
    estimate.begin("b", 0)  # another method, twice as slow
    shares, left = [], []
    for _ in range(20):
        clock.now += 2
        estimate.epoch("b", 0)
        shares.append(estimate.share)
        left.append(estimate.seconds_left())
    assert left[9] == pytest.approx(20 + 2 * 30)  # 40 s for b; the mean of 20 and 40 for each that waits
    estimate.end("b", 0, 20)
    assert estimate.share - shares[-1] < 0.02
    assert abs(left[-1] - estimate.seconds_left()) < 5
    assert shares == sorted(shares)


def test_a_training_that_takes_longer_than_others_is_never_over(clock):
    estimate = Estimate(2, 100, clock=clock)
    train(estimate, clock, "a", 0, 10, 10.0)
    estimate.begin("a", 1)
    clock.now += 1000
    for _ in range(50):
        estimate.epoch("a", 1)
    assert 0 < estimate.seconds_left() < 100
    assert estimate.share < 1


def test_several_at_the_same_time(clock):
    estimate = Estimate(4, 10, clock=clock)
    estimate.begin("a", 0)
    estimate.begin("a", 1)
    clock.now = 10
    for seed in (0, 1):
        estimate.end("a", seed, 10)
    assert estimate.seconds_left() == pytest.approx(10)  # two more, at the same time


def test_what_an_earlier_run_has_done_counts_and_takes_no_time(clock):
    estimate = Estimate(4, 10, done=2, clock=clock)
    assert estimate.share == 0.5
    train(estimate, clock, "a", 0, 10, 10.0)
    assert estimate.seconds_left() == pytest.approx(10)


def test_without_a_terminal_each_training_is_a_line():
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream)) as progress:
        progress.start(3, 10, 1)
        progress.note("[softmax] is there.")
        for seed in (0, 1):
            progress.training("a", seed)
            progress.epoch("a", seed)
            progress.trained("a", seed, 1, 0.25)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[softmax] is there."
    assert re.fullmatch(r"2/3 a, seed 0: 1 epochs in 0\.[23] s, about \d+ s left", lines[1])
    assert re.fullmatch(r"3/3 a, seed 1: 1 epochs in 0\.[23] s", lines[2])


def test_on_a_terminal_one_bar_shows_the_whole_run():
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream, force_terminal=True, width=120)) as progress:
        progress.start(4, 10, 1)
        progress.training("a", 0)
        for _ in range(5):
            progress.epoch("a", 0)
        progress._bar.refresh()
        text = stream.getvalue()
        assert "a, seed 0" in text
        assert "1/4 trainings, 5/10 epochs" in text
        assert " 38%" in text  # 1.5 of 4
        progress.training("b", 0)
        progress.trained("a", 0, 5, 1.0)
        progress.training("a", 1)
        progress._bar.refresh()
        assert "2 trainings at the same time" in stream.getvalue()
        assert "left" in stream.getvalue()


def test_a_trial_is_called_one_until_it_has_ended():
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream)) as progress:
        progress.start(2, 10, 0)
        progress.trial("a", 0, 2, 3)
        for _ in range(2):  # the second is the training of the same seed
            progress.training("a", 0)
            progress.epoch("a", 0)
            progress.trained("a", 0, 1, 0.25)
        progress.warning("temperature, seed 0: T is at its bound.")
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("1/2 trial 2 of 3 of a, seed 0: 1 epochs")
    assert second.startswith("2/2 a, seed 0: 1 epochs")
    assert third == "temperature, seed 0: T is at its bound."


class Told(Progress):
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


def test_warnings_name_the_method_at_work_and_come_once():
    progress = Told()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with reported_warnings(progress, "softmax", 3):
            for _ in range(2):
                warnings.warn("a\nb", stacklevel=1)
            callback = LambdaCallback(on_train_end=lambda *_: warnings.warn("at its bound", stacklevel=1))
            trainer = SimpleNamespace(callbacks=[])
            IsolatedCallbacks([callback], "temperature").on_train_end(trainer, None)
    assert progress.warnings == ["softmax, seed 3: a b", "temperature, seed 3: at its bound"]


def test_without_a_terminal_a_warning_stays_one():
    with pytest.warns(UserWarning, match="^softmax, seed 3: a$"), reported_warnings(Progress(), "softmax", 3):
        warnings.warn("a", stacklevel=1)
