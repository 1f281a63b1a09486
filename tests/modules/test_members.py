"""LightningModules as members: each must end as it would have ended alone."""

import copy
import math
import pickle
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.modules.composite import CompositeOptimizer
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.running.streams import RandomStream

M, SEED = 3, 7


class Lit(LightningModule):
    """A user's module: dropout, BatchNorm, a metric, the usual steps."""

    def __init__(self, scheduler=None, dropout=0.0, optimizer=torch.optim.Adam, lr=0.05):
        super().__init__()
        self.scheduler, self.optimizer, self.lr = scheduler, optimizer, lr
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        if self.scheduler == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        if self.scheduler == "every step":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "cosine"},
            }
        if self.scheduler == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}
        return optimizer


def dataset(n=50):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 3, generator=generator)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x @ weights + torch.randn(n, 3, generator=generator)).argmax(1))


def loader(n=50, **kwargs):
    # With a generator of its own the loader draws nothing from the global one.
    return DataLoader(dataset(n), batch_size=8, generator=torch.Generator().manual_seed(3), **kwargs)


def alone(i, factory, make_trainer, seed=SEED, fit=(), **kwargs):
    """Member i by itself, in a process (so to speak) seeded with its seed."""
    with RandomStream(member_seed(seed, i)).active():
        module = factory()
        trainer = make_trainer(**kwargs)
        trainer.fit(module, loader(), loader(20), *fit)
    return module, trainer


def difference(ensemble, i, module):
    ours, theirs = ensemble.network.member_state_dict(i), module.state_dict()
    assert ours.keys() == theirs.keys()
    return max(
        (ours[name].double() - theirs[name].double()).abs().max().item() for name in ours if theirs[name].numel()
    )


def described(options):
    """An id that is the same in every process: a function's or class's name, not its address."""
    return ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "plain"


def scaled(growth_interval=3):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10, growth_interval=growth_interval))


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({}, {}),
        ({}, {"gradient_clip_val": 0.05}),
        ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ({}, {"accumulate_grad_batches": 2}),
        ({"scheduler": "step"}, {}),
        ({"scheduler": "every step"}, {"accumulate_grad_batches": 3}),
        ({"scheduler": "plateau"}, {}),
        ({"dropout": 0.5}, {}),
        ({}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "bf16-true"}),
        ({}, {"precision": "64-true"}),
        ({}, {"plugins": scaled}),
        ({"optimizer": torch.optim.Adagrad}, {}),
        (
            {"scheduler": "plateau", "dropout": 0.3},
            {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
        ),
    ],
    ids=described,
)
def test_member_ends_as_it_would_alone(module, options, make_trainer):
    def factory():
        return Lit(**module)

    made = lambda: {**options, **({"plugins": options["plugins"]()} if "plugins" in options else {})}  # noqa: E731
    ensemble = EnsembleModule(factory, num_members=M, seed=SEED)
    start = copy.deepcopy(ensemble.state_dict())
    trainer = make_trainer(max_epochs=3, **made())
    trainer.fit(ensemble, loader(), loader(20))
    for i in range(M):
        single, single_trainer = alone(i, factory, make_trainer, max_epochs=3, **made())
        assert difference(ensemble, i, single) == 0.0
        assert trainer.global_step == single_trainer.global_step
        assert trainer.callback_metrics[f"member_{i}/val_loss"] == single_trainer.callback_metrics["val_loss"]
    assert any(not torch.equal(value, start[name]) for name, value in ensemble.state_dict().items())


def test_a_member_that_overflows_does_not_stop_the_others(make_trainer):
    """Member 1's loss is scaled until its gradients are infinite: alone it would skip its steps, and only it."""

    class Loud(Lit):
        count = 0

        def __init__(self):
            super().__init__(optimizer=torch.optim.SGD, lr=0.1)
            self.number = Loud.count % M
            Loud.count += 1

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e30 if self.number == 1 and batch_idx % 2 else 1.0)

    ensemble = EnsembleModule(Loud, num_members=M, seed=SEED)
    start = copy.deepcopy(ensemble.state_dict())
    # The scale is common: it does not grow here, and its fall is too short to cost a small gradient.
    make_trainer(plugins=scaled(1000)).fit(ensemble, loader(), loader(20))
    for i in range(M):
        single, _ = alone(i, Loud, make_trainer, plugins=scaled(1000))
        assert single.number == i
        assert difference(ensemble, i, single) == 0.0
        name = f"network.members.{i}.net.0.weight"
        assert not torch.equal(ensemble.state_dict()[name], start[name])


