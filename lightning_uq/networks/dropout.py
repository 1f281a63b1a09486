"""MC-dropout as an epistemic network: the index is a seed, and the masks are a function of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.validation import describe
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.calling import call_network
from lightning_uq.networks.indexers import SeedIndexer
from lightning_uq.networks.output import Output

Mask = Literal["shared", "per_example"]

_MASK = 0xFFFFFFFF
_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Of one pass in evaluation: a processor is fastest where a layer's activations stay in its cache, and images are large.
_MAX_ROWS, _MAX_ROWS_CPU, _MAX_NUMBERS = 1 << 16, 1 << 13, 1 << 22


class DropoutNetwork(EpistemicNetwork):
    """f(x, z) of any network with dropout layers: the index z is a seed, from which every mask follows.

    The same index gives the same masks, in training and in evaluation, on any device. All indices run in one batched call.
    Kept entries are divided by the probability of keeping, as usual.

    Args:
        network: A network with ``nn.Dropout`` layers (or ``Dropout1d`` to ``3d``), which this network then drives, in place.
            Dropout by a function call inside a forward, as in an attention layer, is off in evaluation.
        mask: ``"shared"``: one mask per index for the whole batch, so that an index is one function of x, as joint predictions
            need. ``"per_example"``: one mask per index and row of the batch, as is usual in MC-dropout.
        output: What ``network`` returns.

    Raises:
        InputError: The network has no dropout layer.
        UnsupportedError: It has an alpha dropout layer.

    Source: Gal & Ghahramani, ICML 2016 (arXiv 1506.02142); one mask per index: ``enn.networks.dropout``.

    Example:
        >>> network = DropoutNetwork(nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)))
        >>> output = network(torch.ones(5, 2), torch.tensor([1, 2, 1]))
        >>> output.shape, torch.equal(output[0], output[2]), torch.equal(output[0], output[1])
        (torch.Size([3, 5, 3]), True, False)
    """

    def __init__(self, network: nn.Module, *, mask: Mask = "shared", output: Output = "logits") -> None:
        super().__init__(SeedIndexer(), output)
        if mask not in ("shared", "per_example"):
            raise InputError(f"`mask` must be 'shared' or 'per_example', but it is {mask!r}.")
        layers = [module for module in network.modules() if isinstance(module, _DropoutNd)]
        for layer in layers:
            if isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout):
                raise UnsupportedError(f"DropoutNetwork does not support {type(layer).__name__}: use nn.Dropout.")
        if not any(layer.p > 0 for layer in layers):
            raise InputError(
                f"`network` must have `nn.Dropout` layers, but {type(network).__name__} has none with p > 0. "
                "Dropout that is a function call cannot be seen from outside."
            )
        self.network = network
        self.mask = mask
        self._active: _Pass | None = None
        for layer in layers:
            layer.register_forward_hook(_Mask(self))

    def forward(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] under the seeds ``index`` [Z]."""
        if index.ndim != 1 or index.is_floating_point():
            raise InputError(f"`index` must be seeds, integers [Z], but it is {describe(index)}.")
        if isinstance(x, Mapping):
            x = dict(x)  # of a class of its own, as a tokenizer gives, it is no nest to torch
        if self.training or torch.compiler.is_compiling():
            return self._run(x, index)
        return torch.cat([self._run(x, part) for part in torch.split(index, _indices_at_once(x))])

    def feature_networks(self) -> list[nn.Module]:
        """The network, whose features are those without masks."""
        return [self.network]

    @property
    def shows_features(self) -> bool:
        """False: the features under masks depend on the index."""
        return False

    def mask_of(self, index: Tensor, layer: int, shape: Sequence[int], rate: float) -> Tensor:
        """Which entries a dropout layer keeps: True with probability 1 - ``rate``, [Z, *shape].

        Args:
            index: Seeds [Z].
            layer: The layer's number, in the order in which layers are called.
            shape: Shape of one index's mask.
            rate: Probability of dropping.
        """
        # Not a `torch.Size`, which would make the batch's size a constant of an exported graph.
        entries = torch.arange(math.prod(shape), device=index.device).reshape(*shape)
        keys = _hash(_hash(index) ^ (layer + 1)).reshape(-1, *[1] * len(shape))
        return _hash(_hash(entries) ^ keys) >= round(rate * 2**32)

    def _run(self, x: Any, index: Tensor) -> Tensor:
        repeated = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.repeat(len(index), *[1] * (t.ndim - 1)), x)
        self._active = _Pass(index)
        switched = [m for m in self.network.modules() if isinstance(m, _DropoutNd) and m.training]
        try:
            for module in switched:  # its own mask would be drawn for nothing
                module.training = False
            output = self.read_output(call_network(self.network, repeated))
        finally:
            self._active = None
            for module in switched:
                module.training = True
        return output.reshape(len(index), -1, *output.shape[1:])

    def _masked(self, layer: _DropoutNd, x: Tensor) -> Tensor:
        assert self._active is not None
        index, number = self._active.index.to(x.device), self._active.next_layer()
        if layer.p == 0:
            return x
        shape = list(x.shape)
        shape[0] = shape[0] // len(index) if self.mask == "per_example" else 1
        if isinstance(layer, _CHANNELWISE):
            shape[2:] = [1] * (x.ndim - 2)
        kept = self.mask_of(index, number, shape, layer.p)
        scale = 0.0 if layer.p == 1 else 1 / (1 - layer.p)
        masked = x.reshape(len(index), -1, *x.shape[1:]) * (kept * scale).to(x.dtype)
        return masked.reshape(x.shape)


class _Pass:
    """One pass through the network: its seeds, and how many dropout layers were called."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.called = 0

    def next_layer(self) -> int:
        self.called += 1
        return self.called - 1


class _Mask:
    """A hook that is copied with the network it hangs on."""

    def __init__(self, network: DropoutNetwork) -> None:
        self.network = network

    def __call__(self, module: _DropoutNd, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.network._active is None else self.network._masked(module, output)


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an integer, as int64 (Wellons' ``lowbias32``)."""
    x = (x ^ (x >> 32)) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _indices_at_once(x: Any) -> int:
    """How many indices one pass over the batch ``x`` takes."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves:
        return 1
    rows, numbers = max(1, len(leaves[0])), max(1, sum(leaf.numel() for leaf in leaves))
    most = _MAX_ROWS_CPU if leaves[0].device.type == "cpu" else _MAX_ROWS
    return max(1, min(most // rows, _MAX_NUMBERS // numbers))
