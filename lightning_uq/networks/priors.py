"""Additive random priors: a frozen random function that training cannot move."""

import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.mlp import MLP


def check_prior(prior: nn.Module | None, argument: str) -> None:
    """Refuse a plain network where a prior g(x, z) of an input and an index is expected.

    Raises:
        InputError: It takes one argument, or is no module.
    """
    if prior is None:
        return
    if not isinstance(prior, nn.Module):
        raise InputError(f"Expected argument `{argument}` to be a module g(x, z), but got {prior!r}.")
    try:
        inspect.signature(prior.forward).bind(None, None)
    except TypeError:
        raise InputError(
            f"Expected argument `{argument}` to be a network g(x, z) of an input and an index, but {type(prior).__name__} does "
            "not take the two. See `lightning_uq.networks.priors`; `AdditivePrior` makes one of plain networks."
        ) from None


def freeze_as_buffers(module: nn.Module) -> nn.Module:
    """Turn every parameter of ``module`` into a buffer of the same name, in place, and set it to eval mode.

    The state dict keeps its names, and the weights move with the module; no optimizer, weight decay, gradient clipping
    or DDP ever sees them.

    Args:
        module: The module tree; a parameter that two names share stays shared.

    Returns:
        ``module`` itself.

    Raises:
        InputError: A lazy module has not seen its first batch.

    Example:
        >>> frozen = freeze_as_buffers(nn.Linear(2, 1))
        >>> list(frozen.parameters()), sorted(frozen.state_dict())
        ([], ['bias', 'weight'])
    """
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError(f"Expected argument `module` to be initialised, but {type(module).__name__} is lazy.")
    buffers: dict[int, Tensor] = {}
    for submodule in module.modules():
        for name, parameter in list(submodule._parameters.items()):
            if parameter is not None:
                del submodule._parameters[name]
                buffer = buffers.setdefault(id(parameter), parameter.detach())
                submodule.register_buffer(name, buffer)
        if isinstance(submodule, nn.RNNBase):
            submodule._apply(lambda t: t, recurse=False)  # type: ignore[no-untyped-call]  # renews its list of weights
    return module.eval()


