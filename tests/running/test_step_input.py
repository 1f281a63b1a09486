"""A step that makes its own input is noticed: what is fitted or scored on another input would be nobody's."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import EnsembleModule, FitGMM, OODDetection, TemperatureScaling
from lightning_uq.running.step_input import StepInput

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
LOADER = DataLoader(TensorDataset(X, Y), batch_size=20)
TEXT = "calls its `forward` with an input other than the one read from the batch"


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def step(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Scaling(Lit):
    def step(self, batch):
        x, y = batch
        return F.cross_entropy(self((x - 3) / 10), y)


class ScalingInPlace(Lit):
    def step(self, batch):
        batch[0].sub_(3).div_(10)
        return super().step(batch)


class Flattening(Lit):
    def step(self, batch):
        x, y = batch
        return F.cross_entropy(self(x.view(x.size(0), -1).float()), y)


class WithLoss(Lit):
    def forward(self, x, labels=None):
        logits = self.net(x)
        return logits if labels is None else F.cross_entropy(logits, labels)

    def step(self, batch):
        x, y = batch
        return self(x, labels=y)


class Direct(Lit):
    def step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net((x - 3) / 10), y)


class Twice(Lit):
    def step(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(x.flip(0)), y.flip(0))


def told(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if TEXT in str(w.message)]


def scaled(batch):
    return (batch[0] - 3) / 10, batch[1]


USES = {
    "fit": lambda module, trainer: trainer(max_epochs=1, callbacks=[FitGMM()]).fit(module, LOADER, LOADER),
    "calibrate": lambda m, trainer: trainer(max_epochs=1, callbacks=[TemperatureScaling()]).fit(m, LOADER, LOADER),
    "detect": lambda m, trainer: trainer(callbacks=[OODDetection({"far": LOADER})]).test(m, LOADER, verbose=False),
    "test": lambda m, trainer: trainer(callbacks=[TemperatureScaling(dataloader=LOADER)]).test(
        m, LOADER, verbose=False
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [Scaling, ScalingInPlace])
def test_a_step_that_makes_its_own_input_is_told(make_trainer, use, kind):
    (text,) = told(lambda: USES[use](kind(), make_trainer))
    assert f"of {kind.__name__} calls" in text
    assert "Pass `unpack_batch`" in text


@pytest.mark.parametrize("kind", [Lit, Flattening, WithLoss, Direct, Twice])
def test_a_step_that_gives_the_same_numbers_is_not(make_trainer, kind):
    for use in USES.values():
        assert told(lambda use=use: use(kind(), make_trainer)) == []


def test_what_the_text_says_helps(make_trainer):
    callbacks = [FitGMM(unpack_batch=scaled), TemperatureScaling(unpack_batch=scaled)]
    module, trainer = Scaling(), make_trainer(max_epochs=1, callbacks=callbacks)
    assert told(lambda: trainer.fit(module, LOADER, LOADER)) == []
    (tested,) = trainer.test(module, LOADER, verbose=False)
    assert tested["uq/test_nll"] == pytest.approx(tested["test_loss"], rel=1e-5)


def test_members_of_an_ensemble_as_well(make_trainer):
    ensemble = EnsembleModule(Scaling, num_members=2, seed=0)
    (text,) = told(lambda: make_trainer(max_epochs=1).fit(ensemble, LOADER, LOADER))
    assert "The `validation_step` of Scaling" in text
    for quiet in (EnsembleModule(Lit, num_members=2), EnsembleModule(Scaling, num_members=2, unpack_batch=scaled)):
        assert told(lambda quiet=quiet: make_trainer(max_epochs=1).fit(quiet, LOADER, LOADER)) == []


class Packed(Lit):
    """Its second element is a length, which `forward` takes."""

    def forward(self, x, lengths=None):
        return super().forward(x if lengths is None else x / (1 + lengths[:, None]))

    def step(self, batch):
        x, lengths, y = batch
        return F.cross_entropy(self(x, lengths), y)


@pytest.mark.parametrize("use", ["fit", "test"])
def test_a_second_element_that_forward_takes_is_no_target(make_trainer, use):
    loader = DataLoader(TensorDataset(X, torch.arange(60) % 3, Y), batch_size=20)
    callback = FitGMM() if use == "fit" else OODDetection({"far": LOADER})
    trainer, module = make_trainer(max_epochs=1, callbacks=[callback]), Packed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, loader)
        if use == "test":
            trainer.test(module, loader, verbose=False)
    assert any(TEXT in str(one.message) for one in caught)


def test_no_hook_is_left_behind(make_trainer):
    class Failing(Lit):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("no")

    module = Failing()
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(max_epochs=1, callbacks=[FitGMM()]).fit(module, LOADER, LOADER)
    assert not module._forward_pre_hooks
    module = Lit()
    make_trainer(max_epochs=1, callbacks=[FitGMM()]).fit(module, LOADER, LOADER)
    assert not module._forward_pre_hooks


def test_an_input_of_names_and_nan():
    watch, x = StepInput(), {"a": torch.tensor([[1.0, torch.nan]]), "b": [torch.ones(1), "text"]}
    network = nn.Identity()
    watch.start(network, x, None)
    network({"b": list(x["b"]), "a": x["a"].clone()})
    assert told(lambda: watch.end(network, "test_step")) == []
    watch = StepInput()
    watch.start(network, x, None)
    network({"a": x["a"], "b": [torch.zeros(1), "text"]})
    assert len(told(lambda: watch.end(network, "test_step"))) == 1


RANKS = """
import json
import warnings
from lightning.pytorch import Trainer
from lightning_uq import FitGMM
from tests.running.test_step_input import LOADER, TEXT, Lit, Scaling

if __name__ == "__main__":
    found = []
    for module in (Lit(), Scaling()):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=1,
            enable_model_summary=False, enable_checkpointing=False, callbacks=FitGMM(),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, LOADER, LOADER)
        found.append(sum(TEXT in str(w.message) for w in caught))
    if trainer.is_global_zero:
        with open(out, "w") as file:
            json.dump(found, file)
    trainer.strategy.barrier()
"""


def test_two_ranks(run_script):
    """Under DDP the step itself is called through ``forward``, which is no call of the module's own."""
    assert run_script(RANKS) == [0, 1]


def test_a_compiled_module_is_left_alone(make_trainer):
    """Its steps would be compiled with the hook, or once more without it."""
    hooks = []

    class Counting(Scaling):
        def on_validation_batch_start(self, batch, batch_idx):
            hooks.append(len(self._forward_pre_hooks))

    for module in (Counting(), torch.compile(Counting(), backend="eager")):
        told(lambda module=module: make_trainer(max_epochs=1, callbacks=[FitGMM()]).fit(module, LOADER, LOADER))
        assert hooks[0] == int(isinstance(module, Counting))
        hooks.clear()


def test_steps_that_tell_nothing_are_not_watched_for_ever():
    """A copy of each batch would be the price of a step that never calls ``self(...)``."""
    watch, network = StepInput(), nn.Identity()
    watched = []
    for _ in range(20):
        watch.start(network, X, None)
        watched.append(bool(network._forward_pre_hooks))
        watch.end(network, "test_step")
    assert watched[0]
    assert not any(watched[10:])
    watch = StepInput()
    for call in (False, False, True):  # the sanity check leaves the call out
        watch.start(network, X, None)
        if call:
            network(X + 1)
        found = told(lambda: watch.end(network, "validation_step"))
    assert len(found) == 1
