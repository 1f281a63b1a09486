"""Prediction sets: their coverage, their equality with another library's, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq import ConformalSets, DeterministicModule, EnsembleModule, EvidentialModule, TemperatureScaling
from lightning_uq.callbacks import PredictionWriter, read_predictions
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction, PointPrediction
from lightning_uq.tasks import Segmentation
from tests.callbacks.conformal import labelled, pairs, resplit
from tests.contract import cases

NUM = 1500
METHODS = [("lac", False), ("aps", True), ("raps", True)]
REFERENCE = {
    key: torch.from_numpy(value)
    for key, value in np.load(Path(__file__).parents[1] / "reference/conformal.npz").items()
}


def covered_by(sets, target):
    return sets.gather(1, target[:, None]).squeeze(1)


def fitted_on(conformal, rows, fitted):
    """Fit some of the rows that were reduced once."""
    conformal._set(conformal.fit_rows(*(part[fitted] for part in rows)), None)
    return conformal


# ---------------------------------------------------------------------- coverage


@pytest.mark.parametrize(("method", "randomized"), METHODS)
def test_coverage_over_a_thousand_resplits(method, randomized):
    prediction, target = labelled(NUM)
    conformal = ConformalSets(method=method, randomized=randomized)
    rows = conformal.rows(prediction, target)

    def covered(fitted, others):
        return (rows[0][others] <= fitted_on(conformal, rows, fitted).threshold).double().mean()

    assert resplit(NUM, covered).mean().item() == pytest.approx(0.9, abs=0.003)
    # The sets hold exactly the classes with such scores, and come from predictions alone.
    one = ConformalSets(method=method, randomized=randomized).fit_predictions(prediction[:499], target[:499])
    found = covered_by(one.sets(prediction[499:]), target[499:])
    assert torch.equal(found, rows[0][499:] <= one.threshold)
    assert torch.equal(one.change(prediction[499:]).prediction_set, one.sets(prediction[499:]))


def test_coverage_of_rows_whose_network_is_wrong():
    prediction, _ = labelled(NUM)
    target = torch.arange(NUM) % 5
    conformal = ConformalSets()
    rows = conformal.rows(prediction, target)
    found = resplit(NUM, lambda a, b: (rows[0][b] <= fitted_on(conformal, rows, a).threshold).double().mean())
    assert found.mean().item() == pytest.approx(0.9, abs=0.003)


def test_coverage_within_each_class():
    prediction, target = labelled(NUM, num_classes=3)
    marginal, conformal = ConformalSets(), ConformalSets(by_class=True)
    rows = conformal.rows(prediction.replace(logits=prediction.logits * torch.tensor([3.0, 1.0, 0.3])), target)

    def covered(fitted, others):
        found = []
        for one in (conformal, marginal):
            inside = rows[0][others] <= fitted_on(one, rows, fitted).threshold.expand(3)[target[others]]
            found.append(torch.stack([inside[target[others] == c].double().mean() for c in range(3)]))
        return torch.stack(found)

    by_class, over_all = resplit(NUM, covered).mean(0)
    assert float(by_class.min()) > 0.897
    assert float(by_class.max()) < 0.9 + 1 / 140  # the smallest class has some 150 rows: one rank more
    assert float(over_all.max() - over_all.min()) > 0.02  # else nothing was shown


def test_without_empty_sets_the_coverage_is_at_least_the_accuracy():
    prediction, target = labelled(NUM, spread=16.0)
    accuracy = (prediction.label == target).double().mean()
    assert accuracy > 0.92
    coverage = {}
    for allow_empty in (True, False):
        conformal = ConformalSets(allow_empty=allow_empty).fit_predictions(prediction[:499], target[:499])
        sets = conformal.sets(prediction)
        coverage[allow_empty] = covered_by(sets, target).double().mean()
        assert bool((sets.sum(1) == 0).any()) == allow_empty
    assert coverage[True].item() == pytest.approx(0.9, abs=0.02)
    assert coverage[False] >= accuracy


def test_without_draws_aps_covers_more():
    prediction, target = labelled(NUM, spread=3.0)
    sizes, coverage = {}, {}
    for randomized in (True, False):
        one = ConformalSets(method="aps", randomized=randomized).fit_predictions(prediction[:499], target[:499])
        sets = one.sets(prediction)
        sizes[randomized], coverage[randomized] = sets.sum(1).double().mean(), covered_by(sets, target).double().mean()
    assert sizes[False] > sizes[True] + 0.2


def test_coverage_under_a_known_covariate_shift():
    """Inputs move from N(0, 1) to N(1, 1), where labels are at random."""
    generator = torch.Generator().manual_seed(0)

    def draw(num, shift):
        x = torch.randn(num, generator=generator) + shift
        y = (torch.rand(num, generator=generator) < torch.where(x > 0, 0.5, 0.05)).long()
        logits = torch.stack([2 + 0.5 * torch.randn(num, generator=generator), torch.zeros(num)], 1)
        return x, CategoricalPrediction(logits[None]), y

    def ratio(x):
        return (x - 0.5).exp()

    found = []
    for _ in range(200):
        x, prediction, y = draw(500, 0.0)
        new_x, new, new_y = draw(200, 1.0)
        weighted = ConformalSets(alpha=0.2, density_ratio=ratio).fit_predictions(prediction, y, weights=ratio(x))
        plain = ConformalSets(alpha=0.2).fit_predictions(prediction, y)
        sets = weighted.sets(new, weights=ratio(new_x)), plain.sets(new)
        found.append([covered_by(one, new_y).double().mean() for one in sets])
    of_weighted, of_plain = torch.tensor(found).mean(0).tolist()
    assert 0.79 < of_weighted < 0.83
    assert of_plain < 0.75  # else nothing was shown


# ---------------------------------------------------------------------- equal to others


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("name", ["lac", "aps", "aps_randomized", "raps", "raps_randomized"])
def test_sets_are_those_of_torchcp(name, by_class):
    method, _, randomized = name.partition("_")
    prediction, target, uniforms = (
        CategoricalPrediction(REFERENCE["logits"][None]),
        REFERENCE["target"],
        REFERENCE["uniforms"],
    )
    conformal = ConformalSets(
        alpha=0.2, method=method, randomized=bool(randomized), by_class=by_class, penalty=0.02, k_reg=2
    )
    pinned = {"uniforms": uniforms[:100]} if randomized else {}
    conformal.fit_predictions(prediction[:100], target[:100], **pinned)
    found = conformal.sets(prediction[100:], uniforms=uniforms[100:] if randomized else None)
    assert torch.equal(found, REFERENCE[f"{name}_{'by_class' if by_class else 'marginal'}"])


# ---------------------------------------------------------------------- draws


def test_draws_hardly_depend_on_the_batches():
    """The probabilities of one row differ by rounding from batch to batch; its set must not."""
    network = cases.network().eval()
    x, y = cases.rows(500)
    module = DeterministicModule(network)
    conformal = ConformalSets(method="aps", randomized=True).fit(module, pairs(x, y, batch_size=64))
    whole = module.predict(x).prediction_set
    single = torch.cat([module.predict(row[None]).prediction_set for row in x])
    assert (whole != single).any(1).double().mean() < 0.01
    again = ConformalSets(method="aps", randomized=True).fit(module, pairs(x, y, batch_size=1))
    torch.testing.assert_close(conformal.threshold, again.threshold, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------- tasks


def own_module(name):
    sgd = cases.OPTIMIZERS["classification"]
    return {
        "binary": lambda: DeterministicModule(cases.binary_network, task="binary", optimizer=sgd),
        "segmentation": lambda: DeterministicModule(
            cases.map_network, task=Segmentation(ignore_index=2), optimizer=sgd
        ),
        "tokens": lambda: DeterministicModule(cases.token_network, task=cases.TOKENS, optimizer=sgd),
        "evidential": lambda: EvidentialModule(cases.network, optimizer=sgd),
        "ensemble": lambda: EnsembleModule(cases.network, num_members=3, seed=0, optimizer=sgd),
        "pooled": lambda: EnsembleModule(cases.network, num_members=33, seed=0, optimizer=sgd),
    }[name]()


SHAPES = {"binary": (2,), "segmentation": (3, 2, 2), "tokens": (3, 4)}


@pytest.mark.filterwarnings("ignore:.*no finite positive temperature")
@pytest.mark.parametrize("name", ["binary", "segmentation", "tokens", "evidential", "ensemble", "pooled"])
def test_every_task_and_kind_of_module_has_sets(make_trainer, tmp_path, name):
    kind = name if name in SHAPES else "classification"
    module, conformal = own_module(name), ConformalSets()
    writer = PredictionWriter(tmp_path / "p", format="npz")
    trainer = make_trainer(callbacks=[TemperatureScaling(), conformal, writer])
    trainer.fit(module, cases.loader(kind, 40), cases.loader(kind, 61, 1))
    (tested,) = trainer.test(module, cases.loader(kind, 61, 1), verbose=False)  # the fitted rows themselves
    assert tested["uq/test_coverage"] >= 0.9
    predictions = trainer.predict(module, cases.loader(kind, 27, 2))
    sets = type(predictions[0]).cat(predictions).prediction_set
    assert sets.shape == (27, *SHAPES.get(name, (3,)))
    assert sets.dtype == torch.bool
    written = read_predictions(tmp_path / "p")
    assert np.array_equal(written["prediction_set"], sets.numpy())
    assert np.array_equal(written["set_size"], sets.sum(1).numpy())


def test_pixels_that_do_not_count_are_left_out():
    module = own_module("segmentation")
    maps = cases.dataset("segmentation", 61, 1)
    conformal = ConformalSets().fit(module, pairs(*maps.tensors))
    x, y = maps.tensors
    prediction = module.prediction(module(x)).as_rows()
    counts = y.flatten() != 2
    direct = ConformalSets().fit_predictions(prediction[counts], y.flatten()[counts])
    assert len(direct.state["scores"]) == int(counts.sum()) < y.numel()
    torch.testing.assert_close(conformal.threshold, direct.threshold)
    few = ConformalSets(max_rows=50).fit(module, pairs(x, y, batch_size=8))
    other = ConformalSets(max_rows=50).fit(module, pairs(x, y, batch_size=61))
    assert len(few.state["scores"]) == 50
    torch.testing.assert_close(few.state["scores"], other.state["scores"])  # one sample in any batches


@pytest.mark.parametrize("randomized", [False, True])
def test_an_input_that_is_not_finite_gets_all_classes(randomized):
    module = own_module("ensemble")
    module.nonfinite = "inf"
    ConformalSets(method="raps", randomized=randomized).fit(module, cases.loader("classification", 61, 1))
    x, _ = cases.rows(6)
    x[2, 0], x[4] = torch.inf, torch.nan
    sets = module.predict(x).prediction_set
    assert bool(sets[[2, 4]].all())
    x[[2, 4]] = 0.0
    assert torch.equal(module.predict(x).prediction_set[[0, 1, 3, 5]], sets[[0, 1, 3, 5]])


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.0}, "`alpha` must"),
        ({"alpha": 1.0}, "`alpha` must"),
        ({"alpha": float("nan")}, "`alpha` must"),
        ({"method": "topk"}, "`method` must be"),
        ({"randomized": True}, "`randomized` needs method='aps' or 'raps'"),
        ({"by_class": 1}, "`by_class` must"),
        ({"by_class": True, "density_ratio": torch.ones_like}, "`by_class` and `density_ratio` cannot be combined"),
        ({"penalty": -1.0}, "`penalty` must"),
        ({"k_reg": 1.5}, "`k_reg` must"),
        ({"max_rows": 0}, "`max_rows` must"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        ConformalSets(**kwargs)


PREDICTION, TARGET = labelled(40, num_classes=3)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (PREDICTION[:0], TARGET[:0], "at least one row"),
        (PREDICTION, TARGET[:5], "`target` must"),
        (PREDICTION, TARGET + 1, "`target` must"),
        (PREDICTION, TARGET.float(), "`target` must"),
        (
            PointPrediction(torch.zeros(1, 40, 1)),
            torch.zeros(40, 1),
            "must predict classes, but it is a PointPrediction",
        ),
        (BernoulliPrediction(torch.zeros(1, 40, 3)), torch.zeros(40, 3), "must predict classes, but it is a Bernoulli"),
        (CategoricalPrediction(torch.zeros(1, 2, 3, 4)), torch.zeros(2, 4).long(), r"Pass `prediction.as_rows\(\)`"),
    ],
)
def test_predictions_that_cannot_be_fitted(prediction, target, message):
    with pytest.raises(InputError, match=message):
        ConformalSets().fit_predictions(prediction, target)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(40), "`density_ratio` must be positive for some of the fitted rows"),
        (torch.full((40,), torch.nan), "`weights` must be finite"),
        (-torch.ones(40), "`weights` must be finite and non-negative"),
        (torch.ones(40, dtype=torch.long), "`weights` must be a floating-point tensor"),
        (torch.ones(3), r"`weights` must be a tensor with one number per row, \[40\], but its shape is \[3\]"),
        ([1.0] * 40, "but it is a list"),
    ],
)
def test_density_ratios_that_cannot_be_used(weights, message):
    with pytest.raises(InputError, match=message):
        ConformalSets(density_ratio=torch.ones_like).fit_predictions(PREDICTION, TARGET, weights=weights)


def test_density_ratios_must_be_where_they_belong():
    with pytest.raises(InputError, match="`weights` is missing: ConformalSets has a function"):
        ConformalSets(density_ratio=torch.ones_like).fit_predictions(PREDICTION, TARGET)
    with pytest.raises(InputError, match="`groups` and `weights` exclude each other"):
        ConformalSets(by_class=True).fit_predictions(PREDICTION, TARGET, weights=torch.ones(40))
    with pytest.raises(
        InputError, match="unknown argument 'groups'. Besides predictions and targets, it takes weights, uniforms"
    ):
        ConformalSets().fit_predictions(PREDICTION, TARGET, groups=TARGET)
    weighted = ConformalSets(density_ratio=torch.ones_like).fit_predictions(PREDICTION, TARGET, weights=torch.ones(40))
    with pytest.raises(
        InputError, match="`weights` of ConformalSets depends on the input, which `change` does not get"
    ):
        weighted.change(PREDICTION)  # it must not come back without sets
    with pytest.raises(InputError, match="`weights` of the new rows are missing"):
        weighted.sets(PREDICTION)
    assert torch.equal(
        weighted.sets(PREDICTION, weights=torch.ones(40)),
        ConformalSets().fit_predictions(PREDICTION, TARGET).sets(PREDICTION),
    )


def test_what_is_not_fitted_or_of_other_classes():
    for use in (
        lambda c: c.sets(PREDICTION),
        lambda c: c.threshold,
        lambda c: c.change(PREDICTION),
        lambda c: c.stream(),
    ):
        with pytest.raises(NotFittedError, match="ConformalSets is not fitted: train with it, or call"):
            use(ConformalSets())
    with pytest.raises(InputError, match="`prediction` must have 3 classes like the fitted rows, but it has 5"):
        ConformalSets().fit_predictions(PREDICTION, TARGET).sets(labelled(4)[0])


def test_too_few_rows_give_all_classes_and_a_warning():
    with pytest.warns(UserWarning, match="gives sets with all classes: alpha=0.1 needs 9 rows, but there are 8"):
        few = ConformalSets().fit_predictions(PREDICTION[:8], TARGET[:8])
    assert bool(few.sets(PREDICTION).all())
    rare = torch.where(TARGET == 2, 0, TARGET)
    with pytest.warns(UserWarning, match=r"puts classes \[2\] into every set"):
        by_class = ConformalSets(by_class=True).fit_predictions(PREDICTION, rare)
    assert by_class.threshold[2] == torch.inf
    assert bool(by_class.sets(PREDICTION)[:, 2].all())
    assert not bool(by_class.sets(PREDICTION).all())


def test_another_level_needs_no_other_fit():
    conformal = ConformalSets().fit_predictions(PREDICTION, TARGET)
    wide = ConformalSets(alpha=0.05).fit_predictions(PREDICTION, TARGET)
    assert torch.equal(conformal.sets(PREDICTION, alpha=0.05), wide.sets(PREDICTION))
    conformal.alpha = 0.05
    assert torch.equal(conformal.change(PREDICTION).prediction_set, wide.sets(PREDICTION))
    other = ConformalSets(alpha=0.05)
    other.load_state_dict(ConformalSets().fit_predictions(PREDICTION, TARGET).state_dict())
    assert torch.equal(other.sets(PREDICTION), wide.sets(PREDICTION))
    with pytest.raises(InputError, match="by_class"):
        ConformalSets(by_class=True).load_state_dict(conformal.state_dict())


@pytest.mark.parametrize(
    ("task", "data", "network"),
    [("multilabel", "multilabel", cases.network), ("regression", "regression", cases.gaussian_network)],
)
def test_tasks_without_classes_are_refused_before_the_training(make_trainer, task, data, network):
    module = DeterministicModule(network, task=task, optimizer=cases.OPTIMIZERS[data])
    with pytest.raises(InputError, match="ConformalSets makes sets of classes, but .* has no classes"):
        make_trainer(callbacks=[ConformalSets()]).fit(module, cases.loader(data, 40), cases.loader(data, 61, 1))


def test_labels_that_are_missing_or_soft_are_refused_before_the_training(make_trainer):
    x, y = cases.rows(40)

    class Silent(cases.UsersModule):
        def validation_step(self, batch, batch_idx):
            pass

    for val, message in (
        (
            pairs(x, nn.functional.one_hot(y, 3).float()),
            "must have labels, but the targets of a batch are probabilities",
        ),
        (torch.utils.data.DataLoader(x, 8), "must have targets, but a batch has none"),
        (pairs(x, y - 1), "does not fit Classification"),
        (pairs(x[:0], y[:0]), "fitting data are empty"),
    ):
        module = Silent()
        before = [p.clone() for p in module.parameters()]
        with pytest.raises(InputError, match=f"ConformalSets's fitting data.*{message}|{message}"):
            make_trainer(callbacks=[ConformalSets()]).fit(module, pairs(x, y), val)
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
