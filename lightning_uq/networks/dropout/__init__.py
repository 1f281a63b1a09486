"""MC-dropout as an epistemic network: the index is a seed, which determines the masks."""

from lightning_uq.networks.dropout.network import DropoutNetwork, Mask

__all__ = ["DropoutNetwork", "Mask"]
