"""Users' projects that import `pytorch_lightning`, a second tree of the classes of `lightning.pytorch`."""

import lightning.pytorch as lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_uq import EnsembleModule, FitGMM, OODDetection, PredictionWriter, TemperatureScaling, load_fitted
from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.importing import import_class
from lightning_uq.lightning_trees import both, in_tree_of, is_instance
from lightning_uq.running.streams import RandomStream
from tests.modules.lightning_ensemble.cases import loader

pl = pytest.importorskip("pytorch_lightning")
M, SEED = 2, 7


def trainer_of(tree, folder, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return tree.Trainer(
        **{**quiet, "max_epochs": 2, "default_root_dir": folder, "enable_checkpointing": False, **kwargs}
    )


class Lit(pl.LightningModule):
    """Its loss, its optimizer and its scheduler are others than an ensemble of plain networks would use."""

    def __init__(self, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.seen = None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.multi_margin_loss(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", float(self.current_epoch))  # the first epoch is the best

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.trainer.model.parameters(), lr=self.hparams.rate)
        return [optimizer], [Halves(optimizer)]

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()

    def on_train_end(self):
        trainer = self.trainer
        self.seen = trainer.model is self and trainer.lightning_module is self and isinstance(trainer, pl.Trainer)


class Halves:
    """A scheduler that is none of torch's: only a module with its own `lr_scheduler_step` may use it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_members_train_as_they_do_alone(tmp_path):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = trainer_of(lightning, tmp_path, gradient_clip_val=0.5)
    trainer.fit(ensemble, loader(), loader(20))
    assert {"member_0/loss_epoch", "loss_epoch", "val"} <= trainer.callback_metrics.keys()
    for i, member in enumerate(ensemble.members.modules):
        assert member.seen
        with RandomStream(member_seed(SEED, i)).active():
            alone = Lit()
            trainer_of(pl, tmp_path, gradient_clip_val=0.5).fit(alone, loader(), loader(20))
        assert all(torch.equal(a, b) for a, b in zip(member.parameters(), alone.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "e.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "e.ckpt", network=Lit)
    assert torch.equal(again.predict(torch.ones(2, 4)).probs, ensemble.predict(torch.ones(2, 4)).probs)


def test_members_that_trained_apart_are_collected(tmp_path):
    modules = [Lit(), Lit()]
    paths = [tmp_path / f"{i}.ckpt" for i in range(M)]
    for module, path in zip(modules, paths, strict=True):
        trainer = trainer_of(pl, tmp_path)
        trainer.fit(module, loader())
        trainer.save_checkpoint(path)
    ensemble = EnsembleModule.from_checkpoints(paths, module_class=Lit)
    assert ensemble.members is not None
    assert torch.equal(ensemble.network.member(1).net[0].weight, modules[1].net[0].weight)


class OfLightning(lightning.LightningModule):
    forward, training_step = Lit.forward, Lit.training_step

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)


@pytest.mark.parametrize("module", [Lit, OfLightning])
def test_members_that_are_compiled_as_a_whole_are_not_taken_for_plain_networks(module):
    with pytest.raises(InputError, match=f"compiles {module.__name__} as a whole.*Compile the network inside it"):
        EnsembleModule(lambda: torch.compile(module(), backend="eager"), num_members=2)


class HoldsAnother(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.trainer.strategy.model.parameters(), lr=0.1)


def test_an_optimizer_with_another_members_parameters_is_an_error(tmp_path):
    with pytest.raises(InputError, match="optimizer of member 0 holds parameters of member 1"):
        trainer_of(lightning, tmp_path).fit(EnsembleModule(HoldsAnother, num_members=2), loader())


@pytest.mark.parametrize("checkpoint_of", [pl, lightning], ids=["pytorch_lightning", "lightning"])
@pytest.mark.parametrize("trainer_tree", [pl, lightning], ids=["pytorch_lightning", "lightning"])
def test_callbacks_fit_on_the_best_weights_under_either_trainer(trainer_tree, checkpoint_of, tmp_path):
    class Project(trainer_tree.LightningModule):
        pass

    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        setattr(Project, name, getattr(Lit, name))
    Project.configure_optimizers = lambda self: torch.optim.SGD(self.parameters(), lr=2.0)

    def build():
        module = Project()
        module.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return module

    module, temperature, density = build(), TemperatureScaling(), FitGMM()
    best = checkpoint_of.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor="val")
    trainer = trainer_of(trainer_tree, tmp_path, callbacks=[temperature, density, best], enable_checkpointing=True)
    trainer.fit(module, loader(), loader(20))
    weights = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert not torch.equal(weights["net.0.weight"], module.net[0].weight)
    reference = build()
    reference.load_state_dict(weights)
    assert temperature.temperature == pytest.approx(TemperatureScaling().fit(reference, loader(20)).temperature)
    assert temperature.uq_ckpt_path == best.best_model_path.replace(".ckpt", "-uq.ckpt")
    probs, scores = load_fitted(temperature.uq_ckpt_path, build())(torch.ones(2, 4))
    assert probs.shape == (2, 3)
    assert scores.shape == (2,)

    # Another process: new callbacks, the best checkpoint, and what lies beside it.
    fresh = [TemperatureScaling(attach=True, task="classification"), FitGMM(), OODDetection({"far": loader(20)})]
    other = trainer_of(trainer_tree, tmp_path, callbacks=[*fresh[1:]])
    results = other.test(build(), loader(20), ckpt_path=best.best_model_path, verbose=False)
    assert any("far" in key for key in results[0])
    writer = PredictionWriter(tmp_path / "out")
    attached = TemperatureScaling(attach=True)
    resumed = trainer_of(trainer_tree, tmp_path, callbacks=[attached, writer], enable_checkpointing=True)
    resumed.fit(module, loader(), loader(20))
    predictions = resumed.predict(module, loader(20))
    assert type(predictions[0]).__name__ == "CategoricalPrediction"
    assert len(writer.written) == 1


def test_averaging_callbacks_are_recognised(tmp_path):
    for averaging in (
        pl.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1),
        pl.callbacks.EMAWeightAveraging(),
    ):
        trainer = trainer_of(pl, tmp_path, callbacks=[TemperatureScaling(), averaging])
        with pytest.raises(InputError, match=f"stands before {type(averaging).__name__}.*Swap them"):
            trainer.fit(Lit(), loader(), loader(20))


def test_modules_of_this_package_need_the_trainer_of_lightning(tmp_path):
    with pytest.raises(TypeError, match="`LightningModule`.*EnsembleModule"):
        trainer_of(pl, tmp_path).fit(EnsembleModule(lambda: nn.Linear(4, 3)), loader())


def test_classes_and_functions_of_both_trees():
    assert both(lightning.Trainer) == (lightning.Trainer, pl.Trainer)
    assert both(nn.Linear) == (nn.Linear,)
    assert is_instance(Lit(), lightning.LightningModule)
    assert not is_instance(nn.Linear(1, 1), lightning.LightningModule)
    assert import_class(f"{__name__}.Lit", lightning.LightningModule) is Lit
    assert in_tree_of(Lit(), lightning.Trainer) is pl.Trainer
    assert in_tree_of(lightning.LightningModule(), lightning.Trainer) is lightning.Trainer


def test_the_other_tree_is_not_imported_for_a_user_who_does_not(run_script):
    code = """
import json, sys
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq import EnsembleModule
x, y = torch.randn(8, 4), torch.randint(3, (8,))
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(EnsembleModule(lambda: nn.Linear(4, 3)), DataLoader(TensorDataset(x, y)))
json.dump([name for name in sys.modules if name.startswith(("pytorch_lightning", "lightning_fabric"))], open(out, "w"))
"""
    assert run_script(code) == []
