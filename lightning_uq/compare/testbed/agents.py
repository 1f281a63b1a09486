"""The agents of the Neural Testbed: this package's methods with the testbed's networks and settings.

All networks have two hidden layers of 50 (dropout's have 100). Adam at 1e-3 takes 1,000 steps on batches of 100, with an L2
term that falls with n / d and includes biases.

Source: Osband et al., arXiv 2110.04629, and ``neural_testbed.agents.factories``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_uq.compare.testbed.epinet import epinet_for_testbed
from lightning_uq.compare.testbed.uniform import UniformModule
from lightning_uq.data import TestbedDataModule
from lightning_uq.method import Method, Setting
from lightning_uq.modules import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    HypermodelModule,
)
from lightning_uq.networks import MLP, PriorIndependentLayers, truncated_normal_init_
from lightning_uq.tasks import Classification

DEFAULT_AGENTS = ("epinet", "ensemble_prior", "ensemble", "dropout", "softmax", "uniform")
"""The default methods of a comparison on the testbed."""

HIDDEN_SIZES = (50, 50)
NUM_MEMBERS = 10
NUM_EVAL_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class AgentSetting(Setting):
    """The facts of a testbed problem that an agent may use, in addition to those of any :class:`Setting`.

    Attributes:
        temperature: Temperature T of the environment.
        num_members: Number of members of an ensemble.
    """

    temperature: float
    num_members: int = NUM_MEMBERS


def agent_network(
    in_features: int,
    num_outputs: int,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    dropout: float = 0.0,
    nonzero_bias: bool = False,
) -> MLP:
    """An agent's ReLU MLP with the initial weights of the testbed.

    Args:
        in_features: d.
        num_outputs: C.
        hidden_sizes: Sizes of the hidden layers.
        dropout: Dropout rate after each hidden layer.
        nonzero_bias: Whether the first layer's bias is drawn like its weights. All other biases are zero.

    Example:
        >>> agent_network(10, 2)[0].bias.abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """
    network = MLP(in_features, num_outputs, hidden_sizes=hidden_sizes, dropout=dropout)
    truncated_normal_init_(network)
    first = network[0]
    if nonzero_bias and isinstance(first, nn.Linear):
        std = in_features**-0.5
        nn.init.trunc_normal_(first.bias, 0.0, std, -2 * std, 2 * std)
    return network


def agent_setting(data: TestbedDataModule, learning_rate: float) -> AgentSetting:
    """The setting of an agent: T, d, n and C, with the network and the optimizer shared by all agents.

    The L2 term is sqrt(T) d / n times the sum of squares of all trained weights, which is Adam's ``weight_decay`` of twice that
    number. The original's ensembles divide it by their size K, like their loss; here both are sums over members.
    """
    num_features, num_train, temperature = data.num_features, data.num_train, data.temperature
    l2 = math.sqrt(temperature) * num_features / num_train
    return AgentSetting(
        data=data.name,
        task=Classification(),
        input_shape=(num_features,),
        num_targets=data.num_classes,
        num_train=num_train,
        backbone=functools.partial(agent_network, in_features=num_features),
        optimizer=functools.partial(torch.optim.Adam, lr=learning_rate, weight_decay=2 * l2),
        temperature=temperature,
    )


def num_epochs(name: str, setting: Setting) -> int:
    """The factor of an agent's number of training steps on this problem, relative to the usual number."""
    if name == "hypermodel":
        return 2
    return 10 if name == "epinet" and setting.num_train / setting.num_features > 500 else 1


def _agent(setting: Setting) -> AgentSetting:
    assert isinstance(setting, AgentSetting)  # only testbed problems reach the agents
    return setting


def _softmax(setting: Setting) -> DeterministicModule:
    return DeterministicModule(setting.network, optimizer=setting.optimizer)


def _ensemble(setting: Setting) -> EnsembleModule:
    return EnsembleModule(setting.network, num_members=_agent(setting).num_members, optimizer=setting.optimizer)


def _ensemble_prior(setting: Setting) -> EnsembleModule:
    network = setting.network_for(nonzero_bias=True)
    return EnsembleModule(
        network,
        num_members=_agent(setting).num_members,
        prior_network=network,
        prior_scale=3 / math.sqrt(_agent(setting).temperature),
        optimizer=setting.optimizer,
    )


def _dropout(setting: Setting) -> DropoutModule:
    network = setting.network_for(hidden_sizes=(100, 100), dropout=0.1, nonzero_bias=True)
    return DropoutModule(network, num_eval_samples=NUM_EVAL_SAMPLES, optimizer=setting.optimizer)


def _epinet(setting: Setting) -> EpinetModule:
    return epinet_for_testbed(
        setting.num_features, setting.num_targets, setting.num_train, temperature=_agent(setting).temperature
    )


def _hypermodel(setting: Setting) -> HypermodelModule:
    sizes: dict[str, Any] = {"in_features": setting.num_features, "out_features": setting.num_targets}
    return HypermodelModule(
        setting.network,
        index_dim=6,
        scale=False,
        initialization="enn",
        prior=functools.partial(PriorIndependentLayers, **sizes, index_dim=6),
        prior_scale=1 / math.sqrt(_agent(setting).temperature),
        calibrate_prior=False,
        num_eval_samples=NUM_EVAL_SAMPLES,
        optimizer=setting.optimizer,
    )


def _bayes_by_backprop(setting: Setting) -> BayesByBackpropModule:
    return BayesByBackpropModule(  # has a prior instead of the other agents' weight decay
        setting.network,
        kl_weight=math.sqrt(_agent(setting).temperature) * setting.num_features,
        num_train=setting.num_train,
        num_eval_samples=NUM_EVAL_SAMPLES,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
    )


def _uniform(setting: Setting) -> UniformModule:
    return UniformModule(setting.num_targets)


_METHODS = (
    Method(name="softmax", build=_softmax, ood_score="predictive_entropy"),
    Method(name="ensemble", build=_ensemble, ood_score="mutual_information"),
    Method(name="ensemble_prior", build=_ensemble_prior, ood_score="mutual_information"),
    Method(name="dropout", build=_dropout, ood_score="predictive_entropy"),
    Method(name="epinet", build=_epinet, ood_score="predictive_entropy"),
    Method(name="hypermodel", build=_hypermodel, ood_score="predictive_entropy"),
    Method(name="bayes_by_backprop", build=_bayes_by_backprop, ood_score="predictive_entropy"),
    Method(name="uniform", build=_uniform, ood_score="predictive_entropy"),
)

AGENTS = {method.name: method for method in _METHODS}
"""The agents by name. On testbed data, they replace the methods with the same names."""
