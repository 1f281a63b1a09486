"""A member's `trainer`: its model, optimizers and logged values are the member's own."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.running.streams import RandomStream

M, SEED = 3, 7


class Template(LightningModule):
    """Passes `self.trainer.model.parameters()` to its optimizer, as a common project template does."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.trainer.model.parameters(), lr=0.1)


def loader():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4, generator=generator)


def test_parameters_of_the_trainers_model_are_the_members_own(make_trainer):
    ensemble = EnsembleModule(Template, num_members=M, seed=SEED)
    make_trainer().fit(ensemble, loader())
    for i in range(M):
        with RandomStream(member_seed(SEED, i)).active():
            single = Template()
            make_trainer().fit(single, loader())
        assert torch.equal(ensemble.network.members[i].net.weight, single.net.weight)


class Looks(Template):
    def setup(self, stage):
        self.seen = {}

    def on_train_batch_start(self, batch, batch_idx):
        self.seen["optimizers"] = list(self.trainer.optimizers)
        self.trainer.should_stop = batch_idx == 1

    def on_train_epoch_end(self):
        self.seen["loss"] = float(self.trainer.callback_metrics["loss_step"])
        self.seen["logged"] = float(self.trainer.logged_metrics["loss_step"])

    def on_train_end(self):
        trainer = self.trainer
        self.seen["own"] = trainer.model is self and trainer.lightning_module is self and isinstance(trainer, Trainer)
        self.seen["same"] = (trainer.global_step, trainer.max_epochs, trainer.lr_scheduler_configs)


def test_a_member_sees_a_trainer_of_its_own(make_trainer):
    ensemble = EnsembleModule(Looks, num_members=2, seed=SEED)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader())
    members = [ensemble.network.members[i] for i in range(2)]
    for i, member in enumerate(members):
        assert member.seen["own"]
        assert member.seen["loss"] == member.seen["logged"] == float(trainer.callback_metrics[f"member_{i}/loss_step"])
        (optimizer,) = member.seen["optimizers"]
        assert optimizer.param_groups[0]["params"] == list(member.parameters())
        assert member.seen["same"] == (trainer.global_step, 2, [])
        assert member.trainer is trainer
    assert members[0].seen["loss"] != members[1].seen["loss"]
    assert trainer.should_stop  # what a member sets is set on the Trainer


class Stops(Template):
    """Asks to stop from an epoch on, and not before: a member takes back nobody else's wish."""

    last = 2

    def on_train_epoch_end(self):
        self.trainer.should_stop = self.current_epoch + 1 >= self.last


def test_a_member_that_stops_stops_all_and_a_warning_says_so(make_trainer):
    ensemble, trainer = EnsembleModule(Stops, num_members=M, seed=SEED), make_trainer(max_epochs=6)
    ensemble.members.modules[1].last = 1
    with pytest.warns(UserWarning, match=r"Member 1 set `trainer.should_stop`, which stops all.*from_checkpoints"):
        trainer.fit(ensemble, loader())
    assert trainer.current_epoch == 1


def test_members_that_stop_together_stop_as_they_would_alone(make_trainer):
    trainer = make_trainer(max_epochs=6)
    trainer.fit(EnsembleModule(Stops, num_members=M, seed=SEED), loader())
    assert trainer.current_epoch == 2


class Foreign(Template):
    def configure_optimizers(self):
        return torch.optim.SGD(self.trainer.strategy.model.parameters(), lr=0.1)


def test_an_optimizer_with_another_members_parameters_is_an_error_before_the_training(make_trainer):
    ensemble = EnsembleModule(Foreign, num_members=2, seed=SEED)
    with pytest.raises(
        InputError, match=r"optimizer of member 0 holds parameters of member 1.*of Foreign pass `self.parameters\(\)`"
    ):
        make_trainer().fit(ensemble, loader())


GLOBAL = nn.Linear(3, 3)


class SharesALayer(Template):
    """Trains a layer that lies outside of it: alone, nobody else does."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(GLOBAL(self(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.parameters()}, {"params": GLOBAL.parameters()}], lr=0.1)


class RegistersIt(SharesALayer):
    """Becomes the layer's owner, as every other member does."""

    def setup(self, stage):
        self.head = GLOBAL

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (SharesALayer, r"members 0 and 1 hold the same parameter of shape \(3, 3\), which belongs to neither"),
        (RegistersIt, "optimizer of member 0 holds parameters of member 1"),
    ],
)
def test_a_layer_that_several_members_would_train_is_an_error_before_the_training(kind, match, make_trainer):
    before = GLOBAL.weight.clone()
    with pytest.raises(InputError, match=match):
        make_trainer().fit(EnsembleModule(kind, num_members=2, seed=SEED), loader())
    assert torch.equal(GLOBAL.weight, before)
    make_trainer().fit(EnsembleModule(kind, num_members=1, seed=SEED), loader())


class OwnTensor(Template):
    """An optimizer may hold a parameter that no module has registered."""

    def configure_optimizers(self):
        self.extra = [nn.Parameter(torch.zeros(1))]
        return torch.optim.SGD([*self.parameters(), *self.extra], lr=0.1)


class LateParameter(Template):
    """Registers a parameter that it makes for its optimizer."""

    def configure_optimizers(self):
        scale = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([*self.parameters(), scale], lr=0.1)
        self.scale = scale
        return optimizer


FROZEN = nn.Linear(4, 4).requires_grad_(False)


class FrozenBackbone(Template):
    """Passes all of its parameters, also the frozen ones, which all members share."""

    def __init__(self):
        super().__init__()
        self.backbone = FROZEN

    def forward(self, x):
        return self.net(self.backbone(x))


@pytest.mark.parametrize("kind", [OwnTensor, LateParameter, FrozenBackbone])
def test_a_parameter_that_no_other_member_trains_is_a_members_own(kind, make_trainer):
    make_trainer().fit(ensemble := EnsembleModule(kind, num_members=2, seed=SEED), loader())
    for i in range(2):
        with RandomStream(member_seed(SEED, i)).active():
            make_trainer().fit(alone := kind(), loader())
        for name, value in alone.state_dict().items():
            assert torch.equal(ensemble.members.modules[i].state_dict()[name], value)
