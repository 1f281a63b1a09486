"""A training that was broken off and resumed ends where the uninterrupted one ends."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, RandomSampler

from tests.contract.cases import UsersModule, dataset, loader
from tests.contract.running import TEST, TRAIN, VAL, assert_equal_states

EPOCHS = 3
STEPS = TRAIN // 8  # an epoch


class ResumableLoader(DataLoader):
    """What torchdata's StatefulDataLoader is to Lightning: a loader that can say where it stands, and go on from there."""

    def __init__(self, data):
        self.order = torch.Generator().manual_seed(5)
        self.given, self.skipped, self.began_at = 0, 0, self.order.get_state()
        super().__init__(data, batch_size=8, sampler=RandomSampler(data, generator=self.order))

    def __iter__(self):
        if self.skipped:
            self.order.set_state(self.began_at)
        self.began_at, self.given = self.order.get_state(), self.skipped
        self.skipped = 0
        iterator = super().__iter__()  # now, and not with the first batch: it draws a seed for workers
        for _ in range(self.given):
            next(iterator)
        return self._counting(iterator)

    def _counting(self, iterator):
        for batch in iterator:
            self.given += 1
            yield batch

    def state_dict(self):
        return {"began_at": self.began_at, "given": self.given}

    def load_state_dict(self, state):
        self.began_at, self.skipped = state["began_at"], state["given"]


class Recorded(Callback):
    """Every value that was logged, by step."""

    def __init__(self):
        self.values = {}

    def on_train_batch_end(self, trainer, *_):
        self.values[trainer.global_step, "train"] = _floats(trainer.callback_metrics, "train")

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.values[trainer.global_step, "val"] = _floats(trainer.callback_metrics, "val")


def _floats(metrics, part):
    return {name: float(value) for name, value in metrics.items() if part in name}


def run(make_trainer, case, *, seed, train, save_to=None, **kwargs):
    """Fit a new module in a process seeded with ``seed``; the module, what was logged, the random numbers that follow."""
    torch.manual_seed(seed)
    module, recorded = case.build(), Recorded()
    fit = {name: kwargs.pop(name) for name in ("ckpt_path", "weights_only") if name in kwargs}
    trainer = make_trainer(**{"max_epochs": EPOCHS, **kwargs, "callbacks": [recorded, *kwargs.get("callbacks", [])]})
    trainer.fit(module, train(), loader(case.task, VAL, 1), **fit)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    following = torch.rand(3)
    (tested,) = trainer.test(module, loader(case.task, TEST, 2), verbose=False)
    return {"module": module, "values": recorded.values, "following": following, "tested": tested, "trainer": trainer}


def assert_same_end(resumed, whole, *, after):
    """Bit for bit: the weights, what was logged after step ``after``, the test, the random numbers that follow."""
    ours, theirs = resumed["module"].state_dict(), whole["module"].state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    rest = {key: values for key, values in whole["values"].items() if key[0] > after}
    assert rest
    again = {key: values for key, values in resumed["values"].items() if key[0] > after}
    assert again == rest
    assert resumed["tested"] == whole["tested"]
    assert torch.equal(resumed["following"], whole["following"])


def saving(directory, name, **kwargs):
    """Options of a Trainer that keeps every checkpoint."""
    callback = ModelCheckpoint(directory, filename=f"{{{name}}}", save_top_k=-1, **kwargs)
    return {"callbacks": [callback], "enable_checkpointing": True}


@pytest.mark.axis("resume")
@pytest.mark.parametrize("moment", ["after the validation", "at the end of the epoch"])
def test_modules_at_an_epochs_end(make_trainer, module_case, tmp_path, moment):
    def train():
        return loader(module_case.task, TRAIN, shuffle=True)

    options = saving(tmp_path, "epoch", save_on_train_epoch_end=moment == "at the end of the epoch")
    whole = run(make_trainer, module_case, seed=1, train=train, **options)
    path = tmp_path / "epoch=0.ckpt"
    resumed = run(make_trainer, module_case, seed=99, train=train, ckpt_path=path, weights_only=True)
    assert_same_end(resumed, whole, after=STEPS)


@pytest.mark.axis("resume")
def test_modules_that_train_longer_than_was_planned(make_trainer, module_case, tmp_path):
    def train():
        return loader(module_case.task, TRAIN, shuffle=True)

    path = tmp_path / "first.ckpt"
    run(make_trainer, module_case, seed=1, train=train, max_epochs=1, save_to=path)
    whole = run(make_trainer, module_case, seed=1, train=train, max_epochs=2)
    resumed = run(make_trainer, module_case, seed=99, train=train, max_epochs=2, ckpt_path=path, weights_only=True)
    assert_same_end(resumed, whole, after=STEPS)


@pytest.mark.axis("mid-epoch")
@pytest.mark.parametrize("step", [2, STEPS + 3])
def test_modules_in_mid_epoch(make_trainer, module_case, tmp_path, step):
    def train():
        return ResumableLoader(dataset(module_case.task, TRAIN))

    whole = run(make_trainer, module_case, seed=1, train=train, **saving(tmp_path, "step", every_n_train_steps=step))
    path = tmp_path / f"step={step}.ckpt"
    resumed = run(make_trainer, module_case, seed=99, train=train, ckpt_path=path, weights_only=True)
    assert resumed["trainer"].global_step == EPOCHS * STEPS
    assert_same_end(resumed, whole, after=step)


@pytest.mark.axis("mid-epoch")
def test_callbacks_in_mid_epoch(make_trainer, callback_case, tmp_path):
    def fit(*callbacks, **kwargs):
        torch.manual_seed(0)
        callback, module = callback_case.build(), UsersModule()
        trainer = make_trainer(max_epochs=2, callbacks=[callback, *callbacks], enable_checkpointing=bool(callbacks))
        rows = ResumableLoader(dataset("classification", TRAIN))
        trainer.fit(module, rows, loader("classification", VAL, 1), **kwargs)
        (tested,) = trainer.test(module, loader("classification", TEST, 2), verbose=False)
        return callback.state_dict(), {**_floats(trainer.callback_metrics, "val"), **tested}

    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=STEPS + 3, save_top_k=-1)
    state, metrics = fit(every)
    resumed, again = fit(ckpt_path=tmp_path / f"step={STEPS + 3}.ckpt", weights_only=True)
    assert_equal_states(resumed, state)
    assert again == metrics


@pytest.mark.axis("resume")
def test_callbacks(make_trainer, callback_case, tmp_path):
    """On a user's module, whose own steps draw nothing: what is fitted, and what is measured, is the same."""

    def fit(epochs, **kwargs):
        torch.manual_seed(0)
        callback, module = callback_case.build(), UsersModule()
        trainer = make_trainer(max_epochs=epochs, callbacks=[callback])
        trainer.fit(module, loader("classification", TRAIN), loader("classification", VAL, 1), **kwargs)
        if epochs == 1:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        (tested,) = trainer.test(module, loader("classification", TEST, 2), verbose=False)
        return callback.state_dict(), {**_floats(trainer.callback_metrics, "val"), **tested}

    fit(1)
    (state, metrics), (resumed, again) = fit(EPOCHS), fit(EPOCHS, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_equal_states(resumed, state)
    assert again == metrics
