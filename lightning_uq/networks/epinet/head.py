"""The head of an epinet, and its settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.epinet.feature_scaler import FeatureScaler
from lightning_uq.networks.epinet.projected_mlp import ProjectedMLP
from lightning_uq.networks.priors.frozen import freeze_as_buffers
from lightning_uq.networks.priors.scale import PriorScale


@dataclass(frozen=True, kw_only=True)
class EpinetHead:
    """Sizes and scales of an epinet, as plain data: f(x, z) = (base_scale base(x) + e(h, z) + s_p p(h, z) + s_g g(x, z)) / T.

    Here h are the features, e is the trained part, and p and g are frozen priors with the scales ``prior_scale`` and
    ``additive_prior_scale``. The defaults need no tuning to the network: features are standardized by running statistics,
    and priors are scaled on the first training batch, so that a scale of 1 is a spread over z of one logit.

    Args:
        index_dim: Dimension of z, a standard normal vector.
        hidden_sizes: Hidden layers of e.
        prior_hidden_sizes: Hidden layers of p; None: those of e.
        prior_scale: Scale of p; 0 disables p.
        additive_prior_scale: Scale of the additive prior g, the argument ``prior`` of the network or module.
        calibrate_prior: Whether the scales of priors are spreads over z, in logits (for regression, in units of the network's
            output). Otherwise they are factors, as in the original.
        standardize_features: Whether running statistics standardize the features. With a frozen base, they are those of the
            first epoch.
        include_inputs: Whether to append the flattened input to the features.
        base_scale: Factor of the base's output.
        temperature: T, in evaluation; it is 1 in training.

    Raises:
        InputError: A size is below 1, a scale is negative, or the temperature is not above 0.

    Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924).

    Example:
        >>> EpinetHead(index_dim=20, hidden_sizes=[50], prior_scale=4.0).hidden_sizes
        (50,)
    """

    index_dim: int = 8
    hidden_sizes: Sequence[int] = (50, 50)
    prior_hidden_sizes: Sequence[int] | None = None
    prior_scale: float = 1.0
    additive_prior_scale: float = 1.0
    calibrate_prior: bool = True
    standardize_features: bool = True
    include_inputs: bool = False
    base_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden_sizes", "prior_hidden_sizes"):
            sizes = getattr(self, name)
            if sizes is not None:
                object.__setattr__(self, name, tuple(sizes))  # a list would make it neither frozen nor hashable
                if any(size < 1 for size in sizes):
                    raise InputError(
                        f"`{name}` of an EpinetHead must hold widths of at least 1, but it is {list(sizes)}."
                    )
        if self.index_dim < 1:
            raise InputError(f"`index_dim` of an EpinetHead must be at least 1, but it is {self.index_dim}.")
        for name in ("prior_scale", "additive_prior_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"`{name}` of an EpinetHead must be finite and at least 0, but it is {getattr(self, name)}."
                )
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"`temperature` of an EpinetHead must be finite and above 0, but it is {self.temperature}."
            )


class Epinet(nn.Module):
    """The head alone: a trained and a prior :class:`ProjectedMLP` over features and an index.

    Args:
        in_features: Size F of the features.
        out_features: Size C of the output.
        head: The sizes and scales.

    Source: ``MLPEpinetWithPrior`` of ``enn.networks.epinet``, which multiplies the prior by its scale and does not
    standardize.

    Example:
        >>> learned, prior = Epinet(7, 3, head=EpinetHead(index_dim=5))(torch.zeros(4, 7), torch.randn(6, 5))
        >>> learned.shape, prior.requires_grad
        (torch.Size([6, 4, 3]), False)
    """

    def __init__(self, in_features: int, out_features: int, *, head: EpinetHead = EpinetHead()) -> None:
        super().__init__()
        self.scaler = FeatureScaler(in_features) if head.standardize_features else None
        self.learned = ProjectedMLP(in_features, out_features, head.index_dim, hidden_sizes=head.hidden_sizes)
        self.prior: nn.Module | None = None
        if head.prior_scale:
            sizes = head.hidden_sizes if head.prior_hidden_sizes is None else head.prior_hidden_sizes
            # Its mode makes no difference. It follows the network's, to avoid warnings about modules in eval mode.
            self.prior = freeze_as_buffers(
                ProjectedMLP(in_features, out_features, head.index_dim, hidden_sizes=sizes)
            ).train()
        self.prior_scale = PriorScale(head.prior_scale)

    def forward(
        self, features: Tensor, index: Tensor, calibration_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Learnable part and scaled prior, each [Z, B, C], for features [B, F] and ``index`` [Z, D_z].

        Under mixed precision, the head keeps the precision of its weights. With ``calibration_index`` [Z', D_z], the spread of the prior over it, at these
        features, becomes the unit of its scale.
        """
        # Under autocast, casting all weights and indices would take longer than these small products.
        with torch.autocast(features.device.type, enabled=False):
            return self._parts(features, index, calibration_index)

    def _parts(self, features: Tensor, index: Tensor, calibration_index: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.scaler is not None:
            features = self.scaler(features)
        learned: Tensor = self.learned(features, index)
        if self.prior is None:
            return learned, torch.zeros_like(learned)
        if calibration_index is not None:
            with torch.no_grad():
                self.prior_scale.measure(self.prior(features, calibration_index))
        return learned, self.prior_scale(self.prior(features, index))
