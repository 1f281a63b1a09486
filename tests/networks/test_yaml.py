"""LightningCLI builds backbones, bounded networks and ensembles from YAML."""

import inspect

import jsonargparse
import pytest
import torch
import yaml
from torch import nn

from lightning_uq import Factory, networks
from lightning_uq.networks import backbones

LINEAR = "{class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 3}}"
CONFIGS = {
    "LeNet": ("backbones.LeNet", "{num_classes: 3, in_channels: 2, input_size: 20}", (2, 20, 20)),
    "VGG16": ("backbones.VGG16", "{num_classes: 3, in_channels: 1, input_size: 28, modified: true}", (1, 28, 28)),
    "WideResNet": ("backbones.WideResNet", "{num_classes: 3, depth: 10, widen_factor: 1, dropout: 0}", (3, 8, 8)),
    "ResNet": ("backbones.ResNet", "{block: basic, num_blocks: [1, 1, 1, 1], num_classes: 3}", (3, 8, 8)),
    "resnet18": ("backbones.resnet18", "{num_classes: 3, modified: true}", (3, 8, 8)),
    "FCResNet": ("backbones.FCResNet", "{in_features: 4, num_classes: 3, activation: elu}", (4,)),
    "loop": ("EnsembleNetwork", f"{{members: [{LINEAR}, {LINEAR}], output: logits}}", (4,)),
    "stacked": ("StackedEnsembleNetwork", f"{{members: [{LINEAR}, {LINEAR}]}}", (4,)),
    "vmap": ("VmapEnsembleNetwork", f"{{members: [{LINEAR}, {LINEAR}]}}", (4,)),
    "chosen": ("build_ensemble", f"{{members: [{LINEAR}, {LINEAR}], execution: auto}}", (4,)),
}
BOUNDED = """
class_path: lightning_uq.Factory
init_args:
  target: lightning_uq.networks.spectral_normalize
  kwargs:
    network: {target: lightning_uq.networks.backbones.FCResNet, kwargs: {in_features: 4, num_classes: 3}}
    coefficient: 0.65
    n_power_iterations: 5
    exclude: [last]
"""


def build(network):
    """What LightningCLI, whose parser is jsonargparse's, makes of an argument of this type."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=Factory | nn.Module)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    built = instantiate(parser.parse_object({"network": network})).network
    return built() if isinstance(built, Factory) else built


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_built_from_yaml(name):
    path, init_args, shape = CONFIGS[name]
    network = build({"class_path": f"lightning_uq.networks.{path}", "init_args": yaml.safe_load(init_args)})
    output = network.eval()(torch.zeros(2, *shape))
    assert output.shape[-2:] == (2, 3)


def test_a_bounded_network_is_built_from_yaml():
    network = build(yaml.safe_load(BOUNDED))
    bound = network.first.parametrizations.weight[0]
    assert (bound.coefficient, bound.n_power_iterations) == (0.65, 5)
    assert type(network.last) is nn.Linear


@pytest.mark.parametrize("name", [*backbones.__all__, "EnsembleNetwork", "build_ensemble", "spectral_normalize"])
def test_few_arguments_of_which_all_but_the_first_are_keywords(name):
    parameters = inspect.signature(getattr(backbones, name, None) or getattr(networks, name)).parameters
    assert len(parameters) <= 12
    if not name.startswith("ENN") and name not in ("EnsembleNetwork", "build_ensemble"):
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[1:])
