"""One trunk with many heads: an ensemble that shares the first part of its network."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.ensemble.loop import EnsembleNetwork
from lightning_uq.networks.ensemble.shared_gradient import share_gradient
from lightning_uq.networks.output import OutputReader, PredictFn

_HEAD = "head."


class SharedTrunkNetwork(EnsembleNetwork):
    """M heads on one trunk: the trunk runs once per batch, and each head maps its features to outputs.

    A trained trunk learns from the mean of the heads' losses: with a loss that is the sum over members, its gradient is divided by M. A
    trunk in which no parameter requires a gradient is frozen, and stays in eval mode.

    Args:
        trunk: Maps x to features, a tensor [B, ...].
        heads: The heads as an ensemble; see :func:`build_ensemble`.

    Attributes:
        trunk: The trunk.
        heads: The heads.

    Raises:
        InputError: In a call, if the trunk does not return a tensor.

    Example:
        >>> from lightning_uq.networks.ensemble import build_ensemble
        >>> heads = build_ensemble([nn.Linear(8, 3) for _ in range(5)])
        >>> network = SharedTrunkNetwork(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), heads)
        >>> network(torch.zeros(2, 4)).shape
        torch.Size([5, 2, 3])
        >>> [name for name in network.state_dict() if name.startswith("trunk")]
        ['trunk.0.weight', 'trunk.0.bias']
    """

    def __init__(self, trunk: nn.Module, heads: EnsembleNetwork) -> None:
        EpistemicNetwork.__init__(self, heads.indexer, heads.read_output)
        self.trunk = trunk
        self.heads = heads
        self.execution = heads.execution
        self.is_stacked = heads.is_stacked
        self.execution_reason = f"One trunk, with heads. {heads.execution_reason}".strip()
        self._features = OutputReader()
        self.train(heads.training)

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter of the trunk requires a gradient."""
        return not any(p.requires_grad for p in self.trunk.parameters())

    def frozen_parts(self) -> list[nn.Module]:
        """The priors of the heads, and a frozen trunk."""
        return [*super().frozen_parts(), *([self.trunk] if self.is_frozen else [])]

    def call_by(self, predict_fn: PredictFn | str) -> None:
        """Not possible: ``predict_fn`` would have to call the trunk alone."""
        raise UnsupportedError(
            "A `predict_fn` calls whole members, but these share a trunk. Remove `predict_fn` or `trunk`."
        )

    # ------------------------------------------------------------------ calls

    def features(self, x: Any) -> Tensor:
        """The trunk's output for x. Backward, its gradient is divided by M.

        Raises:
            InputError: It is not a tensor.
        """
        if self.trunk.training and self.is_frozen:  # somebody froze it after the last `train()`
            self.trunk.eval()
        found = self._features.raw(self.trunk, x)
        if not isinstance(found, Tensor):
            raise InputError(
                f"`trunk` must return features as one tensor, but it returned a {type(found).__name__}. Wrap it in a module that picks "
                "the tensor."
            )
        return share_gradient(found, self.num_indices)

    def _run(self, x: Any, which: Sequence[int] | None) -> Tensor:
        return self.heads._run(self.features(x), which)

    def _run_each(self, xs: Tensor) -> Tensor:
        features = self.features(xs.flatten(0, 1))
        return self.heads._run_each(features.reshape(*xs.shape[:2], *features.shape[1:]))

    # ------------------------------------------------------------------ members

    def _copy_of_member(self, i: int) -> nn.Module:
        return _member(copy.deepcopy(self.trunk), self.heads.member(i))

    def load_member(self, i: int, module: nn.Module) -> None:
        """Load the head of a changed :meth:`member`.

        Raises:
            InputError: Its trunk has other values, which all members would get, or it differs in more than values.
        """
        if not isinstance(module, nn.Sequential) or list(module._modules) != ["trunk", "head"]:
            raise InputError(
                f"`module` must be a trunk and a head, such as `member({i})`, but it is a {type(module).__name__}."
            )
        own, given = self.trunk.state_dict(), module[0].state_dict()
        if own.keys() != given.keys() or any(not torch.equal(own[name], given[name]) for name in own):
            raise InputError(
                "`module` has another trunk, which all members share. Load it by `network.trunk.load_state_dict`."
            )
        self.heads.load_member(i, module[1])

    def member_tensors(self, i: int) -> dict[str, Tensor]:
        """See :meth:`EnsembleNetwork.member_tensors`; those of the trunk belong to all members."""
        trunk = {f"trunk.{name}": t for name, t in (*self.trunk.named_parameters(), *self.trunk.named_buffers())}
        return {**trunk, **{_HEAD + name: tensor for name, tensor in self.heads.member_tensors(i).items()}}

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """The state of the trunk and of head ``i``, under the names of :meth:`member`."""
        head = {_HEAD + name: tensor for name, tensor in self.heads.member_state_dict(i).items()}
        return {**self.trunk.state_dict(prefix="trunk."), **head}

    def share(self, members: range) -> NoReturn:
        """Not possible: processes that train different members would train different trunks."""
        raise UnsupportedError("Members that share a trunk cannot train on different processes. Use strategy='ddp'.")

    def unstacked(self) -> EnsembleNetwork:
        """The trunk with copies of the heads that run one after the other."""
        return SharedTrunkNetwork(self.trunk, self.heads.unstacked())

    @property
    def called_network(self) -> nn.Module | None:
        """The trunk."""
        return self.trunk

    def feature_networks(self) -> list[nn.Module]:
        """The trunk with each head [M], without copies."""
        return [_member(self.trunk, head) for head in self.heads.feature_networks()]

    @property
    def _may_change_inputs(self) -> bool:
        return False

    def _all_modules(self) -> Iterable[nn.Module]:
        return [*self.trunk.modules(), *self.heads._all_modules()]

    # ------------------------------------------------------------------ optimization

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The trunk's parameters, then the groups of the heads."""
        return [list(self.trunk.parameters()), *self.heads.parameter_groups()]

    def clip_gradients_per_member(
        self, clip_val: float, algorithm: str = "norm", *, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clip each head's gradient separately, and the trunk's; return the heads' norms."""
        norms = self.heads.clip_gradients_per_member(clip_val, algorithm, norm_type=norm_type)
        trained = [p for p in self.trunk.parameters() if p.grad is not None]
        if norms is None:
            nn.utils.clip_grad_value_(trained, clip_val)
        else:
            nn.utils.clip_grad_norm_(trained, clip_val, norm_type)
        return norms


def _member(trunk: nn.Module, head: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(trunk=trunk, head=head))
