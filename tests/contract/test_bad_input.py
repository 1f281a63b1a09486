"""Bad input gives one clear error that names what is wrong, and leaves nothing half-fitted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_uq.errors import InputError, NotFittedError, UQError
from tests.contract.cases import CLASSES, FEATURES, UsersModule, dataset, loader, rows
from tests.contract.running import TRAIN, VAL, assert_finite

# One check in the base refuses each kind of bad input: these cases reach it with labels, with numbers, and through members
# that are LightningModules; the callbacks share one reader. The full product is in `make test-slow`.
pytestmark = pytest.mark.represented_by(
    "Deterministic",
    "Deterministic, regression",
    "Ensemble of a user's modules",
    "FitGMM",
    "VectorScaling",
    "OODDetection",
)

KIND = "classification"
NAN, INF = math.nan, math.inf


def poisoned(task, value, num=TRAIN, where=(5, 1)):
    x, y = dataset(task, num).tensors
    x = x.clone()
    x[where] = value
    return DataLoader(TensorDataset(x, y), batch_size=8)


def run(trainer, stage, module, data):
    if stage == "predict":
        return trainer.predict(module, data)
    return getattr(trainer, stage)(module, data)


STAGES = ["fit", "validate", "test", "predict"]
BAD = {
    "nan": (lambda task: poisoned(task, NAN), "input must be finite, but 1 of 8 rows of batch 0"),
    "inf": (lambda task: poisoned(task, INF), "input must be finite, but 1 of 8 rows of batch 0"),
    "late -inf": (lambda task: poisoned(task, -INF, where=(17, 0)), "input must be finite, but 1 of 8 rows of batch 2"),
}


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bad", BAD)
def test_inputs_that_are_not_finite(make_trainer, module_case, stage, bad):
    make, match = BAD[bad]
    if stage == "fit" and "user's" in module_case.name:
        pytest.skip("a user's own `training_step` looks at its input itself")
    with pytest.raises(InputError, match=match):
        run(make_trainer(), stage, module_case.build(), make(module_case.task))


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_not_finite(make_trainer, module_case, stage):
    module = module_case.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(NAN)
    if stage == "fit" and is_of_users(module):
        pytest.skip("the loss of a user's own `training_step` is theirs")
    with pytest.raises(InputError, match="finite"):
        run(make_trainer(num_sanity_val_steps=0), stage, module, loader(module_case.task, TRAIN))


def is_of_users(module):
    return getattr(module, "members", None) is not None


@pytest.mark.axis("bad input")
@pytest.mark.every_case
@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_inputs_of_the_wrong_width(make_trainer, module_case, stage):
    module = module_case.build()
    if stage == "fit" and is_of_users(module):
        pytest.skip("a user's own `training_step` raises torch's error")
    x, y = dataset(module_case.task, 8).tensors
    wide = DataLoader(TensorDataset(torch.cat([x, x], 1), y), batch_size=8)
    with pytest.raises(InputError, match=rf"input.*\b{2 * FEATURES}\b"):
        run(make_trainer(num_sanity_val_steps=0), stage, module, wide)


LABELS = {
    "floating": (lambda y: y.float(), "integer class labels, but they are torch.float32"),
    "boolean": (lambda y: y > 0, "integer class labels, but they are torch.bool"),
    "too large": (lambda y: y + 2, r"class labels in \[0, 3\), but their values go from 2 to 4"),
    "negative": (lambda y: y - 1, r"class labels in \[0, 3\), but their values go from -1 to 1"),
    "one-hot": (
        lambda y: torch.nn.functional.one_hot(y, CLASSES),
        r"class labels must have shape \[9\].*but they have \[9, 3\]",
    ),
    "a column": (lambda y: y[:, None], r"class labels must have shape \[9\].*but they have \[9, 1\]"),
}
TARGETS = {
    "whole numbers": (lambda y: y.long(), "floating-point numbers, but they are torch.int64"),
    "inf": (lambda y: y * INF, "targets must be finite"),
    "one of two": (lambda y: y[:, :1], r"targets must have shape \[9, 2\].*but they have \[9, 1\]"),
    "flat": (lambda y: y[:, 0], r"targets must have shape \[9, 2\].*but they have \[9\]"),
}
BINARY = {
    "three classes": (lambda y: y + 1, "targets must be 0 or 1, .*go from 1 to 2"),
    "nan": (lambda y: y * NAN, "targets must be 0 or 1, but they hold NaN"),
    "two columns": (lambda y: y.expand(-1, 2), r"targets must have shape \[9\] or \[9, 1\].*of shape \[9, 2\]"),
}
MULTILABEL = {
    "three classes": (lambda y: 2 * y, "targets must be 0 or 1, .*go from 0 to 2"),
    "inf": (lambda y: y + INF, "targets must be 0 or 1, .*go from inf to inf"),
    "one of three": (lambda y: y[:, :1], r"targets must have shape \[9, 3\].*of shape \[9, 1\]"),
    "flat": (lambda y: y[:, 0], r"targets must have shape \[9, 3\].*of shape \[9\]. Pass `task=Classification"),
}
MAPS = {name: LABELS[name] for name in ("floating", "boolean", "too large", "negative")}
MAPS["flat"] = (lambda y: y[:, 0], r"class labels must have shape \[9, 2, 2\].*but they have \[9, 2\]")
TOKENS = {name: LABELS[name] for name in ("floating", "boolean")}
TOKENS["too large"] = (lambda y: y + 200, r"class labels in \[0, 3\), but their values go from")
TOKENS["flat"] = (lambda y: y[:, 0], r"class labels must have shape \[9, 4\].*but they have \[9\]")
HORIZON = {
    "whole numbers": (lambda y: y.nan_to_num().long(), "floating-point numbers, but they are torch.int64"),
    "inf": (lambda y: y * INF, "targets must be finite"),
    "a step less": (lambda y: y[:, :2], r"targets must have shape \[9, 3, 2\].*but they have \[9, 2, 2\]"),
}
WRONG = {
    "tokens": TOKENS,
    "horizon": HORIZON,
    "classification": LABELS,
    "binary": BINARY,
    "multilabel": MULTILABEL,
    "segmentation": MAPS,
    "regression": TARGETS,
    "pixel_regression": {
        "whole numbers": (lambda y: y.long(), "floating-point numbers, but they are torch.int64"),
        "inf": (lambda y: y * INF, "infinity"),
        "one row": (lambda y: y[:, :, 0], r"targets must have shape \[9, 1, 2, 2\].*but they have \[9, 1, 2\]"),
    },
}


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_targets_of_the_wrong_kind(make_trainer, module_case, stage):
    x, y = dataset(module_case.task, 9).tensors
    for change, match in WRONG[module_case.task].values():
        module = module_case.build()
        bad = DataLoader(TensorDataset(x, change(y)), batch_size=9)
        # A user's own loss comes first, with torch's error, which names the type in torch 2.6.
        foreign = (Exception, "(?i)target|expected scalar type Long")
        error, text = foreign if is_of_users(module) else (InputError, match)
        with pytest.raises(error, match=text):
            run(make_trainer(num_sanity_val_steps=0), stage, module, bad)


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("targets", [["cat"] * 9, list(range(9))], ids=["words", "a list"])
def test_targets_that_are_no_tensor(make_trainer, module_case, stage, targets):
    module = module_case.build()
    bad = DataLoader([(dataset(module_case.task, 9).tensors[0], targets)], batch_size=None)
    # A user's own loss comes first, with torch's error.
    error, text = (
        (TypeError, "target") if is_of_users(module) else (InputError, "targets of a batch .*but they are a list")
    )
    with pytest.raises(error, match=text):
        run(make_trainer(num_sanity_val_steps=0), stage, module, bad)


class NoRows(IterableDataset):
    """A stream that ends before it begins; nobody knows its length before that."""

    def __iter__(self):
        return iter(())


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("streamed", [False, True], ids=["listed", "streamed"])
@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_no_rows_at_all(make_trainer, module_case, stage, streamed):
    argument = "train_dataloaders" if stage == "fit" else "dataloaders"
    nothing = DataLoader(NoRows(), batch_size=8) if streamed else loader(module_case.task, 0)
    with pytest.raises(InputError, match=f"`{argument}` must hold samples, but it is empty"):
        run(make_trainer(), stage, module_case.build(), nothing)


@pytest.mark.axis("bad input")
@pytest.mark.filterwarnings("ignore:.*[Jj]oint")
def test_one_row(make_trainer, module_case):
    """It is little, and no error."""
    module, trainer, one = module_case.build(), make_trainer(), loader(module_case.task, 1)
    trainer.fit(module, one, one)
    (tested,) = trainer.test(module, one, verbose=False)
    need_more = ("joint", "auroc", "average_precision")  # ten rows, or labels of both values
    assert_finite({name: value for name, value in tested.items() if not any(word in name for word in need_more)})
    (prediction,) = trainer.predict(module, one)
    assert len(prediction) == 1


# ---------------------------------------------------------------------- callbacks: nothing is left half-fitted


def broken(value):
    module = UsersModule()
    with torch.no_grad():
        module.net[0].bias[2] = value
    return module


X, LABEL = rows(VAL)


def pairs(x=X, y=LABEL):
    return DataLoader(TensorDataset(x, y), batch_size=8)


def spoilt(value):
    x = X.clone()
    x[-1, 1] = value  # in the last batch, when most has been read
    return pairs(x)


FITTING_DATA = {
    "nan in an input": (UsersModule, lambda: spoilt(NAN)),
    "infinity in an input": (UsersModule, lambda: spoilt(INF)),
    "nan in the weights": (lambda: broken(NAN), pairs),
    "infinity in the features": (lambda: broken(INF), pairs),
    "no rows": (UsersModule, lambda: pairs(X[:0], LABEL[:0])),
    "no loader": (UsersModule, lambda: None),
    "a number": (UsersModule, lambda: 3),
}
LABELLED = {
    "floating labels": lambda: pairs(y=LABEL.float()),
    "boolean labels": lambda: pairs(y=LABEL > 0),
    "labels that are too large": lambda: pairs(y=LABEL + 1),
    "negative labels": lambda: pairs(y=LABEL - 1),
    "one-hot labels": lambda: pairs(y=torch.nn.functional.one_hot(LABEL, CLASSES)),
    "no labels": lambda: DataLoader(X, batch_size=8),
}
UNTRAINED = pytest.mark.filterwarnings(
    "ignore:.*fewer than 20 per class", "ignore:.*no finite positive temperature", "ignore:.*virtual logit"
)
NAMED = r"[Aa]rgument|fitting data|features|FitKNN|FitViM|`(labels|logits|target)` must "


@UNTRAINED
@pytest.mark.axis("bad input")
@pytest.mark.parametrize("kind", [*FITTING_DATA, *LABELLED])
def test_fitting_data(fitting_case, kind):
    if kind in LABELLED and (
        fitting_case.name.startswith(("FitKNN", "FitViM", "FitLaplace", "ConformalRiskControl", "OODAlarm"))
        or fitting_case.is_of_numbers
    ):
        pytest.skip("it looks at no label of a class")
    make, data = FITTING_DATA.get(kind, (UsersModule, LABELLED.get(kind)))
    callback = fitting_case.build().fit(UsersModule(), pairs())
    assert callback.fitted
    with pytest.raises(InputError, match=NAMED):
        callback.fit(make(), data())
    assert not callback.fitted  # neither half of the new nor the old, which is of other weights
    assert callback.state_dict() == {}


@UNTRAINED
@pytest.mark.filterwarnings("ignore:.*it was fitted again")
@pytest.mark.axis("bad input")
@pytest.mark.parametrize("value", [NAN, INF])
def test_fitting_data_under_a_trainer(make_trainer, fitting_case, value, tmp_path):
    """It is read after training: the error comes then, and no file is written."""
    callback = fitting_case.build(dataloader=spoilt(value))
    trainer = make_trainer(callbacks=[callback], enable_checkpointing=True)
    with pytest.raises(InputError, match=NAMED):
        trainer.fit(UsersModule(), pairs(), pairs())
    assert not callback.fitted
    assert not list(tmp_path.rglob("*uq*"))
    with pytest.raises((NotFittedError, InputError)):
        trainer.test(UsersModule(), pairs(), verbose=False)


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("kept", [1, 2], ids=["one class", "two of three classes"])
@UNTRAINED
@pytest.mark.filterwarnings("ignore:No row is of class")
def test_classes_that_are_missing(fitting_case, kept):
    """A density of a class needs rows of it; the others fit what there is."""
    rows_of = kept > LABEL
    callback = fitting_case.build()
    if fitting_case.name.startswith("FitGMM"):
        with pytest.raises(InputError, match="Every class needs at least 2 rows, but class"):
            callback.fit(UsersModule(), pairs(X[rows_of], LABEL[rows_of]))
        assert not callback.fitted
        return
    callback.fit(UsersModule(), pairs(X[rows_of], LABEL[rows_of]))
    floats = [t for t in callback.state_dict()["tensors"].values() if isinstance(t, torch.Tensor)]
    assert all(fitting_case.is_sound(t) for t in floats if t.is_floating_point())


@pytest.mark.axis("bad input")
@UNTRAINED
def test_memory_that_nobody_has(fitting_case):
    """A million classes: said before anything is allocated."""
    named = {
        "FitGMM": "must fit into `memory_budget`",
        "VectorScaling": "1000000 classes, whose second derivatives take",
        "MatrixScaling": "1000000 classes, whose matrix takes",
        "FitLaplace": "would need .* GiB",
    }
    if fitting_case.name not in named:
        pytest.skip("its memory does not grow with the square of anything that large")
    wide = torch.nn.Sequential(torch.nn.Linear(FEATURES, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1_000_000))
    callback = fitting_case.build()
    with pytest.raises(InputError, match=named[fitting_case.name]):
        callback.fit(wide, pairs(X[:8], LABEL[:8]))
    assert not callback.fitted


@pytest.mark.axis("bad input")
@UNTRAINED
def test_states_that_are_anothers(fitting_case):
    """Or a part of its own: nothing is left that could be used."""
    callback = fitting_case.build().fit(UsersModule(), pairs())
    state = callback.state_dict()
    for tensors in ({}, {"another": torch.zeros(1)}, {"feature_layer": "3", "num_members": 1}, 5):
        with pytest.raises(InputError, match=f"The `tensors` of this state do not belong to {type(callback).__name__}"):
            callback.load_state_dict({**state, "tensors": tensors})
        assert not callback.fitted
    callback.load_state_dict(state)
    assert callback.fitted


# ---------------------------------------------------------------------- callbacks that fit nothing, but measure

MEASURED = {
    "nan in an input": (lambda: spoilt(NAN), "NaN|hold no nan"),
    "infinity in an input": (lambda: spoilt(INF), "NaN|hold no nan"),
    "no rows": (lambda: pairs(X[:0], LABEL[:0]), "must hold samples, but it is empty"),
    "no rows of a stream": (lambda: DataLoader(NoRows(), batch_size=8), "(is|are) empty"),
}


@pytest.mark.axis("bad input")
@pytest.mark.parametrize("kind", MEASURED)
@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_data_that_is_measured(make_trainer, callback_case, kind):
    if callback_case.fits:
        pytest.skip("it measures nothing")
    make, match = MEASURED[kind]
    stage = "validate" if callback_case.name == "CalibratedNLL" else "test"
    with pytest.raises(InputError, match=match):
        run(make_trainer(callbacks=[callback_case.build()]), stage, UsersModule(), make())


# ---------------------------------------------------------------------- what hypothesis finds

NUMBERS = st.floats(width=32) | st.sampled_from([NAN, INF, -INF, 3e38, -3e38, 1e-45, 0.0])


@pytest.mark.axis("bad input")
def test_any_numbers_give_a_prediction_or_our_error(module_case):
    module = module_case.build().eval()
    module(torch.zeros(2, FEATURES))  # what is built at the first batch is

    @settings(max_examples=25)
    @given(st.lists(st.tuples(*[NUMBERS] * FEATURES), min_size=1, max_size=4))
    def check(values):
        x = torch.tensor(values)
        try:
            prediction = module.predict_step(x)
        except InputError:
            return
        assert x.isfinite().all()
        for name, value in prediction.to_dict().items():
            if isinstance(value, torch.Tensor):
                assert not value.isnan().any(), name

    check()


@pytest.mark.axis("bad input")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_rows_fit_or_raise_our_error(fitting_case):
    module = UsersModule()

    @settings(max_examples=25)
    @given(st.lists(st.tuples(st.integers(-1, CLASSES), *[NUMBERS] * FEATURES), max_size=12))
    def check(values):
        y = torch.tensor([int(v[0]) for v in values], dtype=torch.long)
        x = torch.tensor([v[1:] for v in values]).reshape(-1, FEATURES)
        callback = fitting_case.build()
        try:
            callback.fit(module, pairs(x, y))
        except UQError:
            assert not callback.fitted
            return
        for name, value in callback.state_dict()["tensors"].items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert fitting_case.is_sound(value), name

    check()
