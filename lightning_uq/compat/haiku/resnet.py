"""The residual networks under the epinets of DeepMind's ENN. Their last layer starts at zero."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.compat.haiku.batch_norm import DebiasedBatchNorm2d
from lightning_uq.errors import InputError
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.priors.convolutions import SameConv2d, pad_same

_V1_BLOCKS = {18: 2, 32: 5, 44: 7, 56: 9, 110: 18}
_V2_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}

torch.fx.wrap("pad_same")  # also for calls from this file


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> SameConv2d:
    return SameConv2d(in_channels, out_channels, kernel_size, stride=stride, bias=False)


def _linear_from_zero(network: nn.Module, in_features: int, num_classes: int) -> nn.Linear:
    """Draw the weights of ``network`` as in Haiku, and return its last layer with zero weights."""
    truncated_normal_init_(network)
    layer = nn.Linear(in_features, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ENNBlockV1(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights, which at stride 2 takes every second pixel and pads channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv0 = _convolution(in_channels, out_channels, 3, stride)
        self.bn0 = DebiasedBatchNorm2d(out_channels)
        self.conv1 = _convolution(out_channels, out_channels, 3)
        self.bn1 = DebiasedBatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = (out_channels - in_channels) // 2  # on each side

    def forward(self, x: Tensor) -> Tensor:
        """[B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        branch = self.bn1(self.conv1(F.relu(self.bn0(self.conv0(x)))))
        shortcut = F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added_channels, self.added_channels)
        )
        return F.relu(branch + shortcut)

    def haiku_layers(self) -> dict[tuple[str, ...], nn.Module]:
        """The layers by their Haiku names below the block's own name."""
        return {("conv0",): self.conv0, ("batchnorm_0",): self.bn0, ("conv1",): self.conv1, ("batchnorm_1",): self.bn1}


