"""Frozen random functions, which training cannot change, and networks that add them to their output.

``frozen.py`` turns parameters into buffers, ``scale.py`` measures a prior's spread over the index, and ``members.py`` adds a prior to
one member. The functions g(x, z) of an input and an index are in ``additive.py``, ``convolutions.py``,
``random_features.py``, ``independent_layers.py`` and ``index_priors.py``, which also adds them to any epistemic network.
Import the names from :mod:`lightning_uq.networks`.
"""
