"""The steps of LightningModules that are members: their random numbers, batches and losses."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.running.streams import RandomStream
from tests.modules.lightning_ensemble.cases import SEED, Lit, M, alone, difference, loader


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


class Evaluates(Lit):
    """Normalises as it has learned to, and adds noise in evaluation as well; its scheduler follows what comes of it."""

    def __init__(self):
        super().__init__(scheduler="plateau")
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.seen = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        x *= self.scale.detach()  # in place
        return x + 0.1 * torch.randn_like(x) + dataloader_idx, y

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen.append(batch[0])


def test_transfer_hooks_are_each_members_own_in_validation_and_test(make_trainer):
    ensemble, trainer = EnsembleModule(Evaluates, num_members=M, seed=SEED), make_trainer(max_epochs=4)
    trainer.fit(ensemble, loader(), loader(20))
    tested = trainer.test(ensemble, [loader(20), loader(20)], verbose=False)
    for i in range(M):
        with RandomStream(member_seed(SEED, i)).active():
            single, single_trainer = Evaluates(), make_trainer(max_epochs=4)
            single_trainer.fit(single, loader(), loader(20))
            alone_tested = single_trainer.test(single, [loader(20), loader(20)], verbose=False)
        assert difference(ensemble, i, single) == 0.0
        assert all(map(torch.equal, ensemble.members.modules[i].seen, single.seen))
        for j, of_loader in enumerate(alone_tested):
            name = f"test_loss/dataloader_idx_{j}"
            assert tested[j][f"member_{i}/{name}"] == of_loader[name]


def test_what_reads_one_input_reads_the_first_members(make_trainer):
    """A fit reads it in passes of its own, which draw no random numbers of a member's."""
    ensemble, scaling = EnsembleModule(Evaluates, num_members=2, seed=SEED), TemperatureScaling()
    make_trainer(max_epochs=2, callbacks=[scaling]).fit(ensemble, loader(), loader(20))
    for i in range(2):
        assert difference(ensemble, i, alone(i, Evaluates, make_trainer, max_epochs=2)[0]) == 0.0
    with torch.no_grad():
        ensemble.members.modules[1].scale.fill_(torch.nan)  # no other member's hook is called
    for trained in (ensemble, copy.deepcopy(ensemble), EnsembleModule(Evaluates, num_members=2, seed=SEED)):
        assert TemperatureScaling().fit(trained, loader(20)).fitted
    (prediction, *_) = make_trainer().predict(ensemble, loader(20))
    assert bool(prediction.probs.isfinite().all())


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


def test_a_mapping_without_a_loss(make_trainer):
    class Wrong(Lit):
        def training_step(self, batch, batch_idx):
            return {"Loss": 1}

    with pytest.raises(
        InputError, match=r"`training_step` of Wrong returns must hold `loss`, but its keys are \['Loss'\]"
    ):
        make_trainer().fit(EnsembleModule(Wrong, num_members=2), loader())


class UnderItsOwnName(LightningModule):
    """Its batches hold the input under `image`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.inputs = []

    def training_step(self, batch, batch_idx):
        self.inputs.append(batch["image"].detach().clone())
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The members train by their own steps")  # they have no `forward`
def test_an_adversarial_step_changes_the_input_wherever_the_batch_holds_it(make_trainer):
    options = {"num_members": 1, "adversarial_epsilon": 0.1, "adversarial_scale": "absolute"}
    rows = DataLoader([{"image": torch.randn(4), "label": i % 3} for i in range(4)], batch_size=4)
    ensemble = EnsembleModule(UnderItsOwnName, **options)
    make_trainer(max_epochs=1).fit(ensemble, rows)
    clean, changed = ensemble.members.modules[0].inputs
    torch.testing.assert_close((changed - clean).abs(), torch.full((4, 4), 0.1))

    scaled = EnsembleModule(UnderItsOwnName, **options, unpack_batch=lambda batch: (batch["image"] / 2, batch["label"]))
    with pytest.raises(InputError, match="the dict does not hold what `unpack_batch` returns"):
        make_trainer(max_epochs=1).fit(scaled, rows)
