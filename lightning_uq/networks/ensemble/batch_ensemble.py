"""BatchEnsemble: members that share their weights up to a factor of rank one."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.ensemble.rows import MemberLayer, RowEnsembleNetwork, replaced
from lightning_uq.networks.ensemble.shared_gradient import share_gradient
from lightning_uq.networks.labels import label
from lightning_uq.networks.output import Output

SHAREABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers that get factors. They map channels, on the last axis or on axis 1."""

_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LayerNorm, nn.RMSNorm, nn.PReLU, nn.Embedding,
)  # fmt: skip


class RankOneLayer(MemberLayer):
    """A linear layer or convolution of M members: y_m = s_m * layer(r_m * x) + b_m, on rows [M B, ...] in the members' order.

    That is the layer with the weights W * s_m r_m^T. The gradient of the shared W is divided by M, so that it learns from the mean of the
    members' losses; each member's factors learn from its own.

    Args:
        layer: The layer, whose weight is shared. Its bias becomes the start of each member's.
        num_members: M.

    Attributes:
        weight: W, shared.
        scale_in: Factors r [M, in], drawn as -1 or 1.
        scale_out: Factors s [M, out], drawn as -1 or 1.
        bias: Biases [M, out], or None.
    """

    def __init__(self, layer: nn.Module, num_members: int) -> None:
        super().__init__(num_members)
        self.layer = copy.deepcopy(layer)
        weight, bias = self.layer.get_parameter("weight"), self.layer.bias
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.layer.register_parameter("bias", None)
        groups = getattr(layer, "groups", 1)
        like = {"dtype": weight.dtype, "device": weight.device}
        self.scale_in = nn.Parameter(_signs(num_members, weight.shape[1] * groups, **like))
        self.scale_out = nn.Parameter(_signs(num_members, len(weight), **like))
        self.bias = nn.Parameter(bias.detach().repeat(num_members, 1)) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [M B, ...] of inputs [M B, ...]."""
        weight = share_gradient(self.layer.get_parameter("weight"), self.num_members)
        y = torch.func.functional_call(self.layer, {"weight": weight}, self._scaled(x, self.scale_in))
        y = self._scaled(y, self.scale_out)
        return y if self.bias is None else y + self._factor(self.bias, y)

    def _scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        return x * self._factor(factors, x)

    def _factor(self, factors: Tensor, like: Tensor) -> Tensor:
        """The members' factors for the rows of ``like``, [M B, 1, ..., channels, ...]."""
        chosen = self.chosen(factors)
        rows = chosen.repeat_interleave(len(like) // len(chosen), 0)
        shape = [len(like)] + [1] * (like.ndim - 1)
        shape[self.axis] = chosen.shape[1]
        return rows.view(shape)

    def plain(self, i: int) -> nn.Module:
        """Member ``i`` as a layer of its own."""
        layer = copy.deepcopy(self.layer)
        groups = getattr(layer, "groups", 1)
        with torch.no_grad():
            weight = layer.get_parameter("weight")
            into = self.scale_in[i].view(groups, -1).repeat_interleave(len(weight) // groups, 0)
            spatial = [1] * (weight.ndim - 2)
            weight.mul_(into.view(*into.shape, *spatial)).mul_(self.scale_out[i].view(-1, 1, *spatial))
        bias = None if self.bias is None else nn.Parameter(self.bias[i].detach().clone())
        layer.register_parameter("bias", bias)
        return layer


def _signs(*shape: Any, **like: Any) -> Tensor:
    return 2 * torch.randint(2, shape, **like) - 1


class BatchEnsembleNetwork(RowEnsembleNetwork):
    """M members that share the weights of one network, each with its own factors of rank one on every linear layer and convolution.

    The rows of a batch are repeated M times, and run through the network at once. Norms and embeddings belong to all members: the statistics of
    BatchNorm are those of all members' rows.

    Args:
        network: The network whose weights are shared; it is copied.
        num_members: M.
        output: The kind of a member's output.

    Raises:
        UnsupportedError: The network has a layer with weights that cannot be shared like this, such as attention or a recurrent layer, or
            none that can.

    Source: Wen et al., "BatchEnsemble: an Alternative Approach to Efficient Ensemble and Lifelong Learning", ICLR 2020 (arXiv 2002.06715).

    Example:
        >>> network = BatchEnsembleNetwork(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), num_members=5)
        >>> network(torch.zeros(2, 4)).shape
        torch.Size([5, 2, 3])
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(network(x)[1], network.member(1)(x), atol=1e-6)
        True
    """

    execution = "batch_ensemble"

    def __init__(self, network: nn.Module, num_members: int, *, output: Output = "logits") -> None:
        reason = f"BatchEnsemble of {num_members}: the members share all weights but factors of rank one."
        super().__init__(_with_factors(network, num_members), num_members, output, reason)


def _with_factors(network: nn.Module, num_members: int) -> nn.Module:
    found = False

    def factored(layer: nn.Module) -> nn.Module | None:
        nonlocal found
        if type(layer) in SHAREABLE:
            found = True
            return RankOneLayer(layer, num_members)
        return None

    for name, part in network.named_modules():
        own = next((name for name, _ in part.named_parameters(recurse=False)), None)
        if own is not None and type(part) not in (*SHAREABLE, *_NORMS):
            raise UnsupportedError(
                f"{label(name, part)} has weights ({own!r}) that members cannot share up to a factor of rank one. BatchEnsemble takes linear "
                "layers, convolutions, norms and embeddings. Remove `sharing`, or share a `trunk`."
            )
    made = replaced(copy.deepcopy(network), factored)
    if not found:
        raise UnsupportedError(
            "The network has no linear layer or convolution, so the members of a BatchEnsemble would be equal."
        )
    return made
