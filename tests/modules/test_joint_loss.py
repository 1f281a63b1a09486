"""Modules that train with a loss over all indices, and with regularizers."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.data.indexed import IndexedSample
from lightning_uq.errors import InputError
from lightning_uq.functional.joint import joint_log_loss
from lightning_uq.losses import (
    BootstrapNoise,
    CombinedLoss,
    GaussianTargetNoise,
    JointLoss,
    L2WeightDecay,
    PriorLoss,
    cross_entropy_loss,
    l2_weight_decay,
)
from lightning_uq.modules.arguments import restore_argument, saved_argument
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.tasks import Classification

FLIPPED = 0.15


def mlp(d_out=2):
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, d_out))


def problem(n=200):
    """A noisy line: some labels are flipped, so that certainty is punished."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 2, generator=generator)
    y = (x.sum(1) > 0).long()
    flipped = torch.rand(n, generator=generator) < FLIPPED
    return TensorDataset(x, torch.where(flipped, 1 - y, y))


def loader(n=200, **kwargs):
    return DataLoader(problem(n), batch_size=20, **kwargs)


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


MODULES = {
    "ensemble": lambda loss: EnsembleModule(mlp, num_members=4, loss=loss, optimizer=adam, seed=1),
    "stacked": lambda loss: EnsembleModule(mlp, num_members=4, loss=loss, optimizer=adam, seed=1, execution="stacked"),
    "epinet": lambda loss: EpinetModule(mlp(), loss=loss, optimizer=adam, num_train_samples=16),
    "dropout": lambda loss: DropoutModule(
        nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2)),
        loss=loss,
        optimizer=adam,
        num_train_samples=8,
    ),
}


@pytest.mark.parametrize("method", MODULES)
@pytest.mark.parametrize("sampling", ["consecutive", "dyadic"])
def test_it_trains(method, sampling, make_trainer):
    module = MODULES[method](JointLoss(tau=5, sampling=sampling))
    x, y = problem(400).tensors
    x, y = x[200:], y[200:]

    def score():
        module.eval()
        with torch.no_grad():
            loss = joint_log_loss(module(x), y, 5, sampling=sampling).item()
        module.train()
        return loss

    before = score()
    make_trainer(max_epochs=6).fit(module, loader(shuffle=True), loader())
    after = score()
    floor = -5 * (FLIPPED * math.log(FLIPPED) + (1 - FLIPPED) * math.log(1 - FLIPPED))  # five labels of known inputs
    assert after - floor < 0.6 * (before - floor)


def test_the_loss_is_that_of_all_indices_together_and_validation_follows_it(make_trainer):
    module = MODULES["ensemble"](JointLoss(tau=5))
    x, y = problem(20).tensors
    output = module.network(x)
    value = JointLoss(tau=5)(output, y)
    losses = module.index_losses(output, y)
    torch.testing.assert_close(losses, value.expand(4))
    torch.testing.assert_close(module.training_loss(x, y, (x, y)), 4 * value)  # an ensemble sums over its members
    trainer = make_trainer()
    trainer.validate(module, loader(20), verbose=False)
    torch.testing.assert_close(trainer.callback_metrics["val_loss"].float(), value.detach())


