"""Hypermodels: a function of the index gives the weights of a network."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.chunks import in_chunks
from lightning_uq.networks.generated.weights import call_with_weights, check_generable, sets_at_once
from lightning_uq.networks.indexers import Indexer, ScaledGaussianIndexer
from lightning_uq.networks.initializers import CUT_STD, truncated_normal_init_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.output import Output
from lightning_uq.networks.priors.frozen import adopt_prior
from lightning_uq.networks.priors.scale import SPREAD_DRAWS, PriorScale

Initialization = Literal["network", "enn"]

_GENERATED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class HypermodelNetwork(EpistemicNetwork):
    """f(x, z) = network(x; weights(z)) + prior(x, z), where weights(z) is linear in z or in an MLP of z.

    The weights and biases of the network's linear layers and convolutions are generated if they require a gradient. Other
    parameters (of a LayerNorm, for instance) are trained as usual and shared by all indices. All indices run in one batched
    call; in evaluation, as many at once as suit the device. A BatchNorm layer raises, since its running statistics
    would mix those of all indices.

    Generating P weights takes (D + 1) P parameters, where D is the size of the index or of the torso's last layer.

    Args:
        network: The network whose weights are generated, in place. It cannot be used alone afterwards.
        indexer: The source of the vectors z; by default a :class:`ScaledGaussianIndexer` of dimension 8.
        hidden_sizes: Widths of the torso's layers, an MLP over z with ReLU between layers. Without layers, the hypermodel is
            linear.
        scale: Whether generated weights (not biases) are divided by sqrt(fan_in), so that the learned numbers are of order one.
        initialization: ``"network"``: weights(z) starts around the network's own initial weights, with their spread, layer by
            layer. ``"enn"``: it starts around small random weights, drawn as in ENN.
        prior: A prior g(x, z) to [Z, B, C], frozen: :class:`PriorIndependentLayers`, another :class:`HypermodelNetwork`, or
            any of :mod:`lightning_uq.networks.priors`.
        prior_scale: Scale of the prior.
        calibrate_prior: Whether that scale is a spread over z in units of the output, measured on the first training batch.
            Otherwise it is a factor, as in the original.
        output: What ``network`` returns.

    Raises:
        InputError: The network has no layer whose weights can be generated, or the indexer does not draw vectors.
        UnsupportedError: The network has a BatchNorm layer with running statistics, or one parameter under two names.

    Source: Dwaracherla et al., "Hypermodels for Exploration", ICLR 2020 (arXiv 2006.07464); ``enn.networks.hypermodels``.

    Example:
        >>> network = HypermodelNetwork(MLP(4, 3, hidden_sizes=(16,)))
        >>> network(torch.zeros(5, 4), network.sample_index(7)).shape
        torch.Size([7, 5, 3])
        >>> [(name, tuple(p.shape)) for name, p in network.named_parameters()]
        [('generator.weight', (131, 8)), ('generator.bias', (131,))]
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        indexer: Indexer | None = None,
        hidden_sizes: Sequence[int] = (),
        scale: bool = True,
        initialization: Initialization = "network",
        prior: nn.Module | None = None,
        prior_scale: float = 1.0,
        calibrate_prior: bool = True,
        output: Output = "logits",
    ) -> None:
        super().__init__(ScaledGaussianIndexer(8) if indexer is None else indexer, output)
        if initialization not in ("network", "enn"):
            raise InputError(f"`initialization` must be 'network' or 'enn', but it is {initialization!r}.")
        if not 0 <= prior_scale < math.inf:
            raise InputError(f"`prior_scale` must be at least 0 and finite, but it is {prior_scale}.")
        check_generable(network, "HypermodelNetwork")
        # Drawn here rather than on use, because a compiled graph holds it as a constant.
        self._calibration_index = self.indexer(SPREAD_DRAWS, torch.Generator().manual_seed(0))
        if self._calibration_index.ndim != 2 or not self._calibration_index.is_floating_point():
            raise InputError(f"`indexer` must draw vectors [Z, D], but it is {self.indexer!r}.")
        self.index_dim = self._calibration_index.shape[1]
        self.network = network
        initial = _take_weights(network)
        self.names = list(initial)
        self.shapes = [value.shape for value in initial.values()]
        self._factors = [1 / math.sqrt(_fan_in(value)) if scale else 1.0 for value in initial.values()]
        like = next(iter(initial.values()))
        sizes = [self.index_dim, *hidden_sizes]
        self.torso: nn.Module = nn.Identity()
        if hidden_sizes:
            self.torso = truncated_normal_init_(MLP(sizes[0], sizes[-1], hidden_sizes=sizes[1:-1]))
        self.generator = nn.Linear(sizes[-1], self.num_weights)
        self._initialize(list(initial.values()), initialization)
        self.torso.to(like.device, like.dtype)
        self.generator.to(like.device, like.dtype)
        self.prior = adopt_prior(prior)
        self.prior_scale = PriorScale(prior_scale)
        self.calibrate_prior = calibrate_prior

    @property
    def num_weights(self) -> int:
        """P, the number of generated weights per index."""
        return sum(shape.numel() for shape in self.shapes)

    def weights(self, index: Tensor) -> dict[str, Tensor]:
        """The weights [Z, *shape] by their names in the network, as the network is called with them."""
        if index.ndim != 2 or index.shape[1] != self.index_dim or not index.is_floating_point():
            raise InputError(
                f"`index` must be vectors [Z, {self.index_dim}], but it is {index.dtype} of shape {list(index.shape)}."
            )
        flat: Tensor = self.generator(self.torso(index.to(self.generator.weight)))
        parts = torch.split(flat, [shape.numel() for shape in self.shapes], dim=1)
        return {
            name: part.reshape(-1, *shape) * factor if factor != 1 else part.reshape(-1, *shape)
            for name, part, shape, factor in zip(self.names, parts, self.shapes, self._factors, strict=True)
        }

    def forward(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] for the rows of ``index`` [Z, index_dim]."""
        if self.training and self.calibrate_prior and self.prior is not None and not self.prior_scale.measured:
            with torch.no_grad(), torch.autocast(self.generator.weight.device.type, enabled=False):
                self.prior_scale.measure(self.prior(x, self._calibration_index.to(self.generator.weight)))
        if self.training or torch.compiler.is_compiling():
            return self._run(x, index)
        at_once = sets_at_once(self.num_weights, x, self.generator.weight.device)
        return in_chunks(lambda part: self._run(x, part), index, at_once)

    def learned_and_prior(self, x: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, ...]: the trained part and the scaled prior."""
        learned = call_with_weights(self.network, self.read_output, self.weights(index), x)
        if self.prior is None:
            return learned, torch.zeros_like(learned)
        prior: Tensor = self.prior_scale(self.prior(x, index.to(self.generator.weight)))
        if prior.shape != learned.shape:
            raise InputError(
                f"The prior's output must have the network's shape {list(learned.shape)}, but its shape is {list(prior.shape)}."
            )
        return learned, prior

    def frozen_parts(self) -> list[nn.Module]:
        """The prior."""
        return [] if self.prior is None else [self.prior]

    def _run(self, x: Any, index: Tensor) -> Tensor:
        learned, prior = self.learned_and_prior(x, index)
        return learned if self.prior is None else learned + prior.to(learned.dtype)

    @torch.no_grad()
    def _initialize(self, initial: list[Tensor], initialization: Initialization) -> None:
        weights = torch.split(self.generator.weight, [value.numel() for value in initial])
        biases = torch.split(self.generator.bias, [value.numel() for value in initial])
        length = self.torso(self._calibration_index).square().sum(1).mean().sqrt()
        for weight, bias, value, factor in zip(weights, biases, initial, self._factors, strict=True):
            if initialization == "network":
                start = value.flatten().float() / factor
                nn.init.normal_(weight).mul_(start.square().mean().sqrt() / length)
                bias.copy_(start)
            else:  # Haiku's VarianceScaling(1, "fan_avg", "truncated_normal"), also for the bias, whose fans are its length
                for part, fan in ((weight, (weight.shape[0] + weight.shape[1]) / 2), (bias, weight.shape[0])):
                    std = fan**-0.5 / CUT_STD
                    nn.init.trunc_normal_(part, 0.0, std, -2 * std, 2 * std)


def _take_weights(network: nn.Module) -> dict[str, Tensor]:
    """Remove the weights that will be generated and return them by name; an empty buffer replaces each."""
    if len(list(network.named_parameters())) != len(list(network.named_parameters(remove_duplicate=False))):
        raise UnsupportedError("HypermodelNetwork does not support one parameter under two names.")
    taken: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if isinstance(module, _GENERATED):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad and parameter.is_floating_point():
                    del module._parameters[name]
                    module.register_buffer(name, parameter.new_empty(0).detach(), persistent=False)
                    taken[f"{path}.{name}" if path else name] = parameter.detach()
    if not taken:
        raise InputError(
            f"`network` must have linear layers or convolutions that require a gradient, but "
            f"{type(network).__name__} has none."
        )
    return taken


def _fan_in(value: Tensor) -> int:
    """The number of inputs of one output; 1 for a bias."""
    return value[0].numel() if value.ndim > 1 else 1
