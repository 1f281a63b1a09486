"""Checkpoints as users' projects have them: objects among the hyper-parameters, hooks that change them, remote file systems."""

import functools
import logging
from collections.abc import Mapping

import fsspec
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_uq import FitGMM, TemperatureScaling, load_fitted
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.checkpoint_files import is_file, read_checkpoint
from lightning_uq.errors import InputError
from lightning_uq.evaluate.models import load_model
from tests.modules.lightning_ensemble.cases import loader

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


class Steps(LightningModule):
    """Its first epoch is the best."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", float(self.current_epoch))

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2.0)


class Template(Steps):
    """As lightning-hydra-template has it: a network and a partial of an optimizer among the hyper-parameters."""

    def __init__(self, net, optimizer, act=None, compile=False):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net, self.act = net, nn.Tanh() if act is None else act

    def forward(self, x):
        return self.net(self.act(x))

    def configure_optimizers(self):
        return self.hparams.optimizer(self.parameters())


def template(**kwargs):
    return Template(nn.Linear(4, 3), functools.partial(torch.optim.SGD, lr=2.0), **kwargs)


class Renames(Steps):
    """Its file has the names of the library that it was ported from, and a note."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.note, self.loads = "fresh", []

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {"old." + name: value for name, value in checkpoint["state_dict"].items()}
        checkpoint["note"] = f"epoch {checkpoint['epoch']}, step {checkpoint['global_step']}"

    def on_load_checkpoint(self, checkpoint):
        self.note = checkpoint["note"]
        self.loads.append(checkpoint["epoch"])
        checkpoint["state_dict"] = {
            name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()
        }


class Adapter(Steps):
    """Saves its trainable part alone: the base comes from elsewhere."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.base = nn.Linear(4, 8).requires_grad_(False)
        self.net = nn.Linear(8, 3)

    def forward(self, x):
        return self.net(self.base(x).relu())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("base.")}


class Grows(Steps):
    """Builds a layer of the size that the checkpoint says."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))

    def on_load_checkpoint(self, checkpoint):
        self.register_buffer("seen", torch.zeros_like(checkpoint["state_dict"]["seen"]))

    def on_train_epoch_end(self):
        self.seen = torch.cat([self.seen, torch.ones(1)])


def fit(make_trainer, folder, module, *, weights="auto", callbacks=(), **kwargs):
    """The module after a training whose first epoch was the best, its callbacks, and a module with the best weights."""
    temperature, density = TemperatureScaling(weights=weights), FitGMM(weights=weights)
    best = ModelCheckpoint(dirpath=folder, monitor="val")
    trainer = make_trainer(max_epochs=3, callbacks=[*callbacks, temperature, density, best], enable_checkpointing=True)
    trainer.fit(module, loader(), loader(20), **kwargs)
    return temperature, density, best.best_model_path


def expected(module):
    return TemperatureScaling().fit(module, loader(20)).temperature


CASES = {"objects": template, "renames": Renames, "adapter": Adapter, "grows": Grows}


@pytest.mark.filterwarnings(
    "ignore:.*is an instance of `nn.Module`", "ignore:Found keys that are in the model state dict"
)
@pytest.mark.parametrize("weights", ["best", "last"])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_what_is_fitted_is_reloaded_as_lightning_reloads_it(build, weights, make_trainer, tmp_path):
    module = build()
    temperature, density, best = fit(make_trainer, tmp_path, module, weights=weights)
    if weights == "best":
        given = {"net": nn.Linear(4, 3), "optimizer": None} if isinstance(module, Template) else {}
        reference = type(module).load_from_checkpoint(best, weights_only=False, **given)
        assert expected(reference) != expected(module)
    else:
        reference = module
    assert temperature.temperature == pytest.approx(expected(reference))
    path = temperature.uq_ckpt_path
    assert density.uq_ckpt_path == path
    assert fitted_states(path).keys() == {"TemperatureScaling", "FitGMM"}  # it is read with weights_only=True
    with torch.no_grad():
        fitted = load_fitted(path, build())(X)
        probs, scores = fitted["probs"], fitted["ood_score"]
        torch.testing.assert_close(probs, (reference.eval()(X) / temperature.temperature).softmax(1))
    assert scores.shape == (6,)
    callbacks = [TemperatureScaling(), FitGMM()]
    tester = make_trainer(callbacks=callbacks)
    tester.test(build(), loader(20), ckpt_path=path, weights_only=True, verbose=False)
    assert callbacks[0].temperature == temperature.temperature
    resumed = make_trainer(max_epochs=4)
    resumed.fit(build(), loader(), loader(20), ckpt_path=path, weights_only=True)
    assert resumed.current_epoch == 4


