import math
from functools import partial

import pytest
import torch

from benchmarks.seed_differences import best_is_kept
from lightning_uq.errors import InputError
from lightning_uq.functional.best_method import BestMethod, best_method
from lightning_uq.functional.metric_difference import resample_metric
from lightning_uq.functional.paired_difference import DifferenceInterval, paired_difference, seed_difference
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.weighted_metrics import weighted_rmse

of_losses = partial(best_method, difference=paired_difference)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_the_best_is_kept_as_often_as_promised(gap):
    kept, others = best_is_kept(150, 3, gap, 5, 50, draw())
    share = float(kept.double().mean())
    assert share >= 0.975 - 2 * math.sqrt(0.025 * 0.975 / len(kept))
    assert gap > 0 or share < 1  # it is not kept always, so the number measures something


@pytest.mark.parametrize("best_first", [True, False])
def test_clear_losers_are_ruled_out(best_first):
    losses = {f"plus {gap}": torch.randn(5, 300, generator=draw(int(gap))) + gap for gap in (0.0, 1.0, 2.0)}
    if not best_first:
        losses = dict(reversed(losses.items()))
    low, high = of_losses(losses), of_losses(losses, higher_is_better=True)
    assert (low.name, low.tied) == ("plus 0.0", set())
    assert (high.name, high.tied) == ("plus 2.0", set())
    assert low.differences["plus 1.0"] == paired_difference(losses["plus 1.0"], losses["plus 0.0"], level=0.975)
    assert list(low.differences) == [name for name in losses if name != "plus 0.0"]


def test_each_comparison_takes_its_share_of_the_error_rate():
    levels = []

    def difference(a, b, *, level):
        levels.append(level)
        return DifferenceInterval(a - b, a - b - 1, a - b + 1, "rows")

    best = best_method({"a": 0, "b": 0.5, "c": 2, "d": -0.5}, level=0.94, difference=difference)
    assert (best.name, best.tied) == ("d", {"a", "b"})
    assert set(levels) == {1 - 0.06 / 3} == {best.level}


def test_two_methods_get_an_ordinary_interval():
    losses = {"a": torch.randn(5, 30, generator=draw()), "b": torch.randn(5, 30, generator=draw(1)) + 1}
    assert of_losses(losses).differences == {"b": paired_difference(losses["b"], losses["a"], level=0.95)}


def test_one_method_is_the_best():
    assert of_losses({"a": torch.ones(5, 3)}) == BestMethod("a", {}, 0.95)


def test_other_intervals_can_be_compared():
    values = {name: centre + torch.rand(6, generator=draw()) / 100 for name, centre in (("low", 0.1), ("high", 0.9))}
    assert best_method(values, difference=seed_difference, higher_is_better=True).name == "high"
    rows = SeedRows([torch.arange(20) + seed for seed in range(6)], num_train=100)
    found = {}
    for name, value in values.items():
        errors = value[:, None] + torch.rand(6, 20, generator=draw())
        found[name] = resample_metric(weighted_rmse, [{"squared_error": one} for one in errors], rows)
    best = best_method(found)
    assert (best.name, best.tied, best.differences["high"].over) == ("low", set(), "rows and seeds")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_method({}), "`results` is empty."),
        (
            lambda: of_losses({"a": torch.ones(5, 3)}, level=95),
            "`level` must be a number in (0, 1), but it is 95.",
        ),
        (
            lambda: of_losses({"a": torch.ones(5, 3)}, higher_is_better="x"),
            "`higher_is_better` must be True or False",
        ),
        (
            lambda: of_losses({"a": torch.ones(5, 3), "b": torch.ones(4, 3)}),
            "a - b: `losses_b` must have shape [5, 3]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)
