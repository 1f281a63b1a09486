"""A user's subclass of each module and callback trains, tests, reloads bare, resumes, and runs on two ranks."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq import DeterministicModule, EnsembleModule, InputError, TemperatureScaling
from lightning_uq.callbacks import OODDetection
from tests.contract.cases import (
    MODULES,
    REPRESENTATIVES,
    UsersModule,
    loader,
    network,
)
from tests.contract.running import assert_equal_states, assert_finite
from tests.contract.subclasses import batches, build, extended_callback, has_users_members


@pytest.mark.every_case
def test_a_subclass_trains_tests_reloads_bare_and_resumes(module_case, make_trainer, tmp_path):
    kind, module = build(module_case)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[checkpoint])
    trainer.fit(module, batches(module_case, 40), batches(module_case, 21, 1))
    assert {"second_loss", "val_seen", "own_epoch"} <= trainer.callback_metrics.keys()
    (tested,) = trainer.test(module, batches(module_case, 21, 2), verbose=False)
    assert_finite(tested)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    if not has_users_members(module_case):
        assert rates == pytest.approx([0.001 * 0.5**3, 0.01 * 0.5**3])  # 10 steps, halved at every third

    loaded = kind.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert (loaded.penalty, loaded.hparams.tag) == (1e-3, "mine")
    x = next(iter(loader(module_case.task, 8)))[0]
    assert_equal_states(loaded.predict(x).to_dict(), module.predict(x).to_dict())

    torch.manual_seed(5)
    _, resumed = build(module_case)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(resumed, batches(module_case, 40), batches(module_case, 21, 1), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_equal_states(dict(resumed.state_dict()), dict(module.state_dict()))


def test_a_constructor_of_ones_own_is_what_a_checkpoint_calls(make_trainer, tmp_path):
    class Fixed(DeterministicModule):
        def __init__(self, width=8):
            super().__init__(network, num_eval_samples=3)
            self.width = width

    module, trainer = Fixed(width=5), make_trainer()
    trainer.fit(module, loader("classification", 16))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert Fixed.load_from_checkpoint(tmp_path / "own.ckpt").width == 5


@pytest.mark.parametrize("arguments", [{}, {"ignore": ["network"]}, {"ignore": "task"}])
def test_save_hyperparameters_may_be_called_as_ever(make_trainer, tmp_path, arguments):
    class Saved(DeterministicModule):
        def __init__(self, network, kind=torch.nn.ReLU, **kwargs):
            super().__init__(network, **kwargs)
            self.save_hyperparameters(**arguments)
            assert self.hparams.kind is torch.nn.ReLU  # as it was given

    module, trainer = Saved(network, task="multilabel"), make_trainer()
    trainer.fit(module, loader("multilabel", 16))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Saved.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert loaded.task == module.task
    assert loaded.hparams.kind is torch.nn.ReLU


def test_an_argument_that_no_file_can_hold_is_asked_for_by_name(make_trainer, tmp_path):
    class Saved(DeterministicModule):
        def __init__(self, network, **kwargs):
            super().__init__(network, **kwargs)
            self.save_hyperparameters()

    trainer = make_trainer()
    with pytest.warns(UserWarning, match="'network' removed from hparams"):  # Lightning's, of a lambda
        trainer.fit(Saved(lambda: network()), loader("classification", 16))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(InputError, match="The checkpoint does not hold argument `network`"):
        Saved.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert Saved.load_from_checkpoint(tmp_path / "saved.ckpt", network=network)


@pytest.mark.parametrize("hook", ["setup", "on_validation_start", "on_test_start", "on_train_epoch_start"])
def test_a_hook_in_which_we_do_something_is_not_lost_silently(hook):
    with pytest.raises(InputError, match=rf"Mine.{hook} must call `super\(\).{hook}"):
        type("Mine", (DeterministicModule,), {hook: lambda self, *args: None})

    class Named(DeterministicModule):
        def setup(self, stage):
            DeterministicModule.setup(self, stage)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            """Lightning's own, in which we do nothing."""

    assert issubclass(Named, DeterministicModule)


@pytest.mark.parametrize(("base", "hook"), [(TemperatureScaling, "on_train_end"), (OODDetection, "on_test_start")])
def test_so_it_is_with_callbacks(base, hook):
    with pytest.raises(InputError, match=rf"Mine.{hook} must call `super\(\).{hook}"):
        type("Mine", (base,), {hook: lambda self, *args: None})


