"""Lightning's tuners and callbacks on ensembles of a user's modules, and on our modules around plain networks.

Each works, and a member of an ensemble then ends as it would alone; or it is refused by name before the training.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner, batch_size_scaling
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, InputError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.running.streams import RandomStream
from tests.contract.cases import MODULES
from tests.contract.cases import loader as case_loader

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 4, generator=GENERATOR)
Y = (X[:, 0] + 0.5 * torch.randn(48, generator=GENERATOR) > 0).long()
SEED = 3


def loader(batch_size=8):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size, generator=torch.Generator().manual_seed(3))


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return loader(self.batch_size)

    def val_dataloader(self):
        return loader(self.batch_size)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.backbone(x).relu())


class Users(LightningModule):
    """A project's module, with a backbone, a learning rate and a choice of schedulers."""

    def __init__(self, schedule="none"):
        super().__init__()
        self.schedule, self.lr = schedule, 0.2
        self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.backbone(x).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        if self.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        if self.schedule == "one cycle":
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return optimizer


class Adversarial(Users):
    """Two optimizers by hand, as a GAN has them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]


def fit(trainer, module):
    trainer.fit(module, loader(), loader())


def fit_data(trainer, module):
    trainer.fit(module, datamodule=Data())


def suggest_rate(trainer, module):
    found = Tuner(trainer).lr_find(module, loader(), loader(), num_training=15, update_attr=False)
    assert found.suggestion() > 0
    fit(trainer, module)


def scale_batches(trainer, module):
    data = Data()
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    assert data.batch_size == 4
    trainer.fit(module, datamodule=data)


WORKING = {
    "plateau": ("plateau", list, {}, fit),
    "one cycle": ("one cycle", list, {}, fit),
    "overfit batches": ("none", list, {"overfit_batches": 2}, fit),
    "monitor": ("plateau", lambda: [LearningRateMonitor()], {"logger": CSVLogger}, fit),
    "rich": ("none", lambda: [RichProgressBar()], {"enable_progress_bar": True}, fit),
    "accumulation": ("none", lambda: [GradientAccumulationScheduler({1: 2})], {}, fit),
    "lr_find": ("none", list, {}, suggest_rate),
    "scale_batch_size": ("none", list, {}, scale_batches),
    "batch size finder": ("none", lambda: [BatchSizeFinder(max_trials=2, steps_per_trial=1)], {}, fit_data),
}


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Lightning collects garbage at every size that it tries, which takes seconds after thousands of tests."""
    monkeypatch.setattr(batch_size_scaling, "garbage_collection_cuda", lambda: None)


@pytest.fixture
def make(make_trainer, tmp_path):
    def trainer(callbacks=(), logger=None, **options):
        logger = False if logger is None else logger(tmp_path)
        return make_trainer(max_epochs=3, callbacks=list(callbacks), logger=logger, log_every_n_steps=1, **options)

    return trainer


@pytest.mark.parametrize("name", WORKING)
def test_a_member_ends_as_it_would_alone(make, name):
    schedule, callbacks, options, run = WORKING[name]
    factory = partial(Users, schedule)
    ensemble = EnsembleModule(factory, num_members=2, seed=SEED)
    run(make(callbacks(), **options), ensemble)
    for i in range(2):
        with RandomStream(member_seed(SEED, i)).active():
            alone = factory()
            run(make(callbacks(), **options), alone)
        for key, value in alone.state_dict().items():
            assert torch.equal(ensemble.network.member(i).state_dict()[key], value), key


@pytest.mark.parametrize("name", [name for name in WORKING if name not in ("plateau", "one cycle")])
def test_our_modules_around_plain_networks_train(make, name):
    _, callbacks, options, run = WORKING[name]
    for case in MODULES:
        if case.name in ("Deterministic", "Ensemble, loop", "Ensemble, stacked", "Epinet", "Hypermodel, prior"):
            trainer = make(callbacks(), **options)
            run(trainer, case.build())
            assert trainer.current_epoch == 3


