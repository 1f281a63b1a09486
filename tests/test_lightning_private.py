"""Each private name of Lightning that is used still does what it is used for."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler

from lightning_uq import _lightning
from tests.versions import SWA_FILES, skip_on_torch_2_6


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch + 1

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch


def loader() -> DataLoader:
    return DataLoader(torch.zeros(4, 2), batch_size=2)


def test_paths():
    assert _lightning.is_local_path("folder/file.ckpt")
    assert not _lightning.is_local_path("memory://file.ckpt")


def test_transfer_hooks():
    module = Net()
    assert _lightning.before_transfer(module, torch.zeros(1)).item() == 1
    assert _lightning.transferred(module, torch.zeros(1), torch.device("cpu")).item() == 2


def test_the_trainers_loaders_before_the_training_and_its_checkpoint(make_trainer):
    seen = {}

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            assert trainer.train_dataloader is None
            seen["train"] = _lightning.training_source(trainer).dataloader()
            seen["val"] = _lightning.validation_source(trainer).dataloader()

    module, train, val = Net(), loader(), loader()
    assert _lightning.trainer_of(module) is None
    ema = EMAWeightAveraging()
    trainer = make_trainer(callbacks=[Look(), ema])
    trainer.fit(module, train, val)
    assert seen == {"train": train, "val": val}
    assert _lightning.trainer_of(module) is trainer
    assert {"state_dict", "callbacks", "global_step"} <= set(_lightning.dump_checkpoint(trainer))
    assert isinstance(_lightning.average_model(ema), Net)
    assert _lightning.average_model(Look()) is None


def test_the_users_sampler_inside_a_distributed_one():
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    own = SubsetRandomSampler([2, 0])
    assert _lightning.users_sampler(DistributedSamplerWrapper(own, num_replicas=2, rank=0)) is own
    assert _lightning.users_sampler(DistributedSampler(range(4), num_replicas=2, rank=0)) is None


def test_launchers(make_trainer):
    assert not _lightning.starts_processes(make_trainer())
    assert _lightning.starts_processes(make_trainer(devices=2, strategy="ddp_spawn"))


def test_the_training_sampler_can_be_kept(make_trainer):
    trainer = make_trainer()
    connector = trainer._accelerator_connector
    _lightning.keep_training_sampler(trainer)
    trainer.training = True
    assert not connector.use_distributed_sampler
    trainer.validating = True
    assert connector.use_distributed_sampler
    _lightning.split_training_sampler(trainer)
    assert connector.use_distributed_sampler is True


def test_synchronized_batch_norm_is_seen(make_trainer):
    trainers = [make_trainer(devices=2, strategy="ddp", sync_batchnorm=given) for given in (False, True)]
    assert [_lightning.synchronizes_batch_norm(trainer.strategy) for trainer in trainers] == [False, True]


def test_keys_of_states():
    assert _lightning.state_key(Callback(), name="a") == "Callback{'name': 'a'}"


def test_optimizers_and_their_schedulers():
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizers, schedulers, monitor = _lightning.configure_optimizers(([optimizer], [scheduler]))
    configs = _lightning.configure_schedulers(schedulers, monitor)
    _lightning.check_optimizers_attached(optimizers, configs)
    _lightning.check_scheduler_api(configs, module)
    assert optimizers == [optimizer]
    assert configs[0].scheduler is scheduler
    assert not _lightning.optimizer_handles_unscaling(optimizer)


def test_the_step_of_an_optimizer(make_trainer):
    module, trainer = Net(), make_trainer(max_epochs=1)
    clipped = []
    module.configure_gradient_clipping = lambda optimizer, *_, **__: clipped.append(optimizer)
    trainer.fit(module, loader())
    [optimizer] = trainer.optimizers
    wrapped = _lightning.lightning_optimizer(optimizer, trainer.strategy)
    wrapped.step()  # raises without the strategy
    assert wrapped.optimizer is optimizer
    clipped.clear()
    _lightning.after_closure(trainer.precision_plugin, module, optimizer)
    assert clipped == [optimizer]


def test_whether_stochastic_weight_averaging_has_replaced_schedulers(make_trainer, tmp_path):
    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    make_trainer(max_epochs=2, callbacks=[StochasticWeightAveraging(0.1, 2), Saves()]).fit(Net(), loader())
    for epoch, replaced in ((0, False), (1, True)):
        skip_on_torch_2_6(SWA_FILES, if_true=replaced)
        averaging = StochasticWeightAveraging(0.1, 2)
        assert not _lightning.has_replaced_schedulers(averaging)
        make_trainer(max_epochs=2, callbacks=[averaging]).fit(Net(), loader(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert _lightning.has_replaced_schedulers(averaging) == replaced


def test_hyperparameters_and_class_methods():
    class Saves(Net):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"a": 1})
            _lightning.name_hyperparameters(self)

        @_lightning.restricted_classmethod
        def build(cls):
            return cls()

    assert not _lightning.are_hyperparameters_given()
    assert Saves.build().hparams.a == 1
    assert _lightning.hyperparameters_name(Saves()) == "kwargs"
    assert _lightning.hyperparameters_name(Net()) is None
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Saves().build()


def test_what_a_tuner_will_set():
    assert _lightning.learning_rate_names(LearningRateFinder()) == ("lr", "learning_rate")
    assert _lightning.learning_rate_names(LearningRateFinder(attr_name="rate")) == ("rate",)
    assert _lightning.learning_rate_names(LearningRateFinder(update_attr=False)) == ()
    assert _lightning.batch_size_name(BatchSizeFinder(batch_arg_name="rows")) == "rows"
