"""A network with an epinet beside it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import describe
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.epinet.head import Epinet, EpinetHead
from lightning_uq.networks.features import OUTPUT, FeatureTap, detached, last_layer, submodule, traced_last_layer
from lightning_uq.networks.indexers import GaussianIndexer
from lightning_uq.networks.output import Output
from lightning_uq.networks.pooling import Pool, check_pool, num_features
from lightning_uq.networks.positions import position_rows, resized
from lightning_uq.networks.priors.frozen import adopt_prior
from lightning_uq.networks.priors.scale import SPREAD_DRAWS, PriorScale


class EpinetNetwork(EpistemicNetwork):
    """f(x, z) = base(x) + epinet(sg[features], z) + priors: an epinet around any network.

    :class:`EpinetHead` has the formula with all scales. The base runs once, and the head runs for all indices in one batched call.
    The features are the inputs of the named layers, detached (sg), so the epinet does not train the base, which learns through its own
    output. If the network's structure does not determine the layer or the size of its features or of the output, the head is
    built on the first batch (:meth:`initialize`), or from the shapes of a loaded state dict.

    In training mode, the first batch also sets the unit of the priors' scales, which is saved with the state.

    Args:
        base: The network, x [B, ...] to outputs [B, C], or, with ``pool="positions"``, to maps [B, C, *P].
        feature_layers: ``"auto"`` (the linear layer or convolution that feeds the output), a layer's name, or several names. The features are
            the concatenated inputs of those layers. ``"<output>"`` is the base's own output.
        pool: How a layer's input with more axes than [B, D], such as tokens [B, T, D], is pooled: ``"mean"``, ``"last_token"``,
                ``"cls"`` or a function ``pool(x, mask)``. A linear layer with such an input needs one: see
                :func:`~lightning_uq.networks.pooling.pool_features`. With ``"positions"``, the same head acts at each position of a map,
                with one index for the whole map. Features on another grid than the output are those of the nearest position.
        num_outputs: C, if the network's structure does not determine it.
        output_axis: The axis of C in the base's output: 1, or -1 for maps [B, *P, C].
        head: Sizes and scales.
        prior: An additive prior g(x, z) to [Z, B, C], for instance an :class:`~lightning_uq.networks.AdditivePrior`. Its
            parameters become buffers, in place.
        freeze_base: Whether the base stays unchanged: in eval mode, without gradients.
        output: What ``base`` returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.

    Raises:
        InputError: A layer or ``pool`` is unknown, a layer's input needs a ``pool``, the base's output is not [B, C], or
            ``prior`` does not take an index.

    Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924). In one place, their code lets the epinet's
    gradients reach the base (``combine_base_epinet_as_enn``), contrary to the paper; here they never do.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> network = EpinetNetwork(base)
        >>> network.layers, network(torch.zeros(5, 4), network.sample_index(7)).shape
        (['2'], torch.Size([7, 5, 3]))
    """

    indexer: GaussianIndexer

    def __init__(
        self,
        base: nn.Module,
        *,
        feature_layers: str | Sequence[str] = "auto",
        pool: Pool | None = None,
        num_outputs: int | None = None,
        output_axis: int = 1,
        head: EpinetHead = EpinetHead(),
        prior: nn.Module | None = None,
        freeze_base: bool = False,
        output: Output = "logits",
    ) -> None:
        super().__init__(GaussianIndexer(head.index_dim), output)
        check_pool(pool)
        self.head = head
        self.base = base
        self.pool = pool
        self.freeze_base = freeze_base
        if freeze_base:
            base.requires_grad_(False).eval()
        self.num_outputs = num_outputs
        self.output_axis = output_axis
        self.additive_prior = adopt_prior(prior)
        self.additive_scale = PriorScale(head.additive_prior_scale)
        self.epinet: Epinet | None = None
        self.tap: FeatureTap | None = None
        # Created here rather than on use, because a compiled or exported graph holds it as a constant.
        self._calibration_index = self.indexer(SPREAD_DRAWS, torch.Generator().manual_seed(0))
        names = [feature_layers] if isinstance(feature_layers, str) else list(feature_layers)
        if names != ["auto"]:
            self.tap = FeatureTap(base, names, pool)
        self._build_from_structure()

    @property
    def layers(self) -> list[str] | None:
        """The names of the layers whose inputs are the features; None if unknown before the first batch."""
        return None if self.tap is None else self.tap.layers

    @property
    def is_initialized(self) -> bool:
        """Whether the head is built and its layers are known."""
        return self.epinet is not None and self.tap is not None

    def forward(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [Z, B, C] of the batch ``x`` [B, ...] for the rows of ``index`` [Z, index_dim]."""
        learned, prior = self.learned_and_prior(x, index)
        output = learned.add_(prior)  # another Z B C numbers would cost as much as a layer of the head
        return output if self.training or self.head.temperature == 1 else output / self.head.temperature

    def learned_and_prior(self, x: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, C]: base and epinet, which are trained, and the priors."""
        self.initialize(x)
        assert self.epinet is not None
        # In evaluation a gradient of the input is asked for as a whole: the path through the features is part of it.
        through = not self.training and isinstance(x, Tensor) and x.requires_grad
        base, features = self._base(x, detach=not through)
        calibrating = self.training and self.head.calibrate_prior
        draws = (
            self._calibration_index.to(features.device)
            if calibrating and not self.epinet.prior_scale.measured
            else None
        )
        learned, prior = self._of_positions(self.epinet(position_rows(features), index, draws), base)
        if self.additive_prior is not None:
            if calibrating and not self.additive_scale.measured:
                with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
                    self.additive_scale.measure(self.additive_prior(x, self._calibration_index.to(features.device)))
            prior = prior + self.additive_scale(self.additive_prior(x, index)).to(prior.dtype)
        scale = self.head.base_scale
        return learned + (base if scale == 1 else base * scale), prior

    def initialize(self, x: Any) -> None:
        """Build the parts that the network's structure alone did not determine, from one batch ``x`` [B, ...]; else do nothing.

        Raises:
            InputError: ``feature_layers="auto"`` finds no layer, or several.
        """
        if self.is_initialized:
            return
        with torch.inference_mode(False):  # the head outlives this mode, and a layer is found by gradients
            self._initialize(torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, x))

    def _initialize(self, x: Any) -> None:
        modes = [(module, module.training) for module in self.base.modules()]
        self.base.eval()
        try:
            if self.tap is None:
                layer = last_layer(self.base, lambda: self.read_output.call(self.base, x), "feature_layers")
                self.tap = FeatureTap(self.base, [layer], self.pool)
            with torch.no_grad():
                base, features = self._base(x)
        finally:
            for module, mode in modes:
                module.training = mode
        if self.epinet is None:
            at_positions = self.pool == "positions"
            self._build(features.shape[1], base.shape[self.output_axis] if at_positions else base[0].numel())

    def frozen_parts(self) -> list[nn.Module]:
        """The base, if it is frozen, and the additive prior."""
        return [
            *([self.base] if self.freeze_base else []),
            *([] if self.additive_prior is None else [self.additive_prior]),
        ]

    def feature_networks(self) -> list[nn.Module]:
        """The base."""
        return [self.base]

    @property
    def called_network(self) -> nn.Module | None:
        """The base."""
        return self.base

    def track_features(self, mode: bool = True) -> None:
        """Whether training updates the statistics that standardize the features."""
        if self.epinet is not None and self.epinet.scaler is not None:
            self.epinet.scaler.tracking = mode

    def _base(self, x: Any, *, detach: bool = True) -> tuple[Tensor, Tensor]:
        """The base's output and the features, detached unless gradients of the input are asked for."""
        assert self.tap is not None
        with torch.no_grad() if self.freeze_base and detach else nullcontext():
            raw, features = self.tap.run(self.base, x, self.read_output.raw, detach=detach)
            base = self.read_output(raw)
        if self.pool == "positions":
            return base, self._at_positions(base, features, x, detach)
        if base.ndim < 2:
            raise InputError(
                f"The base network must return [B, C], or [B, H, D] for a horizon, but its output has shape {list(base.shape)}. Pass "
                "`output=lambda output: output.unsqueeze(-1)` for one number per sample."
            )
        if any(one.ndim != 2 or one.shape[0] != base.shape[0] for one in features):
            raise InputError(
                f"The features at {self.tap.layers} must have one row per sample [{len(base)}, F], but their shapes are "
                f"{[list(one.shape) for one in features]}. Pass other `feature_layers`, or a function "
                "`pool(x, mask)` that returns features [B, F] as `pool`."
            )
        if self.head.include_inputs:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise InputError(
                    f"With `include_inputs=True`, the input must be a floating-point tensor, but it is {describe(x)}."
                )
            features.append(detached(x, detach).flatten(1).to(features[0].dtype))
        return base, features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def _at_positions(self, base: Tensor, features: list[Tensor], x: Any, detach: bool) -> Tensor:
        """Features [B, F, *P] at the positions of the base's output; features on another grid come from the nearest position."""
        if base.ndim < 3:
            raise InputError(
                f"With `pool='positions'`, the base network must return a map [B, C, ...], but its output has shape "
                f"{list(base.shape)}. Leave `pool` out for one output per input."
            )
        assert self.tap is not None
        shape = base.movedim(self.output_axis, 1).shape
        found = [
            one.movedim(self.output_axis, 1) if name == OUTPUT else one
            for name, one in zip(self.tap.layers, features, strict=True)
        ]
        if self.head.include_inputs:
            is_float = isinstance(x, Tensor) and x.is_floating_point()
            found.append(detached(x, detach).to(features[0].dtype) if is_float else x)
        if any(not isinstance(one, Tensor) or one.ndim != len(shape) or one.shape[0] != shape[0] for one in found):
            raise InputError(
                f"With `pool='positions'`, all features must be maps like the output {list(base.shape)}, but at {self.tap.layers} "
                f"{'and the input ' if self.head.include_inputs else ''}they are "
                f"{[list(one.shape) if isinstance(one, Tensor) else describe(one) for one in found]}."
            )
        return torch.cat([resized(one, shape[2:]) for one in found], dim=1)

    def _of_positions(self, parts: tuple[Tensor, Tensor], base: Tensor) -> Sequence[Tensor]:
        """The head's outputs, [Z, B, C] or [Z, B N, C] for all positions, in the shape of the base's output."""
        if self.pool != "positions":
            if parts[0].shape[2] != base.shape[1:].numel():
                raise InputError(
                    f"The base network returned {list(base.shape)}, one row of {parts[0].shape[2]} outputs per position. Pass "
                    "`pool='positions'`, so that the head acts at each position."
                )
            return [rows.reshape(rows.shape[0], *base.shape) for rows in parts]
        shape = base.movedim(self.output_axis, -1).shape
        axis = self.output_axis if self.output_axis < 0 else self.output_axis + 1
        return [rows.reshape(rows.shape[0], *shape).movedim(-1, axis) for rows in parts]

    def _build_from_structure(self) -> None:
        """Build the head if the network's layers determine the sizes of its features and its output."""
        num_outputs = self.num_outputs
        if self.tap is None:
            found = traced_last_layer(self.base) if self.read_output.predict_fn is None else None
            if found is None:
                return
            self.tap = FeatureTap(self.base, [found[0]], self.pool)
            num_outputs = num_outputs or (None if callable(self.read_output.output) else found[1])
        if num_outputs is None or self.head.include_inputs or callable(self.pool):
            return
        sizes = [
            num_outputs if name == OUTPUT else num_features(submodule(self.base, name)) for name in self.tap.layers
        ]
        if None not in sizes:
            self._build(sum(size for size in sizes if size is not None), num_outputs)

    def _build(self, in_features: int, num_outputs: int) -> None:
        self.epinet = Epinet(in_features, num_outputs, head=self.head)
        if self.freeze_base and self.epinet.scaler is not None:
            self.epinet.scaler.momentum = 0.0
        like = next((p for p in self.base.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.epinet.to(like.device, like.dtype)
        self.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.epinet is None:
            layers = f"{prefix}epinet.learned.layers."
            last = len(self.head.hidden_sizes)
            first, bias = state_dict.get(f"{layers}0.weight"), state_dict.get(f"{layers}{last}.bias")
            if isinstance(first, Tensor) and isinstance(bias, Tensor):
                index_dim = self.indexer.index_dim
                self._build(first.shape[1] - index_dim, len(bias) // index_dim)
        super()._load_from_state_dict(state_dict, prefix, *args)
