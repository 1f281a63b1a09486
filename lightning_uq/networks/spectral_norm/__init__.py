"""Spectral normalization: a bound on how far each linear layer and convolution of any network can stretch its input.

- ``normalize.py``: :func:`spectral_normalize` and :func:`remove_spectral_norm`.
- ``bound.py``, ``power_iteration.py``, ``matrix.py``, ``convolution.py``, ``batchnorm.py``: the bounds, one operator per file.
- ``steps.py``, ``together.py``: what a training forward computes, in few operations for all layers of the network.
- ``attach.py``: how a bound is attached to a layer, and read from copies, pickles and state dicts.
- ``tensors.py``: vectors of length one, one or many, padding, and what a cached weight depends on.
"""

from lightning_uq.networks.spectral_norm.normalize import remove_spectral_norm, spectral_normalize

__all__ = ["remove_spectral_norm", "spectral_normalize"]
