"""Every tool on the LightningModules of users, as they are: they are not asked to change a line.

Each cell trains, tests, predicts and reloads bare; and what a batch or an output of a special kind needs is asked for by a
clear error, before the training.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_uq import (
    CategoricalPrediction,
    EnsembleModule,
    EpinetHead,
    EpinetModule,
    FitGMM,
    InputError,
    OODDetection,
    TemperatureScaling,
    load_fitted,
)
from lightning_uq.functional.ood import auroc
from tests.contract.running import TEST, TRAIN, VAL, assert_finite, assert_sound
from tests.contract.users import USERS

FAR, MEMBERS = 13, 2


@pytest.fixture
def loaders(request):
    """Training, validation, test and far-away data."""
    parameters = request.node.callspec.params
    case = next(parameters[name] for name in ("user_case", "asking_case", "case") if name in parameters)
    pytest.importorskip(case.needs)
    return (
        case.loader(TRAIN, shuffle=True),
        case.loader(VAL, 1),
        case.loader(TEST, 2),
        case.loader(FAR, 3, shift=20.0),
    )


_PATHS = {}


@pytest.fixture
def apart(user_case, loaders, make_trainer, tmp_path_factory):
    """Modules that were trained one after the other, and their checkpoints; once for all tests."""
    if user_case.name not in _PATHS:
        _PATHS[user_case.name] = paths = []
        for i in range(MEMBERS):
            torch.manual_seed(i)
            trainer = make_trainer(max_epochs=2)
            trainer.fit(user_case.module(), *loaders[:2])
            paths.append(tmp_path_factory.mktemp("apart") / "member.ckpt")
            trainer.save_checkpoint(paths[-1])
    paths = _PATHS[user_case.name]
    return [user_case.module.load_from_checkpoint(path, weights_only=True) for path in paths], paths


def logits_and_labels(case, module, loader) -> tuple[Tensor, Tensor]:
    """What the user's module gives [N, C], computed without the package."""
    module.eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in loader:
            x, y = (batch[0], batch[1]) if case.unpack_batch is None else case.unpack_batch(batch)
            output = module(**x) if isinstance(x, dict) else module(x)
            logits.append(output if case.output is None else case.output(output))
            labels.append(y)
    return torch.cat(logits), torch.cat(labels)


def own_outputs(module, loader) -> list:
    """What the user's own ``predict_step`` gives."""
    module.eval()
    with torch.no_grad():
        return [module.predict_step(batch, i) for i, batch in enumerate(loader)]


def assert_same_outputs(found, expected):
    (found, structure), (expected, expected_structure) = tree_flatten(found), tree_flatten(expected)
    assert structure == expected_structure
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def assert_same_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- our modules around theirs


@pytest.mark.axis("EnsembleModule")
def test_ensemble(user_case, loaders, apart, make_trainer, tmp_path):
    train, val, test, _ = loaders
    trainer = make_trainer(max_epochs=2)
    if user_case.by_hand:
        refused = user_case.ensemble(user_case.module, num_members=MEMBERS)
        with pytest.raises(
            InputError, match=r"uses manual optimization. Train such modules separately.*from_checkpoints"
        ):
            make_trainer().fit(refused, train, val)
        modules, paths = apart
        ensemble = user_case.ensemble.from_checkpoints(
            paths, module_class=user_case.module, **user_case.model_arguments
        )
        for i, module in enumerate(modules):
            assert_same_states(ensemble.network.member(i), module)
    else:
        ensemble = user_case.ensemble(user_case.module, num_members=MEMBERS, seed=1, **user_case.model_arguments)
        trainer.fit(ensemble, train, val)
        assert {"train_loss", "val_loss", "member_1/val_loss", "ensemble/val_nll"} <= trainer.callback_metrics.keys()
    members = [ensemble.network.member(i) for i in range(MEMBERS)]
    assert all(type(member) is user_case.module for member in members)

    (tested,) = trainer.test(ensemble, test, verbose=False)
    assert_finite(tested)
    pairs = [logits_and_labels(user_case, member, test) for member in members]
    logits, y = torch.stack([logits for logits, _ in pairs]), pairs[0][1]
    probs = logits.double().softmax(2).mean(0)
    assert tested["ensemble/test_nll"] == pytest.approx(F.nll_loss(probs.log(), y).item(), rel=1e-4)
    assert tested["ensemble/test_accuracy"] == pytest.approx((probs.argmax(1) == y).double().mean().item())
    own = [tested[f"member_{i}/test_acc"] for i in range(MEMBERS)]
    assert tested["test_acc"] == pytest.approx(sum(own) / MEMBERS)

    prediction = CategoricalPrediction.cat(trainer.predict(ensemble, test))
    assert_sound(prediction, TEST)
    torch.testing.assert_close(prediction.logits, logits)

    trainer.save_checkpoint(tmp_path / "ensemble.ckpt")
    again = user_case.ensemble.load_from_checkpoint(tmp_path / "ensemble.ckpt", weights_only=True)
    assert_same_states(again, ensemble)
    reloaded = CategoricalPrediction.cat(make_trainer().predict(again, test))
    assert torch.equal(reloaded.logits, prediction.logits)


