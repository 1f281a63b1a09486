"""Ensembles as epistemic networks: the index is a member's number, and the set is finite."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks._alike import check_alike, named_tensors, skeleton
from lightning_uq.networks._mapped import call_mapped, check_mappable
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.calling import call_network
from lightning_uq.networks.compiled import take_compiled_names
from lightning_uq.networks.indexers import EnsembleIndexer
from lightning_uq.networks.output import Output, OutputReader
from lightning_uq.networks.priors.members import trained_part
from lightning_uq.networks.stacked import lift

Execution = Literal["loop", "stacked", "vmap", "auto"]


class EnsembleNetwork(EpistemicNetwork):
    """M networks side by side; the index [Z] holds member numbers. Here the members run one after the other.

    A subclass may run them at once. All share this interface, give the same numbers, and name their state per member
    (``members.{i}.<name>``), so that a checkpoint of one loads into another.

    Args:
        members: The M networks, each mapping x [B, ...] to outputs [B, ...]. They become submodules as they are.
        output: What a member returns: see :class:`~lightning_uq.networks.output.OutputReader`.
        execution_reason: One sentence that says why this execution was chosen.

    Attributes:
        execution: How the members run: ``"loop"``, ``"stacked"`` or ``"vmap"``.
        execution_reason: Why, in a sentence that a caller may log.
        is_stacked: Whether one parameter holds all members' slices [M, ...] (then :meth:`parameter_groups` is one list).
        num_indices: M.

    Raises:
        InputError: There is no member, or one is no module.

    Example:
        >>> network = EnsembleNetwork([nn.Linear(2, 3) for _ in range(4)])
        >>> network(torch.zeros(5, 2), torch.tensor([0, 2])).shape
        torch.Size([2, 5, 3])
        >>> network.forward_each(torch.zeros(4, 5, 2)).shape
        torch.Size([4, 5, 3])
    """

    execution: str = "loop"
    is_stacked: bool = False
    num_indices: int  # that of the indexer, which is finite
    members: nn.ModuleList

    def __init__(self, members: Iterable[nn.Module], output: Output = "logits", *, execution_reason: str = "") -> None:
        members = _check_members(members)
        super().__init__(EnsembleIndexer(len(members)), output)
        self.execution_reason = execution_reason
        self._adopt(members)

    def _adopt(self, members: list[nn.Module]) -> None:
        self.members = nn.ModuleList(members)

    def forward(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] under the members that ``index`` [Z] names.

        A member that is named twice runs once. Without ``index`` all members run, in order.

        Raises:
            InputError: ``index`` is no list of member numbers.
        """
        if index is None:
            return self._run(x, None)
        if torch.compiler.is_compiling() and not self.training:  # a graph cannot ask which members are wanted
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

    def forward_each(self, xs: Tensor) -> Tensor:
        """Outputs [M, B, ...] where member i sees its own batch ``xs[i]`` of ``xs`` [M, B, ...]."""
        if not isinstance(xs, Tensor) or xs.ndim < 1 or len(xs) != self.num_indices:
            got = list(xs.shape) if isinstance(xs, Tensor) else type(xs).__name__
            raise InputError(
                f"Expected argument `xs` to hold one batch a member, shape [{self.num_indices}, B, ...], but got {got}."
            )
        return self._run_each(xs)

    def member(self, i: int) -> nn.Module:
        """Member ``i`` as a plain network; in a loop the submodule itself, else a copy with its weights."""
        return self.members[self._check_member(i)]

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """State of member ``i`` under its own names, as its ``state_dict()`` would give alone."""
        return self.members[self._check_member(i)].state_dict()

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters, one list a member; one list of stacked leaves [M, ...] where ``is_stacked``."""
        return [list(member.parameters()) for member in self.members]

    def clip_gradients_per_member(
        self, clip_val: float, algorithm: str = "norm", *, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clip each member's gradient by itself, as ``torch.nn.utils`` would for the member alone.

        One norm over all members would let the largest gradient scale down the others.

        Args:
            clip_val: The largest norm, or the largest absolute value.
            algorithm: ``"norm"`` (``clip_grad_norm_``) or ``"value"`` (``clip_grad_value_``).
            norm_type: Order of the norm.

        Returns:
            The members' norms [M] before clipping, or None for ``"value"``.

        Raises:
            InputError: ``algorithm`` is neither.
        """
        if _check_algorithm(algorithm) == "value":
            with_gradient = [p for p in self.parameters() if p.grad is not None]
            if with_gradient:  # torch fails on none
                nn.utils.clip_grad_value_(with_gradient, clip_val)
            return None
        return torch.stack([nn.utils.clip_grad_norm_(g, clip_val, norm_type) for g in self.parameter_groups()])

    def feature_networks(self) -> list[nn.Module]:
        """The members [M]; of a member with a random prior, the trained part."""
        return [trained_part(self.member(i)) for i in range(self.num_indices)]

    @property
    def shows_features(self) -> bool:
        """Whether the members run one by one."""
        return not self.is_stacked

    def _run(self, x: Any, which: Sequence[int] | None) -> Tensor:
        """Outputs of the members ``which`` (ascending, distinct), or of all."""
        members = self.members if which is None else [self.members[i] for i in which]
        return torch.stack([self.read_output(call_network(member, x)) for member in members])

    def _run_each(self, xs: Tensor) -> Tensor:
        return torch.stack([self.read_output(member(x)) for member, x in zip(self.members, xs, strict=True)])

    def _check_member(self, i: int) -> int:
        if not 0 <= i < self.num_indices:
            raise InputError(f"Expected a member number in [0, {self.num_indices}), but got {i}.")
        return i

    def _check_index(self, index: Tensor) -> list[int]:
        if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point() or not len(index):
            got = f"{index.dtype} of shape {list(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise InputError(f"Expected argument `index` to be member numbers, an integer tensor [Z], but got {got}.")
        wanted: list[int] = index.tolist()
        if min(wanted) < 0 or max(wanted) >= self.num_indices:
            raise InputError(
                f"Expected argument `index` to hold member numbers in [0, {self.num_indices}), but got values "
                f"{min(wanted)} to {max(wanted)}."
            )
        return wanted


