"""Networks from a user's own function or class, called with the sizes that it takes."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.importing import import_object

OUTPUT_NAMES = ("num_outputs", "num_classes", "out_features")
DROPOUT_NAMES = ("dropout", "drop_rate", "dropout_rate")


def import_users_factory(name: str) -> Callable[..., Any]:
    """The function or class of ``package.module:factory``.

    Raises:
        InputError: There is no callable object at this path.
    """
    found: Callable[..., Any] = import_object(name, "network")
    return found


def build_users_network(num_outputs: int, name: str, input_shape: Sequence[int], dropout: float) -> nn.Module:
    """Call the factory with the sizes that it takes, and check its network on an input of zeros.

    Args:
        num_outputs: Number of outputs, passed under the first of :data:`OUTPUT_NAMES` that the factory takes.
        name: ``package.module:factory``.
        input_shape: Shape of one input.
        dropout: Dropout rate, passed under the first of :data:`DROPOUT_NAMES` that the factory takes.

    Raises:
        InputError: The factory needs other arguments or does not return a network; the network has another number of outputs, or no
            dropout layers although ``dropout`` is above 0.
    """
    factory = import_users_factory(name)
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except ValueError:  # without a signature, since it is written in C
        parameters = {}
    # Factories of torchvision pass `num_classes` on as a keyword argument.
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    outputs = [one for one in OUTPUT_NAMES if one in parameters] or ["num_classes"] * takes_any
    rates = [one for one in DROPOUT_NAMES if one in parameters]
    sizes = {
        "input_shape": tuple(input_shape),
        "in_features": math.prod(input_shape),
        "in_channels": input_shape[0],
    }
    arguments: dict[str, Any] = {key: value for key, value in sizes.items() if key in parameters}
    arguments |= dict.fromkeys(outputs[:1], num_outputs) | dict.fromkeys(rates[:1] if dropout else (), dropout)
    needed = [
        one.name
        for one in parameters.values()
        if one.default is one.empty
        and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        and one.name not in arguments
    ]
    if needed:
        raise InputError(
            f"`network` {name} is called with the arguments that it takes among {', '.join((*OUTPUT_NAMES, *sizes, 'dropout'))}, but it also needs "
            f"{', '.join(needed)}. Give these arguments default values."
        )
    network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise InputError(f"`network` {name} must return a torch.nn.Module, but it returned a {type(network).__name__}.")
    has_layers = any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in network.modules())
    if dropout and not rates and not has_layers:
        raise InputError(
            f"`network` {name} has no dropout layers and takes no `dropout`, so `dropout` must be 0, but it is {dropout}."
        )
    check_output(network, name, num_outputs, input_shape)
    return network


def check_output(network: nn.Module, name: str, num_outputs: int, input_shape: Sequence[int]) -> None:
    """Run the network on one input of zeros, in eval mode, and check the number of its outputs.

    Raises:
        InputError: The network fails on such an input, or returns something else.
    """
    modes = {layer: layer.training for layer in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            found = network(torch.zeros(1, *input_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f"`network` {name} fails on one input of zeros {[1, *input_shape]}: {error}") from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode
    outputs = getattr(found, "logits", found)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"`network` {name} must return a tensor [B, {num_outputs}], but it returned a {type(outputs).__name__}."
        )
    if outputs.shape[1:2] != (num_outputs,) and not (num_outputs == 1 and outputs.shape == (1,)):
        raise InputError(
            f"`network` {name} must have {num_outputs} outputs, but for one input of zeros {[1, *input_shape]} it returned shape "
            f"{list(outputs.shape)}. Give it an argument `num_outputs`, `num_classes` or `out_features`."
        )
