"""OODAlarm: the share of false alarms, whatever the task, on any module, and what predictions, tables and files hold of it."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    ConformalSets,
    DeterministicModule,
    EnsembleModule,
    EvidentialModule,
    FitGMM,
    FitKNN,
    FitViM,
    OODAlarm,
    PredictionWriter,
    TemperatureScaling,
    export_fitted,
    load_fitted,
    read_predictions,
    save_fitted,
)
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional import conformal_p_values
from lightning_uq.metrics import OODAlarmRate
from lightning_uq.predictions import CategoricalPrediction, GaussianMixturePrediction, PointPrediction
from lightning_uq.tasks import Regression, Segmentation
from tests.callbacks.test_maps import UNet
from tests.callbacks.test_risk_control import pictures
from tests.contract.cases import FEATURES, UsersModule, loader, network
from tests.contract.running import TRAIN, VAL
from tests.trainers import quiet_trainer


def unsure(num, seed=0, scale=3.0):
    logits = scale * torch.randn(1, num, 4, generator=torch.Generator().manual_seed(seed))
    return CategoricalPrediction(logits)


def rows(num, seed=0, far=0.0, batch_size=16):
    """Inputs alone, without targets."""
    x = torch.randn(num, FEATURES, generator=torch.Generator().manual_seed(seed)) + far
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def inputs_only(batch):
    return batch[0], None


def test_the_share_of_false_alarms_is_the_rate():
    """Over draws of 99 held-out rows, a new row raises an alarm with a probability of exactly 4 / 100 at a rate of 4.9 %."""
    shares = []
    for seed in range(400):
        prediction = unsure(599, seed)
        alarm = OODAlarm(score="predictive_entropy", false_alarm_rate=0.049).fit_predictions(prediction[:99])
        shares.append(alarm.change(prediction[99:]).ood_alarm.double().mean())
    found = torch.stack(shares)
    assert float(found.mean()) == pytest.approx(0.04, abs=3 * float(found.std()) / 20)


@pytest.mark.parametrize(("fitted", "served"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_equal_votes_are_equal_in_every_precision(fitted, served):
    votes = torch.randn(5, 800, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alarm = OODAlarm(score="variation_ratio", false_alarm_rate=0.5)
    alarm.fit_predictions(CategoricalPrediction(votes[:, :400].to(fitted)))
    found = alarm.change(CategoricalPrediction(votes[:, 400:].to(served)))
    same = alarm.change(CategoricalPrediction(votes[:, 400:].to(fitted)))
    assert torch.equal(found.ood_p_value, same.ood_p_value)
    assert torch.equal(found.ood_alarm, same.ood_alarm)
    assert torch.equal(found.ood_alarm, found.ood_p_value <= 0.5)


def test_delta_bounds_the_share_for_one_draw():
    too_many = 0
    for seed in range(200):
        prediction = unsure(4500, seed)
        alarm = OODAlarm(score="max_softmax", false_alarm_rate=0.1, delta=0.1).fit_predictions(prediction[:500])
        too_many += bool(alarm.change(prediction[500:]).ood_alarm.double().mean() > 0.1)
    assert too_many <= 20 + 3 * math.sqrt(18)


def test_a_prediction_carries_score_p_value_and_alarm():
    held_out, new = unsure(300), unsure(50, 1)
    alarm = OODAlarm(score="predictive_entropy", false_alarm_rate=0.1).fit_predictions(held_out)
    changed = alarm.change(new)
    assert torch.equal(changed.ood_score, new.predictive_entropy)
    expected = conformal_p_values(new.predictive_entropy, held_out.predictive_entropy.sort().values)
    assert torch.equal(changed.ood_p_value, expected)
    assert torch.equal(changed.ood_alarm, expected <= 0.1)
    assert list(changed.to_dict())[-3:] == ["ood_score", "ood_p_value", "ood_alarm"]
    assert torch.equal(changed[3:7].ood_p_value, expected[3:7])
    joined = type(changed).cat([changed[:20], changed[20:]])
    assert torch.equal(joined.ood_alarm, changed.ood_alarm)


MODULES = {
    "classification": (lambda: DeterministicModule(network()), "predictive_entropy"),
    "ensemble": (lambda: EnsembleModule(network, num_members=3), "predictive_entropy"),
    "evidential": (lambda: EvidentialModule(network()), "vacuity"),
    "binary": (lambda: DeterministicModule(network(1), task="binary"), "predictive_entropy"),
    "multilabel": (lambda: DeterministicModule(network(3), task="multilabel"), "predictive_entropy"),
    "numbers": (lambda: DeterministicModule(network(2), task=Regression(head="mean_variance")), "variance"),
    "means": (lambda: EnsembleModule(lambda: network(1), num_members=3, task=Regression(head="mean")), "epistemic_variance"),
    "quantiles": (lambda: DeterministicModule(network(3), task=Regression(head="quantiles", levels=(0.1, 0.5, 0.9))), "interval_width"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_every_task_has_an_alarm_without_a_label(name):
    torch.manual_seed(0)
    build, score = MODULES[name]
    module = build().eval()
    alarm = OODAlarm(false_alarm_rate=0.1, unpack_batch=inputs_only).fit(module, rows(200))
    assert alarm.state["score_name"] == score
    (x,) = next(iter(rows(50, 1, batch_size=50)))
    prediction = module.predict(x)
    assert torch.equal(prediction.ood_alarm, prediction.ood_score > alarm.threshold)
    assert 0 < float(prediction.ood_p_value.min()) <= float(prediction.ood_p_value.max()) <= 1
    alarm.handle.remove()
    with pytest.raises(NotFittedError, match="carries no `ood_alarm`: no OOD alarm was fitted"):
        _ = module.predict(x).ood_alarm


@pytest.mark.parametrize("score", [None, "ood_score"])
def test_a_density_before_it_is_what_is_judged(tmp_path, score):
    module, alarm = UsersModule(), OODAlarm(score=score, attach=True, task="classification")
    gmm = FitGMM(attach=True, task="classification", feature_transform="raw")
    trainer = quiet_trainer(tmp_path, callbacks=[gmm, alarm], max_epochs=2)
    trainer.fit(module, loader("classification", TRAIN), loader("classification", 100, 1))
    assert alarm.state["score_name"] == "ood_score"
    assert torch.allclose(alarm.scores, gmm.score(module, loader("classification", 100, 1)).sort().values, rtol=1e-5)
    (found,) = trainer.test(module, loader("classification", 100, 1), verbose=False)
    assert found["uq/test_ood_alarm_rate"] == pytest.approx(0.05, abs=0.011)
    assert trainer.callback_metrics.keys() >= {"uq/test_ood_alarm_rate"}
    (first, *_) = trainer.predict(module, loader("classification", VAL, 2))
    assert torch.equal(first.ood_alarm, first.ood_score > alarm.threshold)


def test_a_density_behind_it_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[OODAlarm(), FitGMM()], max_epochs=1)
    with pytest.raises(InputError, match="OODAlarm stands before FitGMM in the Trainer's callbacks"):
        trainer.fit(UsersModule(), loader("classification", TRAIN), loader("classification", VAL))
    callbacks = [OODAlarm(score="max_softmax"), FitGMM(feature_transform="raw")]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(
        UsersModule(), loader("classification", TRAIN), loader("classification", 100)
    )


def test_a_calibration_behind_it_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[OODAlarm(), TemperatureScaling()], max_epochs=1)
    with pytest.raises(InputError, match="OODAlarm stands before TemperatureScaling"):
        trainer.fit(UsersModule(), loader("classification", TRAIN), loader("classification", VAL))


def test_a_mean_without_a_density_is_refused_before_the_training(tmp_path):
    class Regressor(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(FEATURES, 1)
            self.steps = 0

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Regressor()
    trainer = quiet_trainer(tmp_path, callbacks=[OODAlarm(task=Regression(head="mean"))], max_epochs=1)
    with pytest.raises(InputError, match="finds no score 'epistemic_variance'.*Put a density, such as FitGMM, before"):
        trainer.fit(module, loader("regression", TRAIN), loader("regression", VAL))
    assert module.steps == 0
    alarm = OODAlarm(task=Regression(head="mean"), attach=True)
    gmm = FitGMM(task=Regression(head="mean"), attach=True, feature_transform="raw")
    trainer = quiet_trainer(tmp_path, callbacks=[gmm, alarm], max_epochs=1)
    trainer.fit(module, loader("regression", TRAIN), loader("regression", 60))
    assert alarm.state["score_name"] == "ood_score"


def test_without_a_trainer_the_density_is_named(tmp_path):
    module = UsersModule()
    gmm = FitGMM(feature_transform="raw").fit(module, loader("classification", TRAIN))
    alarm = OODAlarm().fit(module, rows(60), after=[gmm])
    assert alarm.state["score_name"] == "ood_score"
    assert torch.allclose(alarm.scores, gmm.score(module, rows(60)).sort().values)
    prediction = alarm.predict(module, torch.zeros(3, FEATURES))
    assert torch.equal(prediction.ood_alarm, prediction.ood_score > alarm.threshold)
    assert prediction.has("log_density")
    with pytest.raises(NotFittedError):
        OODAlarm().fit(module, rows(60), after=[FitGMM()])
    with pytest.raises(InputError, match="`after` must hold fitted callbacks, but it holds a str"):
        OODAlarm().fit(module, rows(60), after=["gmm"])
    ours = DeterministicModule(network())
    with pytest.raises(InputError, match="`after` is not needed for a DeterministicModule"):
        OODAlarm().fit(
            ours, rows(60), after=[FitGMM(feature_transform="raw").fit(ours, loader("classification", TRAIN))]
        )


@pytest.mark.parametrize(
    "make", [partial(FitGMM, feature_transform="raw"), partial(FitKNN, k=3), partial(FitViM, dim=2)]
)
def test_a_density_that_was_fitted_again_is_refused(make):
    """The weights are the same, but the scores are others: the alarm's threshold would be wrong."""
    module = DeterministicModule(network())
    make().fit(module, loader("classification", TRAIN))
    alarm = OODAlarm().fit(module, rows(60))
    before = module.predict(torch.zeros(2, FEATURES))
    assert before.has("ood_alarm")
    assert alarm.state["score_name"] == "ood_score"
    make().fit(module, loader("classification", TRAIN))  # to the same rows: nothing changes
    assert torch.allclose(module.predict(torch.zeros(2, FEATURES)).ood_p_value, before.ood_p_value)
    make().fit(module, loader("classification", TRAIN // 2, 5))
    with pytest.raises(
        InputError, match="fitted to the `ood_score` of another density or distance than this prediction's"
    ):
        module.predict(torch.zeros(2, FEATURES))
    with pytest.raises(InputError, match="another density or distance"):
        OODAlarm.from_json(alarm.to_json()).change(before.replace(score_summary=before.score_summary + 1))


@pytest.mark.parametrize("make", [FitGMM, partial(FitKNN, k=3, feature_transform="combined")])
def test_rows_that_a_density_was_fitted_to_are_noticed(make):
    module, val = DeterministicModule(network()), loader("classification", 60, 1)
    make(held_out=val).fit(module, loader("classification", TRAIN))
    with pytest.warns(UserWarning, match="the density before it were fitted to the same 60 held-out rows"):
        OODAlarm().fit(module, val)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OODAlarm().fit(module, loader("classification", 60, 2))


def test_the_score_of_another_alarm_is_not_that_of_the_density():
    prediction = unsure(100).replace(ood_score=torch.arange(100.0) + 50, score_summary=torch.ones(2, 3))
    of_density = OODAlarm(name="density").fit_predictions(prediction)
    of_entropy = OODAlarm(name="entropy", score="predictive_entropy").fit_predictions(prediction)
    once = of_density.change(prediction)
    assert torch.equal(of_density.change(once).ood_p_value, once.ood_p_value)
    assert torch.equal(of_entropy.change(once).ood_p_value, of_entropy.change(prediction).ood_p_value)
    with pytest.raises(InputError, match="carries the result of another alarm, which replaced the `ood_score`"):
        of_density.change(of_entropy.change(prediction))
    with pytest.raises(
        InputError, match="carries the result of another alarm, which replaced .* Pass the name of a `score`"
    ):
        OODAlarm().fit_predictions(of_entropy.change(prediction))
    assert torch.equal(OODAlarm().fit_predictions(once).scores, of_density.scores)


def test_maps_have_one_alarm_per_image():
    module = UNet(2).eval()
    task = Segmentation(ignore_index=255)
    for reduction in ("mean", "max"):
        alarm = OODAlarm(task=task, false_alarm_rate=0.2, map_reduction=reduction).fit(module, pictures(16, 0))
        x = torch.stack([picture for picture, _ in pictures(6, 1).dataset])
        prediction = alarm.predict(module, x)
        maps = prediction.score("predictive_entropy").flatten(1)
        assert torch.equal(prediction.ood_score, maps.mean(1) if reduction == "mean" else maps.amax(1))
        assert prediction.ood_alarm.shape == (6,)


def test_an_input_that_is_not_finite_raises_an_alarm_even_where_no_finite_one_can(tmp_path):
    module = UsersModule()
    with pytest.warns(
        UserWarning, match="8 held-out rows are too few for false_alarm_rate=0.05, which needs at least 19"
    ):
        alarm = OODAlarm(nonfinite="inf").fit(module, rows(8))
    x = torch.zeros(3, FEATURES)
    x[1, 2] = math.nan
    prediction = alarm.predict(module, x)
    assert prediction.ood_alarm.tolist() == [False, True, False]
    assert prediction.ood_p_value[1] == 0
    assert prediction.ood_score[1] == math.inf
    assert alarm.discoveries(prediction).tolist() == [False, True, False]


def test_scores_that_are_not_finite_are_refused_in_the_fit():
    bad = GaussianMixturePrediction(torch.zeros(1, 30, 1), torch.full((1, 30, 1), math.inf))
    with pytest.raises(InputError, match="must have finite scores, but 30 of 30 scores 'variance' are infinite or NaN"):
        OODAlarm(score="variance").fit_predictions(bad)


def test_json_holds_all_of_it():
    held_out = unsure(200)
    held_out = held_out.replace(temperature=torch.tensor(1.5, dtype=torch.float64))
    alarm = OODAlarm(score="predictive_entropy", false_alarm_rate=0.1, delta=0.2).fit_predictions(held_out)
    again, new = OODAlarm.from_json(alarm.to_json()), held_out[:50]
    for name in ("ood_score", "ood_p_value", "ood_alarm"):
        assert torch.equal(getattr(again.change(new), name), getattr(alarm.change(new), name))
    with pytest.raises(
        InputError, match="fitted to predictions with a temperature of 1.5, but this one has no temperature"
    ):
        again.change(new.replace(temperature=None))
    with pytest.warns(UserWarning, match="too few"):
        few = OODAlarm(score="predictive_entropy").fit_predictions(unsure(5))
    assert OODAlarm.from_json(json.dumps(json.loads(few.to_json()))).threshold == math.inf


def test_a_file_gives_the_alarm_without_the_model(tmp_path):
    module = UsersModule()
    one = OODAlarm(false_alarm_rate=0.1, delta=0.2).fit(module, rows(90))
    save_fitted(tmp_path / "a.ckpt", module, [one])
    again, new = OODAlarm.from_checkpoint(tmp_path / "a.ckpt"), unsure(20)
    assert torch.equal(again.change(new).ood_p_value, one.change(new).ood_p_value)
    assert (again.false_alarm_rate, again.delta, again.threshold) == (0.1, 0.2, one.threshold)
    other = OODAlarm(score="max_softmax", name="other").fit(module, rows(90))
    save_fitted(tmp_path / "a.ckpt", module, [one, other])
    assert OODAlarm.from_checkpoint(tmp_path / "a.ckpt", name="other").threshold == other.threshold
    with pytest.raises(InputError, match=r"must hold exactly one alarm, but it holds \['OODAlarm', .*other"):
        OODAlarm.from_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="must hold exactly one alarm with name 'third', but it holds"):
        OODAlarm.from_checkpoint(tmp_path / "a.ckpt", name="third")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "must be JSON that `to_json` wrote, but it cannot be read"),
        ("[]", "must be JSON of lightning_uq.OODAlarm, but it holds list"),
        ('{"format": "lightning_uq.DriftMonitor"}', "but it holds lightning_uq.DriftMonitor"),
        ('{"format": "lightning_uq.OODAlarm", "version": 2}', "has version 2 of the format lightning_uq.OODAlarm, but this version .* reads 1"),
        ('{"format": "lightning_uq.OODAlarm", "version": 1}', "`text` is damaged: KeyError"),
    ],
)  # fmt: skip
def test_other_text_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        OODAlarm.from_json(text)