class Draws(Lit):
    """Draws random numbers of every kind, in steps and hooks, also while it validates."""

    def training_step(self, batch, batch_idx):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return super().training_step(batch, batch_idx) * noise

    def validation_step(self, batch, batch_idx):
        torch.rand(3)
        super().validation_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.net[4].bias.data += torch.rand(3)


def test_random_numbers_are_a_members_own(make_trainer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ensemble = EnsembleModule(Draws, num_members=M, seed=SEED)
    assert torch.equal(torch.get_rng_state(), before)
    make_trainer(max_epochs=2).fit(ensemble, loader(), loader(20))
    assert torch.equal(torch.get_rng_state(), before)
    for i in range(M):
        single, _ = alone(i, Draws, make_trainer, max_epochs=2)
        assert difference(ensemble, i, single) == 0.0


@pytest.mark.parametrize("module", [{"dropout": 0.5, "scheduler": "step"}, {"scheduler": "every step"}], ids=described)
def test_a_resumed_training_ends_as_the_uninterrupted_one(module, make_trainer, tmp_path):
    def factory():
        return Lit(**module)

    def trainer(epochs, **kwargs):
        return make_trainer(max_epochs=epochs, **kwargs)

    whole = EnsembleModule(factory, num_members=M, seed=SEED)
    trainer(4).fit(whole, loader(), loader(20))
    first = EnsembleModule(factory, num_members=M, seed=SEED)
    half = trainer(2)
    half.fit(first, loader(), loader(20))
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = EnsembleModule(factory, num_members=M, seed=99)
    trainer(4).fit(second, loader(), loader(20), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second.seed == SEED
    for i in range(M):
        assert max((a - b).abs().max() for a, b in zip(second.parameters(), whole.parameters(), strict=True)) == 0
        single, _ = alone(i, factory, make_trainer, max_epochs=4)
        assert difference(second, i, single) == 0.0


# ---------------------------------------------------------------------- logging


def test_members_log_under_their_names_and_the_mean_under_theirs(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("train_loss", "val_loss", "val_accuracy"):
        members = [metrics[f"member_{i}/{name}"] for i in range(M)]
        assert len(set(members)) > 1
        assert metrics[name] == pytest.approx(np.mean(members), abs=1e-6)
    # The ensemble's own stand apart.
    x, y = dataset(20).tensors
    prediction = ensemble.eval().predict(x)
    assert metrics["ensemble/val_accuracy"] == pytest.approx((prediction.label == y).float().mean().item())
    assert metrics["ensemble/val_nll"] == pytest.approx(
        -prediction.probs.log()[torch.arange(20), y].mean().item(), abs=1e-5
    )
    assert metrics["ensemble/val_nll"] < np.mean([metrics[f"member_{i}/val_loss"] for i in range(M)])


def test_what_the_progress_bar_shows_is_the_mean(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    assert set(trainer.progress_bar_metrics) == {"train_loss"}


class LogsEverything(Lit):
    def __init__(self):
        super().__init__()
        self.metrics = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)], prefix="val_")

    def on_train_epoch_start(self):
        self.log("epoch_number", float(self.current_epoch), False, False)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.metrics(self(x), y)
        self.log_dict(self.metrics, on_step=True, on_epoch=True)
        self.log_dict({"a": 1.0, "b": torch.tensor([2.0])}, batch_size=len(y))
        self.log("count", float(len(y)), reduce_fx="sum")
        self.log("count", float(len(y)), reduce_fx="sum")

    def on_validation_epoch_end(self):
        self.log("at_end", self.trainer.callback_metrics.get("nothing", torch.tensor(3.0)))


def test_every_way_of_logging(make_trainer):
    ensemble = EnsembleModule(LogsEverything, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert (metrics["a"], metrics["b"], metrics["at_end"], metrics["epoch_number"]) == (1.0, 2.0, 3.0, 1.0)
    assert metrics["count"] == metrics["member_0/count"] == 40.0
    x, y = dataset(20).tensors
    for name, kind in (("val_MulticlassAccuracy", MulticlassAccuracy), ("val_MulticlassF1Score", MulticlassF1Score)):
        expected = [kind(3)(ensemble.network.member(i).eval()(x), y).item() for i in range(M)]
        assert [metrics[f"member_{i}/{name}"] for i in range(M)] == pytest.approx(expected)
        assert metrics[name] == pytest.approx(np.mean(expected))
        assert metrics[f"{name}_epoch"] == metrics[name]


def test_weights_are_averaged(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    make_trainer(max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.5)]).fit(ensemble, loader(), loader(20))
    for i in range(2):
        with RandomStream(member_seed(SEED, i)).active():
            single = Lit()
            make_trainer(max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.5)]).fit(single, loader(), loader(20))
        assert difference(ensemble, i, single) == 0.0


