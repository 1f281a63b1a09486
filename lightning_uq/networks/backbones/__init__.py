"""Image networks of the DDU experiments, for inputs of about 32x32, and a residual network for feature vectors.

The backbones named ``ENN...`` are those of DeepMind's ENN, whose parameters they load. The others are DDU's: ``modified``
selects its changes to activations and shortcuts, and
:func:`~lightning_uq.networks.spectral_norm.spectral_normalize` bounds their layers. Its experiments leave the last layer
unbounded: ``fc`` of the ResNets, ``linear`` of ``WideResNet``, ``classifier`` of ``VGG16``, ``last`` of ``FCResNet``.
The features of a backbone are the input of its last linear layer.
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