def test_another_calibration_is_refused():
    alarm = OODAlarm(score="predictive_entropy").fit_predictions(unsure(100))
    with pytest.raises(InputError, match="OODAlarm was fitted to predictions with no temperature"):
        alarm.change(unsure(5).replace(temperature=torch.tensor(2.0)))


def test_tables_have_the_columns(tmp_path):
    module = DeterministicModule(network())
    alarm = OODAlarm(unpack_batch=inputs_only).fit(module, rows(100))
    for format in ("csv", "parquet"):
        writer = PredictionWriter(tmp_path / format, format=format)
        trainer = quiet_trainer(tmp_path, callbacks=[writer])
        trainer.predict(module, rows(30, 1), return_predictions=False)
        table = read_predictions(tmp_path / format)
        (x,) = next(iter(rows(30, 1, batch_size=30)))
        prediction = module.predict(x)
        assert table["ood_alarm"].dtype == bool
        assert table["ood_alarm"].tolist() == prediction.ood_alarm.tolist()
        assert table["ood_p_value"].tolist() == pytest.approx(prediction.ood_p_value.tolist(), abs=0.011)
        assert table["ood_score"].tolist() == pytest.approx(prediction.ood_score.tolist(), rel=1e-5)
    assert alarm.fitted


def test_a_file_gives_a_module_with_the_alarm_inside(tmp_path):
    module = UsersModule()
    callbacks = [FitGMM(feature_transform="raw"), TemperatureScaling(), OODAlarm(false_alarm_rate=0.1)]
    trainer = quiet_trainer(tmp_path, callbacks=[*callbacks], max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, loader("classification", TRAIN), loader("classification", 80, 1))
    fitted = load_fitted(callbacks[-1].uq_ckpt_path, UsersModule(), nonfinite="inf")
    x = torch.randn(9, FEATURES)
    x[4, 0] = math.inf
    found = fitted(x)
    assert list(found) == ["probs", "log_density", "ood_score", "ood_p_value", "ood_alarm"]
    ok = [row for row in range(9) if row != 4]
    assert torch.equal(found["ood_p_value"][ok], conformal_p_values(found["ood_score"][ok], callbacks[-1].scores))
    assert (found["ood_p_value"][4], bool(found["ood_alarm"][4]), found["ood_score"][4]) == (0, True, math.inf)
    batch = ({0: torch.export.Dim("batch", max=2**62)},)
    graph = torch.export.export(fitted, (x,), dynamic_shapes=batch, strict=False).module()
    for part in (x, x[:1], x[3:6]):
        for name, values in graph(part).items():
            torch.testing.assert_close(values, fitted(part)[name], equal_nan=True)


