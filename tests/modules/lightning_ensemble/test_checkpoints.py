"""Checkpoints of ensembles of LightningModules: exact resumption, and the members' own hooks."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uq.modules.ensemble import EnsembleModule
from tests.modules.lightning_ensemble.cases import SEED, Lit, M, alone, described, difference, loader


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
        assert again.network.members[i].note == pytest.approx(ensemble.network.members[i].net.weight.sum().item())
        assert again.network.members[i].big.tolist() == [1, 1, 1]


def test_members_that_build_their_layers_late_reload_bare(make_trainer, tmp_path):
    ensemble = EnsembleModule(Late, num_members=2, seed=SEED)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "late.ckpt", network=Late)
    for i in range(2):
        assert torch.equal(again.network.members[i].net.weight, ensemble.network.members[i].net.weight)
        assert again.network.members[i].note == pytest.approx(ensemble.network.members[i].net.weight.sum().item())


class Reads(Lit):
    """Reads in its checkpoint hooks what Lightning puts into a checkpoint."""

    def __init__(self, lr=0.05):
        super().__init__(scheduler="step", lr=lr)
        self.save_hyperparameters()
        self.saw = {}

    def look(self, checkpoint):
        weight = checkpoint["state_dict"]["net.0.weight"].clone()
        (optimizer,), (scheduler,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        moments = optimizer["state"][0]["exp_avg"].clone()
        counts = (
            checkpoint["epoch"],
            checkpoint["global_step"],
            scheduler["last_epoch"],
            len(optimizer["param_groups"]),
        )
        return (
            weight,
            moments,
            counts,
            set(checkpoint) - {"lightning_uq_random_state"},
            dict(checkpoint["hyper_parameters"]),
        )

    def on_save_checkpoint(self, checkpoint):
        self.saw["saved"] = self.look(checkpoint)
        checkpoint["note"] = checkpoint["epoch"]

    def on_load_checkpoint(self, checkpoint):
        self.saw["loaded"] = self.look(checkpoint)
        assert checkpoint["note"] == checkpoint["epoch"]


def test_checkpoint_hooks_see_what_lightning_gives_them_alone(make_trainer, tmp_path):
    ensemble, path = EnsembleModule(Reads, num_members=2, seed=SEED), tmp_path / "a.ckpt"
    trainer = make_trainer()
    trainer.fit(ensemble, loader(), loader(20))
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["lightning_uq_ensemble"]["members"]
    assert [own.keys() for own in state] == [{"note"}] * 2
    again = EnsembleModule(Reads, num_members=2)
    make_trainer(max_epochs=1).fit(again, loader(), loader(20), ckpt_path=path, weights_only=True)
    for i in range(2):
        single, single_trainer = alone(i, Reads, make_trainer)
        single_trainer.save_checkpoint(tmp_path / "single.ckpt")
        loaded = Reads()
        make_trainer(max_epochs=1).fit(
            loaded, loader(), loader(20), ckpt_path=tmp_path / "single.ckpt", weights_only=True
        )
        for found, expected in (
            (ensemble.network.members[i].saw["saved"], single.saw["saved"]),
            (again.network.members[i].saw["loaded"], loaded.saw["loaded"]),
        ):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            assert found[2:] == expected[2:]