def test_monitors_find_the_mean(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}")
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(ensemble, loader(), loader(20))
    assert checkpoint.best_model_score == pytest.approx(float(checkpoint.best_model_score))
    assert checkpoint.best_model_path
    assert trainer.test(ensemble, loader(20), ckpt_path="best", weights_only=True)[0]["ensemble/test_nll"] > 0


def test_learning_rates_are_named_by_member(make_trainer, tmp_path):
    ensemble = EnsembleModule(lambda: Lit(scheduler="every step"), num_members=M, seed=SEED)
    monitor = LearningRateMonitor()
    trainer = make_trainer(callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(ensemble, loader())
    for i in range(M):
        assert monitor.lrs[f"member_{i}/cosine"][0] == 0.05
        assert monitor.lrs[f"member_{i}/cosine"][-1] < 0.05


# ---------------------------------------------------------------------- what a member asks of its Trainer


class Asks(Lit):
    """Writes down what it hears and sees."""

    def __init__(self):
        super().__init__(scheduler="step")
        self.heard, self.seen = [], {}

    def setup(self, stage):
        self.heard.append(f"setup {stage.value}")

    def teardown(self, stage):
        self.heard.append(f"teardown {stage.value}")

    def on_train_batch_start(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.seen["lr"] = optimizer.param_groups[0]["lr"]
        self.seen["optimizer"] = optimizer.optimizer
        self.seen["raw"] = self.optimizers(use_pl_optimizer=False)
        self.seen["scheduler"] = self.lr_schedulers()
        self.seen["where"] = (self.current_epoch, self.global_step, self.trainer.max_epochs, self.device.type)

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen["outputs"] = outputs

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return self.net[0].weight.sum()

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert outputs == self.net[0].weight.sum()
        self.heard.append("on_validation_batch_end")

    def on_before_optimizer_step(self, optimizer):
        self.seen["stepping"] = optimizer

    def on_before_zero_grad(self, optimizer):
        self.seen["zeroing"] = optimizer


for _name in (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
):
    setattr(Asks, _name, lambda self, name=_name: self.heard.append(name))


def test_members_hear_and_see_what_they_would_alone(make_trainer):
    ensemble = EnsembleModule(Asks, num_members=2, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    single, _ = alone(0, Asks, make_trainer, max_epochs=2)
    members = [ensemble.network.member(i) for i in range(2)]
    assert members[0].heard == members[1].heard == single.heard
    assert {"setup fit", "on_train_epoch_end", "on_fit_end", "teardown fit"} <= set(single.heard)
    for member in members:
        parameters = list(member.parameters())
        for key in ("optimizer", "raw", "stepping", "zeroing"):
            assert [p for group in member.seen[key].param_groups for p in group["params"]] == parameters or key == "raw"
            assert isinstance(member.seen[key], torch.optim.Adam)
        assert member.seen["scheduler"].optimizer is member.seen["optimizer"]
        assert member.seen["lr"] == single.seen["lr"] == 0.025
        assert member.seen["where"] == single.seen["where"]
        assert member.seen["outputs"].keys() == single.seen["outputs"].keys()
    assert members[0].seen["outputs"]["loss"] == single.seen["outputs"]["loss"]
    assert members[0].seen["outputs"]["loss"] != members[1].seen["outputs"]["loss"]


def test_members_come_back_as_they_were(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    before = [set(vars(ensemble.network.member(i))) for i in range(2)]
    make_trainer().fit(ensemble, loader())
    assert [set(vars(ensemble.network.member(i))) for i in range(2)] == before
    assert ensemble.network.member(0).trainer is ensemble.trainer


def test_an_ensemble_can_be_pickled_while_it_trains(make_trainer):
    """As `ddp_spawn` does it after a fit that was interrupted."""
    copies = []

    class Pickle(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copies.append(pickle.loads(pickle.dumps(pl_module)))
            copy.deepcopy(pl_module)

    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    make_trainer(callbacks=[Pickle()], limit_train_batches=1).fit(ensemble, loader())
    x = torch.randn(5, 4)
    assert torch.equal(copies[0].eval()(x), ensemble.eval()(x))
    make_trainer(limit_train_batches=1).fit(copies[0].train(), loader())


class WarmsUp(Lit):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.trainer.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()
        scheduler.step()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("options", [{}, {"plugins": scaled}], ids=described)
def test_a_members_own_optimization_hooks_are_its_own(options, make_trainer):
    made = lambda: {name: make() for name, make in options.items()}  # noqa: E731
    ensemble = EnsembleModule(lambda: WarmsUp(scheduler="step"), num_members=M, seed=SEED)
    make_trainer(max_epochs=2, **made()).fit(ensemble, loader(), loader(20))
    for i in range(M):
        single, _ = alone(i, lambda: WarmsUp(scheduler="step"), make_trainer, max_epochs=2, **made())
        assert difference(ensemble, i, single) == 0.0


class Augments(Lit):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 2, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + torch.randn_like(x) if self.trainer.training else x + 1), y


def test_augmentation_in_transfer_hooks_is_each_members_own(make_trainer):
    ensemble = EnsembleModule(Augments, num_members=M, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(), loader(20))
    for i in range(M):
        single, single_trainer = alone(i, Augments, make_trainer, max_epochs=2)
        assert difference(ensemble, i, single) == 0.0
        assert trainer.callback_metrics[f"member_{i}/val_loss"] == single_trainer.callback_metrics["val_loss"]


class HasData(Lit):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(20)


def test_loaders_may_be_the_members(make_trainer):
    ensemble = EnsembleModule(HasData, num_members=2, seed=SEED)
    trainer = make_trainer()
    trainer.fit(ensemble)
    assert "val_loss" in trainer.callback_metrics


def test_a_datamodules_transfer_hook_takes_precedence(make_trainer):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 3, batch[1]

    ensemble = EnsembleModule(Augments, num_members=1, seed=SEED)
    with RandomStream(member_seed(SEED, 0)).active():
        single = Augments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says, once a process, that both override the hook
        for module in (ensemble, single):
            make_trainer().fit(module, datamodule=Data())
    assert difference(ensemble, 0, single) == 0.0


class Late(LightningModule):
    """Builds its layers in `configure_model`, keeps a note in the checkpoint, and drops a key from it."""

    def __init__(self):
        super().__init__()
        self.net, self.note = None, None
        self.register_buffer("big", torch.zeros(3))

    def configure_model(self):
        if self.net is None:
            self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = self.net.weight.sum().item()
        del checkpoint["state_dict"]["big"]

    def on_load_checkpoint(self, checkpoint):
        self.note = checkpoint["note"]
        checkpoint["state_dict"]["big"] = torch.ones(3)


def test_checkpoint_hooks_see_a_checkpoint_of_their_own(make_trainer, tmp_path):
    ensemble = EnsembleModule(Late, num_members=2, seed=SEED)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    names = torch.load(tmp_path / "late.ckpt", weights_only=True)["state_dict"]
    assert set(names) == {f"network.members.{i}.net.{name}" for i in range(2) for name in ("weight", "bias")}
    again = EnsembleModule(Late, num_members=2)
    make_trainer(max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "late.ckpt", weights_only=True)
    for i in range(2):
        assert again.network.member(i).note == pytest.approx(ensemble.network.member(i).net.weight.sum().item())
        assert again.network.member(i).big.tolist() == [1, 1, 1]


def test_a_step_that_is_skipped(make_trainer):
    class Skips(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 == self.lr else loss

    def check(factory, **options):
        ensemble = EnsembleModule(factory, num_members=2, seed=SEED)
        make_trainer(max_epochs=2, **options).fit(ensemble, loader(), loader(20))
        for i in range(2):
            assert difference(ensemble, i, alone(i, factory, make_trainer, max_epochs=2, **options)[0]) == 0.0

    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        check(lambda: Skips(lr=1))  # both skip every other batch
    counter = iter([0, 1, 0, 1])
    check(lambda: Skips(lr=next(counter), optimizer=torch.optim.SGD))  # they take turns


# ---------------------------------------------------------------------- evaluation


def test_forward_and_predict_are_the_ensembles(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=M, seed=SEED)
    x = dataset(20).tensors[0]
    ensemble.eval()
    expected = torch.stack([ensemble.network.member(i)(x) for i in range(M)])
    assert torch.equal(ensemble(x), expected)
    predictions = make_trainer().predict(ensemble, loader(20))
    assert torch.allclose(torch.cat([p.probs for p in predictions]), expected.softmax(2).mean(0), atol=1e-6)


def test_output_picks_the_logits_from_what_a_member_returns(make_trainer):
    class Dict(Lit):
        def forward(self, x):
            return {"logits": self.net(x), "features": x}

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])["logits"], batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(InputError, match=r"returned a dict with keys \['features', 'logits'\].*argument `output`"):
        make_trainer().fit(EnsembleModule(Dict, num_members=2), loader(), loader(20))
    ensemble = EnsembleModule(Dict, num_members=2, output=lambda out: out["logits"])
    trainer = make_trainer()
    trainer.fit(ensemble, loader(), loader(20))
    assert "ensemble/val_nll" in trainer.callback_metrics


class Regressor(Lit):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (lambda x, y: TensorDataset(x, x[:, :3]), "the targets are no class labels"),
        (lambda x, y: TensorDataset(x, torch.where(y == 0, -1, y)), "the targets are no class labels"),
        (lambda x, y: [{"a": a} for a in x], "the batches are no pairs"),
        (lambda x, y: TensorDataset(x), "the batches hold no target"),
    ],
)
def test_targets_that_do_not_fit_are_left_to_the_member(batch, reason, make_trainer, monkeypatch):
    said = []
    monkeypatch.setitem(EnsembleModule.setup.__globals__, "rank_zero_info", said.append)

    class Free(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(1.0), batch_size=8)

    trainer = make_trainer(max_epochs=2)
    trainer.fit(
        EnsembleModule(Free, num_members=2, seed=SEED), loader(), DataLoader(batch(*dataset(20).tensors), batch_size=8)
    )
    assert trainer.callback_metrics["val_loss"] == 1.0
    assert not any(name.startswith("ensemble/") for name in trainer.callback_metrics)
    assert len(said) == 1
    assert reason in said[0]


def test_several_loaders(make_trainer):
    class Two(Lit):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("loader", float(dataloader_idx), batch_size=1)

        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("loader", float(dataloader_idx), batch_size=1, add_dataloader_idx=False)

    ensemble = EnsembleModule(Two, num_members=2, seed=SEED)
    trainer = make_trainer()
    results = trainer.validate(ensemble, [loader(20), loader(12)], verbose=False)
    assert results[1]["loader/dataloader_idx_1"] == 1.0
    assert results[1]["ensemble/val_nll/dataloader_idx_1"] != results[0]["ensemble/val_nll/dataloader_idx_0"]


# ---------------------------------------------------------------------- refusals


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Late2(Lit):
    def setup(self, stage):
        self.automatic_optimization = False


class TwoOptimizers(Lit):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 4)]