class StackedEnsembleNetwork(EnsembleNetwork):
    """M networks of one architecture as one network over stacked parameters [M, ...]; see :class:`EnsembleNetwork`.

    One member's forward pass is translated, operation by operation, into one for all: a linear layer of M members is a
    single batched product. Each element-wise mask (dropout) is drawn for every member by itself, and BatchNorm keeps
    each member's statistics. There are no submodules: :meth:`member` gives a copy of one.

    Args:
        members: The M networks; their weights are copied.
        output: What a member returns; a function that picks it is translated with the network.
        execution_reason: One sentence that says why this execution was chosen.

    Raises:
        UnsupportedError: The members differ in more than their weights, or do what has no stacked counterpart.

    Example:
        >>> members = [nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(4)]
        >>> network, loop = StackedEnsembleNetwork(members), EnsembleNetwork(members)
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(network(x), loop(x), atol=1e-6)
        True
        >>> [tuple(p.shape) for p in network.parameters()]
        [(4, 8, 2), (4, 8), (4, 3, 8), (4, 3)]
        >>> list(network.state_dict()) == list(loop.state_dict())
        True
    """

    execution = "stacked"
    is_stacked = True

    def _adopt(self, members: list[nn.Module]) -> None:
        check_alike(members)
        # A copy without values: what a member looks like, hidden from the parameters and the submodules.
        self._hidden = (skeleton(members[0]),)
        self._keys = {name: "members/" + name.replace(".", "/") for name, _ in named_tensors(members[0])}
        self._state_names = tuple(members[0].state_dict())
        for name, parameter in members[0].named_parameters():
            values = torch.stack([m.get_parameter(name).detach() for m in members])
            self.register_parameter(self._keys[name], nn.Parameter(values, requires_grad=parameter.requires_grad))
        for name, _ in members[0].named_buffers():
            values = torch.stack([m.get_buffer(name).detach() for m in members])
            self.register_buffer(self._keys[name], values, persistent=name in self._state_names)
        self.training = members[0].training
        self._prepare()

    def _prepare(self) -> None:
        """Translate the forward pass in both modes, so that what cannot be translated is told now."""
        self._programs = {mode: lift(self._hidden[0].train(mode), self.read_output) for mode in (True, False)}

    def _skeleton(self) -> nn.Module:
        # A caller may set `training` without calling `train` (Lightning does, after a validation).
        hidden = self._hidden[0]
        return hidden if hidden.training == self.training else hidden.train(self.training)

    # A program is made from the skeleton, and is made again where the network is copied or unpickled.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_programs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {**self._parameters, **self._buffers}
        return {name: tensors[key] for name, key in self._keys.items()}  # type: ignore[misc]  # none is None

    def _run(self, x: Any, which: Sequence[int] | None) -> Tensor:
        tensors = self._tensors()
        if which is None:
            return self._call(tensors, x, None)
        index = torch.tensor(which, device=next(iter(tensors.values())).device)
        chosen = {name: tensor.index_select(0, index) for name, tensor in tensors.items()}
        output = self._call(chosen, x, None)
        if self.training:
            with torch.no_grad():
                for name, key in self._keys.items():
                    if key in self._buffers:
                        tensors[name].index_copy_(0, index, chosen[name])
        return output

    def _run_each(self, xs: Tensor) -> Tensor:
        return self._call(self._tensors(), xs, 0)

    def _call(self, tensors: dict[str, Tensor], x: Any, x_axis: int | None) -> Tensor:
        if not isinstance(x, Tensor):
            raise InputError(
                f"Expected argument `x` to be a tensor where members are stacked, but got {type(x).__name__}."
            )
        if x_axis is None:
            x = x.expand(len(next(iter(tensors.values()))), *x.shape)
        output = self._programs[self.training](x, tensors)
        return output if callable(self.read_output.output) else self.read_output(output)

    def member(self, i: int) -> nn.Module:
        """A copy of member ``i`` with its weights, as a plain network."""
        i = self._check_member(i)
        network = copy.deepcopy(self._skeleton())
        for name, tensor in self._tensors().items():
            owner_name, _, own = name.rpartition(".")
            owner = network.get_submodule(owner_name)
            value = tensor[i].detach().clone(memory_format=torch.contiguous_format)
            if own in owner._parameters:
                owner._parameters[own] = nn.Parameter(value, requires_grad=tensor.requires_grad)
            else:
                owner._buffers[own] = value
        return network

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """State of member ``i`` under its own names; copies."""
        i, tensors = self._check_member(i), self._tensors()
        return {
            name: tensors[name][i].detach().clone(memory_format=torch.contiguous_format) for name in self._state_names
        }

    def _all_modules(self) -> Iterable[nn.Module]:
        return self._skeleton().modules()

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """One list of the stacked leaves [M, ...]."""
        return [list(self.parameters())]

    def clip_gradients_per_member(
        self, clip_val: float, algorithm: str = "norm", *, norm_type: float = 2.0
    ) -> Tensor | None:
        """See :meth:`EnsembleNetwork.clip_gradients_per_member`; a member's gradient is its slice of each leaf's."""
        if _check_algorithm(algorithm) == "value":
            return super().clip_gradients_per_member(clip_val, algorithm)
        grads = [p.grad.reshape(self.num_indices, -1) for p in self.parameters() if p.grad is not None]
        if not grads:
            return torch.zeros(self.num_indices)
        norms = torch.stack([torch.linalg.vector_norm(g, norm_type, dim=1).to(grads[0].device) for g in grads])
        norm: Tensor = torch.linalg.vector_norm(norms, norm_type, dim=0)
        factor = (clip_val / (norm + 1e-6)).clamp(max=1.0)
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(factor.view(-1, *[1] * (p.ndim - 1)).to(p.grad))
        return norm

    # The state dict has the names that a loop would have.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        tensors = self._tensors()
        for i in range(self.num_indices):
            for name in self._state_names:
                value = tensors[name][i]
                destination[f"{prefix}members.{i}.{name}"] = value if keep_vars else value.detach()
            if hasattr(destination, "_metadata"):
                for name, module in self._hidden[0].named_modules(prefix=f"{prefix}members.{i}"):
                    destination._metadata[name] = {"version": module._version}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        take_compiled_names(self, state_dict, prefix)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        tensors, expected = self._tensors(), set()
        given: dict[str, list[Tensor]] = {name: [] for name in self._state_names}
        for i in range(self.num_indices):
            for name in self._state_names:
                key, shape = f"{prefix}members.{i}.{name}", tensors[name].shape[1:]
                expected.add(key)
                if key not in state_dict:
                    missing_keys.append(key)
                elif state_dict[key].shape != shape:
                    error_msgs.append(
                        f"size mismatch for {key}: copying a param with shape {state_dict[key].shape} from checkpoint, the "
                        f"shape in current model is {shape}."
                    )
                elif assign:
                    given[name].append(state_dict[key])
                else:
                    with torch.no_grad():
                        tensors[name][i].copy_(state_dict[key])
        for name, values in given.items():
            if len(values) == self.num_indices:
                self._assign(name, torch.stack(values).detach())
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in expected]

    def _assign(self, name: str, values: Tensor) -> None:
        key = self._keys[name]
        old = self._parameters.get(key)
        if old is None:
            self._buffers[key] = values
        else:
            self._parameters[key] = nn.Parameter(values, requires_grad=old.requires_grad)


