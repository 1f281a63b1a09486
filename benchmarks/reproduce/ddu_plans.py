"""The networks of ``ddu.py`` and how long they are trained, in full and on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from small_resnet import narrow_resnet18, narrow_vgg16
from torch import nn

from lightning_uq.networks.backbones import VGG16, LeNet, resnet18
from lightning_uq.networks.spectral_norm import spectral_normalize


@dataclass(frozen=True)
class Plan:
    """A network and its training.

    Attributes:
        build: Makes the network.
        epochs: Number of epochs.
        samples: Training and validation samples, or None for all.
        about: What the table says of it.
    """

    build: Callable[[], nn.Module]
    epochs: int
    samples: int | None
    about: str


def with_spectral_norm(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with bounded layers but the last."""
    return spectral_normalize(build(), coefficient=3.0, exclude=["fc"])


FULL = {
    "lenet": Plan(LeNet, 100, None, "LeNet"),
    "vgg16": Plan(partial(VGG16, in_channels=1, input_size=28), 100, None, "VGG-16"),
    "resnet18_sn": Plan(
        partial(with_spectral_norm, partial(resnet18, in_channels=1)), 100, None, "ResNet-18, spectral norm"
    ),
}
CPU = {
    "lenet": Plan(LeNet, 6, None, "LeNet"),
    "vgg16": Plan(narrow_vgg16, 4, 12000, "VGG-16 with an eighth of its channels"),
    "resnet18_sn": Plan(
        partial(with_spectral_norm, narrow_resnet18),
        4,
        12000,
        "ResNet-18 with an eighth of its channels, spectral norm",
    ),
}