@pytest.mark.parametrize("hook", ["configure_optimizers", "training_step"])
def test_what_members_do_themselves_is_not_replaced_beside_them(make_trainer, hook):
    kind = type("Mine", (EnsembleModule,), {hook: lambda self, *args: None})
    with pytest.raises(
        InputError, match=f"Mine overrides `{hook}`.*members are LightningModules.*Override it in UsersModule"
    ):
        make_trainer().fit(kind(UsersModule, num_members=2), loader("classification", 16))


@pytest.mark.every_case
def test_a_callbacks_subclass_fits_and_finds_its_file(callback_case, make_trainer, tmp_path):
    callback = extended_callback(callback_case)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[callback, checkpoint])
    module, data = UsersModule(), loader("classification", 40)
    trainer.fit(module, data, loader("classification", 61, 1))
    (tested,) = trainer.test(module, loader("classification", 27, 2), ckpt_path="best", verbose=False)
    assert_finite(tested)
    assert callback.note == "mine"
    assert callback.heard == ["fit", "train end", "test", *["batch"] * 4]
    if callback_case.fits:
        again = extended_callback(callback_case)
        other = make_trainer(callbacks=[again])
        other.test(UsersModule(), loader("classification", 27, 2), ckpt_path=checkpoint.best_model_path, verbose=False)
        assert_equal_states(again.state_dict(), callback.state_dict())


RANKS = """
import json, warnings
import torch
from lightning.pytorch import Trainer
from tests.contract.cases import MODULES
from tests.contract.subclasses import batches, build
warnings.simplefilter("ignore")
results = {{}}
for case in MODULES:
    if case.name in {names}:
        torch.manual_seed(0)
        kind, module = build(case)
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
                          enable_model_summary=False, enable_checkpointing=False)
        trainer.fit(module, batches(case, 41), batches(case, 21, 1))
        (tested,) = trainer.test(module, batches(case, 27, 2), verbose=False)
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        both = trainer.strategy.all_gather(flat)
        results[case.name] = [bool((both[0] == both[1]).all()), tested, float(trainer.callback_metrics.get("val_seen", 1.0))]
if trainer.is_global_zero:
    json.dump(results, open(out, "w"))
"""


def test_subclasses_run_on_two_ranks(run_script):
    names = [case.name for case in MODULES if case.name in REPRESENTATIVES]
    for name, (agree, tested, _) in run_script(RANKS.format(names=names)).items():
        assert agree, name
        assert all(math.isfinite(value) for value in tested.values()), (name, tested)


CALLBACKS_ON_RANKS = """
import json, warnings
import torch
from lightning.pytorch import Trainer
from tests.contract.cases import CALLBACKS, UsersModule, loader
from tests.contract.subclasses import extended_callback
warnings.simplefilter("ignore")
results = {}
for case in CALLBACKS:
    torch.manual_seed(0)
    callback, module = extended_callback(case), UsersModule()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, loader("classification", 41), loader("classification", 61, 1))
    (tested,) = trainer.test(module, loader("classification", 27, 2), verbose=False)
    results[case.name] = [callback.heard, callback.fitted if case.fits else True, tested]
if trainer.is_global_zero:
    json.dump(results, open(out, "w"))
"""


def test_subclasses_of_callbacks_run_on_two_ranks(run_script):
    for name, (heard, fitted, tested) in run_script(CALLBACKS_ON_RANKS).items():
        assert fitted, name
        assert heard == ["fit", "train end", "test", "batch", "batch"], name  # 14 rows on each rank
        assert all(math.isfinite(value) for value in tested.values()), (name, tested)


REPLACED_STEPS = """
import json
import torch
from lightning.pytorch import Trainer
from lightning_uq import DeterministicModule
from tests.contract.cases import loader, network
class Mine(DeterministicModule):
    def validation_step(self, batch, batch_idx):
        self.log("own", self(batch[0]).mean(), sync_dist=True)
    def test_step(self, batch, batch_idx):
        self.log("own", self(batch[0]).mean(), sync_dist=True)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False)
module = Mine(network)
trainer.fit(module, loader("classification", 16), loader("classification", 16))
(tested,) = trainer.test(module, loader("classification", 16), verbose=False)
if trainer.is_global_zero:
    json.dump(tested, open(out, "w"))
"""


def test_metrics_that_a_replaced_step_does_not_update_are_not_logged(run_script):
    assert list(run_script(REPLACED_STEPS)) == ["own"]
