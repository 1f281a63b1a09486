import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from lightning_uq.callbacks._running import (
    LogitReader,
    evaluating,
    gather_rows,
    is_uncertainty_module,
    raise_together,
    to_device,
    together,
)
from lightning_uq.errors import InputError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.ensemble import EnsembleNetwork


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


def test_logits_of_a_foreign_module_and_of_ours():
    x, net = torch.randn(5, 4), nn.Linear(4, 3)
    assert torch.equal(LogitReader()(net, (x, None)), net(x).unsqueeze(0))
    assert torch.equal(LogitReader()(net, x), net(x).unsqueeze(0))
    assert torch.equal(LogitReader()(net, {"input": x}), net(x).unsqueeze(0))
    module = DeterministicModule(net)
    assert is_uncertainty_module(module)
    assert not is_uncertainty_module(net)
    assert torch.equal(LogitReader()(module, (x, None)), net(x).unsqueeze(0))
    module.network = EnsembleNetwork([net, nn.Linear(4, 3)])
    assert LogitReader()(module, (x, None)).shape == (2, 5, 3)
    members = LogitReader(predict_fn=lambda model, x: torch.stack([model(x), -model(x)]))(net, x)
    assert torch.equal(members, torch.stack([net(x), -net(x)]))
    own = LogitReader(unpack_batch=lambda batch: (batch.x, None))
    assert torch.equal(own(net, SimpleNamespace(x=x)), net(x).unsqueeze(0))


def test_our_modules_unpack_their_own_batches():
    class Reversed(DeterministicModule):
        def unpack_batch(self, batch):
            return batch[1], batch[0]

    x, module = torch.randn(5, 4), Reversed(nn.Linear(4, 3))
    assert torch.equal(LogitReader()(module, (torch.zeros(5), x)), module(x))


def test_half_precision_is_upcast_and_double_kept():
    x = torch.randn(5, 4)
    assert LogitReader()(nn.Linear(4, 3).bfloat16(), x.bfloat16()).dtype == torch.float32
    assert LogitReader()(nn.Linear(4, 3).double(), x.double()).dtype == torch.float64


def test_probabilities_are_read_where_the_argument_says_so():
    x, net = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    torch.testing.assert_close(LogitReader(output="probs")(net, x)[0], net(x).log())
    picked = LogitReader(output=lambda out: out["logits"])
    assert torch.equal(picked(nn.Identity(), {"input": {"logits": x}})[0], x)


class NoForward(LightningModule):
    pass


@pytest.mark.parametrize(
    ("model", "reader", "message"),
    [
        (NoForward(), {}, "NoForward has no `forward`.*Pass argument `predict_fn`"),
        (nn.Softmax(1), {}, 'returned probabilities .*Pass argument `output="probs"`'),
        (nn.Identity(), {"predict_fn": lambda m, x: {"logits": x}}, "dict with keys \\['logits'\\].*argument `output`"),
        (nn.Linear(4, 1), {}, "C >= 2, but it returned shape \\[6, 1\\].*argument `output`"),
        (nn.Unflatten(1, (2, 2)), {}, "logits \\[B, C\\] from Unflatten, but got shape \\[6, 2, 2\\].*`predict_fn`"),
        (nn.Identity(), {"predict_fn": lambda m, x: x[0]}, "but got shape \\[4\\]"),
        (nn.Identity(), {"predict_fn": lambda m, x: x[None, None]}, "but got shape \\[1, 1, 6, 4\\]"),
    ],
)
def test_what_is_no_logits_is_refused(model, reader, message):
    with pytest.raises(InputError, match=message):
        LogitReader(**reader)(model, torch.randn(6, 4))


@pytest.mark.parametrize("name", ["predict_fn", "unpack_batch"])
def test_arguments_are_functions(name):
    with pytest.raises(InputError, match=f"Expected argument `{name}` to be a function, but got str"):
        LogitReader(**{name: "forward"})
    with pytest.raises(InputError, match="Expected argument `output`"):
        LogitReader(output="softmax")


def test_one_process_raises_its_own_error():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        raise_together(error, SimpleNamespace(world_size=1))
    assert caught.value is error
    raise_together(None)
    with pytest.raises(ZeroDivisionError), together():
        _ = 1 / 0
    rows = torch.arange(3)
    assert gather_rows(rows, SimpleNamespace(world_size=1)) is rows


TWO_RANKS = """
import json, os
from datetime import timedelta
import torch
import torch.multiprocessing as mp
from types import SimpleNamespace
from lightning_uq.callbacks._running import gather_rows, raise_together, together
from lightning_uq.errors import InputError, NotFittedError

def main(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    trainer = SimpleNamespace(world_size=2)
    found = [gather_rows(torch.arange(float(rank), 5, 2), trainer).tolist()]
    raise_together(None, trainer)
    for kind in (NotFittedError, KeyError):
        try:
            with together(trainer):
                if rank == 1:
                    raise kind("on rank 1")
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    try:
        with together(trainer):
            raise InputError(f"on rank {rank}")
    except InputError as error:
        found.append(str(error))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.barrier()
    os._exit(0)  # at once: see tests/conftest.py

if __name__ == "__main__":
    folder = os.path.dirname(out)
    mp.spawn(main, (folder,), nprocs=2)
    json.dump([json.load(open(f"{folder}/{rank}.json")) for rank in range(2)], open(out, "w"))
"""


def test_two_ranks_raise_one_error(run_script):
    first, second = run_script(TWO_RANKS)
    assert first == second
    assert first[0] == [0.0, 1.0, 2.0, 3.0, 4.0]  # as the rows were shared, and one rank has one more
    assert first[1] == ["NotFittedError", "on rank 1"]
    assert first[2] == ["RuntimeError", "KeyError: 'on rank 1'"]
    assert first[3] == "on rank 0"
