"""Epinets: a small head that reads a network's features and an index, beside the network's own output.

``network.py`` joins base, head and priors; ``head.py`` has the head and its settings, made of the MLP in ``projected_mlp.py``
and of the standardisation of features in ``feature_scaler.py``. Import the names from :mod:`lightning_uq.networks`.
"""