@pytest.mark.axis("EnsembleModule")
def test_an_ensemble_of_networks_from_their_checkpoints(user_case, loaders, apart, make_trainer):
    """Trained apart as their modules train, then members of an ensemble that goes on training as ours does."""
    train, val, test, _ = loaders
    modules, paths = apart
    inner = user_case.inner(user_case.module())
    if isinstance(inner, user_case.module):
        pytest.skip("the network is the module itself")
    ensemble = user_case.ensemble.from_checkpoints(
        paths, lambda: copy.deepcopy(inner), optimizer=torch.optim.SGD, **user_case.model_arguments
    )
    expected = torch.stack([logits_and_labels(user_case, module, test)[0] for module in modules])
    prediction = CategoricalPrediction.cat(make_trainer().predict(ensemble, test))
    torch.testing.assert_close(prediction.logits, expected, rtol=1e-4, atol=1e-5)
    trainer = make_trainer()
    trainer.fit(ensemble, train, val)
    assert_finite(trainer.test(ensemble, test, verbose=False)[0])


@pytest.mark.axis("EpinetModule")
def test_epinet(user_case, loaders, make_trainer, tmp_path):
    """Around a new module of theirs, which its class builds: a checkpoint remembers it."""
    train, val, test, _ = loaders
    small = {"head": EpinetHead(hidden_sizes=(6,)), "num_eval_samples": 5, "optimizer": torch.optim.SGD}
    epinet = user_case.epinet(user_case.module, **small, **user_case.model_arguments)
    before = {name: p.clone() for name, p in epinet.network.base.named_parameters()}
    trainer = make_trainer(max_epochs=2)
    trainer.fit(epinet, train, val)
    moved = [name for name, p in epinet.network.base.named_parameters() if not torch.equal(p, before[name])]
    assert moved  # the user's network learns with it
    (tested,) = trainer.test(epinet, test, verbose=False)
    assert_finite(tested)
    prediction = CategoricalPrediction.cat(trainer.predict(epinet, test))
    assert_sound(prediction, TEST)
    assert prediction.logits.std(0).min() > 0
    trainer.save_checkpoint(tmp_path / "epinet.ckpt")
    again = user_case.epinet.load_from_checkpoint(tmp_path / "epinet.ckpt", weights_only=True)
    reloaded = CategoricalPrediction.cat(make_trainer().predict(again, test))
    torch.testing.assert_close(reloaded.logits, prediction.logits)


@pytest.mark.axis("EpinetModule")
def test_epinet_around_a_trained_network(user_case, loaders, apart, make_trainer, tmp_path):
    """The network inside a trained module of theirs, kept as it is."""
    train, val, test, _ = loaders
    (module, _), _ = apart
    theirs = copy.deepcopy(module)
    frozen = {"freeze_base": True, "head": EpinetHead(hidden_sizes=(6,)), "num_eval_samples": 3}
    epinet = user_case.epinet(user_case.inner(module), **frozen, **user_case.model_arguments)
    trainer = make_trainer()
    trainer.fit(epinet, train, val)
    assert_finite(trainer.test(epinet, test, verbose=False)[0])
    assert_same_states(module, theirs)
    logits, _ = logits_and_labels(user_case, theirs, test)
    with torch.no_grad():
        at_zero = torch.cat([epinet.network(x, torch.zeros(1, 8))[0] for x in inputs(user_case, test)])
    torch.testing.assert_close(at_zero, logits)  # where the index is zero, so is the epinet
    prediction = CategoricalPrediction.cat(trainer.predict(epinet, test))
    assert_sound(prediction, TEST)
    trainer.save_checkpoint(tmp_path / "epinet.ckpt")
    again = user_case.epinet.load_from_checkpoint(
        tmp_path / "epinet.ckpt", network=user_case.inner(user_case.module()), weights_only=True
    )
    reloaded = CategoricalPrediction.cat(make_trainer().predict(again, test))
    torch.testing.assert_close(reloaded.logits, prediction.logits)


