from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.running.logits import LogitReader, is_uncertainty_module
from lightning_uq.tasks import Classification, Segmentation


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


class UsersModuleAroundOurNetwork(LightningModule):
    """A user's own module that happens to name an EpistemicNetwork ``network``."""

    def __init__(self):
        super().__init__()
        self.network = DeterministicNetwork(nn.Linear(4, 3))

    def forward(self, x):
        return self.network(x, self.network.sample_index(1))[0]


@pytest.mark.filterwarnings("ignore:The likelihood has no finite")
def test_a_users_module_with_an_epistemic_network_stays_the_users():
    model, x, y = UsersModuleAroundOurNetwork(), torch.randn(40, 4), torch.arange(40) % 3
    assert not is_uncertainty_module(model)
    assert torch.equal(LogitReader()(model, (x, y)), model(x).unsqueeze(0))
    assert TemperatureScaling().fit(model, [(x, y)]).fitted
    assert FitGMM().fit(model, [(x, y)]).fitted


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
        (nn.Softmax(1), {}, 'returned probabilities .*Pass `output="probs"`'),
        (nn.Identity(), {"predict_fn": lambda m, x: {"out": x}}, "dict with keys \\['out'\\].*argument `output`"),
        (nn.Linear(4, 1), {}, "C >= 2, but it returned shape \\[6, 1\\].*as `output`"),
        (
            nn.Unflatten(1, (2, 2)),
            {},
            "returned \\[6, 2, 2\\], a map of logits, but the task is Classification.*`task=Segmentation\\(\\)`",
        ),
        (nn.Identity(), {"predict_fn": lambda m, x: x[0]}, "but it returned shape \\[4\\]"),
        (nn.Identity(), {"predict_fn": lambda m, x: x[None, None]}, "returned \\[1, 6, 4\\], a map"),
    ],
)
def test_what_is_no_logits_is_refused(model, reader, message):
    with pytest.raises(InputError, match=message):
        LogitReader(**reader)(model, torch.randn(6, 4))


@pytest.mark.parametrize("name", ["predict_fn", "unpack_batch"])
def test_arguments_are_functions(name):
    with pytest.raises(InputError, match=f"`{name}` must be a function or its import path, but its type is int"):
        LogitReader(**{name: 3})
    with pytest.raises(
        InputError, match=f"`{name}` must be the import path of a class or function, but it is 'forward'"
    ):
        LogitReader(**{name: "forward"})
    with pytest.raises(InputError, match="`output` must be"):
        LogitReader(output="softmax")


# ---------------------------------------------------------------------- what the outputs mean


class Maps(nn.Module):
    def forward(self, x):
        return torch.stack([x, -x], 1)  # [B, 2, H, W]


def test_the_task_of_a_foreign_module_is_an_argument_and_of_ours_its_own():
    x = torch.randn(6, 4, 4)
    assert LogitReader(task=Segmentation())(Maps(), x).shape == (1, 6, 2, 4, 4)
    assert LogitReader(task="segmentation").task(Maps()) == Segmentation()
    module = DeterministicModule(nn.Linear(4, 3))
    assert LogitReader(task=Classification()).task(module) is module.task
    with pytest.raises(
        InputError,
        match=r"DeterministicModule is one of this package and has the task Classification\(\). Leave argument `task` out",
    ):
        LogitReader(task=Segmentation()).task(module)
    with pytest.raises(InputError, match="`task` must be a Task, or one of"):
        LogitReader(task="clustering")


@pytest.mark.parametrize("num_rows", [3, 6, 1])
def test_a_predict_fn_of_maps_may_give_an_index_or_none(num_rows):
    def of_members(model, x):
        return torch.stack([model(x), model(2 * x), model(3 * x)])

    first, x = torch.randn(6, 4, 4), torch.randn(num_rows, 4, 4)
    plain, members = (LogitReader(fn, task=Segmentation()) for fn in (lambda model, x: model(x), of_members))
    plain(Maps(), first), members(Maps(), first)
    assert plain(Maps(), x).shape == (1, num_rows, 2, 4, 4)
    assert members(Maps(), x).shape == (3, num_rows, 2, 4, 4)  # three of three as well


def test_a_first_batch_that_may_be_read_in_two_ways_is_refused():
    reader = LogitReader(lambda model, x: model(x), task=Segmentation())
    with pytest.raises(
        InputError, match=r"\[2, 2, 4, 4\] for a batch of 2, .*as \[B, ...\] or as \[Z, B, ...\]. Use another"
    ):
        reader(Maps(), torch.randn(2, 4, 4))
    assert reader(Maps(), torch.randn(1, 4, 4)).shape == (1, 1, 2, 4, 4)
