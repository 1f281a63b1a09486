"""Spectral normalization: bounds how far each linear layer and convolution of a network can stretch its input.

- ``normalize.py``: :func:`spectral_normalize` and :func:`remove_spectral_norm`.
- ``bound.py``, ``power_iteration.py``, ``matrix.py``, ``convolution.py``, ``batchnorm.py``: the bounds, one operator per file.
- ``steps.py``, ``together.py``: the computations of a training forward, in few operations for all layers of the network.
- ``attach.py``: attaches a bound to a layer, and reads it from copies, pickles and state dicts.
- ``tensors.py``: unit vectors, padding, and the dependencies of a cached weight.
"""

from lightning_uq.networks.spectral_norm.normalize import remove_spectral_norm, spectral_normalize

__all__ = ["remove_spectral_norm", "spectral_normalize"]
