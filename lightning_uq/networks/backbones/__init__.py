"""Image networks of the DDU experiments for inputs of about 32x32, small networks for quick comparisons, and access to both by name.

The backbones of DeepMind's ENN, which load its parameters, are in :mod:`lightning_uq.compat.haiku`. The backbones here are
DDU's. ``modified`` selects its changes to activations and shortcuts, and
:func:`~lightning_uq.networks.spectral_norm.spectral_normalize` bounds their layers. DDU's experiments leave the last layer
unbounded: ``fc`` of the ResNets, ``linear`` of ``WideResNet``, ``classifier`` of ``VGG16``, ``last`` of ``FCResNet``.
The features of a backbone are the input of its last linear layer.
"""

from lightning_uq.networks.backbones.cnn import CNN
from lightning_uq.networks.backbones.fc_resnet import FCResNet
from lightning_uq.networks.backbones.lenet import LeNet
from lightning_uq.networks.backbones.resnet import ResNet, resnet18, resnet50, resnet110
from lightning_uq.networks.backbones.unet import UNet
from lightning_uq.networks.backbones.vgg import VGG16
from lightning_uq.networks.backbones.wide_resnet import WideResNet

__all__ = [
    "CNN",
    "VGG16",
    "FCResNet",
    "LeNet",
    "ResNet",
    "UNet",
    "WideResNet",
    "resnet18",
    "resnet50",
    "resnet110",
]