class NoOptimizer(Lit):
    def configure_optimizers(self):
        return None


class OwnBackward(Lit):
    def backward(self, loss):
        loss.backward()


class OwnLoop(Lit):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


class NoStep(LightningModule):
    pass


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Manual, "Manual to leave optimization to Lightning, but it optimizes by hand"),
        (Late2, "Late2 to leave optimization to Lightning, but it optimizes by hand"),
        (TwoOptimizers, "`configure_optimizers` of TwoOptimizers to return one optimizer, but it returned 2"),
        (NoOptimizer, "`configure_optimizers` of NoOptimizer to return one optimizer, but it returned 0"),
        (
            lambda: Lit(optimizer=torch.optim.LBFGS),
            "Lit to use an optimizer that needs one evaluation a step, but got LBFGS",
        ),
        (OwnBackward, "OwnBackward to leave the backward pass to Lightning, but it overrides `backward`"),
        (OwnLoop, "`training_step` of OwnLoop to take a batch, but it takes `dataloader_iter`"),
        (NoStep, "NoStep to define `training_step`"),
    ],
)
def test_modules_that_cannot_train_side_by_side(factory, message, make_trainer):
    with pytest.raises(InputError, match=rf"{message}.*collect them with `EnsembleModule.from_checkpoints`"):
        make_trainer().fit(EnsembleModule(factory, num_members=2), loader())


