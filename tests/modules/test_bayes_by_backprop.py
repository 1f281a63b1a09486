import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.compare.testbed import AGENTS, AgentSetting, agent_network
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.modules.bayes_by_backprop import BayesByBackpropModule
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.mlp import MLP
from lightning_uq.tasks import Classification, Segmentation

X = torch.randn(46, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
SIZES = {"in_features": 4, "out_features": 3, "hidden_sizes": [32]}
BASE = Factory("lightning_uq.networks.mlp.MLP", SIZES)
ADAM = functools.partial(torch.optim.Adam, lr=0.02)
FAST = functools.partial(torch.optim.Adam, lr=0.1)


def loader(y=Y) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size=8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_it_learns_and_hypotheses_differ(make_trainer, precision):
    module = BayesByBackpropModule(BASE, kl_weight=0.1, optimizer=ADAM)
    trainer = make_trainer(max_epochs=10, precision=precision)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    assert result["test_accuracy"] > 0.8
    (again,) = trainer.test(module, loader(), verbose=False)
    assert result == again
    assert module.eval().float().predict(X).mutual_information.mean() > 0.001


def test_the_prior_wins_where_there_are_no_data(make_trainer):
    def spread(kl_weight):
        module = BayesByBackpropModule(BASE, kl_weight=kl_weight, initial_std=0.1, optimizer=FAST)
        make_trainer(max_epochs=10).fit(module, loader())
        return module.network.std.mean()

    assert spread(10.0) > 0.5  # the prior's is 1
    assert spread(0.0) < 0.2


def test_regression(make_trainer):
    base = Factory("lightning_uq.networks.mlp.MLP", {**SIZES, "out_features": 2})
    module = BayesByBackpropModule(base, task="regression", optimizer=ADAM)
    make_trainer(max_epochs=2).fit(module, loader(X[:, :1]), loader(X[:, :1]))
    assert (module.predict(X).epistemic_variance > 0).all()


@pytest.mark.parametrize("second", [None, 0.3])
def test_the_loss_is_the_negative_elbo(second):
    module = BayesByBackpropModule(
        BASE, prior_std=0.8, second_prior_std=second, kl_weight=2.0, num_train=46, num_train_samples=5
    )
    torch.manual_seed(3)
    loss = module.training_loss(X, Y, None)
    torch.manual_seed(3)
    index = module.network.sample_index(5)
    output = module.network(X, index)
    kl = module.network.kl(0.8, second, 0.5, module.network.weights(index)).mean()
    torch.testing.assert_close(loss, nn.functional.cross_entropy(output.flatten(0, 1), Y.repeat(5)) + 2 * kl / 46)


def test_the_number_of_samples_is_counted_or_told(make_trainer):
    module = BayesByBackpropModule(BASE, optimizer=ADAM)
    with pytest.raises(InputError, match="Without a Trainer, pass `num_train`"):
        module.training_loss(X, Y, None)
    make_trainer().fit(module, loader())
    assert module._num_train == 46
    make_trainer().fit(module, DataLoader(TensorDataset(X[:30], Y[:30]), batch_size=8))
    assert module._num_train == 30
    told = BayesByBackpropModule(BASE, num_train=1000, optimizer=ADAM)
    make_trainer().fit(told, loader())
    assert told._num_train == 1000

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    with pytest.raises(InputError, match=r"The training data have no length \(.*\)\. Pass `num_train`\."):
        make_trainer().fit(BayesByBackpropModule(BASE), DataLoader(Endless(), batch_size=8))


def test_a_checkpoint_gives_the_same_numbers(make_trainer, tmp_path):
    module = BayesByBackpropModule(BASE, second_prior_std=0.1, mixture_weight=0.3, temperature=0.5, optimizer=ADAM)
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = BayesByBackpropModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.eval()(X), module.eval()(X))
    assert again.prior == module.prior
    assert again.network.temperature == 0.5


def test_it_starts_from_the_networks_weights():
    network = MLP(**SIZES)
    module = BayesByBackpropModule(network, initial_std=1e-4).eval()
    torch.testing.assert_close(module(X).mean(0), network(X), atol=1e-3, rtol=0)


def test_a_density_is_refused(make_trainer):
    module = BayesByBackpropModule(BASE, optimizer=ADAM)
    with pytest.raises(UnsupportedError, match="no plain inner network whose features could be read"):
        make_trainer(callbacks=[FitGMM()]).fit(module, loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior_std": 0}, "`prior_std` must be positive and finite, but it is 0"),
        ({"prior_std": float("inf")}, "`prior_std` must be positive and finite, but it is inf"),
        ({"second_prior_std": -1}, "`second_prior_std` must be positive and finite, but it is -1"),
        ({"mixture_weight": 2}, r"`mixture_weight` must lie in \[0, 1\], but it is 2"),
        ({"kl_weight": -1}, "`kl_weight` must be at least 0, but it is -1"),
        ({"num_train": 0}, "`num_train` must be an integer of at least 1, but it is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        BayesByBackpropModule(BASE, **arguments)


def test_the_testbeds_agent():
    setting = AgentSetting(
        data="testbed",
        task=Classification(),
        input_shape=(10,),
        num_targets=2,
        num_train=100,
        backbone=functools.partial(agent_network, in_features=10),
        optimizer=ADAM,
        temperature=0.1,
    )
    module = AGENTS["bayes_by_backprop"].build(setting)
    assert sum(p.numel() for p in module.parameters()) == 2 * 3202
    assert module.kl_weight == pytest.approx(math.sqrt(0.1) * 10)
    assert module._num_train == 100
    assert module.prior["prior_std"] == 1.0
    assert module.prior["second_prior_std"] is None
    assert (module.num_train_samples, module.num_eval_samples) == (8, 1000)
    (group,) = module.configure_optimizers().param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0)


def test_the_divergence_weighs_as_much_as_the_data_on_maps():
    """-ELBO / (labels of the data set): N images of H x W labels are N H W likelihood terms and one divergence."""
    torch.manual_seed(0)
    num_train, x = 20, torch.randn(4, 2, 3, 3)
    y = torch.randint(3, (4, 3, 3))
    y[:, 0] = 255
    task = Segmentation(ignore_index=255)
    module = BayesByBackpropModule(nn.Conv2d(2, 3, 1), task=task, num_train=num_train, num_train_samples=1)
    torch.manual_seed(1)
    found = module.training_loss(x, y, None)
    torch.manual_seed(1)
    weights = module.network.weights(module.network.sample_index(1))
    output = module.network.call(x, weights)[0]
    likelihood = nn.functional.cross_entropy(output, y, ignore_index=255, reduction="sum") * num_train / len(x)
    kl = module.network.kl(**module.prior, weights=weights)
    labels = num_train * 6
    torch.testing.assert_close(found, ((likelihood + kl) / labels).squeeze())