# ---------------------------------------------------------------------- callbacks on theirs

FITTED = [pytest.param(cls, marks=pytest.mark.axis(cls.__name__)) for cls in (FitGMM, TemperatureScaling)]
ALL = [*FITTED, pytest.param(OODDetection, marks=pytest.mark.axis("OODDetection"))]


def build(cls, loaders, **kwargs):
    return cls({"far": loaders[3]}, **kwargs) if cls is OODDetection else cls(**kwargs)


@pytest.mark.parametrize("cls", FITTED)
def test_what_is_fitted_after_training(user_case, loaders, make_trainer, tmp_path, cls):
    train, val, test, far = loaders
    given = user_case.callback_arguments
    torch.manual_seed(5)
    alone, plain = user_case.module(), make_trainer(max_epochs=2)
    plain.fit(alone, train, val)

    torch.manual_seed(5)
    module, callback = user_case.module(), cls(**given)
    keep = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_on_train_epoch_end=False)
    trainer = make_trainer(max_epochs=2, callbacks=[callback, keep], enable_checkpointing=True)
    trainer.fit(module, train, val)
    assert_same_states(module, alone)  # trained as it would be without
    # Theirs are left alone: what is logged, and what is predicted.
    (expected,) = plain.test(alone, test, verbose=False)
    path = callback.uq_ckpt_path
    (tested,) = trainer.test(module, test, verbose=False, ckpt_path=path, weights_only=True)
    assert {name for name in tested if not name.startswith("uq/")} == expected.keys()
    best = user_case.module.load_from_checkpoint(path, weights_only=True)
    assert_same_outputs(trainer.predict(module, test), own_outputs(best, test))

    # In another process: the file says all. With `attach` the predictions are ours.
    fresh = user_case.module()
    attached = make_trainer(callbacks=[cls(attach=True, **given)])
    prediction = CategoricalPrediction.cat(attached.predict(fresh, test, ckpt_path=path, weights_only=True))
    assert_sound(prediction, TEST)
    logits, _ = logits_and_labels(user_case, best, test)
    torch.testing.assert_close(prediction.logits, logits[None])
    far_away = CategoricalPrediction.cat(attached.predict(fresh, far))
    if cls is FitGMM:
        torch.testing.assert_close(prediction.ood_score, callback.score(best, test))
        if user_case.data.__name__ in ("tuples", "mappings"):
            assert far_away.log_density.max() < prediction.log_density.min()
    else:
        temperature = callback.temperature.float()
        assert temperature != 1
        torch.testing.assert_close(prediction.probs, (logits / temperature).softmax(1))
    assert_same_outputs(make_trainer().predict(fresh, test), own_outputs(best, test))

    # Without a Trainer.
    fitted = load_fitted(path, output=user_case.output)
    found = [fitted(x) for x in inputs(user_case, test)]
    probs = torch.cat([one["probs"] for one in found])
    torch.testing.assert_close(probs, prediction.probs)
    if cls is FitGMM:
        torch.testing.assert_close(torch.cat([one["log_density"] for one in found]), prediction.log_density)


def inputs(case, loader):
    return [batch[0] if case.unpack_batch is None else case.unpack_batch(batch)[0] for batch in loader]


@pytest.mark.axis("OODDetection")
def test_ood_detection(user_case, loaders, apart, make_trainer):
    _, _, test, far = loaders
    (module, _), (path, _) = apart
    (expected,) = make_trainer().test(module, test, verbose=False)
    detection = build(OODDetection, loaders, **user_case.callback_arguments)
    trainer = make_trainer(callbacks=[detection])
    (tested,) = trainer.test(module, test, verbose=False)
    assert_finite(tested)
    assert {name: value for name, value in tested.items() if not name.startswith("ood_")} == expected
    logits = [logits_and_labels(user_case, module, loader)[0].double() for loader in (test, far)]
    score = torch.cat([-rows.logsumexp(1) for rows in logits])
    is_ood = torch.arange(TEST + FAR) >= TEST
    assert tested["ood_auroc/far/energy"] == pytest.approx(auroc(score, is_ood).item(), abs=1e-6)
    assert_same_outputs(trainer.predict(module, test), own_outputs(module, test))
    again = user_case.module.load_from_checkpoint(path, weights_only=True)
    assert trainer.test(again, test, verbose=False) == [tested]


