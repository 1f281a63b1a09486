"""Networks f(x, z): an input, and an index that says which hypothesis is speaking."""

from lightning_uq.networks.base import DeterministicNetwork, EpistemicNetwork
from lightning_uq.networks.ensemble import EnsembleNetwork, build_ensemble
from lightning_uq.networks.factory import Factory

__all__ = ["DeterministicNetwork", "EnsembleNetwork", "EpistemicNetwork", "Factory", "build_ensemble"]