class VmapEnsembleNetwork(StackedEnsembleNetwork):
    """As :class:`StackedEnsembleNetwork`, run by ``torch.vmap``: any architecture that it can map, convolutions included.

    Args:
        members: The M networks; their weights are copied.
        output: What a member returns.
        execution_reason: One sentence that says why this execution was chosen.

    Raises:
        UnsupportedError: The members differ in more than their weights, or (at the first call) do what cannot be mapped.

    Example:
        >>> members = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()) for _ in range(3)]
        >>> VmapEnsembleNetwork(members)(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([3, 5, 8])
    """

    execution = "vmap"

    def _prepare(self) -> None:
        pass

    def _call(self, tensors: dict[str, Tensor], x: Any, x_axis: int | None) -> Tensor:
        return call_mapped(self._skeleton(), self.read_output, tensors, x, x_axis)


def build_ensemble(
    members: Iterable[nn.Module],
    execution: Execution = "auto",
    *,
    output: Output = "logits",
    mixed_precision: bool = False,
) -> EnsembleNetwork:
    """An ensemble of ``members`` that runs as ``execution`` says; ``.execution_reason`` says what came of it and why.

    ``"auto"`` stacks the members where they are alike and made of layers that stack (linear, norms, activations,
    dropout), uses ``torch.vmap`` for other alike members that lie on a GPU, and else runs them one after the other: so
    convolutions on a CPU, where batching gains nothing, and LightningModules.

    Args:
        members: The M networks.
        execution: ``"loop"``, ``"stacked"``, ``"vmap"`` or ``"auto"``.
        output: What a member returns: see :class:`~lightning_uq.networks.output.OutputReader`.
        mixed_precision: Whether the members will run under autocast, which ``"auto"`` then does not mix with
            ``torch.vmap``: autocast reaches the layers that this package knows of, not a member's own products.

    Raises:
        InputError: ``execution`` is none of these, or the members are no modules.
        UnsupportedError: The members cannot run as asked; the message names the module or operation.

    Example:
        >>> network = build_ensemble([nn.Linear(2, 3) for _ in range(5)])
        >>> network.execution, network.execution_reason
        ('stacked', 'Ensemble of 5 runs stacked: its members are alike, and one batched product serves them all.')
    """
    if execution not in ("loop", "stacked", "vmap", "auto"):
        raise InputError(
            f"Expected argument `execution` to be 'loop', 'stacked', 'vmap' or 'auto', but got {execution!r}."
        )
    members = _check_members(members)
    begin = f"Ensemble of {len(members)} runs"
    if execution == "auto":
        return _choose(members, output, mixed_precision, begin)
    kind = {"loop": EnsembleNetwork, "stacked": StackedEnsembleNetwork, "vmap": VmapEnsembleNetwork}[execution]
    how = "in a loop" if execution == "loop" else execution if execution == "stacked" else "under torch.vmap"
    try:
        return kind(members, output, execution_reason=f"{begin} {how}, as asked.")
    except UnsupportedError as error:
        raise UnsupportedError(
            f"execution={execution!r} does not support these members: {error}. Use execution='loop' or 'auto'."
        ) from error


