"""MC-dropout as an epistemic network: the index is a seed, which determines the masks."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.validation import describe
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.chunks import in_chunks, indices_at_once, most_rows, num_rows
from lightning_uq.networks.dropout.masks import keep_mask
from lightning_uq.networks.dropout.passes import DropoutPass
from lightning_uq.networks.dropout.plan import Plan, make_plan
from lightning_uq.networks.indexers import SeedIndexer
from lightning_uq.networks.output import Output

Mask = Literal["shared", "per_example"]

_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_MAX_NUMBERS = 1 << 22  # in the inputs of one pass in evaluation, since images are large


class DropoutNetwork(EpistemicNetwork):
    """f(x, z) for any network with dropout, where the index z is a seed that determines every mask.

    The same index gives the same masks in training and evaluation and on any device. Kept entries are divided by the
    probability of keeping, as usual. The masks apply to

    - ``nn.Dropout`` layers, and ``Dropout1d`` to ``3d``;
    - ``F.dropout`` and its variants, for any value of their argument ``training``;
    - the weights of ``nn.MultiheadAttention`` and of ``F.scaled_dot_product_attention``.

    Function calls whose rate is 0 only in evaluation use their rate in training.

    The network examines its dropouts at the first batch. If all have the batch in axis 0, all indices run in one call. In evaluation, layers before
    the first dropout then run once for all indices, if the network's graph shows that nothing bypasses it. If a dropout has the batch in another axis (time-major recurrent networks and transformers) or no batch (a table of positions), one index runs
    at a time. With shared masks, a row alone gives the same output as in a batch of any size. The dropout inside ``nn.LSTM`` and its
    variants, stochastic depth, and layers that are never called do not depend on the index; a warning names them.

    Args:
        network: A network with dropout, which is modified in place.
        mask: ``"shared"``: one mask per index for the whole batch, so that an index is one function of x, as joint predictions
            require. ``"per_example"``: one mask per index and row of the batch, as is usual in MC-dropout.
        output: What ``network`` returns.

    Raises:
        InputError: The network has no dropout. It is raised at once if the network consists of torch's own layers, and otherwise at the first batch.
        UnsupportedError: The network has an alpha dropout layer, or a dropout that mixes rows and positions in one axis.

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
        if not any(layer.p > 0 for layer in layers) and all(_is_of_torch(module) for module in network.modules()):
            raise InputError(
                f"`network` must have `nn.Dropout` layers, but {type(network).__name__} has none with p > 0."
            )
        self.network = network
        self.mask = mask
        self._plan: Plan | None = None
        self._active: DropoutPass | None = None
        for layer in layers:
            layer.register_forward_pre_hook(_Enter(self))
            layer.register_forward_hook(_Mask(self))

    @property
    def is_shared(self) -> bool:
        """Whether all rows of a batch share one mask."""
        return self.mask == "shared"

    def forward(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] for the seeds ``index`` [Z]."""
        if index.ndim != 1 or index.is_floating_point():
            raise InputError(f"`index` must be seeds, integers [Z], but it is {describe(index)}.")
        if isinstance(x, Mapping):
            x = dict(x)  # torch does not look into special classes of mappings, such as a tokenizer's
        if self._plan is None and not torch.compiler.is_compiling():
            self._plan = make_plan(self, x)
        return self.run_all(x, index, self._plan or Plan())

    def feature_networks(self) -> list[nn.Module]:
        """The network, whose features are computed without masks."""
        return [self.network]

    @property
    def shows_features(self) -> bool:
        """False, since the features under masks depend on the index."""
        return False

    def layers(self) -> list[tuple[str, _DropoutNd]]:
        """The dropout layers by name."""
        return [(name, layer) for name, layer in self.network.named_modules() if isinstance(layer, _DropoutNd)]

    def mask_of(self, index: Tensor, layer: int, shape: Sequence[int], rate: float) -> Tensor:
        """The mask of the ``layer``-th dropout call: see :func:`~lightning_uq.networks.dropout.masks.keep_mask`."""
        return keep_mask(index, layer, shape, rate)

    # ------------------------------------------------------------------ passes

    def run_all(self, x: Any, index: Tensor, plan: Plan, *, rate: float | None = None) -> Tensor:
        """Outputs [Z, B, ...] for all indices, in as few passes as the plan and the memory allow."""
        if plan.one_at_a_time:
            return self._in_passes(x, index, plan, 1, rate)
        if self.training or torch.compiler.is_compiling():
            return self._in_passes(x, index, plan, max(1, len(index)), rate)
        if not (plan.shares_trunk and self.is_shared):
            numbers = sum(leaf.numel() for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
            return self._in_passes(x, index, plan, indices_at_once(x, numbers, _MAX_NUMBERS), rate)
        # All indices for some rows at a time, so that no row passes through the trunk twice.
        most = max(1, min(most_rows(x), _MAX_NUMBERS // plan.row_size))
        size = max(1, most // max(1, len(index)))
        parts = [_rows(x, start, start + size) for start in range(0, num_rows(x), size)]
        return torch.cat([self._in_passes(part, index, plan, most, rate) for part in parts], 1)

    def _in_passes(self, x: Any, index: Tensor, plan: Plan, size: int, rate: float | None) -> Tensor:
        """Outputs [Z, B, ...], ``size`` indices at a time."""
        return in_chunks(lambda part: self.run(x, part, plan, rate=rate)[0], index, size)

    def run(self, x: Any, index: Tensor, plan: Plan, *, rate: float | None = None) -> tuple[Tensor, DropoutPass]:
        """Outputs [Z, B, ...] of one pass, and the record of its dropouts."""
        late = plan.shares_trunk and not self.training
        if not late:
            x = tree_map_only(Tensor, lambda t: t.repeat(len(index), *[1] * (t.ndim - 1)) if t.ndim else t, x)
        active = self._active = DropoutPass(
            index,
            shared=self.is_shared,
            late=late,
            axes=plan.axes,
            function_rates=plan.function_rates,
            rate=rate,
            keep=self.mask_of,
        )
        switched = [m for m in self.network.modules() if isinstance(m, _DropoutNd) and m.training]
        try:
            for module in switched:  # its own mask would be drawn needlessly
                module.training = False
            with active if plan.sees_functions else nullcontext():
                raw = self.read_output.raw(self.network, x)
            output = self.read_output(raw)
        finally:
            self._active = None
            for module in switched:
                module.training = True
        return output.reshape(len(index), -1, *output.shape[1:]), active


class _Enter:
    """A hook before a dropout layer, which marks its inner function call as part of the layer."""

    def __init__(self, network: DropoutNetwork) -> None:
        self.network = network

    def __call__(self, module: _DropoutNd, args: tuple[Any, ...]) -> None:
        if self.network._active is not None:
            self.network._active.in_layer = True


class _Mask:
    """A hook after a dropout layer, which is copied together with its network."""

    def __init__(self, network: DropoutNetwork) -> None:
        self.network = network

    def __call__(self, module: _DropoutNd, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        active = self.network._active
        if active is None:
            return None
        active.in_layer = False
        return active.drop(output, module.p, channelwise=isinstance(module, _CHANNELWISE), layer=module)


def _rows(x: Any, start: int, end: int) -> Any:
    return tree_map_only(Tensor, lambda t: t[start:end] if t.ndim else t, x)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a module's forward is torch's own, which has dropout only in known layers."""
    known = type(module).__module__.startswith("torch.nn.")
    return known and not isinstance(module, nn.MultiheadAttention) and not hasattr(module, "dropout_p")