def test_a_mapping_without_a_loss(make_trainer):
    class Wrong(Lit):
        def training_step(self, batch, batch_idx):
            return {"Loss": 1}

    with pytest.raises(InputError, match=r"`training_step` of Wrong returns to hold `loss`, but got keys \['Loss'\]"):
        make_trainer().fit(EnsembleModule(Wrong, num_members=2), loader())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"optimizer": torch.optim.SGD}, "optimizer"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.1)}, "optimizer"),
        ({"lr_scheduler": torch.optim.lr_scheduler.LinearLR}, "lr_scheduler"),
        ({"loss": F.cross_entropy}, "loss"),
        ({"bootstrap": "poisson"}, "bootstrap"),
        ({"prior_network": lambda: nn.Linear(4, 3), "prior_scale": 1.0}, "prior_network"),
    ],
)
def test_arguments_that_modules_bring_themselves(arguments, name):
    with pytest.raises(
        InputError, match=rf"argument `{name}` to be left out where members are LightningModules: Lit brings"
    ):
        EnsembleModule(Lit, num_members=2, **arguments)


def test_modules_run_in_a_loop():
    assert EnsembleModule(Lit, num_members=2).network.execution == "loop"
    with pytest.raises(UnsupportedError, match="execution='stacked' does not support these members"):
        EnsembleModule(Lit, num_members=2, execution="stacked")


