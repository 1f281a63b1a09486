"""Backbones by name: this package's, timm's, and those of a user's own factory."""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from lightning_uq.errors import InputError, MissingExtraError
from lightning_uq.networks.backbones.cnn import CNN
from lightning_uq.networks.backbones.fc_resnet import FCResNet
from lightning_uq.networks.backbones.lenet import LeNet
from lightning_uq.networks.backbones.resnet import resnet18, resnet50, resnet110
from lightning_uq.networks.backbones.unet import UNet
from lightning_uq.networks.backbones.users_factory import build_users_network, check_output, import_users_factory
from lightning_uq.networks.backbones.vgg import VGG16
from lightning_uq.networks.backbones.wide_resnet import WideResNet
from lightning_uq.networks.mlp import MLP

Shape = Sequence[int]


@dataclass(frozen=True)
class Backbone:
    """One of this package's networks.

    Attributes:
        make: Builds the network from the number of outputs, the shape of an input, and the dropout rate.
        inputs: The accepted inputs.
        has_dropout: Whether the network has dropout layers.
    """

    make: Callable[[int, Shape, float], nn.Module]
    inputs: Literal["any", "flat", "image", "square image"]
    has_dropout: bool = False


def _mlp(num: int, shape: Shape, dropout: float) -> nn.Module:
    network = MLP(math.prod(shape), num, hidden_sizes=(128, 128), dropout=dropout)
    return network if len(shape) == 1 else nn.Sequential(nn.Flatten(), *network)


BACKBONES: dict[str, Backbone] = {
    "mlp": Backbone(_mlp, "any", has_dropout=True),
    "fc_resnet": Backbone(
        lambda num, shape, dropout: FCResNet(shape[0], num_classes=num, dropout=dropout), "flat", has_dropout=True
    ),
    "cnn": Backbone(
        lambda num, shape, dropout: CNN(num, in_channels=shape[0], dropout=dropout), "image", has_dropout=True
    ),
    "lenet": Backbone(lambda num, shape, _: LeNet(num, in_channels=shape[0], input_size=shape[1]), "square image"),
    "resnet18": Backbone(lambda num, shape, _: resnet18(num, in_channels=shape[0]), "image"),
    "resnet50": Backbone(lambda num, shape, _: resnet50(num, in_channels=shape[0]), "image"),
    "resnet110": Backbone(lambda num, shape, _: resnet110(num, in_channels=shape[0]), "image"),
    "wide_resnet": Backbone(
        lambda num, shape, dropout: WideResNet(num, in_channels=shape[0], dropout=dropout), "image", has_dropout=True
    ),
    "vgg16": Backbone(lambda num, shape, _: VGG16(num, in_channels=shape[0], input_size=shape[1]), "square image"),
    "unet": Backbone(
        lambda num, shape, dropout: UNet(num, in_channels=shape[0], dropout=dropout), "image", has_dropout=True
    ),
}
"""This package's networks by name. ``unet`` returns one output per position of a map, and the others return one per input."""


def backbone(name: str, input_shape: Shape) -> Callable[..., nn.Module]:
    """A factory of networks, ``make(num_outputs, dropout=0.0)``, that can be pickled and stored in a checkpoint.

    ``functools.partial(make, num_outputs=10)`` is a factory without arguments, for instance for an ensemble.

    Args:
        name: A name in :data:`BACKBONES`; ``"timm:NAME"``; or ``"package.module:factory"``, a function or class of your own. It is
            called with those arguments that it takes among ``num_outputs``, ``num_classes``, ``out_features``, ``input_shape``,
            ``in_features``, ``in_channels`` and ``dropout``. Its output is checked on an input of zeros.
        input_shape: Shape of one input, without the batch axis.

    Raises:
        InputError: The backbone does not exist, or does not accept such inputs. When the factory is called: the network has another number of
            outputs, or no dropout layers although ``dropout`` is above 0.
        MissingExtraError: timm is not installed.

    Example:
        >>> make = backbone("mlp", (4,))
        >>> make(3, dropout=0.1)
        MLP(
          (0): Linear(in_features=4, out_features=128, bias=True)
          (1): ReLU()
          (2): Dropout(p=0.1, inplace=False)
          (3): Linear(in_features=128, out_features=128, bias=True)
          (4): ReLU()
          (5): Dropout(p=0.1, inplace=False)
          (6): Linear(in_features=128, out_features=3, bias=True)
        )
    """
    shape = [int(size) for size in input_shape]
    if name.startswith("timm:"):
        _check_inputs(name, "image", shape)
        _check_timm(name)
    elif ":" in name:
        import_users_factory(name)
    elif name in BACKBONES:
        _check_inputs(name, BACKBONES[name].inputs, shape)
    else:
        close = get_close_matches(name, BACKBONES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"`network` must be one of {', '.join(BACKBONES)}, or timm:NAME, or package.module:factory, but it is {name!r}.{hint}"
        )
    return functools.partial(build_backbone, name=name, input_shape=shape)


def build_backbone(num_outputs: int, *, name: str, input_shape: Shape, dropout: float = 0.0) -> nn.Module:
    """Build one network; see :func:`backbone`, whose factories call this function."""
    if name.startswith("timm:"):
        return _timm(num_outputs, name, input_shape, dropout)
    if ":" in name:
        return build_users_network(num_outputs, name, input_shape, dropout)
    found = BACKBONES[name]
    if dropout and not found.has_dropout:
        able = ", ".join(other for other, one in BACKBONES.items() if one.has_dropout)
        raise InputError(
            f"`network` {name} has no dropout layers, so `dropout` must be 0, but it is {dropout}. Networks with dropout layers are {able}."
        )
    return found.make(num_outputs, input_shape, dropout)


def default_backbone(task: str, input_shape: Shape) -> str:
    """The name of the backbone for a task and its inputs: ``mlp``, ``cnn`` for images, ``unet`` for maps.

    Args:
        task: Name of the task.
        input_shape: Shape of one input, without the batch axis.

    Raises:
        InputError: The task is a segmentation, but the inputs are not images.

    Example:
        >>> default_backbone("regression", (8,)), default_backbone("segmentation", (3, 32, 32))
        ('mlp', 'unet')
    """
    if task in ("segmentation", "pixel_regression"):
        _check_inputs("unet", "image", input_shape)
        return "unet"
    return "cnn" if len(input_shape) == 3 else "mlp"


def _check_inputs(name: str, inputs: str, shape: Shape) -> None:
    fits = {
        "any": True,
        "flat": len(shape) == 1,
        "image": len(shape) == 3,
        "square image": len(shape) == 3 and shape[1] == shape[2],
    }[inputs]
    if not fits:
        wanted = {"flat": "[d]", "image": "[C, H, W]", "square image": "[C, H, H]"}[inputs]
        raise InputError(f"`network` {name} needs inputs {wanted}, but the data have inputs {list(shape)}.")


def _import_timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingExtraError(f"`network` {name} needs timm: pip install timm.") from error


def _check_timm(name: str) -> None:
    timm = _import_timm(name)
    model = name.removeprefix("timm:")
    if not timm.is_model(model):
        close = get_close_matches(model, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"`network` must name a model of timm {timm.__version__}, but it has no {model!r}.{hint}")


def _timm(num_outputs: int, name: str, shape: Shape, dropout: float) -> nn.Module:
    rate = {"drop_rate": dropout} if dropout else {}
    model = name.removeprefix("timm:")
    network: nn.Module = _import_timm(name).create_model(model, num_classes=num_outputs, in_chans=shape[0], **rate)
    check_output(network, name, num_outputs, shape)
    return network
