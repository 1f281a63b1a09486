"""`trainer.test` of ensembles beside torch-uncertainty's routine."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from benchmarks.harness import Call, Contender, Work
from benchmarks.timings.training import BATCH, members_of, trainer_for
from lightning_uq import EnsembleModule
from lightning_uq.networks import MLP
from lightning_uq.networks.backbones import LeNet

TITLE = "Tests of ensembles"
ABOUT = """Whole calls of `trainer.test` on 100 batches of 128 rows, its start and its metrics included, with members of the same weights. Both report more
metrics than the three that are compared (accuracy, Brier score, NLL). The routine's smooth calibration error takes up to 1.5 s at the end, depending on the
data; the last rows leave it out. Ours reports joint log-losses, which the routine does not have."""

BATCHES = 100


def works(device: str) -> Iterator[Work]:
    """Perceptrons, then LeNets on a tenth of the batches."""
    generator = torch.Generator().manual_seed(0)
    for name, network, shape, batches in [
        ("MLP", partial(MLP, 64, 10), (64,), BATCHES),
        ("LeNet", LeNet, (1, 28, 28), BATCHES // 10),
    ]:
        rows = batches * BATCH
        x, y = torch.randn(rows, *shape, generator=generator), torch.randint(10, (rows,), generator=generator)
        loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
        for members in (5, 10) if name == "MLP" else (5,):
            module = EnsembleModule(network, num_members=members, seed=0).eval()
            contenders = [
                Contender("lightning-uq", partial(ours, module, loader, device)),
                Contender("ClassificationRoutine", partial(routine, module, loader, device), "torch-uncertainty"),
                Contender(
                    "ClassificationRoutine without smooth calibration error",
                    partial(routine, module, loader, device, smooth=False),
                    "torch-uncertainty",
                ),
            ]
            yield Work(f"{name}, M = {members}, {batches} batches", contenders, calls=1)


def ours(module: EnsembleModule, loader: DataLoader, device: str) -> Call:
    return tested(module, loader, device, ["test_accuracy", "test_brier", "test_nll"])


def routine(module: EnsembleModule, loader: DataLoader, device: str, smooth: bool = True) -> Call:
    from torch_uncertainty.methods import deep_ensembles
    from torch_uncertainty.routines import ClassificationRoutine

    model = deep_ensembles(members_of(module), task="classification")
    tests = ClassificationRoutine(model, num_classes=10, loss=nn.CrossEntropyLoss(), is_ensemble=True)
    if not smooth:
        members = {name: metric for name, metric in tests.test_cls_metrics.items(keep_base=True) if name != "cal/SmECE"}
        tests.test_cls_metrics = MetricCollection(members, prefix="test/")
    return tested(tests, loader, device, ["test/cls/Acc", "test/cls/Brier", "test/cls/NLL"])


def tested(module: nn.Module, loader: DataLoader, device: str, names: list[str]) -> Call:
    trainer = trainer_for(device, -1)

    def call() -> Tensor:
        trainer.test(module, loader, verbose=False)
        return torch.stack([trainer.callback_metrics[name].cpu().double() for name in names])

    return call
