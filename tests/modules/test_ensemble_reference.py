"""EnsembleModule under the Trainer against what deep-ensembles-pytorch 0.1.2 printed.

The original takes the mean over members, clips their gradients jointly (at norm 1) and, in its adversarial mode, lets the
clean loss's gradient leak into the step. A subclass puts the three back where its trained weights are to be met; the
intended gradients are met without.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.mlp import TabularNetwork, load_deep_ensembles_state

ARRAYS = np.load(Path(__file__).parents[1] / "reference" / "ensembles_train.npz")
NETWORKS = {"in3out2M3h8d3": (3, 2, 8, 3, 3), "in1out1M5h16d2": (1, 1, 16, 2, 5)}
EXECUTIONS = ("loop", "stacked", "vmap")


def arrays(prefix):
    return {
        name.removeprefix(prefix): torch.from_numpy(ARRAYS[name]) for name in ARRAYS.files if name.startswith(prefix)
    }


def renamed(state):
    """The original's names as those of this package, by way of a network that is loaded and read."""
    members = 1 + max(int(name.split(".")[1]) for name in state)
    d_in, hidden = state["members.0.backbone.0.weight"].shape[::-1]
    depth = 1 + sum(name.startswith("members.0.backbone") and name.endswith("bias") for name in state)
    network = nn.Module()
    out = len(state["members.0.mean_head.bias"])
    network.members = nn.ModuleList(
        [TabularNetwork(d_in, out, hidden_features=hidden, depth=depth) for _ in range(members)]
    )
    load_deep_ensembles_state(network, state)
    return network.state_dict()


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_intended_gradient(name, adversarial, execution):
    d_in, d_out, hidden, depth, members = NETWORKS[name]
    module = EnsembleModule(
        lambda: TabularNetwork(d_in, d_out, hidden_features=hidden, depth=depth),
        num_members=members,
        task="regression",
        adversarial_epsilon=0.01 if adversarial else None,
        adversarial_scale="absolute",
        execution=execution,
    )
    module.network.load_state_dict(renamed(arrays(f"net/{name}/state/")))
    x, y = torch.from_numpy(ARRAYS[f"net/{name}/X"]), torch.from_numpy(ARRAYS[f"net/{name}/y"])
    loss = module.training_loss(x, y, (x, y))
    loss.backward()
    prefix = f"net/{name}/train_adv{adversarial}"
    assert loss.item() / members == pytest.approx(float(ARRAYS[f"{prefix}/loss"]), rel=2e-6)
    expected = renamed(arrays(f"{prefix}/{'grad_intended' if adversarial else 'grad'}/"))
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.copy_(parameter.grad / members)
    for key, value in module.network.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=2e-5, atol=2e-7)


class Original(EnsembleModule):
    leak = False
    steps = 40

    def training_loss(self, x, y, batch):
        loss = super().training_loss(x, y, batch) / self.network.num_indices
        return loss + self.index_losses(self.network(x), y).sum() if self.leak else loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def original(tag, execution, **kwargs):
    start = renamed(arrays(f"{tag}/init/"))
    members = 1 + max(int(name.split(".")[1]) for name in start)
    module = Original(
        lambda: TabularNetwork(4, 1, hidden_features=8, depth=3),
        num_members=members,
        task="regression",
        optimizer=lambda parameters: torch.optim.Adam(parameters, 0.01),
        execution=execution,
        **kwargs,
    )
    module.network.load_state_dict(start)
    return module


def batches(tag, steps):
    """The original's batches in its order: 20, 20 and 10 samples, over and over."""
    sizes = [(20, 20, 10)[step % 3] for step in range(steps)]
    order = torch.from_numpy(ARRAYS[f"{tag}/batch_indices"])[: sum(sizes)].split(sizes)
    data = TensorDataset(torch.from_numpy(ARRAYS[f"{tag}/X"]), torch.from_numpy(ARRAYS[f"{tag}/y"]))
    return DataLoader(data, batch_sampler=[indices.tolist() for indices in order])


class Record(Callback):
    def __init__(self):
        self.losses, self.state = [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.network.state_dict().items()}


def largest_difference(state, expected):
    assert state.keys() == expected.keys()
    return max((state[name] - expected[name]).abs().max().item() for name in state)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("adversarial", [False, True])
def test_forty_steps(adversarial, execution, make_trainer):
    tag = f"trainer/adv{adversarial}"
    epsilon = {"adversarial_epsilon": 0.01, "adversarial_scale": "absolute"} if adversarial else {}
    module, record = original(tag, execution, **epsilon), Record()
    module.leak = adversarial
    make_trainer(gradient_clip_val=1.0, callbacks=[record]).fit(module, batches(tag, 40))
    assert largest_difference(record.state, renamed(arrays(f"{tag}/final/"))) < 2e-6
    if not adversarial:
        np.testing.assert_allclose(record.losses, ARRAYS[f"{tag}/losses"], atol=2e-6)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(float(ARRAYS[f"{tag}/lr_last"]), abs=1e-12)


def warmed_up(averaged, current, num_averaged):
    """The original's average: a copy for 100 steps, then a decay that warms up, 1 - (1 + t)^(-2/3) up to 0.995."""
    t = 10 * int(num_averaged) - 100
    decay = min(1 - (1 + t) ** (-2 / 3), 0.995) if t > 0 else 0.0
    return averaged.lerp(current, 1 - decay)


class EveryTenSteps(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx % 10 == 0


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_three_hundred_steps_and_their_average(execution, make_trainer):
    module, record = original("trainer300", execution), Record()
    module.steps = 300
    trainer = make_trainer(gradient_clip_val=1.0, callbacks=[record, EveryTenSteps(avg_fn=warmed_up)])
    trainer.fit(module, batches("trainer300", 300))
    assert largest_difference(record.state, renamed(arrays("trainer300/final/"))) < 3e-4
    averaged = renamed(arrays("trainer300/ema/"))
    assert largest_difference(module.network.state_dict(), averaged) < 3e-4
    assert largest_difference(record.state, averaged) > 3e-3
