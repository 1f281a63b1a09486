"""Image networks of the DDU experiments, for inputs of about 32x32, and a residual network for plain features.

Those of DeepMind's ENN, which load its parameters, are named ``ENN...`` and take no other arguments than sizes. Each of the
others takes ``spectral_normalization``, ``coeff`` and ``n_power_iterations`` (see
:func:`~lightning_uq.networks.spectral_norm.spectral_normalize`; the last layer is left alone) and, where it has a
meaning, ``modified``. The features are the input of the last linear layer.
"""

from lightning_uq.networks.backbones.enn_lenet import ENNLeNet
from lightning_uq.networks.backbones.enn_resnet import ENNResNetV1, ENNResNetV2
from lightning_uq.networks.backbones.enn_vgg import ENNVGG
from lightning_uq.networks.backbones.fc_resnet import FCResNet
from lightning_uq.networks.backbones.lenet import LeNet
from lightning_uq.networks.backbones.resnet import ResNet, resnet18, resnet50, resnet110
from lightning_uq.networks.backbones.vgg import VGG16
from lightning_uq.networks.backbones.wide_resnet import WideResNet

__all__ = [
    "ENNVGG",
    "VGG16",
    "ENNLeNet",
    "ENNResNetV1",
    "ENNResNetV2",
    "FCResNet",
    "LeNet",
    "ResNet",
    "WideResNet",
    "resnet18",
    "resnet50",
    "resnet110",
]
