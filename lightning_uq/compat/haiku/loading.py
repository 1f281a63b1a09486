"""Loads weights of DeepMind's ENN, named as in Haiku, into this package's networks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import singledispatch
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lightning_uq.compat.haiku.generated import load_bayes_by_backprop, load_hypermodel, load_independent_layers
from lightning_uq.errors import InputError
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.epinet.head import Epinet
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.networks.generated.bayes_by_backprop import BayesByBackpropNetwork
from lightning_uq.networks.generated.hypermodel import HypermodelNetwork
from lightning_uq.networks.priors.additive import AdditivePrior
from lightning_uq.networks.priors.independent_layers import PriorIndependentLayers
from lightning_uq.networks.priors.index_priors import ChoicePrior
from lightning_uq.networks.priors.members import trained_part
from lightning_uq.networks.wrapped import WrappedNetwork

Arrays = Mapping[str, Tensor]

_EPINET, _PRIOR = "train_epinet", "prior_epinet"


def read_haiku(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file by name. A file that needs unpickling raises.

    ENN publishes its checkpoints as pickles, which run code when they are read. Convert such a file in a safe environment with
    ``numpy.savez(path, **{f"{module}/{name}": array})``.

    Raises:
        InputError: The file cannot be read, holds Python objects, or is not an ``.npz`` file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not an .npz file of plain arrays: {error}") from error


@runtime_checkable
class HaikuNamed(Protocol):
    """A network that knows Haiku's names of its layers."""

    def haiku_layers(self) -> Mapping[tuple[str, ...], nn.Module]:
        """Layers by their names below the network's own, without Haiku's ``~``. A layer has one name per version of the code."""


def load_haiku(network: nn.Module, params: Mapping[str, Any], *, member_axis: int = 0) -> nn.Module:
    """Load ENN's Haiku parameters into a network of this package, in place.

    Names are ``module/path/w`` and ``module/path/b``. Layers are matched in order: Haiku numbers them (``linear``,
    ``linear_1``, ...) in the order of calls, and this package registers them in that order. Linear weights [in, out] are transposed, and
    convolutions [H, W, in, out] become [out, in, H, W].

    - :class:`EpinetNetwork`: ``train_epinet`` and ``prior_epinet`` go to the head, all other arrays to the base.
    - :class:`Epinet`: ``train_epinet`` and ``prior_epinet``; the latter is ignored if the epinet has no prior.
    - :class:`AdditivePrior`, :class:`ChoicePrior`, :class:`EnsembleNetwork`: every array has an axis of members.
    - A network around another one (with a prior, over atoms, centered or scaled): the parameters go to the inner network. ENN keeps
      priors outside the parameters, so load them separately.
    - :class:`HaikuNamed`, the backbones of ENN: each layer by its name, below any prefix. Batch normalization takes its
      averages, and their counter, from Haiku's state.
    - :class:`HypermodelNetwork` or :class:`BayesByBackpropNetwork` of an MLP, and :class:`PriorIndependentLayers`.
    - Any other network: its linear layers and convolutions.

    Args:
        network: The network.
        params: Arrays by name, or a mapping of mappings like Haiku's. With batch normalization, pass parameters and state:
            ``{**params, **state}``.
        member_axis: The axis of members: the first in ENN's ``vmap`` ensembles, the last in its einsum ensembles.

    Returns:
        ``network`` itself.

    Raises:
        InputError: The number of layers or a shape differs, or a name of a :class:`HaikuNamed` network is missing or left
            over.

    Source: google-deepmind/enn at da8ec76.

    Example:
        >>> layer = load_haiku(nn.Linear(2, 3), {"linear": {"w": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "b": [0.0, 0.0, 0.0]}})
        >>> layer.weight.tolist()
        [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """
    _load(network, dict(_flat(params)), member_axis)
    return network


@singledispatch
def _load(network: nn.Module, arrays: Arrays, member_axis: int) -> None:
    _load_layers(network, arrays)


