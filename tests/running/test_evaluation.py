import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import FitGMM, TemperatureScaling
from lightning_uq.running.evaluation import evaluating, to_device


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


class Frozen(nn.Sequential):
    """Keeps its BatchNorm in evaluation mode, as fine-tuning does."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002  # the global state is the point


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fitting", [False, True])
def test_everything_is_put_back(fails, fitting):
    model = Net()
    model.frozen = Frozen(nn.BatchNorm1d(2), nn.Dropout())
    model.train()
    model.layers[1].eval()  # a mixed state, which one `train()` would not restore
    model.log = own = lambda *args: None
    trainer = SimpleNamespace(state=SimpleNamespace(stage=RunningStage.TRAINING))
    modes, before = [m.training for m in model.modules()], states()

    def body():
        with evaluating(model, trainer, fitting=fitting):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            assert trainer.state.stage is (RunningStage.VALIDATING if fitting else RunningStage.TRAINING)
            model.log("loss", 1.0)
            model.log_dict({"loss": 1.0})
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            body()
    else:
        body()
    assert [m.training for m in model.modules()] == modes
    assert states() == before
    assert trainer.state.stage is RunningStage.TRAINING
    assert torch.is_grad_enabled()
    assert model.log is own
    assert "log_dict" not in vars(model)


class Stateful(nn.Module):
    """Keeps a hidden state, a counter, a running mean and a buffer that it replaces."""

    def __init__(self):
        super().__init__()
        self.calls, self.hidden = 0, None
        self.cell = nn.GRUCell(4, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8))
        self.register_buffer("unset", None)

    def forward(self, x):
        self.calls += 1
        hidden = self.cell(x, self.hidden)
        self.hidden = hidden.detach()
        self.seen_once = True
        self.mean.mul_(0.9).add_(0.1 * self.hidden.mean(0))
        self.last = self.hidden.mean(0)
        return hidden


def test_a_pass_over_fitting_data_leaves_the_state_of_a_users_module():
    model = nn.Sequential(Stateful(), nn.Linear(8, 2))
    model(torch.ones(3, 4))
    del model[0].seen_once
    attributes, buffers = dict(vars(model[0])), {name: b.clone() for name, b in model.named_buffers()}
    own = dict(model[0]._buffers)
    with evaluating(model, fitting=True):
        outputs = [model(torch.randn(3, 4)) for _ in range(3)]
        assert model[0].calls == 4
    assert outputs[0].shape == (3, 2)
    assert vars(model[0]).keys() == attributes.keys()
    assert all(vars(model[0])[name] is value for name, value in attributes.items())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(model[0]._buffers[name] is buffer for name, buffer in own.items())


def test_a_lazy_module_keeps_the_weights_that_a_pass_gives_it():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with evaluating(model, fitting=True):
        expected = model(torch.ones(2, 5))
    assert model[0].in_features == 5
    torch.testing.assert_close(model.eval()(torch.ones(2, 5)), expected)


@pytest.mark.parametrize("make", [FitGMM, TemperatureScaling])
def test_a_training_is_the_same_with_a_callback_if_forward_changes_its_module(make_trainer, make):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.state, self.head = Stateful(), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.state(x) - self.state.mean.clone())

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=20)
    states = []
    for callbacks in ([], [make()]):
        torch.manual_seed(0)
        module, trainer = Module(), make_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, loader, loader)
        states.append({**module.state_dict(), "calls": torch.tensor(module.state.calls), "hidden": module.state.hidden})
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_fit_leaves_inference_mode_and_a_score_stays_in_it():
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        with evaluating(model, fitting=True):
            fitted = model(torch.ones(1, 2))
        with evaluating(model):
            assert torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
    fitted += 1  # an inference tensor would refuse
    with evaluating(model):
        assert not torch.is_inference_mode_enabled()


def test_batches_follow_the_model_without_a_trainer():
    batch = {"input": torch.zeros(2, 4), "target": torch.tensor([0, 1]), "id": "a"}
    moved = to_device(batch, nn.Linear(4, 3).double())
    assert moved["input"].dtype == torch.float64
    assert moved["target"].dtype == torch.int64
    assert moved["id"] == "a"
    assert to_device(batch, nn.Linear(4, 3))["input"].dtype == torch.float32
    assert to_device(batch, nn.Identity())["input"].dtype == torch.float32

    class Hooked(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

    assert to_device(torch.zeros(2, 4), Hooked()).tolist() == torch.ones(2, 4).tolist()


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is in use")
def test_a_pass_on_a_processor_does_not_look_for_a_gpu(monkeypatch):
    def look():
        raise AssertionError("this loads the driver's library at each call")

    monkeypatch.setattr(torch.cuda, "is_available", look)
    monkeypatch.setattr(torch.cuda, "device_count", look)
    before = torch.get_rng_state()
    with evaluating(nn.Dropout()):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
