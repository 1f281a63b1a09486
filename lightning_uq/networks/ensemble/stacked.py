"""An ensemble of one architecture as one network over stacked parameters."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.networks.compiled import take_compiled_names
from lightning_uq.networks.ensemble.alike import check_alike, named_tensors, skeleton
from lightning_uq.networks.ensemble.checks import check_algorithm
from lightning_uq.networks.ensemble.lift import lift
from lightning_uq.networks.ensemble.loop import EnsembleNetwork
from lightning_uq.networks.indexers import EnsembleIndexer
from lightning_uq.networks.priors.members import trained_part

_CACHED_NUMBERS = 1 << 17
"""The number of activations of a layer that run at once, 0.5 MB in float32: they fit into a processor's cache, and an allocator keeps
their memory between layers. Beyond it, running the members at once takes up to 1.6 times as long as running them one after another."""


class StackedEnsembleNetwork(EnsembleNetwork):
    """M networks of one architecture as one network over stacked parameters [M, ...]; see :class:`EnsembleNetwork`.

    One member's forward pass is translated, operation by operation, into one for all members. A linear layer of M
    members becomes a single batched product. Each member has its own dropout masks and BatchNorm statistics. There are no
    submodules: :meth:`member` returns a copy, and :meth:`load_member` loads one.

    Args:
        members: The M networks; their weights are copied.
        output: The kind of a member's output; a function that selects it is translated together with the network.
        execution_reason: A sentence that explains the choice of this execution.

    Raises:
        UnsupportedError: The members differ in more than their weights, or an operation has no stacked counterpart.

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
        # A member without values, in a tuple so that it does not become a submodule.
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
        """Translate the forward pass in both modes, so that the constructor raises any error."""
        self._programs = {mode: lift(self._hidden[0].train(mode), self.read_output) for mode in (True, False)}

    def _skeleton(self) -> nn.Module:
        # A caller may set `training` without calling `train` (Lightning does, after a validation).
        hidden = self._hidden[0]
        return hidden if hidden.training == self.training else hidden.train(self.training)

    # Copies and unpickled networks build their programs again.

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
                f"Stacked members take one tensor, but argument `x` is a {type(x).__name__}. Use execution='loop' or 'vmap'."
            )
        if x_axis is None:
            x = x.expand(len(next(iter(tensors.values()))), *x.shape)
        program, size = self._programs[self.training], self._members_at_once(x, tensors)
        if size >= len(x):
            output = program(x, tensors)
        else:
            parts = zip(*(torch.split(tensor, size) for tensor in tensors.values()), strict=True)
            groups = [dict(zip(tensors, part, strict=True)) for part in parts]
            output = torch.cat([program(*own) for own in zip(torch.split(x, size), groups, strict=True)])
        return output if callable(self.read_output.output) else self.read_output(output)

    def _members_at_once(self, x: Tensor, tensors: dict[str, Tensor]) -> int:
        """The number of members that run at once on x [M, B, ..., in]: all, unless the activations of an inference would exceed a processor's cache."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return len(x)
        rows = x.numel() // max(1, len(x) * x.shape[-1])
        widest = max((tensor.shape[1] for tensor in tensors.values() if tensor.ndim > 1), default=1)
        return max(1, _CACHED_NUMBERS // max(1, rows * widest))

    def _copy_of_member(self, i: int) -> nn.Module:
        own = self.member_tensors(i)
        return self._member_with(
            {name: row.detach().clone(memory_format=torch.contiguous_format) for name, row in own.items()}
        )

    def _member_with(self, own: Mapping[str, Tensor]) -> nn.Module:
        """A member with these tensors, which are not copied."""
        network, stacked = copy.deepcopy(self._skeleton()), self._tensors()
        for name, row in own.items():
            owner_name, _, last = name.rpartition(".")
            owner = network.get_submodule(owner_name)
            is_parameter = isinstance(getattr(owner, last), nn.Parameter)
            setattr(owner, last, nn.Parameter(row.detach(), stacked[name].requires_grad) if is_parameter else row)
        return network

    def member_tensors(self, i: int) -> dict[str, Tensor]:
        """See :meth:`EnsembleNetwork.member_tensors`; these are rows of the stacked tensors."""
        return {name: tensor[i] for name, tensor in self._tensors().items()}

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """The state of member ``i`` under its own names, as copies."""
        i, tensors = self._check_member(i), self._tensors()
        return {
            name: tensors[name][i].detach().clone(memory_format=torch.contiguous_format) for name in self._state_names
        }

    @property
    def called_network(self) -> nn.Module | None:
        """A member without values."""
        return self._skeleton()

    def unstacked(self) -> EnsembleNetwork:
        """Copies of the members that run one after the other."""
        return EnsembleNetwork([self.member(i) for i in range(self.num_indices)], self.read_output.output)

    def feature_networks(self) -> list[nn.Module]:
        """Members [M] that view rows of the stacked tensors without copies; for a member with a random prior, the trained part."""
        return [trained_part(self._member_with(self.member_tensors(i))) for i in range(self.num_indices)]

    def _all_modules(self) -> Iterable[nn.Module]:
        return self._skeleton().modules()

    def share(self, members: range) -> EnsembleNetwork:
        """These consecutive members alone; their parameters are rows of this network's, but leaves with gradients of their own."""
        rows = slice(members.start, members.stop)
        own = copy.copy(self)
        own.indexer = EnsembleIndexer(len(members))
        own._parameters = {
            key: None if p is None else nn.Parameter(p.detach()[rows], requires_grad=p.requires_grad)
            for key, p in self._parameters.items()
        }
        own._buffers = {key: None if b is None else b[rows] for key, b in self._buffers.items()}
        return own

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """One list of the stacked parameters [M, ...]."""
        return [list(self.parameters())]

    def clip_gradients_per_member(
        self, clip_val: float, algorithm: str = "norm", *, norm_type: float = 2.0
    ) -> Tensor | None:
        """See :meth:`EnsembleNetwork.clip_gradients_per_member`; a member's gradient is its slice of each gradient."""
        if check_algorithm(algorithm) == "value":
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

    # The state dict has the names of a loop ensemble.

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
