import functools
import pickle

import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks.factory import (
    Factory,
    build_network,
    check_factory,
    factory_from_config,
    factory_to_config,
)


class Outer:
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)


def test_a_factory_builds_a_new_network_each_time_and_pickles():
    factory = Factory("torch.nn.Linear", {"in_features": 2, "out_features": 3})
    first, second = factory(), pickle.loads(pickle.dumps(factory))()
    assert first is not second
    assert not torch.equal(first.weight, second.weight)


def test_an_argument_is_built_by_a_factory_of_its_own():
    inner = {"target": "torch.nn.Linear", "kwargs": {"in_features": 2, "out_features": 3}}
    factory = Factory("lightning_uq.networks.DeterministicNetwork", {"network": inner})
    config = factory_to_config(factory)
    assert config == {"target": factory.target, "kwargs": {"network": inner}}
    for again in (factory, factory_from_config(config), pickle.loads(pickle.dumps(factory))):
        first, second = again().network, again().network
        assert type(first) is nn.Linear
        assert not torch.equal(first.weight, second.weight)
    with pytest.raises(InputError, match="import path of a class or function, but it is 'no.Such'"):
        Factory("torch.nn.Sequential", {"network": {"target": "no.Such", "kwargs": {}}})


@pytest.mark.parametrize("target", ["torch.nn.NoSuch", "no_such_package.Net", "Linear", "torch.nn.init.math.pi"])
def test_a_wrong_path_is_named(target):
    with pytest.raises(InputError, match=f"import path of a class or function, but it is '{target}'"):
        Factory(target)


@pytest.mark.parametrize(
    "value",
    [
        nn.ReLU,
        functools.partial(nn.Linear, in_features=2, out_features=3),
        Factory("torch.nn.Linear", {"in_features": 2, "out_features": 3}),
        torch.nn.functional.mse_loss,
        torch.optim.SGD,
        functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    ],
)
def test_what_can_be_imported_goes_round(value):
    config = factory_to_config(value)
    assert isinstance(config, dict)
    restored = factory_from_config(config)
    assert callable(restored)
    assert factory_to_config(restored) == config


def test_a_bare_callable_comes_back_as_itself():
    assert factory_from_config(factory_to_config(torch.optim.Adam)) is torch.optim.Adam


@pytest.mark.parametrize(
    "value",
    [
        {"target": 0.5, "kwargs": {}},
        {"target": "accuracy", "kwargs": {"top_k": 1}},
        {"target": "no.such.module", "kwargs": {}},
        {"target": "torch.nn.Linear", "kwargs": 3},
    ],
)
def test_a_mapping_of_the_user_s_with_the_same_keys_stays_one(value):
    assert factory_from_config(value) == value


def test_an_optimizer_goes_round_with_its_arguments():
    restored = factory_from_config(factory_to_config(functools.partial(torch.optim.SGD, lr=0.5)))
    assert restored([nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.5


@pytest.mark.parametrize(
    "value", [lambda: nn.ReLU(), functools.partial(nn.Linear, 2, 3), functools.partial(nn.ReLU, object()), nn.ReLU()]
)
def test_what_cannot_be_found_again_is_none(value):
    assert factory_to_config(value) is None


def test_a_local_function_is_not_taken_for_an_importable_one():
    def build() -> nn.Module:
        return nn.ReLU()

    assert factory_to_config(build) is None


def test_an_instance_is_not_a_factory():
    with pytest.raises(InputError, match="`network` must be a factory.*it is an instance of Linear"):
        check_factory(nn.Linear(2, 2))
    with pytest.raises(InputError, match="callable or a `Factory`, but it is 3"):
        check_factory(3)
    with pytest.raises(InputError, match=r"`network` must return a torch.nn.Module, but it returned 3"):
        build_network(lambda: 3)