class NetworkWithPrior(nn.Module):
    """A trained network plus a frozen random one: network(x) + scale * prior(x).

    What the prior gives away from the data the trained part does not unlearn there, so members with independent priors
    disagree where no data spoke. Its weights are buffers and it is always in eval mode; the gradient to ``x`` runs
    through both.

    Args:
        network: The part that is trained.
        prior: The random part, with outputs of the same shape (an output [B, 2 D] of means and raw variances has both
            moved); its parameters are turned into buffers, in place.
        scale: Standard deviation of the prior's part relative to its own initialisation.

    Raises:
        InputError: The two outputs differ in shape.

    Source: Osband et al., "Randomized Prior Functions for Deep Reinforcement Learning", NeurIPS 2018 (arXiv 1806.03335).

    Example:
        >>> network = NetworkWithPrior(nn.Linear(2, 1), nn.Linear(2, 1), scale=3.0)
        >>> [name for name, _ in network.named_parameters()]
        ['network.weight', 'network.bias']
    """

    def __init__(self, network: nn.Module, prior: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = network
        self.prior = freeze_as_buffers(prior)
        self.scale = scale

    def train(self, mode: bool = True) -> "NetworkWithPrior":
        """Set the mode of the trained part; the prior stays in eval mode."""
        super().train(mode)
        self.prior.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, ...] of the network with its prior."""
        return add_prior(self.network(x), self.prior(x), self.scale)


def trained_part(network: nn.Module) -> nn.Module:
    """The trained part of a :class:`NetworkWithPrior`; any other network itself."""
    return network.network if isinstance(network, NetworkWithPrior) else network


def add_prior(output: Tensor, prior: Tensor, scale: float) -> Tensor:
    """output + scale * prior, of one shape."""
    if output.shape != prior.shape:
        raise InputError(
            f"Expected the prior's output to have the network's shape {list(output.shape)}, but got {list(prior.shape)}."
        )
    return output + scale * prior


# A tracer of the networks records the call whole, with its check of shapes.
torch.fx.wrap("add_prior")


def truncated_normal_init_(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the linear layers and convolutions of ``module`` as Haiku does, in place.

    Weights are normal with standard deviation 1 / sqrt(fan_in), cut at two of them (so that 0.88 / sqrt(fan_in) is left);
    biases are zero.

    Args:
        module: The module tree.
        generator: Source of randomness.

    Returns:
        ``module`` itself.

    Source: ``hk.Linear`` and ``hk.ConvND`` of Haiku 0.0.17.

    Example:
        >>> layer = truncated_normal_init_(nn.Linear(100, 1000), torch.Generator().manual_seed(0))
        >>> print(f"{layer.weight.std():.3f} {layer.weight.abs().max():.2f} {layer.bias.abs().max():.0f}")
        0.088 0.20 0
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            std = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


class AdditivePrior(nn.Module):
    """A frozen random function that is linear in the index: sum_k z_k g_k(x).

    Args:
        functions: The K functions g_k, each x [B, ...] to [B, C]; their parameters become buffers, in place.

    Raises:
        InputError: There is no function, or an index has not K entries.

    Source: Osband et al., arXiv 2107.08924, section 3.2 (``combine_functions_linear_in_index`` in their code).

    Example:
        >>> prior = AdditivePrior([nn.Linear(2, 3) for _ in range(4)])
        >>> prior(torch.zeros(5, 2), torch.randn(7, 4)).shape
        torch.Size([7, 5, 3])
    """

    def __init__(self, functions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.functions = nn.ModuleList(freeze_as_buffers(function) for function in functions)
        if not len(self.functions):
            raise InputError("Expected argument `functions` to hold at least one module, but got none.")

    def train(self, mode: bool = True) -> "AdditivePrior":
        """Nothing here is trained: the functions stay in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of x [B, ...] under the rows of ``index`` [Z, K]; each function runs once."""
        if index.ndim != 2 or index.shape[1] != len(self.functions):
            raise InputError(
                f"Expected argument `index` to be [Z, {len(self.functions)}], but got shape {list(index.shape)}."
            )
        outputs = torch.stack([function(x) for function in self.functions])
        return torch.einsum("zk,kbc->zbc", index.to(outputs), outputs)


def pad_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad [..., H, W] as TensorFlow's SAME does: a window then fits ceil(size / stride) times, the odd row stands behind.

    Args:
        x: Images [..., H, W].
        kernel_size: Height and width of the window.
        stride: Its steps.
        value: What is filled in; -inf before max-pooling.

    Example:
        >>> pad_same(torch.ones(1, 4), (1, 3), (1, 2)).tolist()
        [[1.0, 1.0, 1.0, 1.0, 0.0]]
    """
    padding: list[int] = []
    for size, kernel, step in zip(x.shape[:-3:-1], kernel_size[::-1], stride[::-1], strict=True):
        missing = max((-(-size // step) - 1) * step + kernel - size, 0)
        padding += [missing // 2, missing - missing // 2]
    return F.pad(x, padding, value=value)


# The padding follows from the size, which a tracer does not know: it records the call whole.
torch.fx.wrap("pad_same")


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(size / stride) outputs, the odd zero behind.

    Example:
        >>> SameConv2d(3, 4, 5, stride=2)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 4, 16, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', ceil(H / s), ceil(W / s)]."""
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class ConvFunction(nn.Module):
    """A small convolutional network whose convolutions are SAME, and whose features are flattened channels last.

    Images of another size than ``image_size`` are resized to it, bilinearly and with antialiasing.

    Args:
        num_outputs: C.
        channels: Of the convolutions, each followed by a ReLU.
        kernel_sizes: Of each.
        strides: Of each.
        image_size: Height and width that the function sees.
        in_channels: Channels of the images [B, in_channels, H, W].

    Example:
        >>> ConvFunction(10)(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_outputs: int,
        channels: Sequence[int] = (4, 8, 4),
        kernel_sizes: Sequence[int] = (5, 5, 5),
        strides: Sequence[int] = (2, 2, 2),
        image_size: int = 32,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        sizes = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            SameConv2d(a, b, k, stride=s)
            for a, b, k, s in zip(sizes[:-1], channels, kernel_sizes, strides, strict=True)
        )
        for stride in strides:
            image_size = -(-image_size // stride)
        self.linear = nn.Linear(image_size**2 * sizes[-1], num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, C] of images [B, in_channels, H, W]."""
        if x.ndim != 4:
            raise InputError(f"Expected a convolutional prior's input to be [B, C, H, W], but got {list(x.shape)}.")
        size = (self.image_size, self.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        for convolution in self.convolutions:
            x = convolution(x).relu()
        output: Tensor = self.linear(x.permute(0, 2, 3, 1).flatten(1))
        return output


def mlp_prior(
    in_features: int, num_outputs: int, index_dim: int, hidden_sizes: Sequence[int] = (5, 5), seed: int | None = None
) -> AdditivePrior:
    """An :class:`AdditivePrior` of K = ``index_dim`` small MLPs over flattened inputs.

    Args:
        in_features: Input dimension d.
        num_outputs: C.
        index_dim: K.
        hidden_sizes: Widths of each MLP's hidden layers; the testbed's are (5, 5).
        seed: Seed of its weights; the global generator draws them without it.

    Example:
        >>> mlp_prior(10, 2, index_dim=8, seed=0)(torch.zeros(3, 10), torch.randn(5, 8)).shape
        torch.Size([5, 3, 2])
    """
    return _prior(lambda: nn.Sequential(nn.Flatten(), MLP(in_features, num_outputs, hidden_sizes)), index_dim, seed)


def cifar_conv_prior(num_outputs: int, index_dim: int, in_channels: int = 3, seed: int | None = None) -> AdditivePrior:
    """An :class:`AdditivePrior` of K convolutional networks on 32 x 32 images: channels 4, 8, 4, kernels 5, strides 2.

    Example:
        >>> cifar_conv_prior(10, index_dim=2)(torch.zeros(3, 3, 32, 32), torch.randn(5, 2)).shape
        torch.Size([5, 3, 10])
    """
    return _prior(lambda: ConvFunction(num_outputs, in_channels=in_channels), index_dim, seed)


def imagenet_conv_prior(
    num_outputs: int = 1000, index_dim: int = 30, in_channels: int = 3, seed: int | None = None
) -> AdditivePrior:
    """An :class:`AdditivePrior` on 224 x 224 images: channels 4, 8, 8, kernels 10, 10, 3, strides 5, 5, 2.

    Example:
        >>> imagenet_conv_prior(index_dim=2)(torch.zeros(1, 3, 224, 224), torch.randn(5, 2)).shape
        torch.Size([5, 1, 1000])
    """
    channels, kernels, strides = (4, 8, 8), (10, 10, 3), (5, 5, 2)
    return _prior(
        lambda: ConvFunction(num_outputs, channels, kernels, strides, image_size=224, in_channels=in_channels),
        index_dim,
        seed,
    )


def imagenet_mlp_prior(
    num_outputs: int = 1000, index_dim: int = 30, in_channels: int = 3, seed: int | None = None
) -> AdditivePrior:
    """An :class:`AdditivePrior` of MLPs (50, 50) on 224 x 224 images whose 10 x 10 windows, 5 apart, are averaged.

    Example:
        >>> imagenet_mlp_prior(index_dim=2)(torch.zeros(1, 3, 224, 224), torch.randn(5, 2)).shape
        torch.Size([5, 1, 1000])
    """

    def function() -> nn.Module:
        # Flattened channels last, as the original's images are.
        windows = nn.Sequential(nn.AvgPool2d(10, 5), ChannelsLast(), nn.Flatten())
        return nn.Sequential(windows, MLP(43 * 43 * in_channels, num_outputs, (50, 50)))

    return _prior(function, index_dim, seed)


class ChannelsLast(nn.Module):
    """[B, C, H, W] to [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers in another order."""
        return x.permute(0, 2, 3, 1)


def _prior(function: Callable[[], nn.Module], index_dim: int, seed: int | None) -> AdditivePrior:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return AdditivePrior(truncated_normal_init_(function(), generator) for _ in range(index_dim))