@_load.register
def _load_epinet_network(network: EpinetNetwork, arrays: Arrays, member_axis: int) -> None:
    if network.epinet is None:
        raise InputError("The epinet's head is not built yet. Call `initialize(x)` of the network with a batch first.")
    heads = {name: value for name, value in arrays.items() if name.split("/")[0] in (_EPINET, _PRIOR)}
    _load(network.epinet, heads, member_axis)
    _load(network.base, {name: value for name, value in arrays.items() if name not in heads}, member_axis)


@_load.register
def _load_epinet(network: Epinet, arrays: Arrays, member_axis: int) -> None:
    _load_layers(network.learned, {n: v for n, v in arrays.items() if n.split("/")[0] == _EPINET})
    if network.prior is not None:
        _load_layers(network.prior, {n: v for n, v in arrays.items() if n.split("/")[0] == _PRIOR})


@_load.register
def _load_wrapped(network: WrappedNetwork, arrays: Arrays, member_axis: int) -> None:
    _load(network.network, arrays, member_axis)


@_load.register
def _load_choice(network: ChoicePrior, arrays: Arrays, member_axis: int) -> None:
    _load(network.functions, arrays, member_axis)


@_load.register
def _load_sum(network: AdditivePrior, arrays: Arrays, member_axis: int) -> None:
    _load_members(list(network.functions), arrays, member_axis)


@_load.register
def _load_ensemble(network: EnsembleNetwork, arrays: Arrays, member_axis: int) -> None:
    loop = network.unstacked()
    _load_members([trained_part(member) for member in loop.members], arrays, member_axis)
    if loop is not network:  # after loading copies of its members, so that an error leaves the weights unchanged
        network.load_state_dict(loop.state_dict())


@_load.register
def _load_hypermodel(network: HypermodelNetwork, arrays: Arrays, member_axis: int) -> None:
    load_hypermodel(network, arrays)


@_load.register
def _load_bayes_by_backprop(network: BayesByBackpropNetwork, arrays: Arrays, member_axis: int) -> None:
    load_bayes_by_backprop(network, arrays)


@_load.register
def _load_independent_layers(network: PriorIndependentLayers, arrays: Arrays, member_axis: int) -> None:
    load_independent_layers(network, arrays)


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _load_members(members: Sequence[nn.Module], arrays: Arrays, axis: int) -> None:
    for name, value in arrays.items():
        if value.ndim == 0 or value.shape[axis] != len(members):
            raise InputError(
                f"{name!r} must have {len(members)} members on axis {axis}, but its shape is {list(value.shape)}."
            )
    for i, member in enumerate(members):
        _load_layers(member, {name: value.select(axis, i) for name, value in arrays.items()})