@pytest.mark.parametrize("cls", ALL)
def test_callbacks_on_an_ensemble_from_checkpoints(user_case, loaders, apart, make_trainer, tmp_path, cls):
    """Members that were trained apart: fitted without a Trainer, or by the one that predicts, it is the same."""
    train, val, test, _ = loaders
    modules, paths = apart
    collect = {"module_class": user_case.module, **user_case.model_arguments}
    ensemble = user_case.ensemble.from_checkpoints(paths, **collect)
    logits = torch.stack([logits_and_labels(user_case, module, test)[0] for module in modules])
    if cls is OODDetection:
        (tested,) = make_trainer(callbacks=[build(cls, loaders)]).test(ensemble, test, verbose=False)
        assert_finite(tested)
        assert "ood_auroc/far/mutual_information" in tested
        assert torch.equal(CategoricalPrediction.cat(make_trainer().predict(ensemble, test)).logits, logits)
        return
    data = train if cls is FitGMM else val
    by_hand = cls().fit(ensemble, data)
    found = []
    for callback in (by_hand, cls(dataloader=data)):
        trainer = make_trainer(callbacks=[callback])
        (tested,) = trainer.test(ensemble, test, verbose=False)
        found.append((tested, CategoricalPrediction.cat(trainer.predict(ensemble, test))))
    assert found[0][0] == pytest.approx(found[1][0])
    for _, prediction in found:
        assert_sound(prediction, TEST)
        torch.testing.assert_close(prediction.logits, logits)
        if cls is FitGMM:
            torch.testing.assert_close(prediction.ood_score, by_hand.score(ensemble, test))
        else:
            pooled = logits.log_softmax(2).exp().mean(0).log() / by_hand.temperature.float()
            torch.testing.assert_close(prediction.probs, pooled.softmax(1))
    # The ensemble's checkpoint holds it too.
    trainer.save_checkpoint(tmp_path / "ensemble.ckpt")
    again = make_trainer(callbacks=[cls()])
    with pytest.warns(UserWarning, match=f"holds what {cls.__name__} fitted"):  # the module alone would not have it
        reloaded = user_case.ensemble.load_from_checkpoint(tmp_path / "ensemble.ckpt", weights_only=True)
    predictions = again.predict(reloaded, test, ckpt_path=tmp_path / "ensemble.ckpt", weights_only=True)
    torch.testing.assert_close(CategoricalPrediction.cat(predictions).probs, found[0][1].probs)


# ---------------------------------------------------------------------- what is plain, needs no function


@pytest.mark.parametrize("cls", [FitGMM, TemperatureScaling])
def test_a_plain_batch_and_output_need_no_function(asking_case, loaders, cls):
    train, module = loaders[0], asking_case.module()
    told, plain = (cls(**arguments).fit(module, train) for arguments in (asking_case.callback_arguments, {}))
    one, other = told.state_dict()["tensors"], plain.state_dict()["tensors"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


def test_ood_detection_needs_none_either(asking_case, loaders, make_trainer):
    module = asking_case.module()
    tested = [
        make_trainer(callbacks=[build(OODDetection, loaders, **arguments)]).test(module, loaders[2], verbose=False)
        for arguments in (asking_case.callback_arguments, {})
    ]
    assert tested[0] == tested[1]


@pytest.mark.axis("EnsembleModule")
def test_an_ensemble_needs_none_either(asking_case, loaders, make_trainer):
    train, val, test, _ = loaders
    found = []
    for kind, arguments in ((asking_case.ensemble, asking_case.model_arguments), (EnsembleModule, {})):
        torch.manual_seed(0)  # of the shuffled loader
        ensemble, trainer = kind(asking_case.module, num_members=MEMBERS, seed=0, **arguments), make_trainer()
        trainer.fit(ensemble, train, val)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found.append((metrics, CategoricalPrediction.cat(trainer.predict(ensemble, test)).logits))
    assert "ensemble/val_nll" in found[0][0]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.axis("EpinetModule")
def test_an_epinet_needs_none_either(asking_case, loaders, make_trainer):
    module, trainer = EpinetModule(asking_case.module, num_eval_samples=3), make_trainer()
    trainer.fit(module, *loaders[:2])
    assert_finite({name: float(value) for name, value in trainer.callback_metrics.items()})


TEXT = [case for case in USERS if case.output is not None]


@pytest.mark.parametrize("case", TEXT)
def test_a_function_can_call_the_model_instead(case, loaders):
    """`predict_fn` gets the batch as its user's own code would."""
    train, _, test, _ = loaders
    module = case.module()
    told = FitGMM(**case.callback_arguments).fit(module, train)
    called = FitGMM(
        unpack_batch=lambda batch: (batch, batch["labels"]),
        predict_fn=lambda model, batch: model(**batch).logits,
    ).fit(module, train)
    torch.testing.assert_close(called.score(module, test), told.score(module, test))
