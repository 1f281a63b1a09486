"""The base class of networks around another one, and two helpers for index inputs."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.priors.frozen import adopt_prior


class WrappedNetwork(EpistemicNetwork):
    """An epistemic network around another one, with its indices, and optionally a frozen prior.

    Args:
        network: The network f(x, z).
        prior: A function whose parameters become buffers, in place. It stays in eval mode.

    Raises:
        InputError: ``network`` is not an :class:`EpistemicNetwork`.
    """

    def __init__(self, network: EpistemicNetwork, prior: nn.Module | None = None) -> None:
        if not isinstance(network, EpistemicNetwork):
            raise InputError(
                f"`network` must be an EpistemicNetwork, but it is a {type(network).__name__}. Wrap a plain network in a "
                "DeterministicNetwork."
            )
        super().__init__(network.indexer, network.read_output)
        self.network = network
        self.prior = adopt_prior(prior)

    def frozen_parts(self) -> list[nn.Module]:
        """The prior, and the frozen parts of the inner network."""
        return [*([] if self.prior is None else [self.prior]), *self.network.frozen_parts()]

    def feature_networks(self) -> list[nn.Module]:
        """The feature networks of the inner network."""
        return self.network.feature_networks()

    @property
    def feature_source(self) -> EpistemicNetwork:
        """The feature source of the inner network."""
        return self.network.feature_source

    @property
    def shows_features(self) -> bool:
        """Whether the inner network shows its features."""
        return self.network.shows_features


def check_vectors(index: Tensor, index_dim: int) -> None:
    """Raise an :class:`InputError` if ``index`` is not [Z, index_dim]."""
    if index.ndim != 2 or index.shape[1] != index_dim:
        raise InputError(f"`index` must be [Z, {index_dim}], but its shape is {list(index.shape)}.")


def read_both(layer: nn.Module, h: Tensor, index: Tensor) -> Tensor:
    """A linear layer of [h, z], [Z, B, F]. The product with an h [1, B, H] that all indices share is computed once."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    size = h.shape[-1]
    by_index = F.linear(index, weight[:, size:]).unsqueeze(1)
    return F.linear(h, weight[:, :size], layer.bias) + by_index  # type: ignore[arg-type]