def _load_layers(network: nn.Module, arrays: Mapping[str, Tensor]) -> None:
    if isinstance(network, HaikuNamed):
        _load_named(network, arrays)
        return
    ours = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    theirs: dict[str, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        path, _, leaf = name.rpartition("/")
        theirs.setdefault(path, {})[leaf] = value
    # Convolutions come before linear layers, and each kind is in numerical order.
    order = sorted(theirs, key=lambda path: (-theirs[path]["w"].ndim if "w" in theirs[path] else 0, _number(path)))
    if len(order) != len(ours):
        raise InputError(
            f"`params` must hold {len(ours)} layers for {type(network).__name__}, but it holds {len(order)}"
            f"{': ' if order else ''}{', '.join(order)}."
        )
    for layer, name in zip(ours, order, strict=True):
        _load_leaf(layer, "weight", f"{name}/w", theirs[name].get("w"))
        _load_leaf(layer, "bias", f"{name}/b", theirs[name].get("b"))


def _load_named(network: HaikuNamed, arrays: Mapping[str, Tensor]) -> None:
    kind, layers = type(network).__name__, network.haiku_layers()
    given = {"/".join(part for part in name.split("/") if part != "~"): name for name in arrays}
    root = _root(next(iter(layers)), given, kind)
    expected: dict[str, tuple[nn.Module, str | None]] = {}
    for spellings, layer in layers.items():
        paths = [root + spelling for spelling in spellings]
        path = next((path for path in paths if any(name.startswith(f"{path}/") for name in given)), paths[0])
        expected |= {f"{path}/{leaf}": (layer, ours) for leaf, ours in _leaves(layer).items()}
    missing = [name for name, (_, ours) in expected.items() if ours and name not in given]
    if missing:
        state = "_ema/" in missing[0]
        raise InputError(
            f"`params` must hold {missing[0]!r} for {kind}, but it does not"
            f"{f', nor {len(missing) - 1} more' if len(missing) > 1 else ''}."
            f"{' The averages are in the state of Haiku: pass {**params, **state}.' if state else ''}"
        )
    unused = [theirs for name, theirs in given.items() if name not in expected]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise InputError(f"`params` must hold only the arrays of {kind}, but it also holds {unused[0]!r}{more}.")
    for name, (layer, ours) in expected.items():
        if ours:
            theirs = given[name]
            _load_leaf(layer, ours, theirs, arrays[theirs])


def _root(first: tuple[str, ...], given: Mapping[str, str], kind: str) -> str:
    """The prefix of the layers' names: the names of the network and of its enclosing modules."""
    ends = [f"{name}/w" for name in first]
    roots = [n.removesuffix(end) for n in given for end in ends if n == end or n.endswith(f"/{end}")]
    if len(roots) != 1:
        found = ", ".join(repr(name) for name in list(given.values())[:4])
        raise InputError(
            f"`params` must hold {ends[0]!r}, the first layer of {kind}, once, but it occurs {len(roots)} "
            f"times among {len(given)} arrays{': ' if found else ''}{found}{', ...' if len(given) > 4 else ''}."
        )
    return roots[0]


def _leaves(layer: nn.Module) -> dict[str, str | None]:
    """The names of a layer's arrays in Haiku and here; None for an array that follows from the others."""
    if not isinstance(layer, nn.BatchNorm2d):
        return {"w": "weight"} if layer.bias is None else {"w": "weight", "b": "bias"}
    return {
        **({} if layer.weight is None else {"scale": "weight"}),
        "offset": "bias",
        "mean_ema/average": "running_mean",
        "var_ema/average": "running_var",
        "mean_ema/counter": "num_batches_tracked",
        "var_ema/counter": None,
        "mean_ema/hidden": None,  # the average before its division by 1 - decay^counter
        "var_ema/hidden": None,
    }


def _load_leaf(layer: nn.Module, ours: str, name: str, value: Tensor | None) -> None:
    target: Tensor | None = getattr(layer, ours)
    if value is None or target is None:
        if value is not target:
            holds = "none" if value is None else "one"
            raise InputError(
                f"The {ours} of a {type(layer).__name__} and {name!r} cannot be combined: there is {holds}."
            )
        return
    if isinstance(layer, nn.BatchNorm2d):
        value = value.flatten() if value.shape[:-1] == (1, 1, 1) else value
    elif ours == "weight":
        value = value.permute(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
    if value.shape != target.shape:
        raise InputError(
            f"{name!r} must match the {ours} {list(target.shape)} of a {type(layer).__name__}, but its shape is "
            f"{list(value.shape)} after its axes are moved."
        )
    with torch.no_grad():
        target.copy_(value)


def _number(layer: str) -> tuple[list[tuple[str, int]], str]:
    """A key that sorts Haiku's layers by number: ``linear``, ``linear_1``, ..., ``linear_10``."""
    key = []
    for part in layer.split("/"):
        match = re.fullmatch(r"(.*?)(?:_(\d+))?", part)
        assert match is not None
        key.append((match[1], int(match[2] or 0)))
    return key, layer
