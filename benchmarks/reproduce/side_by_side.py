"""Many small networks trained at once: those of all splits of a data set, and of all learning rates.

All splits of a set have as many training rows, so a batch can hold rows of every split, [B, P, D] for P networks. To a module of this package
they are one network whose P targets are the splits' own. No weight and no row belongs to two of them, so each gets the gradient that it
would get alone, divided by P. Adam is indifferent to such a factor if its epsilon is divided too.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """Rows of P splits, as many of each.

    Attributes:
        x: Inputs [N, P, D] in float64.
        y: Targets [N, P] in float64.
    """

    x: Tensor
    y: Tensor

    def of(self, split: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, D] and targets [N, 1] of one split in float32."""
        return self.x[:, split].float(), self.y[:, split].unsqueeze(1).float()

    def take(self, splits: Sequence[int]) -> "Rows":
        """The rows of some splits, which may repeat."""
        return Rows(self.x[:, splits], self.y[:, splits])

    def standardized(self, like: "Rows") -> "Rows":
        """The rows with inputs in units of other rows of the same split; an input that is constant there is only shifted."""
        spread = like.x.std(0, correction=0)
        return Rows((self.x - like.x.mean(0)) / torch.where(spread > 0, spread, 1.0), self.y)

    def scales(self) -> tuple[list[float], list[float]]:
        """Means and standard deviations of the splits' targets."""
        return self.y.mean(0).tolist(), self.y.std(0, correction=0).tolist()


class SideBySideLinear(nn.Module):
    """P linear layers as one: x [P, B, in] to [P, B, out]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().mT for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach().unsqueeze(0) for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """The output of each layer on its own rows."""
        return torch.baddbmm(self.bias, x, self.weight)

    @torch.no_grad()
    def copy_to(self, layer: nn.Linear, i: int) -> None:
        """Give a plain layer the values of layer ``i``."""
        layer.weight.copy_(self.weight[i].mT)
        layer.bias.copy_(self.bias[i, 0])


class SideBySide(nn.Module):
    """P networks of one architecture, each with its own inputs: x [B, P, D] to outputs [B, k P], in k blocks of P numbers.

    Networks of one learning rate share their tensors, so neighbours should have the same rate.

    Args:
        networks: Sequences of linear and element-wise layers; their weights are copied.
        rates: The learning rate of each, for :meth:`optimizer`.

    Example:
        >>> networks = [nn.Sequential(nn.Linear(3, 2)) for _ in range(5)]
        >>> SideBySide(networks, [0.1, 0.1, 0.1, 0.01, 0.01])(torch.zeros(4, 5, 3)).shape
        torch.Size([4, 10])
    """

    def __init__(self, networks: Sequence[nn.Sequential], rates: Sequence[float]) -> None:
        super().__init__()
        self.rates, self.sizes = [], []
        self.groups = nn.ModuleList()
        for rate, pairs in groupby(zip(rates, networks, strict=True), key=lambda pair: pair[0]):
            own = [network for _, network in pairs]
            self.rates.append(rate)
            self.sizes.append(len(own))
            layers = [
                SideBySideLinear(same) if isinstance(same[0], nn.Linear) else same[0] for same in zip(*own, strict=True)
            ]
            self.groups.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all networks."""
        parts = x.transpose(0, 1).split(self.sizes)
        outputs = [group(part) for group, part in zip(self.groups, parts, strict=True)]
        return torch.cat(outputs).permute(1, 2, 0).flatten(1)

    def unstacked(self, new: Callable[[], nn.Sequential]) -> list[nn.Sequential]:
        """The networks as plain ones in eval mode; ``new`` builds one, whose values are replaced."""
        networks = []
        for group, size in zip(self.groups, self.sizes, strict=True):
            for i in range(size):
                networks.append(new().eval())
                for own, layer in zip(group, networks[-1], strict=True):
                    if isinstance(own, SideBySideLinear):
                        own.copy_to(layer, i)
        return networks

    def optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Adam with the networks' own rates, on the parameters of any number of such networks, as a module passes them."""
        flat = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
        size = sum(1 for _ in self.groups[0].parameters())
        chunks = [flat[start : start + size] for start in range(0, len(flat), size)]
        groups = [{"params": chunk, "lr": self.rates[i % len(self.rates)]} for i, chunk in enumerate(chunks)]
        return torch.optim.Adam(groups, eps=1e-8 / sum(self.sizes), fused=True)
