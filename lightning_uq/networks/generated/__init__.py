"""Networks whose weights are made from the index: hypermodels, and Bayes by backprop.

``weights.py`` runs a network with the weights of many indices at once. Import the names from :mod:`lightning_uq.networks`.
"""
