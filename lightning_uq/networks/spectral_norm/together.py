"""Hooks on a network that find the steps of all its layers at once when a training forward starts."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_uq.networks.spectral_norm.power_iteration import PowerIteration
from lightning_uq.networks.spectral_norm.steps import find_steps


def join(network: nn.Module) -> None:
    """Add the hooks."""
    together = _JointSteps()
    network.register_forward_pre_hook(together.start)
    network.register_forward_hook(together.end, always_call=True)


def part(network: nn.Module) -> None:
    """Remove the hooks from ``network`` and everything in it."""
    for module in network.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _JointSteps)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class _JointSteps:
    """Offers each layer its next step, which changes nothing until the layer runs.

    The layer takes the offer once, and only for the weight of the offer. Otherwise it computes its own step: at its
    first forward and at a new size, when it runs again, or outside the network's forward. The result is the same.
    """

    def __init__(self) -> None:
        self._offered: list[PowerIteration] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies of the network have their own offers

    def start(self, network: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        if torch.compiler.is_compiling():
            return  # the compiler fuses the steps of the layers
        groups: dict[Any, tuple[list[PowerIteration], list[nn.Parameter]]] = {}
        for module in network.modules():
            if isinstance(module, ParametrizationList) and isinstance(norm := module[0], PowerIteration):
                weight = module.original
                if type(weight) is nn.Parameter and norm.can_join(weight):
                    alike = (weight.device, norm.v.dtype, norm.coefficient, norm.eps, norm.n_power_iterations)
                    norms, weights = groups.setdefault(alike, ([], []))
                    norms.append(norm)
                    weights.append(weight)
        for norms, weights in groups.values():
            for norm, step in zip(norms, find_steps(norms, weights), strict=True):
                norm.ready = step
            self._offered += norms

    def end(self, network: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: drop the steps of layers that did not run, and skip these layers until they run."""
        for norm in self._offered:
            if norm.ready is not None:
                norm.ready, norm.joins = None, False
        self._offered.clear()
