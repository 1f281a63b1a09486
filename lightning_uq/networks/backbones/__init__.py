"""Image networks of the DDU experiments, for inputs of about 32x32, and a residual network for plain features.

The backbones of DeepMind's ENN, which load its parameters, are in :mod:`lightning_uq.compat.haiku`. Each network takes
``spectral_normalization``, ``coeff`` and ``n_power_iterations`` (see
:func:`~lightning_uq.networks.spectral_norm.spectral_normalize`; the last layer is left alone) and, where it has a
meaning, ``modified``. The features are the input of the last linear layer.
"""

from lightning_uq.networks.backbones.fc_resnet import FCResNet
from lightning_uq.networks.backbones.lenet import LeNet
from lightning_uq.networks.backbones.resnet import ResNet, resnet18, resnet50, resnet110
from lightning_uq.networks.backbones.vgg import VGG16
from lightning_uq.networks.backbones.wide_resnet import WideResNet

__all__ = [
    "VGG16",
    "FCResNet",
    "LeNet",
    "ResNet",
    "WideResNet",
    "resnet18",
    "resnet50",
    "resnet110",
]
