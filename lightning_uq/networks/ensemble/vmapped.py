"""An ensemble of one architecture that runs by ``torch.vmap``."""

from typing import Any

from torch import Tensor, nn

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.ensemble.mapped_call import call_mapped
from lightning_uq.networks.ensemble.operations import ELEMENTWISE_MODULES
from lightning_uq.networks.ensemble.stacked import StackedEnsembleNetwork
from lightning_uq.networks.ensemble.trace import own_name, trace
from lightning_uq.networks.labels import label
from lightning_uq.networks.output import OutputReader


class VmapEnsembleNetwork(StackedEnsembleNetwork):
    """A :class:`StackedEnsembleNetwork` that runs by ``torch.vmap``, for every architecture that it can map.

    Args:
        members: The M networks; their weights are copied.
        output: The kind of a member's output.
        execution_reason: A sentence that explains the choice of this execution.

    Raises:
        UnsupportedError: The members differ in more than their weights, or, at the first call, cannot be mapped.

    Example:
        >>> import torch
        >>> members = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()) for _ in range(3)]
        >>> VmapEnsembleNetwork(members)(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([3, 5, 8])
    """

    execution = "vmap"

    def _prepare(self) -> None:
        pass

    def _call(self, tensors: dict[str, Tensor], x: Any, x_axis: int | None) -> Tensor:
        return call_mapped(self._skeleton(), self.read_output, tensors, x, x_axis)


_MAPPABLE = (
    *ELEMENTWISE_MODULES, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Flatten,
    nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.MaxPool1d, nn.MaxPool2d, nn.RMSNorm,
)  # fmt: skip


def check_mappable(network: nn.Module, reader: OutputReader) -> None:
    """Check that ``torch.vmap`` is known to map every layer, and that no branch depends on values.

    Raises:
        UnsupportedError: The network has another layer, or such a branch.
    """
    for node in trace(network, reader).nodes:
        if node.op == "call_module":
            name = own_name(str(node.target))
            module = network.get_submodule(name)
            if type(module) not in _MAPPABLE:
                raise UnsupportedError(f"{label(name, module)} is not known to work under torch.vmap")
