"""Epinets: a small head that takes a network's features and an index, and is added to the network's own output.

``network.py`` joins base, head and priors. ``head.py`` has the head and its settings, built from the MLP in ``projected_mlp.py``
and the standardization of features in ``feature_scaler.py``. Import the names from :mod:`lightning_uq.networks`.
"""
