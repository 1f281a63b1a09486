"""An ensemble whose members run one after the other, and the interface of all ensembles."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.batches import own_batch
from lightning_uq.errors import InputError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.ensemble.alike import named_tensors, visible_difference
from lightning_uq.networks.ensemble.checks import check_algorithm, check_members
from lightning_uq.networks.indexers import EnsembleIndexer
from lightning_uq.networks.output import Output
from lightning_uq.networks.priors.members import trained_part


class EnsembleNetwork(EpistemicNetwork):
    """M networks side by side; the index [Z] holds member numbers. In this class, the members run one after the other.

    A subclass may run them at once. All executions have this interface, give the same results, and name their state per
    member (``members.{i}.<name>``), so a checkpoint of one loads into another. :meth:`member` returns a copy of one member,
    and :meth:`load_member` loads its weights.

    Args:
        members: The M networks, each of which maps x [B, ...] to outputs [B, ...]. They become submodules.
        output: The kind of a member's output: see :class:`~lightning_uq.networks.output.OutputReader`.
        execution_reason: A sentence that explains the choice of this execution.

    Attributes:
        execution: How the members run: ``"loop"``, ``"stacked"`` or ``"vmap"``.
        execution_reason: A sentence that explains the choice of the execution, for logs.
        num_indices: M.

    Raises:
        InputError: There are no members, or one of them is not a module.

    Example:
        >>> network = EnsembleNetwork([nn.Linear(2, 3) for _ in range(4)])
        >>> network(torch.zeros(5, 2), torch.tensor([0, 2])).shape
        torch.Size([2, 5, 3])
        >>> network.forward_each(torch.zeros(4, 5, 2)).shape
        torch.Size([4, 5, 3])
    """

    execution: str = "loop"
    num_indices: int  # of the indexer, which is finite
    members: nn.ModuleList

    def __init__(self, members: Iterable[nn.Module], output: Output = "logits", *, execution_reason: str = "") -> None:
        members = check_members(members)
        super().__init__(EnsembleIndexer(len(members)), output)
        self.execution_reason = execution_reason
        self._adopt(members)

    def _adopt(self, members: list[nn.Module]) -> None:
        self.members = nn.ModuleList(members)

    def forward(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] from the members in ``index`` [Z].

        A member that occurs twice runs once. Without ``index``, all members run, in order.

        Raises:
            InputError: ``index`` is not a tensor of member numbers.
        """
        if index is None:
            return self._run(x, None)
        if torch.compiler.is_compiling() and not self.training:  # a graph cannot depend on the index's values
            return self._run(x, None).index_select(0, index)
        wanted = self._check_index(index)
        if wanted == list(range(self.num_indices)):
            return self._run(x, None)
        run = sorted(set(wanted))
        output = self._run(x, None if len(run) == self.num_indices else run)
        if run == wanted:
            return output
        order = torch.tensor([run.index(member) for member in wanted], device=output.device)
        return output.index_select(0, order)

    def evaluate_at(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [M, B, ...] of all members. The values of ``index`` are not read, since that would wait for the device."""
        output: Tensor = self(x)
        return output

    def forward_each(self, xs: Tensor) -> Tensor:
        """Outputs [M, B, ...], where member i gets its own batch ``xs[i]`` of ``xs`` [M, B, ...]."""
        if not isinstance(xs, Tensor) or xs.ndim < 1 or len(xs) != self.num_indices:
            got = list(xs.shape) if isinstance(xs, Tensor) else type(xs).__name__
            raise InputError(
                f"`xs` must hold one batch per member, shape [{self.num_indices}, B, ...], but it is {got}."
            )
        return self._run_each(xs)

    def member(self, i: int) -> nn.Module:
        """Member ``i`` as a plain network, an independent copy in every execution.

        Changes to the copy do not affect the ensemble; :meth:`load_member` loads its weights. In a loop, the members are
        also submodules, so ``network.members[i]`` is the member itself. Members that run at once are not submodules.
        """
        i = self._check_member(i)
        with torch.inference_mode(False):  # a copy made in inference mode could not be trained
            return self._copy_of_member(i)

    def load_member(self, i: int, module: nn.Module) -> None:
        """Load the values of a network's parameters and buffers into member ``i``, for instance those of a changed :meth:`member`.

        Raises:
            InputError: The network differs from the member in more than those values.

        Example:
            >>> network = EnsembleNetwork([nn.Linear(2, 3) for _ in range(4)])
            >>> member = network.member(1)
            >>> _ = nn.init.zeros_(member.weight)
            >>> network.load_member(1, member)
            >>> network.members[1].weight.any()
            tensor(False)
        """
        difference = visible_difference(self.member(i), module)
        if difference is not None:
            raise InputError(
                f"`module` may differ from member {i} only in the values of its parameters and buffers, but {difference}. "
                "Build a new ensemble of the changed networks, or change all members by the ensemble's own methods, such "
                "as `requires_grad_` and `to`."
            )
        own = self.member_tensors(i)
        with torch.no_grad():
            for name, tensor in named_tensors(module):
                own[name].copy_(tensor)

    def _copy_of_member(self, i: int) -> nn.Module:
        return copy.deepcopy(self.members[i])

    def member_tensors(self, i: int) -> dict[str, Tensor]:
        """The parameters and buffers of member ``i`` under its own names, on the ensemble's storage: a change in place changes the member."""
        return dict(named_tensors(self.members[i]))

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """The ``state_dict()`` of member ``i``, under its own names."""
        return self.members[self._check_member(i)].state_dict()

    def share(self, members: range) -> "EnsembleNetwork":
        """A network of these consecutive members alone, on the same storage: a change of one network's values is a change of the other's.

        Example:
            >>> network = EnsembleNetwork([nn.Linear(2, 3) for _ in range(4)])
            >>> share = network.share(range(1, 3))
            >>> share.num_indices, share.members[0] is network.members[1]
            (2, True)
        """
        return EnsembleNetwork(self.members[members.start : members.stop], self.read_output)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters: one list per member, or one list of stacked parameters [M, ...] if ``is_stacked``."""
        return [list(member.parameters()) for member in self.members]

    def clip_gradients_per_member(
        self, clip_val: float, algorithm: str = "norm", *, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clip each member's gradient separately, like ``torch.nn.utils`` does for a single network.

        With one norm over all members, the largest gradient would scale down the others.

        Args:
            clip_val: The largest norm or absolute value after clipping.
            algorithm: ``"norm"`` (``clip_grad_norm_``) or ``"value"`` (``clip_grad_value_``).
            norm_type: Order of the norm.

        Returns:
            The members' norms [M] before clipping, or None for ``"value"``.

        Raises:
            InputError: ``algorithm`` is neither.
        """
        if check_algorithm(algorithm) == "value":
            with_gradient = [p for p in self.parameters() if p.grad is not None]
            if with_gradient:  # torch raises for an empty list
                nn.utils.clip_grad_value_(with_gradient, clip_val)
            return None
        return torch.stack([nn.utils.clip_grad_norm_(g, clip_val, norm_type) for g in self.parameter_groups()])

    @property
    def called_network(self) -> nn.Module | None:
        """The first member."""
        return self.members[0]

    def unstacked(self) -> "EnsembleNetwork":
        """This ensemble itself."""
        return self

    def feature_networks(self) -> list[nn.Module]:
        """The members [M]; for a member with a random prior, the trained part."""
        return [trained_part(member) for member in self.members]

    @property
    def shows_features(self) -> bool:
        """Whether the members run one by one."""
        return not self.is_stacked

    def _run(self, x: Any, which: Sequence[int] | None) -> Tensor:
        """Outputs of the members ``which`` (ascending, distinct), or of all."""
        members = self.members if which is None else [self.members[i] for i in which]
        shared = not self._may_change_inputs or torch.compiler.is_compiling()
        return torch.stack([self.read_output.call(member, x if shared else own_batch(x)) for member in members])

    @property
    def _may_change_inputs(self) -> bool:
        """Whether a member may change its input in place, like the steps of a LightningModule do; each member then gets a copy."""
        one = self.members[0]
        return len(self.members) > 1 and (self.read_output.predict_fn is not None or hasattr(one, "training_step"))

    def _run_each(self, xs: Tensor) -> Tensor:
        return torch.stack([self.read_output.call(member, x) for member, x in zip(self.members, xs, strict=True)])

    def _check_member(self, i: int) -> int:
        if not 0 <= i < self.num_indices:
            raise InputError(f"A member's number must be in [0, {self.num_indices}), but it is {i}.")
        return i

    def _check_index(self, index: Tensor) -> list[int]:
        if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point() or not len(index):
            got = f"{index.dtype} of shape {list(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise InputError(f"`index` must be member numbers, an integer tensor [Z], but it is {got}.")
        wanted: list[int] = index.tolist()
        if min(wanted) < 0 or max(wanted) >= self.num_indices:
            raise InputError(
                f"`index` must hold member numbers in [0, {self.num_indices}), but it holds "
                f"{min(wanted)} to {max(wanted)}."
            )
        return wanted
