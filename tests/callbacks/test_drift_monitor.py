"""DriftMonitor: what it finds and when, merged over workers, resumed from text, in constant memory."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_uq import DriftMonitor, OODAlarm
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.drift import DriftTest
from lightning_uq.predictions import CategoricalPrediction


def normal(num, seed, shift=0.0):
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_rows_in_distribution_raise_no_alarm_and_a_shift_does():
    monitor = DriftMonitor(normal(500, 0))
    assert (monitor.drifted, monitor.num_rows, monitor.p_value, monitor.log10_evidence) == (False, 0, 1.0, 0.0)
    assert not monitor.update(normal(3000, 1))
    assert 0.05 < monitor.p_value <= 1
    assert monitor.update(normal(1000, 2, shift=0.8))
    assert 3000 < monitor.drift_row < 3300
    assert monitor.p_value <= 0.05
    row, largest = monitor.drift_row, monitor.p_value
    assert monitor.update(normal(100_000, 3))  # a drift that is over was one
    assert monitor.drift_row == row
    assert monitor.p_value <= largest


@pytest.mark.parametrize("probability", [0.001, 0.2])
def test_the_drift_row_is_the_first_with_enough_evidence(probability):
    scores, cut = torch.cat([normal(50, 1), normal(300, 2, 1.0)]), None
    one_by_one = DriftMonitor(normal(300, 0), false_alarm_probability=probability)
    for i, score in enumerate(scores):
        if one_by_one.update(score[None]) and cut is None:
            cut = i + 1
            assert one_by_one.log10_evidence >= -math.log10(probability)
    whole = DriftMonitor(normal(300, 0), false_alarm_probability=probability)
    assert whole.update(scores)
    assert whole.drift_row == one_by_one.drift_row == cut
    assert whole.log10_evidence == pytest.approx(one_by_one.log10_evidence, abs=1e-9)


def test_batches_do_not_matter_for_equal_scores_either():
    scores = torch.randint(3, (400,), generator=torch.Generator().manual_seed(0)).double()
    whole, parts = DriftMonitor(scores[:100]), DriftMonitor(scores[:100])
    whole.update(scores[100:])
    for part in scores[100:].split(7):
        parts.update(part)
    assert torch.equal(whole._test.counts, parts._test.counts)
    other = DriftMonitor(scores[:100], seed=1)
    other.update(scores[100:])
    assert not torch.equal(whole._test.counts, other._test.counts)


def test_a_monitor_goes_on_from_its_text():
    scores = torch.cat([normal(200, 1), normal(200, 2, 0.5)])
    whole, first = DriftMonitor(normal(300, 0)), DriftMonitor(normal(300, 0))
    whole.update(scores)
    for part in scores.split(50):
        first = DriftMonitor.from_json(first.to_json())
        first.update(part)
    assert first.drift_row == whole.drift_row
    assert torch.equal(first._test.counts, whole._test.counts)
    torch.testing.assert_close(first._test.log_bets, whole._test.log_bets, rtol=1e-12, atol=1e-12)
    pickle.loads(pickle.dumps(first)).update(scores)
    fresh = DriftMonitor.from_json(DriftMonitor(normal(300, 0)).to_json())
    json.loads(fresh.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_memory_does_not_grow():
    monitor = DriftMonitor(normal(500, 0))
    sizes = []
    for seed in range(3):
        monitor.update(normal(20_000, 1 + seed))
        sizes.append(len(monitor.to_json()))
    assert max(sizes) - min(sizes) < 100
    assert max(sizes) < 4000


def test_workers_are_merged_again_and_again_and_no_row_counts_twice():
    calibration = normal(500, 0)
    main, workers = DriftMonitor(calibration), [DriftMonitor(calibration, seed=seed) for seed in (1, 2)]
    for turn in range(5):
        for i, worker in enumerate(workers):
            worker.update(normal(100 * (i + 1), 10 * turn + i))
            main.merge(DriftMonitor.from_json(worker.to_json()))
            main.merge(worker)  # once more: nothing is new
    assert main.num_rows == 1500
    assert torch.equal(main._test.counts, sum(worker._test.counts for worker in workers))
    resumed = DriftMonitor.from_json(main.to_json())
    resumed.merge(workers[0])
    assert resumed.num_rows == 1500
    for turn in range(4):
        for i, worker in enumerate(workers):
            worker.update(normal(100, 100 + 10 * turn + i, shift=0.7))
            main.merge(worker)
    assert main.drifted
    assert main.drift_row <= 2300


def test_merged_streams_without_a_drift_rarely_raise_an_alarm():
    alarms = 0
    for seed in range(120):
        scores = normal(1700, seed)
        main, workers = DriftMonitor(scores[:200]), [DriftMonitor(scores[:200], seed=s) for s in (1, 2, 3)]
        for i, part in enumerate(scores[200:].split(250)):
            workers[i % 3].update(part)
            main.merge(workers[i % 3])
        assert main.num_rows == 1500
        alarms += main.drifted
    assert alarms <= 6 + 2 * math.sqrt(120 * 0.05 * 0.95)


def test_what_cannot_be_merged_is_refused():
    main, worker = DriftMonitor(normal(100, 0)), DriftMonitor(normal(100, 0), seed=1)
    early = DriftMonitor.from_json(worker.to_json())
    worker.update(normal(50, 1))
    main.merge(worker)
    with pytest.raises(InputError, match="`other` is an earlier state of a monitor that was already merged"):
        main.merge(early)
    with pytest.raises(InputError, match="`other` was made with other held-out rows"):
        main.merge(DriftMonitor(normal(100, 1)))
    with pytest.raises(InputError, match="`other` must be another monitor, but it is this one"):
        main.merge(DriftMonitor.from_json(main.to_json()))


def test_rows_of_two_monitors_with_one_seed_are_not_merged():
    def monitor(seed, *, with_rows=True):
        made = DriftMonitor(torch.zeros(100), seed=seed)
        made.update(torch.zeros(5 * with_rows))
        return made

    main = monitor(0, with_rows=False)  # whose own seed orders nothing
    main.merge(monitor(0, with_rows=False))
    first = monitor(0)
    main.merge(first)
    first.update(torch.zeros(5))
    main = DriftMonitor.from_json(main.to_json())
    main.merge(first)
    group = monitor(1)
    group.merge(monitor(2))
    main.merge(group)
    before = main.to_json()
    for other in (monitor(0), monitor(2)):
        with pytest.raises(InputError, match=f"Two monitors with seed={other.seed} cannot be merged"):
            main.merge(other)
    with pytest.raises(InputError, match="Two monitors with seed=0 cannot be merged"):
        main.update(torch.zeros(1))
    assert main.to_json() == before


def test_a_reset_begins_anew():
    monitor = DriftMonitor(normal(100, 0))
    monitor.update(normal(100, 1, 3.0))
    monitor.reset()
    assert (monitor.drifted, monitor.num_rows, monitor.p_value) == (False, 0, 1.0)


def test_arrays_are_taken_as_a_table_gives_them():
    scores = normal(400, 0)
    array = scores.numpy().copy()
    array.setflags(write=False)
    by_array, by_tensor = DriftMonitor(array[:200]), DriftMonitor(scores[:200])
    by_array.update(array[200:][::-1])
    by_tensor.update(scores[200:].flip(0))
    assert by_array.log10_evidence == by_tensor.log10_evidence
    with pytest.raises(InputError, match="`alarm` must be a fitted OODAlarm, or scores"):
        DriftMonitor(scores[:200].tolist())


def test_predictions_with_an_alarm_are_its_rows():
    prediction = CategoricalPrediction(torch.randn(1, 400, 3, generator=torch.Generator().manual_seed(0)))
    alarm = OODAlarm(score="max_softmax").fit_predictions(prediction[:200])
    by_prediction, by_score = DriftMonitor(alarm), DriftMonitor(alarm.scores)
    by_prediction.update(alarm.change(prediction[200:]))
    by_score.update(prediction[200:].score("max_softmax").numpy())
    assert by_prediction.log10_evidence == by_score.log10_evidence
    assert DriftMonitor(OODAlarm.from_json(alarm.to_json())).bins.edges.tolist() == by_score.bins.edges.tolist()
    with pytest.raises(NotFittedError, match="carries no `ood_p_value`"):
        by_prediction.update(prediction)
    with pytest.raises(NotFittedError, match="OODAlarm is not fitted"):
        DriftMonitor(OODAlarm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_of_any_precision_and_without_an_end(dtype):
    calibration = normal(300, 0).to(dtype)
    monitor = DriftMonitor(calibration)
    monitor.update(normal(2000, 1).to(dtype))
    assert not monitor.drifted
    assert monitor.update(torch.full((30,), math.nan, dtype=dtype))
    assert monitor.update(torch.empty(0, dtype=dtype))


def test_the_evidence_is_that_of_the_functional():
    monitor, scores = DriftMonitor(normal(50, 0)), normal(80, 1)
    monitor.update(scores)
    bins = monitor.bins(scores, torch.full((80,), 0.5))
    _, capital = DriftTest.start(monitor.bins.sizes).advance(bins)
    assert monitor.log10_evidence == pytest.approx(float(capital[-1]) / math.log(10), abs=1e-12)
    assert monitor.p_value == pytest.approx(math.exp(-max(0.0, float(capital.max()))), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DriftMonitor(torch.rand(9), false_alarm_probability=0), r"`false_alarm_probability` must be a number in \(0, 1\)"),
        (lambda: DriftMonitor(torch.rand(9), seed=-1), "`seed` must be"),
        (lambda: DriftMonitor(torch.empty(0)), "`calibration` must hold finite scores"),
        (lambda: DriftMonitor(torch.rand(9)).update(torch.rand(2, 2)), r"`rows` must have shape \[4\]"),
        (lambda: DriftMonitor(torch.rand(9)).update(torch.arange(3)), "`rows` must be a floating-point tensor"),
        (lambda: DriftMonitor(torch.rand(9)).update([0.5]), "`rows` must be a prediction, or scores .* It is a list"),
        (lambda: DriftMonitor(torch.rand(9)).update(np.arange(3)), "`rows` must be .* It is an array of int64"),
        (lambda: DriftMonitor(torch.rand(9, 1)), r"`alarm` must have shape \[9\]"),
        (lambda: DriftMonitor([0.5]), "`alarm` must be a fitted OODAlarm, or scores .* It is a list"),
        (lambda: DriftMonitor.from_json("{}"), "must be JSON of lightning_uq.DriftMonitor, but it holds dict"),
        (lambda: DriftMonitor.from_json('{"format": "lightning_uq.DriftMonitor", "version": 9}'), "has version 9"),
        (lambda: DriftMonitor.from_json('{"format": "lightning_uq.DriftMonitor", "version": 1}'), "`text` is damaged: KeyError"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
def test_arrays_give_what_tensors_give_without_a_warning(dtype, recwarn):
    held_out, rows = normal(100, 0).half(), normal(200, 1, 0.5).half()
    arrays = [scores.numpy().astype(dtype) for scores in (held_out, rows)]
    for one in arrays:
        one.flags.writeable = False  # as those of a Parquet file are
    ours, theirs = DriftMonitor(held_out), DriftMonitor(arrays[0])
    assert ours.update(rows) == theirs.update(arrays[1])
    assert ours.log10_evidence == theirs.log10_evidence != 0
    assert not recwarn.list


def test_a_damaged_list_is_refused():
    content = json.loads(DriftMonitor(normal(100, 0)).to_json())
    content["counts"].pop()
    with pytest.raises(InputError, match="its lists have inconsistent lengths"):
        DriftMonitor.from_json(json.dumps(content))


def test_the_result_of_another_alarm_is_refused():
    prediction = CategoricalPrediction(torch.randn(1, 600, 4, generator=torch.Generator().manual_seed(0)))
    one, other = (OODAlarm(score=name).fit_predictions(prediction[:200]) for name in ("max_softmax", "energy"))
    monitor = DriftMonitor(one)
    for part in (prediction[200:300], prediction[300:301]):
        monitor.update(one.change(part))
    discrete = prediction.replace(ood_score=(10 * prediction.predictive_entropy).round() / 10)  # many ties
    tied = OODAlarm(score="ood_score").fit_predictions(discrete[:200])
    DriftMonitor(tied).update(tied.change(discrete[200:]))
    with pytest.raises(InputError, match="`rows` carry the result of an alarm other than"):
        monitor.update(other.change(prediction[200:]))
    assert monitor.num_rows == 101


def test_a_merge_of_many_rows_takes_them_in_parts(monkeypatch):
    monkeypatch.setattr("lightning_uq.callbacks.drift_monitor._ROWS_AT_ONCE", 100)
    worker, main = DriftMonitor(normal(200, 0), seed=1), DriftMonitor(normal(200, 0))
    worker.update(normal(1050, 1))
    assert not main.merge(worker)
    assert torch.equal(main._test.counts, worker._test.counts)
    worker.update(normal(800, 2, 1.0))
    assert main.merge(worker)
    assert 1050 < main.drift_row < 1850
