"""The graph of one member's forward pass."""

from typing import Any

from torch import fx, nn

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.output import OutputReader


class _WithReader(nn.Module):
    """A network together with the function that selects its output, as one module for the tracer."""

    def __init__(self, network: nn.Module, reader: OutputReader) -> None:
        super().__init__()
        self.network = network
        self.pick = reader.output if callable(reader.output) else None

    def forward(self, x: Any) -> Any:
        output = self.network(x)
        return output if self.pick is None else self.pick(output)


def trace(network: nn.Module, reader: OutputReader) -> fx.Graph:
    """The graph of one member, whose names begin with ``network.``.

    Raises:
        UnsupportedError: The forward pass depends on values, or fails without values.
    """
    root = _WithReader(network, reader)
    root.training = network.training
    try:
        return fx.Tracer().trace(root)
    except Exception as error:  # a user's forward may raise anything for a proxy of a tensor
        raise UnsupportedError(
            f"the forward pass of {type(network).__name__} cannot be traced ({type(error).__name__}: {error})"
        ) from error


def own_name(name: str) -> str:
    """The name of a submodule or tensor in its network, given its name in the graph."""
    return name.removeprefix("network").removeprefix(".")
