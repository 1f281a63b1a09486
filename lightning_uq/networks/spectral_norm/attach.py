"""Attaches a bound to a layer, and preserves it in copies, pickles and state dicts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_uq.networks.spectral_norm.bound import Bound
from lightning_uq.networks.spectral_norm.convolution import ConvolutionNorm
from lightning_uq.networks.spectral_norm.power_iteration import PowerIteration


def attach(layer: Any, bound: Bound) -> None:
    """Bound ``layer.weight``. The layer's class changes to one with a computed ``weight``."""
    parametrize.register_parametrization(layer, "weight", bound, unsafe=True)
    _make_copyable(layer)
    if isinstance(bound, ConvolutionNorm):
        bound.handles.append(layer.register_forward_pre_hook(_learn_size, with_kwargs=True))
    bound.handles.append(layer.register_load_state_dict_pre_hook(_translate_keys))


def detach(layer: nn.Module) -> None:
    """Replace the computed weight by the bounded one, and restore the layer's class."""
    bound = bound_of(layer)
    assert bound is not None
    bound.eval()  # so that reading the weight does not take a step of the power iteration
    for handle in bound.handles:
        handle.remove()
    parametrize.remove_parametrizations(layer, "weight")


def bound_of(layer: nn.Module) -> Bound | None:
    """The bound on ``layer``'s weight, or None."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    found = [item for item in _on_weight(layer) if isinstance(item, Bound)]
    return found[0] if found else None


def _on_weight(layer: nn.Module) -> Iterator[nn.Module]:
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    on_weight = lists["weight"]
    assert isinstance(on_weight, parametrize.ParametrizationList)
    return iter(on_weight)


def _learn_size(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a convolution."""
    bound = bound_of(layer)
    assert isinstance(bound, ConvolutionNorm)
    x: Tensor = args[0] if args else kwargs["input"]
    bound.learn_size(x.shape[1 - bound.v.ndim :])


def _translate_keys(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """State pre-hook: rename the keys of the original code, or of an unbounded layer, to this layer's."""
    bound = bound_of(layer)
    assert bound is not None
    target = f"{prefix}parametrizations.weight."
    own = f"{target}{list(_on_weight(layer)).index(bound)}."
    if isinstance(bound, PowerIteration) and f"{prefix}weight_orig" in state_dict:
        state_dict[f"{target}original"] = state_dict.pop(f"{prefix}weight_orig")
        state_dict.pop(f"{prefix}weight", None)
        u, v, sigma = (state_dict.pop(f"{prefix}weight_{key}", None) for key in ("u", "v", "sigma"))
        if u is None or v is None or sigma is None:
            missing_keys.extend(
                f"{prefix}weight_{key}" for key, x in (("u", u), ("v", v), ("sigma", sigma)) if x is None
            )
            return
        try:
            u, v = bound.read_original(u, v)
        except RuntimeError as error:
            error_msgs.append(f"`{prefix}weight_u` and `{prefix}weight_v` do not belong to a square input: {error}")
            return
        state_dict.update({f"{own}u": u, f"{own}v": v, f"{own}sigma": sigma.reshape(())})
    elif f"{prefix}weight" in state_dict and f"{target}original" not in state_dict:
        state_dict[f"{target}original"] = state_dict.pop(f"{prefix}weight")
        state_dict.update({f"{own}{name}": value for name, value in bound.cold_state().items()})


def _make_copyable(layer: nn.Module) -> None:
    """Tell pickle how to rebuild the parametrized class, which torch refuses to pickle.

    Torch's own deep copies share that class, and with it the computed weight, so removing it from a copy breaks the original.
    """
    made: Any = type(layer)
    made.__reduce_ex__ = _reduce
    if "__deepcopy__" in vars(made):
        del made.__deepcopy__  # copies use __reduce_ex__


def _reduce(layer: nn.Module, protocol: Any) -> tuple[Any, ...]:
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return _rebuild, (parametrize.type_before_parametrizations(layer), list(lists)), layer.__dict__


def _rebuild(base: type[nn.Module], names: list[str]) -> nn.Module:
    """An empty module of the parametrized class, to be filled by unpickling."""
    layer = base.__new__(base)
    nn.Module.__init__(layer)
    for name in names:
        layer.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
    _make_copyable(layer)
    return layer
