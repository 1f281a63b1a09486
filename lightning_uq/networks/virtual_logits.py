"""The virtual logit of all members' features compared with the logits of their last layers, as a score."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_uq.functional.ood_features import VimFit, vim_score
from lightning_uq.functional.precision import to_float64, wide_dtype
from lightning_uq.networks.feature_score import FeatureScore


class VirtualLogits(FeatureScore):
    """The virtual logit minus the log-sum-exp of the others [B], for features [M, B, D]: everything that :class:`~lightning_uq.FitViM` fits.

    The score is the mean over members. A copy of each member's last layer computes the logits from the features, before
    any calibration.

    Args:
        fits: The virtual logit of each member.
        layers: The weight [C, D] and the bias [C] of each member's last layer, in float64.

    Example:
        >>> fit = VimFit(torch.zeros(2), torch.tensor([[0.0], [1.0]]), torch.tensor(20.0))
        >>> score = VirtualLogits([fit], [(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2))])
        >>> score(torch.tensor([[[0.0, 3.0]]])).round(decimals=3)
        tensor([59.3070], dtype=torch.float64)
    """

    needs_float64 = True

    def __init__(self, fits: Sequence[VimFit], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.num_members = len(fits)
        self.members = nn.ModuleList(_Member(fit, *layer) for fit, layer in zip(fits, layers, strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The score from the tensors of a :class:`~lightning_uq.FitViM`."""
        members = range(tensors["num_members"])
        return cls(
            [VimFit(*(tensors[f"{i}.{field}"] for field in VimFit._fields)) for i in members],
            [(tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in members],
        )

    def forward(self, features: Tensor) -> Tensor:
        """The out-of-distribution score [B] of features [M, B, D]."""
        rows = to_float64(features)
        score = torch.stack([member(one) for member, one in zip(self.members, rows, strict=True)]).mean(0)
        return score.to(wide_dtype(features.device)).to(features.device)


class _Member(nn.Module):
    """The fit and the last layer of one member."""

    origin: Tensor
    residual: Tensor
    alpha: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, fit: VimFit, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        for name, value in {**fit._asdict(), "weight": weight, "bias": bias}.items():
            self.register_buffer(name, to_float64(value))

    def forward(self, rows: Tensor) -> Tensor:
        logits = nn.functional.linear(rows, self.weight, self.bias)
        return vim_score(rows, logits, VimFit(self.origin, self.residual, self.alpha))
