"""Additive priors on epistemic networks: frozen functions g(x, z) that share the network's index."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.ensemble import build_ensemble
from lightning_uq.networks.initializers import truncated_normal_, variance_scaling_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.priors.frozen import freeze_as_buffers
from lightning_uq.networks.priors.members import add_prior
from lightning_uq.networks.wrapped import WrappedNetwork, check_vectors, read_both


class EpistemicNetworkWithPrior(WrappedNetwork):
    """f(x, z) + scale * g(x, z): an epistemic network plus a frozen random function of the same index.

    Args:
        network: The trained part.
        prior: g, called with x [B, ...] and the index: an :class:`~lightning_uq.networks.AdditivePrior`, a
            :class:`ChoicePrior`, a :class:`RandomIndexMLP`, or another epistemic network. Its parameters become buffers, in
            place, and it stays in eval mode.
        scale: Factor of the prior.
        moves: ``"output"``: g has the network's shape [Z, B, ...]. ``"mean"``: for outputs [Z, B, 2 D], means and raw
            variances, g [Z, B, D] only shifts the means.

    Raises:
        InputError: The shapes do not match, or an argument is invalid.

    Source: Osband et al., arXiv 1806.03335 and arXiv 2107.08924; ``EnnWithAdditivePrior`` of google-deepmind/enn.

    Example:
        >>> from lightning_uq.networks import EnsembleNetwork
        >>> ensemble = EnsembleNetwork([nn.Linear(4, 3) for _ in range(5)])
        >>> network = EpistemicNetworkWithPrior(ensemble, ChoicePrior([nn.Linear(4, 3) for _ in range(5)]))
        >>> network(torch.zeros(6, 4), network.evaluation_index(100)).shape
        torch.Size([5, 6, 3])
    """

    def __init__(
        self,
        network: EpistemicNetwork,
        prior: nn.Module,
        *,
        scale: float = 1.0,
        moves: Literal["output", "mean"] = "output",
    ) -> None:
        super().__init__(network, prior)
        if moves not in ("output", "mean"):
            raise InputError(f"`moves` must be 'output' or 'mean', but it is {moves!r}.")
        if not 0 <= scale < math.inf:
            raise InputError(f"`scale` must be a number of at least 0, but it is {scale}.")
        self.scale = scale
        self.moves = moves

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the network with its prior."""
        return add_prior(self.network(x, index), self._prior(x, index), self.scale)

    def learned_and_prior(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, ...]: the trained part and the scaled priors."""
        learned, prior = self.network.learned_and_prior(x, index)
        return learned, add_prior(prior, self._prior(x, index), self.scale)

    def _prior(self, x: Tensor, index: Tensor) -> Tensor:
        assert self.prior is not None
        prior: Tensor = self.prior(x, index)
        return F.pad(prior, (0, prior.shape[-1])) if self.moves == "mean" else prior


class ChoicePrior(nn.Module):
    """A frozen random function g_z(x), selected by the index, a member's number.

    Args:
        functions: The K functions, each x [B, ...] to [B, C]. Functions of the same architecture run as one.

    Raises:
        InputError: There is no function.

    Source: ``combine_functions_choice_via_index`` of google-deepmind/enn.

    Example:
        >>> prior = ChoicePrior([nn.Linear(2, 3) for _ in range(4)])
        >>> prior(torch.zeros(5, 2), torch.tensor([0, 3])).shape, list(prior.parameters())
        (torch.Size([2, 5, 3]), [])
    """

    def __init__(self, functions: Iterable[nn.Module]) -> None:
        super().__init__()
        members = [freeze_as_buffers(function) for function in functions]
        if not members:
            raise InputError("`functions` must hold at least one module, but it is empty.")
        self.functions = build_ensemble(members)
        self.train(False)

    def train(self, mode: bool = True) -> "ChoicePrior":
        """Do nothing: the functions are not trained and stay in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of x [B, ...] from the functions selected by ``index`` [Z]."""
        output: Tensor = self.functions(x, index)
        return output


class RandomIndexMLP(nn.Module):
    """A frozen random function of input and index: an MLP over [x, z] with larger weights than a network's initial ones.

    Args:
        in_features: Size of the flattened input.
        num_outputs: C.
        index_dim: Dimension of z.
        hidden_sizes: Widths of the hidden layers.
        weight_scale: Weights have variance ``weight_scale`` / fan_in. The original calls this number a standard deviation,
            but uses it in the same way.
        bias_std: Standard deviation of the biases, before the truncation at twice that.
        seed: Seed of the weights; None uses the global generator.

    Raises:
        InputError: A size is below 1, or a scale is negative.

    Source: ``get_random_mlp_with_index`` of google-deepmind/enn.

    Example:
        >>> prior = RandomIndexMLP(4, 1, index_dim=3, seed=0)
        >>> prior(torch.zeros(6, 4), torch.randn(7, 3)).shape, list(prior.parameters())
        (torch.Size([7, 6, 1]), [])
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int = 1,
        *,
        index_dim: int = 8,
        hidden_sizes: Sequence[int] = (10, 10),
        weight_scale: float = 3.0,
        bias_std: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("index_dim", index_dim, 1)
        if not 0 <= bias_std < math.inf:
            raise InputError(f"`bias_std` must be a number of at least 0, but it is {bias_std}.")
        self.index_dim = index_dim
        self.mlp = MLP(in_features + index_dim, num_outputs, hidden_sizes=hidden_sizes)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                variance_scaling_(layer.weight, weight_scale, generator=generator)
                truncated_normal_(layer.bias, bias_std, generator)
        freeze_as_buffers(self)

    def train(self, mode: bool = True) -> "RandomIndexMLP":
        """Do nothing: the function is not trained."""
        return super().train(False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of x [B, ...] for the rows of ``index`` [Z, index_dim]."""
        check_vectors(index, self.index_dim)
        first, *others = self.mlp
        weight: Tensor = first.weight  # type: ignore[assignment]  # it is linear
        h = read_both(first, x.flatten(1).unsqueeze(0).to(weight.dtype), index.to(weight))
        for layer in others:
            h = layer(h)
        return h
