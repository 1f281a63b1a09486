"""Initial weights as in Haiku."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError

# Standard deviation of a standard normal truncated at -2 and 2.
CUT_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``weight``, in place, from N(0, std^2) truncated at two standard deviations, which leaves a standard deviation of 0.88 std.

    Example:
        >>> weight = truncated_normal_(torch.empty(100_000), 1.0, torch.Generator().manual_seed(0))
        >>> print(f"{weight.std():.2f} {weight.abs().max():.2f}")
        0.88 2.00
    """
    if std == 0:
        return nn.init.zeros_(weight)
    return nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)


def variance_scaling_(
    weight: Tensor,
    scale: float = 1.0,
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill ``weight`` [out, in, ...], in place, with variance ``scale`` / fan, from a normal truncated at two standard deviations.

    Unlike :func:`truncated_normal_init_`, it corrects for the loss of variance by the truncation.

    Args:
        weight: Weights in torch's layout; the axes after the second count for both fans.
        scale: Variance times fan.
        mode: The fan: that of the inputs, that of the outputs, or their mean.
        generator: Source of randomness.

    Returns:
        ``weight`` itself.

    Raises:
        InputError: ``mode`` is unknown, ``scale`` is negative, or ``weight`` has fewer than two axes.

    Source: ``hk.initializers.VarianceScaling`` of Haiku 0.0.17.

    Example:
        >>> weight = variance_scaling_(torch.empty(2000, 100), mode="fan_avg", generator=torch.Generator().manual_seed(0))
        >>> print(f"{weight.std():.4f} {(1 / 1050) ** 0.5:.4f}")
        0.0309 0.0309
    """
    if weight.ndim < 2:
        raise InputError(f"`weight` must be [out, in, ...], but its shape is {list(weight.shape)}.")
    if not 0 <= scale < math.inf:
        raise InputError(f"`scale` must be a number of at least 0, but it is {scale}.")
    field = weight[0, 0].numel()
    fans = {"fan_in": weight.shape[1] * field, "fan_out": weight.shape[0] * field}
    fans["fan_avg"] = (fans["fan_in"] + fans["fan_out"]) / 2  # type: ignore[assignment]  # a half is a fan here
    if mode not in fans:
        raise InputError(f"`mode` must be one of {list(fans)}, but it is {mode!r}.")
    return truncated_normal_(weight, math.sqrt(scale / fans[mode]) / CUT_STD, generator)


def truncated_normal_init_(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of the linear layers and convolutions of ``module`` as in Haiku, in place.

    Weights are normal with standard deviation 1 / sqrt(fan_in), truncated at twice that (which leaves 0.88 / sqrt(fan_in));
    biases are zero.

    Args:
        module: The module tree.
        generator: Source of randomness.

    Returns:
        ``module`` itself.

    Source: ``hk.Linear`` and ``hk.ConvND`` of Haiku 0.0.17.

    Example:
        >>> layer = truncated_normal_init_(nn.Linear(100, 1000), torch.Generator().manual_seed(0))
        >>> print(f"{layer.weight.std():.3f} {layer.weight.abs().max():.2f} {layer.bias.abs().max():.0f}")
        0.088 0.20 0
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            std = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module
