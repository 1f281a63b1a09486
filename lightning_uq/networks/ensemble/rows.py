"""Members that run as one network, on the rows of all members at once."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.ensemble.loop import EnsembleNetwork
from lightning_uq.networks.indexers import EnsembleIndexer
from lightning_uq.networks.output import Output, PredictFn


class MemberLayer(nn.Module):
    """A layer with values of M members, whose input holds the rows of all or of some of them, one member after the other.

    Args:
        num_members: M.

    Attributes:
        members: The members whose rows the next call gets; None for all.
    """

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self.num_members = num_members
        self.members: Sequence[int] | None = None

    def chosen(self, values: Tensor) -> Tensor:
        """The values [m, ...] of the members of the next call, from those of all [M, ...]."""
        return values if self.members is None else values[list(self.members)]

    @abstractmethod
    def plain(self, i: int) -> nn.Module:
        """Member ``i`` as a layer of its own."""


class RowEnsembleNetwork(EnsembleNetwork):
    """M members that share a network, with some values of their own in its :class:`MemberLayer` layers.

    The rows of a batch are repeated M times, and run through the network at once.

    Args:
        shared: The network, with its layers.
        num_members: M.
        output: The kind of a member's output.
        execution_reason: A sentence that explains the execution, for logs.
    """

    execution = "rows"

    def __init__(self, shared: nn.Module, num_members: int, output: Output, execution_reason: str) -> None:
        EpistemicNetwork.__init__(self, EnsembleIndexer(num_members), output)
        self.execution_reason = execution_reason
        self.shared = shared
        self.train(shared.training)

    def _run(self, x: Any, which: Sequence[int] | None) -> Tensor:
        num = self.num_indices if which is None else len(which)
        return self._outputs(_repeated(x, num), num, which)

    def _run_each(self, xs: Tensor) -> Tensor:
        return self._outputs(xs.flatten(0, 1), self.num_indices, None)

    def _outputs(self, rows: Any, num: int, which: Sequence[int] | None) -> Tensor:
        for layer in self._layers():
            layer.members = which
        output = self.read_output.call(self.shared, rows)
        return output.reshape(num, -1, *output.shape[1:])

    def _layers(self) -> list[MemberLayer]:
        return [layer for layer in self.shared.modules() if isinstance(layer, MemberLayer)]

    def _copy_of_member(self, i: int) -> nn.Module:
        return replaced(
            copy.deepcopy(self.shared), lambda layer: layer.plain(i) if isinstance(layer, MemberLayer) else None
        )

    def call_by(self, predict_fn: PredictFn | str) -> None:
        """Not possible: ``predict_fn`` calls one member at a time."""
        raise UnsupportedError(
            "A `predict_fn` calls one member at a time, but these run as one. Remove `predict_fn` or `sharing`."
        )

    def load_member(self, i: int, module: nn.Module) -> NoReturn:
        """Not possible: a member has no weights of its own."""
        raise UnsupportedError("These members share their weights, so none can be loaded alone.")

    def member_tensors(self, i: int) -> NoReturn:
        """Not possible: a member has no weights of its own."""
        raise UnsupportedError("These members share their weights, so none has tensors of its own.")

    def share(self, members: range) -> NoReturn:
        """Not possible: processes that train different members would train different weights."""
        raise UnsupportedError("Members that share weights cannot train on different processes. Use strategy='ddp'.")

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """The state of :meth:`member` ``i``."""
        state: dict[str, Tensor] = self.member(i).state_dict()
        return state

    def unstacked(self) -> EnsembleNetwork:
        """Copies of the members that run one after the other."""
        return EnsembleNetwork([self.member(i) for i in range(self.num_indices)], self.read_output.output)

    @property
    def called_network(self) -> nn.Module | None:
        """The shared network."""
        return self.shared

    def feature_networks(self) -> list[nn.Module]:
        """Copies of the members [M]."""
        return [self.member(i) for i in range(self.num_indices)]

    @property
    def shows_features(self) -> bool:
        """False: the members' rows run together."""
        return False

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """One list of all parameters."""
        return [list(self.parameters())]

    def _all_modules(self) -> Iterable[nn.Module]:
        return self.shared.modules()


def _repeated(x: Any, num: int) -> Any:
    """The rows of an input, or of each tensor of a mapping, ``num`` times one after the other."""
    if isinstance(x, Tensor):
        return x.repeat(num, *[1] * (x.ndim - 1))
    if isinstance(x, Mapping) and all(isinstance(value, Tensor) for value in x.values()):
        return {name: _repeated(value, num) for name, value in x.items()}
    raise InputError(
        f"Members that share weights take a tensor, or a mapping of tensors, but argument `x` is a {type(x).__name__}."
    )


def replaced(network: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The network with layers replaced by ``new(layer)``, where that is not None."""
    whole = new(network)
    if whole is not None:
        return whole
    for name, layer in list(network.named_children()):
        setattr(network, name, replaced(layer, new))
    return network
