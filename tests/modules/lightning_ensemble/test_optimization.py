"""The optimization of LightningModules side by side: each ends exactly as it would have ended alone."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.lightning_ensemble.composite import CompositeOptimizer
from lightning_uq.running.streams import RandomStream
from tests.modules.lightning_ensemble.cases import SEED, Lit, M, alone, described, difference, loader, scaled
from tests.versions import SWA_FILES, skip_on_torch_2_6


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


class SeesLosses(WarmsUp):
    """Writes down every loss that Lightning hands to it, and that a step returns."""

    def __init__(self):
        super().__init__()
        self.seen, self.stepped = [], 0

    def on_before_backward(self, loss):
        self.seen.append(("backward", float(loss.detach())))

    def on_before_optimizer_step(self, optimizer):
        self.stepped += 1

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        stepping = (optimizer, self.optimizers())[batch_idx % 2]
        assert stepping.optimizer is self.optimizers(use_pl_optimizer=False)
        value = stepping.step(closure=optimizer_closure)
        self.seen.append(("step", None if value is None else float(value)))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"plugins": scaled}], ids=described)
def test_members_see_the_losses_that_they_would_alone(options, make_trainer):
    """Divided by the number of accumulated batches, scaled by a gradient scaler, and returned by the optimizer's step."""
    made = lambda: {**options, **({"plugins": scaled()} if "plugins" in options else {})}  # noqa: E731
    ensemble = EnsembleModule(SeesLosses, num_members=2, seed=SEED)
    make_trainer(max_epochs=2, **made()).fit(ensemble, loader(), loader(20))
    for i, member in enumerate(ensemble.members.modules):
        single, _ = alone(i, SeesLosses, make_trainer, max_epochs=2, **made())
        assert member.seen == single.seen
        assert member.stepped == single.stepped
        assert difference(ensemble, i, single) == 0.0


@pytest.mark.parametrize("options", [{}, {"plugins": scaled}], ids=described)
def test_a_members_own_optimization_hooks_are_its_own(options, make_trainer):
    made = lambda: {name: make() for name, make in options.items()}  # noqa: E731
    ensemble = EnsembleModule(lambda: WarmsUp(scheduler="step"), num_members=M, seed=SEED)
    make_trainer(max_epochs=2, **made()).fit(ensemble, loader(), loader(20))
    for i in range(M):
        single, _ = alone(i, lambda: WarmsUp(scheduler="step"), make_trainer, max_epochs=2, **made())
        assert difference(ensemble, i, single) == 0.0


def test_weights_are_averaged(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=2, seed=SEED)
    make_trainer(max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.5)]).fit(ensemble, loader(), loader(20))
    for i in range(2):
        with RandomStream(member_seed(SEED, i)).active():
            single = Lit()
            make_trainer(max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.5)]).fit(single, loader(), loader(20))
        assert difference(ensemble, i, single) == 0.0


@pytest.mark.parametrize(
    ("names", "logged"),
    [([None], [""]), ([None, None], ["/pg1", "/pg2"]), (["weight", "bias"], ["/weight", "/bias"])],
)
def test_learning_rates_are_logged_by_member_and_group(make_trainer, tmp_path, names, logged):
    class Grouped(Lit):
        def configure_optimizers(self):
            parts = zip(self.net.parameters(), names, strict=False)
            groups = [{"params": [part]} | ({} if name is None else {"name": name}) for part, name in parts]
            return torch.optim.SGD(groups, 0.1)

    monitor = LearningRateMonitor()
    ensemble = EnsembleModule(Grouped, num_members=2, seed=SEED)
    trainer = make_trainer(callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(ensemble, loader())
    assert list(monitor.lrs) == [f"lr-CompositeOptimizer/member_{i}{name}" for i in range(2) for name in logged]
    own = trainer.optimizers[0].optimizers[1].param_groups[0]
    assert own.get("name") == names[0]  # the member's group keeps its own
    trainer.optimizers[0].param_groups[len(names)]["lr"] = 0.5
    assert own["lr"] == 0.5


def test_composite_optimizer_refuses_what_belongs_to_a_member():
    composite = CompositeOptimizer([torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)])
    with pytest.raises(NotImplementedError, match="Add parameter groups to a member's own optimizer"):
        composite.add_param_group({"params": []})
    with pytest.raises(
        InputError, match="The checkpoint holds the optimizer states of 0 LightningModules, but the ensemble has 1"
    ):
        composite.load_state_dict(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict())
    assert "SGD" in repr(composite)


