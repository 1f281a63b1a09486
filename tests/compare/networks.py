"""A network of a user's own."""

from torch import nn


def make(num_outputs, dropout=0.0):
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, num_outputs))
