"""Every metric in a user's module: in each precision, through a pickle, in several loaders, with bad input."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.errors import InputError
from lightning_uq.predictions import NumberPrediction, PointPrediction, Prediction
from tests.contract.cases import Measured
from tests.metrics import cases as measured

ROWS = torch.arange(measured.ROWS)
PRECISIONS = [
    pytest.param(name, marks=pytest.mark.axis(name)) for name in ("32-true", "bf16-mixed", "bf16-true", "64-true")
]


def loader(rows=ROWS):
    return DataLoader(TensorDataset(rows), batch_size=7)


def value(case, rows=ROWS):
    """Without a Trainer, in one piece."""
    metric = measured.make(case.key)
    metric.update(*measured.CASES[case.key][2](measured.Data(), rows))
    return metric.compute().item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision(make_trainer, metric_case, precision):
    module, trainer = Measured(metric_case.key), make_trainer(precision=precision)
    for _ in range(2):  # Lightning resets it in between
        (tested,) = trainer.test(module, loader(), verbose=False)
        assert tested["value"] == pytest.approx(value(metric_case), rel=1e-6, abs=1e-6)


@pytest.mark.axis("options")
def test_limited_batches(make_trainer, metric_case):
    (tested,) = make_trainer(limit_test_batches=3).test(Measured(metric_case.key), loader(), verbose=False)
    assert tested["value"] == pytest.approx(value(metric_case, ROWS[:21]), rel=1e-6, abs=1e-6)


@pytest.mark.axis("fast_dev_run")
def test_fast_dev_run(make_trainer, metric_case):
    (tested,) = make_trainer(fast_dev_run=3).test(Measured(metric_case.key), loader(), verbose=False)
    assert tested["value"] == pytest.approx(value(metric_case, ROWS[:21]), rel=1e-6, abs=1e-6)


@pytest.mark.axis("reload")
def test_half_way_through_a_pickle(metric_case):
    metric, data = measured.make(metric_case.key), measured.Data()
    update = measured.CASES[metric_case.key][2]
    metric.update(*update(data, ROWS[:20]))
    again = pickle.loads(pickle.dumps(metric))
    assert not metric.state_dict()  # a checkpoint of the module does not hold it
    again.update(*update(data, ROWS[20:]))
    assert again.compute().item() == pytest.approx(value(metric_case), rel=1e-6)


@pytest.mark.axis("bad input")
def test_nan_and_what_does_not_fit(metric_case):
    """The error names the argument, and what was counted before is kept as it was."""
    data = measured.Data()
    first, second, *rest = measured.CASES[metric_case.key][2](data, ROWS)
    metric = measured.make(metric_case.key)
    metric.update(first, second, *rest)
    before = metric.compute().item()
    if isinstance(first, NumberPrediction):  # of intervals
        spoilt = first.replace(conformal_upper=first.conformal_upper * torch.nan)
    elif isinstance(first, Prediction):  # of sets, or of what is answered: masks hold no NaN
        spoilt = PointPrediction(torch.zeros(1, len(first), 1))
    else:
        spoilt = tuple(part * torch.nan for part in first) if isinstance(first, tuple) else first * torch.nan
    bads = [("words", second, *rest)]
    if metric_case.name != "OODAlarmRate":  # any type of prediction may carry an alarm
        bads.append((spoilt, second, *rest))
    if metric_case.name not in ("PredictiveEntropy", "MutualInformation"):  # they take a target, and look at none
        bads.append((first, second[:-1], *rest))
    for bad in bads:
        with pytest.raises(InputError, match=r"`\w+` must "):
            metric.update(*bad)
    metric._computed = None
    assert metric.compute().item() == before