def test_one_hypothesis_and_a_tau_of_one_train_as_ever():
    plain, joint = (DeterministicModule(mlp(), loss=loss) for loss in (None, JointLoss(tau=1)))
    joint.load_state_dict(plain.state_dict())
    x, y = problem(20).tensors
    for module in (plain, joint):
        module.training_loss(x, y, (x, y)).backward()
    for a, b in zip(plain.parameters(), joint.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_equal_members_get_the_gradient_that_they_would_get_alone():
    torch.manual_seed(1)
    start = mlp().state_dict()

    def same():
        network = mlp()
        network.load_state_dict(start)
        return network

    with pytest.warns(UserWarning, match="members start from the same weights"):
        module = EnsembleModule(same, num_members=3, loss=JointLoss(tau=4), execution="loop")
    x, y = problem(4).tensors
    module.training_loss(x, y, (x, y)).backward()
    alone = mlp()
    alone.load_state_dict(start)
    (4 * nn.functional.cross_entropy(alone(x), y)).backward()
    for i in range(3):
        for a, b in zip(module.network.members[i].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_regression(make_trainer):
    x = torch.randn(100, 2)
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=20)
    module = EnsembleModule(
        mlp, num_members=3, task="regression", loss=JointLoss(tau=4, likelihood="gaussian"), optimizer=adam
    )
    before = module.index_losses(module.network(x), x.sum(1, keepdim=True)).mean().item()
    make_trainer(max_epochs=5).fit(module, data, data)
    after = module.index_losses(module.network(x), x.sum(1, keepdim=True)).mean().item()
    assert after < before - 1


def test_samples_cannot_be_weighted_in_it():
    module = EnsembleModule(mlp, num_members=2, loss=JointLoss(), bootstrap="poisson")
    x, y = problem(20).tensors
    with pytest.raises(InputError, match=r"`loss` is computed over all indices together.*JointLoss"):
        module.training_loss(x, y, IndexedSample(x, y, torch.arange(20)))


def test_targets_with_noise_can():
    noise = GaussianTargetNoise(0.5)
    module = EnsembleModule(
        mlp, num_members=2, task="regression", loss=JointLoss(tau=5, likelihood="gaussian"), data_noise=noise, seed=0
    )
    x, y, index = torch.randn(20, 2), torch.randn(20, 1), torch.arange(20)
    value = module.training_loss(x, y, IndexedSample(x, y, index))
    expected = JointLoss(tau=5, likelihood="gaussian")(module.network(x), noise.targets(y, index, torch.arange(2)))
    torch.testing.assert_close(value, 2 * expected)


def test_a_sum_of_losses():
    loss = CombinedLoss([JointLoss(tau=5), nn.CrossEntropyLoss()], [0.2, 1.0])
    module = MODULES["ensemble"](loss)
    x, y = problem(20).tensors
    output = module.network(x)
    expected = 0.2 * JointLoss(tau=5)(output, y) + cross_entropy_loss(output, y).mean()
    torch.testing.assert_close(module.index_losses(output, y)[0], expected)


# ---------------------------------------------------------------------- regularizers


def test_a_regularizer_is_added_to_the_training_loss_alone(make_trainer):
    plain = EpinetModule(mlp())
    x, y = problem(20).tensors
    torch.manual_seed(4)
    without = plain.training_loss(x, y, (x, y))
    plain.regularizer = L2WeightDecay(0.1)
    torch.manual_seed(4)
    value = plain.training_loss(x, y, (x, y))
    torch.testing.assert_close(value - without, l2_weight_decay(plain.network, 0.1))
    trainer = make_trainer()
    trainer.validate(plain, loader(20), verbose=False)
    with_it = trainer.callback_metrics["val_loss"]
    plain.regularizer = None
    trainer.validate(plain, loader(20), verbose=False)
    assert trainer.callback_metrics["val_loss"] == with_it


@pytest.mark.parametrize("freeze_base", [True, False])
def test_a_prior_loss_draws_the_learned_part_to_zero_where_there_are_no_data(freeze_base, make_trainer):
    def trained(scale):
        torch.manual_seed(0)
        module = EpinetModule(
            mlp(),
            optimizer=adam,
            freeze_base=freeze_base,
            regularizer=CombinedLoss([PriorLoss(scale, num_samples=4, input_scale=10.0), L2WeightDecay(0.0)]),
        )
        make_trainer(max_epochs=4).fit(module, loader())
        far = 10 * torch.randn(200, 2)
        module.eval()
        learned, _ = module.network.learned_and_prior(far, module.network.evaluation_index(20))
        return learned.square().mean().item()

    assert trained(1.0) < 0.5 * trained(0.0)


# ---------------------------------------------------------------------- checkpoints and the command line


ARGUMENTS = [
    JointLoss(tau=3, sampling="dyadic"),
    BootstrapNoise("exponential", seed=7),
    GaussianTargetNoise(0.25),
    PriorLoss(0.5, num_samples=3, distill="regression"),
    L2WeightDecay(0.1),
]


@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_arguments_are_saved_as_plain_data(value):
    saved = saved_argument(value)
    assert saved["class_path"].startswith("lightning_uq.losses.")
    assert restore_argument(saved, "loss") == value
    assert restore_argument(value, "loss") is value


def test_a_checkpoint_brings_loss_noise_and_regularizer_back(make_trainer, tmp_path):
    loss, noise, regularizer = JointLoss(tau=3), BootstrapNoise("bernoulli", seed=2), PriorLoss(0.1)
    module = EpinetModule(mlp, loss=loss, data_noise=noise, regularizer=regularizer)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    again = EpinetModule.load_from_checkpoint(tmp_path / "module.ckpt", network=mlp, weights_only=True)
    assert (again.loss, again.data_noise, again.regularizer) == (loss, noise, regularizer)
    ensemble = EnsembleModule(mlp, num_members=2, data_noise=noise, loss=CombinedLoss([nn.CrossEntropyLoss()]))
    trainer = make_trainer()
    trainer.strategy.connect(ensemble)
    trainer.save_checkpoint(tmp_path / "ensemble.ckpt")
    with pytest.raises(InputError, match=r"does not hold argument `loss`: a .*CombinedLoss.*Pass it to"):
        EnsembleModule.load_from_checkpoint(tmp_path / "ensemble.ckpt", network=mlp)
    again = EnsembleModule.load_from_checkpoint(tmp_path / "ensemble.ckpt", network=mlp, loss=None)
    assert again.data_noise == noise


def test_the_command_line_builds_them():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(EpinetModule, "model")

    def part(name, **arguments):
        return {"class_path": f"lightning_uq.losses.{name}", "init_args": arguments}

    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}
    config = {
        "class_path": "lightning_uq.EpinetModule",
        "init_args": {
            "network": network,
            "task": {"class_path": "lightning_uq.tasks.Classification", "init_args": {"num_classes": 2}},
            "loss": part("JointLoss", tau=4),
            "data_noise": part("BootstrapNoise", kind="exponential", seed=3),
            "regularizer": part("L2WeightDecay", scale=0.5),
        },
    }
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    model = instantiate(parser.parse_object({"model": config})).model
    assert model.task == Classification(num_classes=2)
    assert model.loss == JointLoss(tau=4)
    assert model.data_noise == BootstrapNoise("exponential", seed=3)
    assert model.regularizer == L2WeightDecay(0.5)
