"""A checkpoint holds what the outermost constructor was called with, whatever a method lists; unknown arguments are named."""

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.modules.bayes_by_backprop import BayesByBackpropModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.networks.factory import Factory

LINEAR = Factory("torch.nn.Linear", {"in_features": 4, "out_features": 2})


class Wide(DeterministicModule):
    """A user's own method: it has arguments of its own, and passes others to its base by itself."""

    def __init__(self, network, width=3, *, activation=nn.ReLU, **training):
        super().__init__(
            nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 2)), task="regression", **training
        )
        self.width = width


class Wider(Wide):
    """Its constructor passes everything on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Columns(DeterministicModule):
    """Its own argument is a mapping."""

    def __init__(self, network, *, columns, **training):
        super().__init__(network, **training)
        self.columns = columns


def reloaded(make_trainer, tmp_path, module, **kwargs):
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    return type(module).load_from_checkpoint(tmp_path / "module.ckpt", **kwargs)


def test_a_users_own_mapping_with_the_keys_of_a_factory_is_left_as_it_is(make_trainer, tmp_path):
    columns = {"target": "price", "kwargs": {"unit": "EUR"}}
    module = Columns(LINEAR, columns=columns)
    assert module.columns == reloaded(make_trainer, tmp_path, module).columns == columns


@pytest.mark.parametrize("kind", [Wide, Wider])
def test_a_users_own_arguments_are_saved_and_restored(make_trainer, tmp_path, kind):
    module = kind(LINEAR, 5, num_eval_samples=7)
    again = reloaded(make_trainer, tmp_path, module)
    assert (again.width, again.num_eval_samples, again.task) == (5, 7, module.task)
    assert again.hparams == module.hparams
    assert "task" not in again.hparams  # the class sets it
    x = torch.randn(3, 4)
    assert torch.equal(again(x), module(x))


def test_an_argument_that_cannot_be_saved_is_asked_for_by_name(make_trainer, tmp_path):
    module = Wide(LINEAR, activation=lambda: nn.ReLU())
    with pytest.raises(InputError, match=r"does not hold argument `activation`.*activation=\.\.\."):
        reloaded(make_trainer, tmp_path, module)
    assert reloaded(make_trainer, tmp_path, module, activation=nn.ReLU).width == 3


def test_notes_end_with_the_constructor():
    assert "given_arguments" not in vars(EnsembleModule(LINEAR, num_members=2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EpinetModule(LINEAR, index_dim=4),
            "EpinetModule has no argument `index_dim`: it is a field of `head`. Pass",
        ),
        (
            lambda: BayesByBackpropModule(LINEAR, prior_sd=1.0),
            "BayesByBackpropModule has no argument `prior_sd`. .*prior_std",
        ),
        (
            lambda: EnsembleModule(LINEAR, members=3),
            "EnsembleModule has no argument `members`. .*num_members.*optimizer",
        ),
        (
            lambda: Wide(LINEAR, widht=3),
            "Wide has no argument `widht`. Its arguments are network, width, activation, output,",
        ),
    ],
)
def test_an_unknown_argument_is_named_with_the_class_and_the_arguments_that_exist(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_too_many_arguments_stay_an_error():
    with pytest.raises(TypeError, match="positional"):
        DeterministicModule(LINEAR, "probs", 3)