class ENNBlockV2(nn.Module):
    """A bottleneck with normalization and ReLU before each convolution. The first one of a group projects its shortcut."""

    conv_shortcut: nn.Module | None

    def __init__(self, in_channels: int, out_channels: int, stride: int, projects: bool) -> None:
        super().__init__()
        width = out_channels // 4
        self.bn0 = DebiasedBatchNorm2d(in_channels)
        self.conv0 = _convolution(in_channels, width, 1)
        self.bn1 = DebiasedBatchNorm2d(width)
        self.conv1 = _convolution(width, width, 3, stride)
        self.bn2 = DebiasedBatchNorm2d(width)
        self.conv2 = _convolution(width, out_channels, 1)
        self.conv_shortcut = _convolution(in_channels, out_channels, 1, stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        normal = F.relu(self.bn0(x))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(normal)
        branch = self.conv1(F.relu(self.bn1(self.conv0(normal))))
        branch = self.conv2(F.relu(self.bn2(branch)))
        out: Tensor = branch + shortcut
        return out

    def haiku_layers(self) -> dict[tuple[str, ...], nn.Module]:
        """The layers by their names below the block's own name, in ENN and in ``hk.nets``."""
        layers: dict[tuple[str, ...], nn.Module] = {}
        convolutions, norms = (self.conv0, self.conv1, self.conv2), (self.bn0, self.bn1, self.bn2)
        for i, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
            layers |= {(f"batchnorm_{i}",): norm, (f"conv{i}", f"conv_{i}"): convolution}
        if self.conv_shortcut is not None:
            layers["conv_shortcut", "shortcut_conv"] = self.conv_shortcut
        return layers


class ENNResNetV1(nn.Module):
    """ResNet of ENN for small images: three groups of 16, 32 and 64 channels, and a last layer that starts at zero.

    This is the thin residual network of He et al. for CIFAR-10, with their shortcut without weights. It differs from
    :func:`~lightning_uq.networks.backbones.resnet110`. The 64-dimensional features are the mean over pixels.
    :func:`~lightning_uq.compat.haiku.load_haiku` loads ENN's parameters and state.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.
        depth: 18, 32, 44, 56 or 110, with n = 2, 5, 7, 9 or 18 blocks per group. It has 6 n + 2 layers, except for "18", ENN's name for n = 2.

    Raises:
        InputError: The depth is not one of these.

    Source: ``enn.networks.resnet.lib`` (google-deepmind/enn at da8ec76); He et al., CVPR 2016 (arXiv 1512.03385), section
    4.2.

    Example:
        >>> import torch
        >>> network = ENNResNetV1(depth=32)
        >>> network(torch.randn(2, 3, 32, 32)).any(), sum(p.numel() for p in network.parameters())
        (tensor(False), 464154)
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, depth: int = 18) -> None:
        super().__init__()
        _check_depth(depth, list(_V1_BLOCKS))
        self.initial_conv = _convolution(in_channels, 16, 3)
        self.initial_bn = DebiasedBatchNorm2d(16)
        blocks, width = [], 16
        for channels in (16, 32, 64):
            for _ in range(_V1_BLOCKS[depth]):
                blocks.append(ENNBlockV1(width, channels, stride=channels // width))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.final_fc = _linear_from_zero(self, width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, H, W]."""
        x = self.blocks(F.relu(self.initial_bn(self.initial_conv(x))))
        logits: Tensor = self.final_fc(x.mean((2, 3)))
        return logits

    def haiku_layers(self) -> dict[tuple[str, ...], nn.Module]:
        """The layers by their Haiku names below the network's own name."""
        layers: dict[tuple[str, ...], nn.Module] = {
            ("initial_conv",): self.initial_conv,
            ("initial_batchnorm",): self.initial_bn,
        }
        for i, block in enumerate(self.blocks):
            name = f"res_block_v1_{i}" if i else "res_block_v1"
            layers |= {(f"{name}/{layer}",): module for (layer,), module in block.haiku_layers().items()}  # type: ignore[operator]
        return {**layers, ("final_fc",): self.final_fc}


class ENNResNetV2(nn.Module):
    """ResNet of ENN for large images, as in Haiku: bottlenecks with normalization first, and a last layer that starts at zero.

    It has a 7x7 convolution and 3x3 max-pooling, both with stride 2 and TensorFlow's SAME (whose padding differs from
    torchvision's), four groups of 256, 512, 1024 and 2048 channels, and the mean over pixels as features.
    :func:`~lightning_uq.compat.haiku.load_haiku` loads the parameters and the state of ENN's network, and those of
    ``hk.nets.ResNet50`` (101, 152, 200) with ``resnet_v2=True``.

    Args:
        num_classes: Classes C.
        in_channels: Channels of the input.
        depth: 50, 101, 152 or 200.

    Raises:
        InputError: The depth is not one of these.

    Source: ``enn.networks.resnet.lib`` (google-deepmind/enn at da8ec76) and ``haiku.nets.ResNet``; He et al., "Identity
    mappings in deep residual networks", ECCV 2016 (arXiv 1603.05027).

    Example:
        >>> network = ENNResNetV2(num_classes=10)
        >>> network.final_fc.in_features, network.final_fc.weight.any()
        (2048, tensor(False))
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, depth: int = 50) -> None:
        super().__init__()
        _check_depth(depth, list(_V2_BLOCKS))
        self.blocks_per_group = _V2_BLOCKS[depth]
        self.initial_conv = _convolution(in_channels, 64, 7, stride=2)
        blocks, width = [], 64
        for group, number in enumerate(self.blocks_per_group):
            channels = 256 * 2**group
            for i in range(number):
                blocks.append(ENNBlockV2(width, channels, stride=1 if i or not group else 2, projects=not i))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.final_bn = DebiasedBatchNorm2d(width)
        self.final_fc = _linear_from_zero(self, width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, in_channels, H, W]."""
        x = F.max_pool2d(pad_same(self.initial_conv(x), (3, 3), (2, 2), value=-float("inf")), 3, 2)
        x = F.relu(self.final_bn(self.blocks(x)))
        logits: Tensor = self.final_fc(x.mean((2, 3)))
        return logits

    def haiku_layers(self) -> dict[tuple[str, ...], nn.Module]:
        """The layers by their names below the network's own name, in ENN and in ``hk.nets``."""
        layers: dict[tuple[str, ...], nn.Module] = {("initial_conv",): self.initial_conv}
        places = [(group, i) for group, number in enumerate(self.blocks_per_group) for i in range(number)]
        for number, (block, (group, i)) in enumerate(zip(self.blocks, places, strict=True)):
            enn = f"res_block_v2_{number}" if number else "res_block_v2"
            for names, module in block.haiku_layers().items():  # type: ignore[operator]
                layers[f"{enn}/{names[0]}", f"block_group_{group}/block_{i}/{names[-1]}"] = module
        return {**layers, ("final_batchnorm",): self.final_bn, ("final_fc", "logits"): self.final_fc}


def _check_depth(depth: int, known: list[int]) -> None:
    if depth not in known:
        raise InputError(f"`depth` must be one of {known}, but it is {depth}.")
