"""One network with many sets of weights, one set per index."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.chunks import indices_at_once
from lightning_uq.networks.ensemble.mapped_call import call_mapped
from lightning_uq.networks.labels import label
from lightning_uq.networks.output import OutputReader

# Weights generated at once in evaluation, in float32: 256 MB, or 1 MB on a CPU. More than its cache holds take it up to six times as long.
_MAX_WEIGHTS, _MAX_WEIGHTS_CPU = 1 << 26, 1 << 18


def check_generable(network: nn.Module, name: str) -> None:
    """Check that a network's weights exist, and that it has no running statistics of its activations.

    Raises:
        InputError: A lazy module is not initialized.
        UnsupportedError: The network has a BatchNorm layer with running statistics.
    """
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise InputError(f"`network` must be initialized, but {type(network).__name__} is lazy.")
    for path, module in network.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise UnsupportedError(
                f"{name} does not support {label(path, module)}: every index has its own weights and activations, and one "
                "running mean would mix them. Use LayerNorm, GroupNorm or RMSNorm, or `track_running_stats=False`."
            )


def call_with_weights(network: nn.Module, reader: OutputReader, weights: Mapping[str, Tensor], x: Any) -> Tensor:
    """Outputs [Z, B, ...] of ``network`` with each of the Z rows of ``weights`` [Z, ...] in place of its own weights.

    All indices run in one batched call (``torch.vmap``). The part before the first of these weights runs once.

    Raises:
        UnsupportedError: ``torch.vmap`` cannot map an operation of the network.
    """
    try:
        return call_mapped(network, reader, weights, x, None)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{type(network).__name__} cannot run with the weights of many indices at once, by torch.vmap: {error.__cause__}"
        ) from error


def sets_at_once(num_weights: int, x: Any, device: torch.device) -> int:
    """The number of indices, each with a set of weights on ``device``, per pass over the batch ``x`` in evaluation."""
    return indices_at_once(x, num_weights, _MAX_WEIGHTS_CPU if device.type == "cpu" else _MAX_WEIGHTS)
