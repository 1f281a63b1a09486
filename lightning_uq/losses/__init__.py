"""Losses: Gaussian likelihood."""

from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian

__all__ = ["gaussian_nll_loss", "split_gaussian"]
