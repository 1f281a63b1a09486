"""Maps evaluated by two processes, one of which gets no batch."""

import json

import pytest

SCRIPT = """
import json
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from lightning_uq import DeterministicModule, EnsembleModule
from lightning_uq.tasks import EvidentialClassification, Segmentation

torch.manual_seed(0)
x, y = torch.randn(5, 2, 4, 4), torch.randint(0, 2, (5, 4, 4))
y[0] = 255  # a map of which nothing counts
y[1, :2] = 255
IGNORE = 255


class Stream(IterableDataset):
    # All rows come to one rank.
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        distributed = torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == self.rank:
            yield from zip(x, y)


def network():
    torch.manual_seed(1)
    return nn.Conv2d(2, 3, 3, padding=1)


def make_trainer(**kwargs):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=DEVICES, strategy="ddp" if DEVICES > 1 else "auto", precision="64-true",
                   max_epochs=1, **quiet, **kwargs)


modules = {
    "deterministic": DeterministicModule(network, task=Segmentation(ignore_index=IGNORE)),
    "ensemble": EnsembleModule(network, num_members=2, task=Segmentation(ignore_index=IGNORE), seed=0),
    # Its review of a validation gathers over the ranks.
    "evidential": DeterministicModule(network, task=EvidentialClassification(ignore_index=IGNORE)),
}
loaders = {
    "rank 0": DataLoader(Stream(0), batch_size=2),
    "rank 1": DataLoader(Stream(1), batch_size=2),
    "one row": DataLoader(TensorDataset(x[1:2], y[1:2]), batch_size=2),  # the other rank gets a copy that does not count
}
found = {}
for name, module in modules.items():
    for case, loader in loaders.items():
        for stage in ("validate", "test"):
            (found[f"{name}, {stage}, {case}"],) = getattr(make_trainer(), stage)(module, loader, verbose=False)

module = EnsembleModule(network, num_members=2, task=EvidentialClassification(ignore_index=IGNORE), seed=0,
                        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
stopping = EarlyStopping("val_loss")  # an error where a rank lacks the number
trainer = make_trainer(callbacks=[stopping], num_sanity_val_steps=1)
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=2), loaders["rank 1"])
found["fit"] = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
if trainer.is_global_zero:
    json.dump(found, open(out, "w"))
"""


def test_a_rank_without_a_batch_takes_part_and_the_numbers_are_those_of_one_process(run_script):
    one, two = (run_script(SCRIPT.replace("DEVICES", str(devices)), timeout=200) for devices in (1, 2))
    assert len(one) == 19
    assert one.keys() == two.keys()
    for case, numbers in one.items():
        assert {"loss", "accuracy", "nll", "ece"} <= {name.partition("_")[2] for name in numbers}
        assert two[case] == pytest.approx(numbers, rel=1e-6, abs=1e-9), json.dumps([case, numbers, two[case]])