def _choose(members: list[nn.Module], output: Output, mixed_precision: bool, begin: str) -> EnsembleNetwork:
    if len(members) == 1:
        return EnsembleNetwork(members, output, execution_reason=f"{begin} in a loop: one member has nothing to share.")
    why = "its members are alike, and one batched product serves them all"
    try:
        return StackedEnsembleNetwork(members, output, execution_reason=f"{begin} stacked: {why}.")
    except UnsupportedError as error:
        reason = str(error)
    if all(p.is_cuda for member in members for p in member.parameters()) and not mixed_precision:
        try:
            check_mappable(members[0], OutputReader(output))
            return VmapEnsembleNetwork(
                members,
                output,
                execution_reason=f"{begin} under torch.vmap: its members are alike, on a GPU, and {reason}.",
            )
        except UnsupportedError as error:
            reason = str(error)
    return EnsembleNetwork(members, output, execution_reason=f"{begin} in a loop: {reason}.")


def _check_members(members: Any) -> list[nn.Module]:
    """The members as a list, or an :class:`InputError`."""
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise InputError(f"Expected argument `members` to be a list of modules, but got one {type(members).__name__}.")
    listed = list(members)
    if not listed:
        raise InputError("Expected argument `members` to hold at least one module, but it is empty.")
    for i, member in enumerate(listed):
        if not isinstance(member, nn.Module):
            raise InputError(f"Expected argument `members` to hold torch.nn.Modules, but item {i} is {member!r}.")
    return listed


def _check_algorithm(algorithm: str) -> str:
    """``"norm"`` or ``"value"``, also from Lightning's enumeration."""
    name = str(getattr(algorithm, "value", algorithm)).lower()
    if name not in ("norm", "value"):
        raise InputError(f"Expected argument `algorithm` to be 'norm' or 'value', but got {algorithm!r}.")
    return name
