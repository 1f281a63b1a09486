"""What a step costs on a GPU, in launches, copies and waits, which no clock has to measure: `pytest -m gpu`."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule, EpinetModule
from lightning_uq.networks import MLP
from tests.counting import cuda_calls
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

X, Y = torch.randn(256, 16), torch.randint(3, (256,))
MODULES = {
    "softmax": lambda: DeterministicModule(MLP(16, 3, hidden_sizes=(64,))),
    "ensemble": lambda: EnsembleModule(lambda: MLP(16, 3, hidden_sizes=(64,)), num_members=4),
    "dropout": lambda: DropoutModule(MLP(16, 3, hidden_sizes=(64,), dropout=0.1)),
    "epinet": lambda: EpinetModule(MLP(16, 3, hidden_sizes=(64,)), num_train_samples=8),
}


def training_step(name):
    """A step without a Trainer, whose first calls are over."""
    module, x, y = MODULES[name]().cuda().train(), X.cuda(), Y.cuda()

    def step():
        module.zero_grad()
        module.training_loss(x, y, (x, y)).backward()

    for _ in range(3):
        step()
    return step


@pytest.mark.parametrize("name", MODULES)
def test_a_training_step_waits_for_nothing(name):
    found = cuda_calls(training_step(name))
    assert found["launches"] > 0, "the profiler saw no kernels"
    assert found["waits"] == 0


def test_an_epinet_launches_few_kernels_more_than_its_base():
    plain, epinet = (cuda_calls(training_step(name))["launches"] for name in ("softmax", "epinet"))
    assert epinet - plain <= 75  # 61 operators, of which a product of matrices may take two kernels


@pytest.mark.parametrize("name", MODULES)
def test_a_test_batch_waits_twice_at_most(name, tmp_path):
    module = MODULES[name]()
    trainer = quiet_trainer(tmp_path, accelerator="gpu", devices=1)

    def of(num_batches):
        # Pinned rows are copied to the device without a wait.
        rows = TensorDataset(X.repeat(num_batches, 1), Y.repeat(num_batches))
        loader = DataLoader(rows, batch_size=len(X), pin_memory=True)
        return cuda_calls(lambda: trainer.test(module, loader, verbose=False))

    of(2)
    few, many = of(10), of(20)  # what begins and ends a test is in both
    assert many["launches"] > few["launches"]
    assert (many["waits"] - few["waits"]) / 10 <= 2
    assert (many["copies"] - few["copies"]) / 10 <= 10
