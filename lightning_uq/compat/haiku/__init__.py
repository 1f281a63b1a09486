"""Networks of DeepMind's ENN in torch, and its Haiku weights for them and for this package's own networks.

Nothing else in the package needs these files. ``loading.py`` reads arrays and loads them into a network, with
``generated.py`` for hypermodels. The networks have Haiku's initial weights, layers and moving averages: ``mlp.py``, ``lenet.py``,
``vgg.py``, ``resnet.py`` and their ``batch_norm.py``.
"""

from lightning_uq.compat.haiku.lenet import ENNLeNet
from lightning_uq.compat.haiku.loading import load_haiku, read_haiku
from lightning_uq.compat.haiku.mlp import haiku_mlp
from lightning_uq.compat.haiku.resnet import ENNResNetV1, ENNResNetV2
from lightning_uq.compat.haiku.vgg import ENNVGG

__all__ = ["ENNVGG", "ENNLeNet", "ENNResNetV1", "ENNResNetV2", "haiku_mlp", "load_haiku", "read_haiku"]