@pytest.mark.parametrize("score", ["vacuity", "mutual_information", "expected_entropy"])
def test_a_file_of_a_dirichlet_keeps_its_scores(score, tmp_path):
    """The log of its mean is no Dirichlet: its mutual information would be 0."""
    module = EvidentialModule(network())
    alarm = OODAlarm(score=score).fit(module, rows(200))
    save_fitted(tmp_path / "m-uq.ckpt", module, [alarm])
    fitted, x = load_fitted(tmp_path / "m-uq.ckpt", module), torch.randn(60, FEATURES)
    found, expected = fitted(x), alarm.predict(module, x)
    for name in ("probs", "ood_score", "ood_p_value", "ood_alarm"):
        torch.testing.assert_close(found[name], getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert float(found["ood_score"].std()) > 0
    export_fitted(fitted, tmp_path / "m.pt2", x)


def test_the_alarm_does_not_disturb_sets():
    module = DeterministicModule(network())
    sets = ConformalSets().fit(module, loader("classification", 100))
    alarm = OODAlarm().fit(module, loader("classification", 100))
    prediction = module.predict(torch.zeros(2, FEATURES))
    assert prediction.has("prediction_set")
    assert prediction.has("ood_alarm")
    assert sets.fitted
    assert alarm.fitted


def test_the_metric_is_the_share():
    metric = OODAlarmRate()
    for alarms in ([True, False, False], [False]):
        metric.update(unsure(len(alarms)).replace(ood_alarm=torch.tensor(alarms)), torch.zeros(len(alarms)))
    assert metric.compute() == 0.25
    with pytest.raises(NotFittedError, match="carries no `ood_alarm`"):
        metric.update(unsure(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_alarm_rate": 0.0}, r"`false_alarm_rate` must be a number in \(0, 1\)"),
        ({"delta": 1.0}, r"`delta` must be a number in \(0, 1\)"),
        ({"map_reduction": "sum"}, "`map_reduction` must be"),
        ({"score": torch.max}, "`score` must be the name of a score or None, but its type is builtin"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        OODAlarm(**arguments)


def test_predictions_in_memory_need_a_score_or_a_name():
    with pytest.raises(InputError, match="`score` is needed to fit predictions in memory.*predictive_entropy"):
        OODAlarm().fit_predictions(unsure(30))
    with pytest.raises(InputError, match="finds no score 'variance'"):
        OODAlarm(score="variance").fit_predictions(unsure(30))
    with pytest.raises(InputError, match="finds no score 'epistemic_variance'"):
        OODAlarm(score="epistemic_variance").fit_predictions(PointPrediction(torch.zeros(1, 30, 1)))
    alarm = OODAlarm().fit_predictions(unsure(30).replace(ood_score=torch.arange(30.0)))
    assert alarm.state["score_name"] == "ood_score"
    with pytest.raises(InputError, match="must hold at least one row"):
        OODAlarm(score="energy").fit_predictions(unsure(0))


@pytest.mark.parametrize("scores", [torch.rand(30), torch.rand(30).numpy()])
def test_scores_without_a_model_are_told_where_to_go(scores):
    alarm = OODAlarm(score="predictive_entropy").fit_predictions(unsure(30))
    for use in (alarm.fit_predictions, alarm.change, alarm.discoveries):
        with pytest.raises(InputError, match="`prediction` must be a prediction.*`benjamini_hochberg`"):
            use(scores)


def test_the_model_takes_batches_and_the_alarm_of_a_text_has_no_model():
    module, held_out = UsersModule(), loader("classification", 100)
    alarm = OODAlarm().fit(module, held_out)
    with pytest.raises(InputError, match="`x` must be inputs or one batch, but it is a DataLoader"):
        alarm.predict(module, held_out)
    with pytest.raises(
        NotFittedError, match="OODAlarm does not know its model's weights.* Pass predictions to `change`"
    ):
        OODAlarm.from_json(alarm.to_json()).predict(module, torch.zeros(2, FEATURES))


def test_no_row_is_lost_or_counted_twice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alarm = OODAlarm(score="energy", max_rows=50).fit_predictions(unsure(80))
    assert len(alarm.scores) == 80  # in memory, all are taken
    module = UsersModule()
    assert len(OODAlarm(max_rows=50).fit(module, rows(80)).scores) == 50
