"""Loads ENN's weights of hypermodels, whose base weights Haiku flattens in its own order."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.generated.bayes_by_backprop import BayesByBackpropNetwork
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers


@torch.no_grad()
def load_hypermodel(network: HypermodelNetwork, arrays: Mapping[str, Tensor]) -> None:
    """Load a hypermodel of an MLP, in place. Load its prior separately, since ENN keeps it outside the parameters.

    Raises:
        InputError: An array is missing or left over, or has another shape.
    """
    left = dict(arrays)
    for i, layer in enumerate(layer for layer in network.torso.modules() if isinstance(layer, nn.Linear)):
        layer.weight.copy_(_take(left, f"mlp/linear_{i}/w", layer.weight.mT.shape).mT)
        layer.bias.copy_(_take(left, f"mlp/linear_{i}/b", layer.bias.shape))
    width = network.generator.in_features
    sizes = [network.shapes[i].numel() for i in _haiku_order(network.names)]
    leaves = [_numbered("linear", i) for i in range(len(sizes))]
    weights = [_take(left, f"{leaf}/w", torch.Size([width, n])) for leaf, n in zip(leaves, sizes, strict=True)]
    biases = [_take(left, f"{leaf}/b", torch.Size([n])) for leaf, n in zip(leaves, sizes, strict=True)]
    position = _positions(network.names, network.shapes)
    network.generator.weight.copy_(torch.cat(weights, dim=1)[:, position].mT)
    network.generator.bias.copy_(torch.cat(biases)[position])
    _check_empty(left, network)


@torch.no_grad()
def load_bayes_by_backprop(network: BayesByBackpropNetwork, arrays: Mapping[str, Tensor]) -> None:
    """Load the means and standard deviations of an MLP's weights, in place.

    Raises:
        InputError: An array is missing or left over, or has another shape.
    """
    left = dict(arrays)
    shapes = [network.network.get_parameter(name).shape for name in network.names]
    position = _positions(network.names, shapes)
    network.spread.rho.copy_(_take(left, "diagonal_linear/w", position.shape)[position] - network.spread.start)
    means = _take(left, "diagonal_linear/b", position.shape)[position]
    parts = torch.split(means, [shape.numel() for shape in shapes])
    for name, shape, part in zip(network.names, shapes, parts, strict=True):
        network.network.get_parameter(name).copy_(part.reshape(shape))
    _check_empty(left, network)


@torch.no_grad()
def load_independent_layers(network: PriorIndependentLayers, arrays: Mapping[str, Tensor]) -> None:
    """Load the prior whose layers' weights are linear in the index, in place.

    Raises:
        InputError: An array is missing or left over, or has another shape.
    """
    left = dict(arrays)
    for i in range(network.num_layers):
        for ours, theirs in (("weight", "w"), ("bias", "b")):
            target = network.get_buffer(f"{ours}_{i}")
            target.copy_(_take(left, f"{_numbered('hyper_linear', i)}/{theirs}", target.shape))
    _check_empty(left, network)


def _check_empty(left: Mapping[str, Tensor], network: nn.Module) -> None:
    if left:
        raise InputError(f"`params` must fit {type(network).__name__}, but it has no place for {', '.join(left)}.")


def _numbered(layer: str, i: int) -> str:
    return f"{layer}_{i}" if i else layer


def _take(arrays: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Remove and return the array whose name ends in ``name``."""
    for full in arrays:
        if f"/{full}".replace("/~/", "/").endswith(f"/{name}"):
            if arrays[full].shape != shape:
                raise InputError(
                    f"{full!r} must have shape {list(shape)}, but its shape is {list(arrays[full].shape)}."
                )
            return arrays.pop(full)
    raise InputError(f"`params` must hold {name!r}, but it holds {', '.join(arrays) or 'nothing else'}.")


def _haiku_order(names: Sequence[str]) -> list[int]:
    """The indices of this package's leaves in Haiku's order: by layer name (``linear_10`` before ``linear_2``), and the bias first."""
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    keys = [(f"linear_{paths.index(path)}", leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
    return sorted(range(len(names)), key=keys.__getitem__)  # "bias" is before "weight", as "b" is before "w"


def _positions(names: Sequence[str], shapes: Sequence[torch.Size]) -> Tensor:
    """The position of each of this package's flattened weights in Haiku's flat vector [P], whose matrices are [in, out]."""
    places: dict[int, Tensor] = {}
    start = 0
    for i in _haiku_order(names):
        if len(shapes[i]) > 2:
            raise InputError(
                f"Only weights of linear layers can be loaded, but {names[i]!r} has shape {list(shapes[i])}."
            )
        numbers = torch.arange(start, start + shapes[i].numel())
        places[i] = numbers.reshape(shapes[i][::-1]).mT.flatten() if len(shapes[i]) == 2 else numbers
        start += len(numbers)
    return torch.cat([places[i] for i in range(len(names))])
