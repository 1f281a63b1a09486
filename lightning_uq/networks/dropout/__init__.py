"""MC-dropout as an epistemic network: the index is a seed, and the masks are a function of it."""

from lightning_uq.networks.dropout.network import DropoutNetwork, Mask

__all__ = ["DropoutNetwork", "Mask"]