def test_the_default_optimizer_may_come_spelled_out():
    """As the command line passes it."""
    EnsembleModule(Lit, num_members=2, optimizer=partial(torch.optim.Adam, lr=0.001, weight_decay=0))


def test_composite_optimizer_refuses_what_belongs_to_a_member():
    composite = CompositeOptimizer([torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)])
    with pytest.raises(NotImplementedError, match="Add parameter groups to a member's own optimizer"):
        composite.add_param_group({"params": []})
    with pytest.raises(
        InputError, match="Expected the optimizer states of 1 LightningModules, but the checkpoint holds 0"
    ):
        composite.load_state_dict(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict())
    assert "SGD" in repr(composite)


class MeanOnly(LightningModule):
    """A regressor without a variance: right for its own steps, but no density to score."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_members_without_a_density_train_and_validate_by_their_own_steps(make_trainer):
    data = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
    ensemble = EnsembleModule(MeanOnly, num_members=2, task="regression")
    trainer = make_trainer()
    trainer.fit(ensemble, data, data)
    assert set(trainer.callback_metrics) == {"val_loss", "member_0/val_loss", "member_1/val_loss"}
    with pytest.raises(InputError, match="argument `output` a function that makes them"):
        trainer.predict(ensemble, data)


class NllOfLogProbs(Lit):
    """Returns probabilities, which its own loss knows and a softmax classifier's metrics do not."""

    def forward(self, x):
        return super().forward(x).softmax(1)


def test_metrics_that_do_not_fit_never_stop_members_that_train_alone(make_trainer):
    trainer = make_trainer()
    trainer.fit(EnsembleModule(NllOfLogProbs, num_members=2, seed=SEED), loader(), loader(20))
    assert not [name for name in trainer.callback_metrics if name.startswith("ensemble/")]
    assert "val_loss" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # they hold nothing
@pytest.mark.filterwarnings("ignore:JointLogLoss has not seen")
def test_metrics_of_a_part_of_the_data_do_not_pass_for_all_of_it(make_trainer):
    """A later batch has a label that the task does not know."""

    class Ignores(Lit):
        def validation_step(self, batch, batch_idx):
            pass

        test_step = validation_step

    x, y = dataset(20).tensors
    y = y.clone()
    y[12] = -100
    ensemble = EnsembleModule(Ignores, num_members=2, seed=SEED)
    (found,) = make_trainer().test(ensemble, DataLoader(TensorDataset(x, y), batch_size=8), verbose=False)
    assert all(math.isnan(value) for name, value in found.items() if name.startswith("ensemble/"))