class Own(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


REFUSED = {
    "backbone": ([BackboneFinetuning()], Users, "BackboneFinetuning freezes layers.*from_checkpoints"),
    "own finetuning": ([Own()], Users, "Own freezes layers.*from_checkpoints"),
    "pruning": ([ModelPruning("l1_unstructured", amount=0.5)], Users, "ModelPruning compares.*from_checkpoints"),
    "rate": ([LearningRateFinder()], Users, r"Find the rate for one of them, `Tuner\(trainer\).lr_find\(Users\(\)\)`"),
    "size": ([BatchSizeFinder()], Users, "`batch_size`, which the members share.*LightningDataModule"),
    "by hand": ([], Adversarial, "Adversarial must leave optimization to Lightning.*from_checkpoints"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_train_members_as_alone_is_refused_before_the_training(make, name):
    callbacks, kind, match = REFUSED[name]
    ensemble = EnsembleModule(kind, num_members=2, seed=SEED)
    with pytest.raises(InputError, match=match):
        fit(make(callbacks), ensemble)


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (BackboneFinetuning(), "needs an attribute `backbone`, which DeterministicModule does not have"),
        (LearningRateFinder(), "no attribute `lr` or `learning_rate` of DeterministicModule.*`update_attr=False`"),
        (LearningRateFinder(attr_name="rate"), "no attribute `rate` of DeterministicModule"),
    ],
)
def test_what_a_module_lacks_is_named(make, callback, match):
    with pytest.raises(InputError, match=match):
        fit(make([callback]), DeterministicModule(Net))


SGD = partial(torch.optim.SGD, lr=0.2)


class WithBackbone(EnsembleModule):
    @property
    def backbone(self):
        return nn.ModuleList(self.network.members[i].backbone for i in range(self.network.num_indices))


def test_a_backbone_of_ones_own_is_frozen_and_thawed_as_lightning_does_it(make):
    finetuning = partial(BackboneFinetuning, unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, verbose=False)
    torch.manual_seed(0)
    ensemble = WithBackbone(Net, num_members=2, seed=SEED, execution="loop", optimizer=SGD)
    start = [ensemble.network.member(i).state_dict() for i in range(2)]
    fit(make([finetuning()]), ensemble)
    for i in range(2):
        alone = Users()
        alone.load_state_dict(start[i])
        fit(make([finetuning()]), alone)
        torch.testing.assert_close(dict(ensemble.network.member(i).state_dict()), dict(alone.state_dict()))
        assert not torch.equal(start[i]["backbone.weight"], alone.backbone.weight)


def test_copies_of_a_backbone_are_not_frozen_in_its_place(make):
    class Copies(EnsembleModule):
        @property
        def backbone(self):
            return self.network.member(0).backbone

    with pytest.raises(InputError, match="BackboneFinetuning would freeze copies.*`execution='loop'`"):
        fit(make([BackboneFinetuning()]), Copies(Net, num_members=2, execution="vmap", optimizer=SGD))


def test_a_rate_that_a_subclass_has_is_found_and_set(make):
    class WithRate(DeterministicModule):
        def __init__(self, network, lr=0.1):
            super().__init__(network)
            self.lr = lr

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = WithRate(Net)
    found = Tuner(make()).lr_find(module, loader(), loader(), num_training=15)
    assert module.lr == found.suggestion() != 0.1


@pytest.mark.parametrize("name", ["Deterministic", "Ensemble, loop", "Epinet"])
def test_a_subclass_optimizes_by_hand(make, name):
    (case,) = (case for case in MODULES if case.name == name)

    class ByHand(type(case.build())):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            first, *others = [p for p in self.parameters() if p.requires_grad]
            return [torch.optim.SGD([first], lr=0.1), torch.optim.SGD(others, lr=0.01)]

    module = ByHand(*case.build.args, **case.build.keywords)
    before = [p.clone() for p in module.parameters() if p.requires_grad]
    trainer = make()
    trainer.fit(module, case_loader("classification", 24), case_loader("classification", 24))
    assert trainer.global_step == 2 * 9
    after = [p for p in module.parameters() if p.requires_grad]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
