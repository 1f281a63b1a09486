"""Members whose checkpoints are not plain, whose hooks change them, or that build their layers late: together, and collected."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_uq import EnsembleModule, TemperatureScaling, load_fitted
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.errors import InputError
from tests.callbacks.test_users_checkpoints import Adapter, Renames, Steps, X, template
from tests.modules.lightning_ensemble.cases import SEED, loader
from tests.modules.lightning_ensemble.test_checkpoints import Late

PLAIN_HPARAMS = "ignore:.*is an instance of `nn.Module`"


class Keeps(Steps):
    """Its weights lie under a key of its own, with an object beside them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.where = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = checkpoint["state_dict"]
        checkpoint["where"] = Path("x")
        checkpoint["state_dict"] = {}

    def on_load_checkpoint(self, checkpoint):
        self.where = checkpoint.get("where", "left out")
        checkpoint["state_dict"] = checkpoint["mine"]


class Compiled(Steps):
    """Compiles its network where it is built."""

    def __init__(self, compile=True):
        super().__init__()
        self.save_hyperparameters()
        net = nn.Linear(4, 3)
        self.net = torch.compile(net, backend="eager") if compile else net


MEMBERS = {"renames": Renames, "adapter": Adapter, "keeps": Keeps, "late": Late, "compiled": Compiled}


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
@pytest.mark.parametrize("factory", MEMBERS.values(), ids=MEMBERS)
def test_members_that_trained_apart_are_collected(factory, make_trainer, tmp_path):
    paths, modules = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"], [factory(), factory()]
    for path, module in zip(paths, modules, strict=True):
        trainer = make_trainer()
        trainer.fit(module, loader())
        trainer.save_checkpoint(path)
    ensemble = EnsembleModule.from_checkpoints(paths, factory, weights_only=factory is not Keeps)
    alone = torch.stack([module.eval()(X) for module in modules])
    torch.testing.assert_close(ensemble.eval()(X), alone)
    if factory in (Renames, Late):  # the hook has run
        assert ensemble.members.modules[1].note not in (None, "fresh")


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_member_and_a_plain_one_are_one(compiled, make_trainer, tmp_path):
    trainer, module = make_trainer(), Compiled(compiled)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "0.ckpt")
    collected = EnsembleModule.from_checkpoints([tmp_path / "0.ckpt"], functools.partial(Compiled, not compiled))
    torch.testing.assert_close(collected(X)[0], module(X))
    ensemble = EnsembleModule(functools.partial(Compiled, compiled), num_members=2)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "e.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "e.ckpt", network=functools.partial(Compiled, not compiled))
    torch.testing.assert_close(again(X), ensemble(X))


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
@pytest.mark.parametrize("factory", [Renames, Adapter, Keeps], ids=["renames", "adapter", "keeps"])
def test_the_best_weights_of_an_ensemble_come_through_the_members_hooks(factory, make_trainer, tmp_path):
    ensemble, temperature = EnsembleModule(factory, num_members=2, seed=SEED), TemperatureScaling()
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val")
    trainer = make_trainer(max_epochs=3, callbacks=[temperature, best], enable_checkpointing=True)
    trainer.fit(ensemble, loader(), loader(20))
    reference = EnsembleModule.load_from_checkpoint(
        best.best_model_path, network=factory, weights_only=factory is not Keeps
    )
    assert temperature.temperature == pytest.approx(TemperatureScaling().fit(reference, loader(20)).temperature)
    path = temperature.uq_ckpt_path
    assert fitted_states(path).keys() == {"TemperatureScaling"}
    torch.testing.assert_close(load_fitted(path, factory)(X)["probs"], reference.predict(X).probs)
    fresh = TemperatureScaling()
    again = EnsembleModule(factory, num_members=2)
    make_trainer(callbacks=[fresh]).test(again, loader(20), ckpt_path=path, weights_only=True, verbose=False)
    assert fresh.temperature == temperature.temperature
    resumed = make_trainer(max_epochs=4)
    resumed.fit(EnsembleModule(factory, num_members=2), loader(), ckpt_path=path, weights_only=True)
    assert resumed.current_epoch == 4


@pytest.mark.filterwarnings(PLAIN_HPARAMS)
def test_files_with_objects_say_what_to_pass(make_trainer, tmp_path):
    modules, paths = [template(), template()], [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    for module, path in zip(modules, paths, strict=True):
        trainer = make_trainer()
        trainer.fit(module, loader())
        trainer.save_checkpoint(path)
    with pytest.raises(
        InputError, match=r"it holds \S+, which is neither weights.*Pass `weights_only=False` if you trust"
    ):
        EnsembleModule.from_checkpoints(paths, template)
    with pytest.raises(InputError, match=r"different values of net, optimizer.*pass argument `network`, a factory"):
        EnsembleModule.from_checkpoints(paths, module_class=type(modules[0]), weights_only=False)
    ensemble = EnsembleModule.from_checkpoints(paths, template, weights_only=False)
    assert torch.equal(ensemble.members.modules[1].net.weight, modules[1].net.weight)
    # Together they are one factory, and the ensemble's file holds plain data.
    together, trainer = EnsembleModule(template, num_members=2), make_trainer()
    trainer.fit(together, loader())
    trainer.save_checkpoint(tmp_path / "e.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "e.ckpt", network=template)
    assert torch.equal(again(X), together(X))
    keeps, trainer = EnsembleModule(Keeps, num_members=2), make_trainer()
    trainer.fit(keeps, loader())
    trainer.save_checkpoint(tmp_path / "k.ckpt")
    with pytest.raises(InputError, match="neither weights nor plain data.*Pass `weights_only=False` if you trust"):
        EnsembleModule.load_from_checkpoint(tmp_path / "k.ckpt", network=Keeps)


def test_hyper_parameters_that_are_arrays_are_compared(make_trainer, tmp_path):
    paths = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    for path, weights in zip(paths, ([1.0, 2.0], [1.0, 2.0]), strict=True):
        trainer = make_trainer()
        trainer.fit(Weighted(torch.tensor(weights)), loader())
        trainer.save_checkpoint(path)
    ensemble = EnsembleModule.from_checkpoints(paths, module_class=Weighted)
    assert ensemble.members.modules[0].hparams.weights.tolist() == [1.0, 2.0]
    trainer = make_trainer()
    trainer.fit(Weighted(torch.tensor([1.0, 3.0])), loader())
    trainer.save_checkpoint(paths[1])
    with pytest.raises(InputError, match="different values of weights"):
        EnsembleModule.from_checkpoints(paths, module_class=Weighted)


class Weighted(Steps):
    def __init__(self, weights):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 3)


class Container(dict):
    """A container of omegaconf's, which is not a dependency."""


class Configured(Steps):
    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(4, 3), []

    @property
    def hparams(self):
        return Container(lr=1)

    def on_save_checkpoint(self, checkpoint):
        self.seen.append((checkpoint["hyper_parameters"], checkpoint["hparams_type"]))
        del checkpoint["hyper_parameters"], checkpoint["hparams_type"]


def test_hyper_parameters_of_omegaconf_stay_what_they_are(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace(Container=Container))
    ensemble, trainer = EnsembleModule(Configured, num_members=1), make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    ((hyper_parameters, kind),) = ensemble.members.modules[0].seen
    assert type(hyper_parameters) is kind is Container
