import math
from functools import partial

import pytest
import torch

from benchmarks.seed_differences import best_is_kept
from lightning_uq.errors import InputError
from lightning_uq.functional.metric_difference import metric_difference
from lightning_uq.functional.paired_difference import DifferenceInterval, paired_difference, seed_difference
from lightning_uq.functional.tied_with_best import tied_with_best


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_the_best_is_kept_as_often_as_promised(gap):
    kept, others = best_is_kept(150, 3, gap, 5, 50, draw())
    share = float(kept.double().mean())
    assert share >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / len(kept))
    assert gap > 0 or share < 1  # it is not kept always, so the number measures something


def test_clear_losers_are_ruled_out_and_the_best_of_the_data_never_is():
    losses = {f"plus {gap}": torch.randn(5, 300, generator=draw(int(gap))) + gap for gap in (0.0, 1.0, 2.0)}
    assert tied_with_best(losses) == {"plus 0.0": True, "plus 1.0": False, "plus 2.0": False}
    assert tied_with_best(losses, higher_is_better=True) == {"plus 0.0": False, "plus 1.0": False, "plus 2.0": True}


def test_each_comparison_takes_its_share_of_the_error_rate():
    levels = []

    def difference(a, b, *, level):
        levels.append(level)
        return DifferenceInterval(a - b, a - b - 1, a - b + 1, "rows")

    assert tied_with_best({"a": 0, "b": 0.5, "c": 2, "d": -0.5}, level=0.94, difference=difference) == {
        "a": True,
        "b": True,
        "c": False,
        "d": True,
    }
    assert levels == pytest.approx([1 - 2 * 0.02] * 6)


def test_one_method_is_the_best():
    assert tied_with_best({"a": torch.ones(5, 3)}) == {"a": True}


def test_other_intervals_can_be_compared():
    values = {name: centre + torch.rand(6, generator=draw()) / 100 for name, centre in (("low", 0.1), ("high", 0.9))}
    assert tied_with_best(values, difference=seed_difference, higher_is_better=True) == {"low": False, "high": True}
    resplit = partial(paired_difference, num_train=100)
    losses = {name: value[:, None] + torch.rand(20, generator=draw()) for name, value in values.items()}
    assert tied_with_best(losses, difference=resplit) == {"low": True, "high": False}
    metrics = {name: (lambda weights, loss=loss: weights @ loss.double().T / 20) for name, loss in losses.items()}
    bootstrap = partial(metric_difference, num_rows=20, num_resamples=100, generator=draw())
    assert tied_with_best(metrics, difference=bootstrap) == {"low": True, "high": False}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tied_with_best({}), "`results` is empty."),
        (
            lambda: tied_with_best({"a": torch.ones(5, 3)}, level=0.5),
            "`level` must be a number in (0.5, 1), but it is 0.5.",
        ),
        (
            lambda: tied_with_best({"a": torch.ones(5, 3)}, higher_is_better="x"),
            "`higher_is_better` must be True or False",
        ),
        (
            lambda: tied_with_best({"a": torch.ones(5, 3), "b": torch.ones(4, 3)}),
            "a - b: `losses_b` must have shape [5, 3]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)