class RatePerEpoch(Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class PlainSGD(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def averaging():
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=3)


class SeesRates(Lit):
    """Writes down its rate in every epoch, by its optimizer and by its scheduler; without BatchNorm."""

    def __init__(self, scheduler="step"):
        super().__init__(scheduler, optimizer=torch.optim.SGD)
        self.net[1] = nn.Identity()
        self.rates = []

    def on_save_checkpoint(self, checkpoint):
        assert len(checkpoint["lr_schedulers"]) == 1  # as alone

    def on_train_epoch_end(self):
        scheduler = self.lr_schedulers()
        self.rates.append((self.optimizers().param_groups[0]["lr"], type(scheduler), scheduler.get_last_lr()[0]))


@pytest.mark.parametrize("scheduler", ["step", "plateau", "every step"])
@pytest.mark.parametrize("kind", [Lit, SeesRates])
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_members_with_schedulers_follow_stochastic_weight_averaging(kind, scheduler, make_trainer):
    ensemble = EnsembleModule(lambda: kind(scheduler), num_members=2, seed=SEED)
    make_trainer(max_epochs=5, callbacks=[averaging()]).fit(ensemble, loader(), loader(20))
    for i, member in enumerate(ensemble.members.modules):
        single, _ = alone(i, lambda: kind(scheduler), make_trainer, max_epochs=5, callbacks=[averaging()])
        assert difference(ensemble, i, single) == 0.0
        assert kind is Lit or member.rates == single.rates


@pytest.mark.parametrize("epochs", [1, 3])
def test_stochastic_weight_averaging_resumes_with_the_members_schedulers(epochs, make_trainer, tmp_path):
    """Before the averaging begins the members' own schedulers come back; afterwards only that of the averaging."""
    skip_on_torch_2_6(SWA_FILES, if_true=epochs == 3)

    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == epochs - 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, resumed = (EnsembleModule(SeesRates, num_members=2, seed=SEED) for _ in range(2))
    make_trainer(max_epochs=5, callbacks=[averaging(), Saves()]).fit(whole, loader(), loader(20))
    trainer = make_trainer(max_epochs=5, callbacks=[averaging()])
    trainer.fit(resumed, loader(), loader(20), ckpt_path=tmp_path / "middle.ckpt")
    for ours, theirs in zip(resumed.members.modules, whole.members.modules, strict=True):
        assert len(ours.rates) == 5 - epochs
        assert ours.rates == theirs.rates[epochs:]


def test_stochastic_weight_averaging_refuses_members_with_several_schedulers(make_trainer):
    class Two(Lit):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1) for _ in range(2)]

    ensemble = EnsembleModule(Two, num_members=2)
    with pytest.raises(InputError, match="StochasticWeightAveraging replaces one scheduler, but Two has 2. Return one"):
        make_trainer(callbacks=[averaging()]).fit(ensemble, loader())


@pytest.mark.filterwarnings("ignore:The members train by their own steps")  # they have no `forward`
def test_a_scheduler_that_a_callback_installs_steps(make_trainer):
    def rates(module):
        recorder = RatePerEpoch()
        averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=2)
        data = DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 2), 8)
        make_trainer(max_epochs=5, callbacks=[averaging, recorder]).fit(module, data)
        return recorder.rates

    alone = rates(PlainSGD())
    assert alone[-1] == pytest.approx(0.01)
    assert rates(EnsembleModule(PlainSGD, num_members=2, seed=0)) == pytest.approx(alone)
