"""The head of an epinet."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_uq.networks.epinet.feature_scaler import FeatureScaler
from lightning_uq.networks.epinet.projected_mlp import ProjectedMLP
from lightning_uq.networks.priors.frozen import freeze_as_buffers
from lightning_uq.networks.priors.scale import PriorScale


class Epinet(nn.Module):
    """The head alone: learnable and prior :class:`ProjectedMLP` over features and an index.

    Args:
        in_features: Size F of the features.
        out_features: Size C of the output.
        index_dim: Size D_z of the index.
        hidden_sizes: Hidden layers of the learnable part.
        prior_hidden_sizes: Hidden layers of the prior; those of the learnable part by default.
        prior_scale: Scale of the prior; 0 leaves it out.
        standardize_features: Whether running statistics standardise the features of both parts.

    Source: ``MLPEpinetWithPrior`` of ``enn.networks.epinet``, which multiplies the prior by its scale and does not
    standardise.

    Example:
        >>> learned, prior = Epinet(7, 3, index_dim=5)(torch.zeros(4, 7), torch.randn(6, 5))
        >>> learned.shape, prior.requires_grad
        (torch.Size([6, 4, 3]), False)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        index_dim: int = 8,
        hidden_sizes: Sequence[int] = (50, 50),
        prior_hidden_sizes: Sequence[int] | None = None,
        prior_scale: float = 1.0,
        standardize_features: bool = False,
    ) -> None:
        super().__init__()
        prior_hidden_sizes = hidden_sizes if prior_hidden_sizes is None else prior_hidden_sizes
        self.scaler = FeatureScaler(in_features) if standardize_features else None
        self.learned = ProjectedMLP(in_features, out_features, index_dim, hidden_sizes)
        self.prior: nn.Module | None = None
        if prior_scale:
            # Its mode makes no difference: it follows the network's, so that nobody warns of modules in eval mode.
            self.prior = freeze_as_buffers(
                ProjectedMLP(in_features, out_features, index_dim, prior_hidden_sizes)
            ).train()
        self.prior_scale = PriorScale(prior_scale)

    def forward(
        self, features: Tensor, index: Tensor, calibration_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Learnable part and scaled prior, each [Z, B, C], of features [B, F] and ``index`` [Z, D_z].

        No gradient reaches the features. With ``calibration_index`` [Z', D_z], the spread of the prior over it, at these
        features, becomes the unit of its scale.
        """
        features = features.detach()
        if self.scaler is not None:
            features = self.scaler(features)
        learned: Tensor = self.learned(features, index)
        if self.prior is None:
            return learned, torch.zeros_like(learned)
        if calibration_index is not None:
            with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
                self.prior_scale.measure(self.prior(features, calibration_index))
        return learned, self.prior_scale(self.prior(features, index)).detach()
