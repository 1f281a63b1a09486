"""Members that change their batch in place: each gets a copy that no other has touched."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq.batches import own_batch
from lightning_uq.errors import InputError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.running.streams import RandomStream

M, SEED = 3, 7

# The steps here make their own input, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*calls its `forward` with an input other")


class Reassigns(LightningModule):
    """Puts scaled inputs into the batch that it was given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        batch["x"] = batch["x"] / 10
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class InPlace(Reassigns):
    def loss(self, batch):
        batch["x"].div_(10)
        return F.cross_entropy(self(batch["x"] + 0), batch["y"])


class Pops(Reassigns):
    def loss(self, batch):
        return F.cross_entropy(self(batch.pop("x")), batch.pop("y"))


class Mixes(Reassigns):
    """As mixup does it: the backward pass needs the inputs as they were."""

    def loss(self, batch):
        x = batch["x"]
        x.mul_(0.7).add_(x.flip(0).mul(0.3))
        return F.cross_entropy(self(x), batch["y"])


class InHooks(Reassigns):
    """Changes the batch before its step and looks at it after: all three see one batch."""

    def on_train_batch_start(self, batch, batch_idx):
        batch["x"].mul_(2).add_(torch.rand(()))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.net.bias.data += batch["x"].mean()


class Augments(InHooks):
    """Draws in a transfer hook first, and in `on_train_batch_start` then."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch["x"] = batch["x"] + torch.rand_like(batch["x"])
        return batch


def loader():
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": 10 * torch.randn(4, generator=generator), "y": torch.tensor(i % 3)} for i in range(16)]
    # With a generator of its own the loader draws nothing from the global one.
    return DataLoader(rows, batch_size=4, generator=generator)


class Ensemble(EnsembleModule):
    def unpack_batch(self, batch):
        return batch["x"], batch["y"]


@pytest.mark.parametrize("kind", [Reassigns, InPlace, Pops, Mixes, InHooks, Augments])
@pytest.mark.parametrize("num_members", [1, M])
def test_a_member_ends_as_it_would_alone(kind, num_members, make_trainer):
    ensemble = Ensemble(kind, num_members=num_members, seed=SEED)
    validation = [] if kind is Augments else [loader()]  # whose draws in evaluation are the first member's for all
    trainer = make_trainer()
    trainer.fit(ensemble, loader(), *validation)
    for i in range(num_members):
        with RandomStream(member_seed(SEED, i)).active():
            single = kind()
            single_trainer = make_trainer()
            single_trainer.fit(single, loader(), *validation)
        assert torch.equal(ensemble.network.members[i].net.weight, single.net.weight)
        assert torch.equal(ensemble.network.members[i].net.bias, single.net.bias)
        if validation:
            expected = single_trainer.callback_metrics["val_loss"]
            assert trainer.callback_metrics[f"member_{i}/val_loss"] == expected
    if validation:  # the ensemble's own metrics see the batch of the loader
        batches = list(loader())
        x, y = (torch.cat([batch[name] for batch in batches]) for name in ("x", "y"))
        log_probs = ensemble.eval()(x).log_softmax(2).logsumexp(0) - math.log(num_members)
        nll = F.nll_loss(log_probs, y).item()
        assert trainer.callback_metrics["ensemble/val_nll"].item() == pytest.approx(nll, rel=1e-5)


def test_a_copy_has_its_own_containers_and_tensors():
    shared = torch.arange(4.0)
    whole = torch.zeros(1000, 4)
    batch = {"x": shared, "again": [shared, "text"], "slice": whole[:2], "pair": (torch.ones(1), None)}
    own = own_batch(batch)
    own["x"].zero_()
    own["again"].append(1)
    assert own["again"][0] is own["x"]
    assert batch["again"][0] is shared
    assert batch["again"] == [shared, "text"]
    assert shared.tolist() == [0, 1, 2, 3]
    assert own["slice"].untyped_storage().nbytes() == 2 * 4 * 4
    assert isinstance(own["pair"], tuple)


def test_an_object_is_copied_as_it_says():
    class Graph:
        def __init__(self):
            self.nodes = torch.ones(3)

        def __deepcopy__(self, memo):
            other = Graph()
            other.nodes = copy.deepcopy(self.nodes, memo)
            return other

    graph = Graph()
    own_batch([graph])[0].nodes.zero_()
    assert graph.nodes.tolist() == [1, 1, 1]


def test_a_batch_that_cannot_be_copied_is_named():
    with pytest.raises(InputError, match=r"A batch of type dict cannot be copied: .*lock.*define `__deepcopy__`"):
        own_batch({"lock": threading.Lock()})


class Remembers(Reassigns):
    """Keeps an output of its steps, as a metric may: a tensor with a graph cannot be copied."""

    def loss(self, batch):
        self.last = self(batch["x"])
        return F.cross_entropy(self.last, batch["y"])

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            super().validation_step(batch, batch_idx)


def test_a_member_that_cannot_be_copied_trains(make_trainer):
    rows = [{"x": torch.randn(4), "y": i % 3} for i in range(12)]
    ensemble = EnsembleModule(Remembers, num_members=2, seed=SEED)
    make_trainer(max_epochs=1).fit(ensemble, DataLoader(rows, 4), DataLoader(rows, 4))
    assert ensemble.global_step == 3