@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`")
def test_left_out_hyper_parameters_are_told_once_and_asked_for(make_trainer, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        temperature, _, _ = fit(make_trainer, tmp_path, template(act=nn.ReLU()))
    path = temperature.uq_ckpt_path
    (told,) = [record.message for record in caplog.records if "leaves out" in record.message]
    assert "-uq.ckpt leaves out hyper_parameters.net, hyper_parameters.optimizer, hyper_parameters.act, because" in told
    assert "Pass these hyper-parameters again to `load_from_checkpoint`" in told
    assert read_checkpoint(path)["hyper_parameters"] == {"compile": False}
    with pytest.raises(InputError, match=r"lacks the hyper-parameters net, optimizer, act.*Pass an instance"):
        load_fitted(path)  # the default activation would have passed for the one that was trained
    with pytest.raises(InputError, match=r"lacks the hyper-parameters net, optimizer, which.*Pass them in `init_args`"):
        load_model(path, f"{__name__}.Template", init_args={"act": nn.ReLU()})
    again = Template.load_from_checkpoint(path, net=nn.Linear(4, 3), optimizer=None, act=nn.ReLU(), weights_only=True)
    temperature.check_fitted(again)


class Container(Mapping):
    """A container of omegaconf's, which is not a dependency: attributes, and a class of its own in the checkpoint."""

    def __init__(self, values):
        self.__dict__.update(values)

    def __getitem__(self, key):
        return self.__dict__[key]

    def __iter__(self):
        return iter(self.__dict__)

    def __len__(self):
        return len(self.__dict__)


class Configured(Steps):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = nn.Sequential(nn.Linear(4, config.width), nn.Linear(config.width, 3))

    def on_save_checkpoint(self, checkpoint):  # as Lightning does
        checkpoint["hparams_name"] = "config"
        checkpoint["hyper_parameters"], checkpoint["hparams_type"] = self.config, type(self.config)


def test_a_configuration_becomes_plain_data_with_attributes(make_trainer, tmp_path):
    module = Configured(Container({"width": 5, "sizes": Container({"a": 1})}))
    temperature, _, _ = fit(make_trainer, tmp_path, module)
    file = read_checkpoint(temperature.uq_ckpt_path)
    assert file["hyper_parameters"] == {"width": 5, "sizes": {"a": 1}}
    assert "lightning_uq_left_out" not in file
    load_fitted(temperature.uq_ckpt_path)


def test_what_a_hook_changes_is_put_back(make_trainer, tmp_path):
    module = Renames()
    loads = module.loads
    fit(make_trainer, tmp_path, module)
    assert module.note == "fresh"
    assert module.loads is loads
    assert loads == []
    module = Grows()
    fit(make_trainer, tmp_path, module)
    assert len(module.seen) == 4


def test_a_hook_sees_no_resumed_training(make_trainer, tmp_path):
    class Looks(Renames):
        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint)
            functions.append(self.trainer.state.fn.value)
            assert {"optimizer_states", "loops", "callbacks"} <= checkpoint.keys()

    functions = []
    fit(make_trainer, tmp_path, Looks())
    assert functions == ["validate", "validate"]  # for each callback


def test_averaged_weights_go_through_the_modules_own_hook(make_trainer, tmp_path):
    module = Renames()
    temperature, _, _ = fit(make_trainer, tmp_path, module, weights="last", callbacks=[EMAWeightAveraging(decay=0.5)])
    file = read_checkpoint(temperature.uq_ckpt_path)
    assert set(file["state_dict"]) == {"old.net.weight", "old.net.bias"}
    assert torch.equal(file["state_dict"]["old.net.weight"], module.net.weight)
    load_fitted(temperature.uq_ckpt_path, Renames())


# ---------------------------------------------------------------------- remote file systems


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("weights", ["best", "last"])
def test_checkpoints_on_a_remote_file_system(weights, bucket, make_trainer, tmp_path):
    module = Renames()
    temperature, _, best = fit(make_trainer, bucket, module, weights=weights)
    name = best.replace(".ckpt", "-uq.ckpt") if weights == "best" else f"{bucket}/uq-last.ckpt"
    assert temperature.uq_ckpt_path == name
    reference = Renames.load_from_checkpoint(best, weights_only=True) if weights == "best" else module
    assert temperature.temperature == pytest.approx(expected(reference))
    load_fitted(name)
    (fresh,) = callbacks = [TemperatureScaling(weights=weights)]
    tested = best if weights == "best" else name
    make_trainer(callbacks=callbacks).test(Renames(), loader(20), ckpt_path=tested, weights_only=True, verbose=False)
    assert fresh.temperature == temperature.temperature
    assert not (tmp_path / "memory:").exists()
    if weights == "last":  # nothing is overwritten
        again, _, _ = fit(make_trainer, bucket, Renames(), weights="last")
        assert again.uq_ckpt_path == f"{bucket}/uq-last-v1.ckpt"


def test_a_web_address_is_not_looked_up():
    assert not is_file("https://unreachable.invalid/a.ckpt")
