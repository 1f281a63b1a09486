"""Power iteration, which tracks the norm of a layer's linear operator during training."""

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.networks.spectral_norm.bound import Bound
from lightning_uq.networks.spectral_norm.steps import Step, divide, find_steps
from lightning_uq.networks.spectral_norm.tensors import full_precision, lasting, random_unit, stamp, unit


class PowerIteration(Bound, ABC):
    """W -> W / (max(1, sigma / coefficient) + eps), with sigma = <u, A v> and A the layer's linear operator.

    Args:
        weight: The weight to bound.
        u_shape: Shape of one output of the operator; an unknown size is 0.
        v_shape: Shape of one input.
        coefficient: The largest allowed norm of the operator.
        n_power_iterations: Steps of the power iteration in each training forward.
        n_warmup_iterations: Steps at the first forward.
        eps: Number added to the divisor of the weight.

    Attributes:
        u: Left singular vector, in the shape of one output of the layer.
        v: Right singular vector, in the shape of one input.
        sigma: The norm at the last training forward or at the warm-up; 0 before. Evaluation changes none of the three.
        ready: The next step, if it was already computed together with those of other layers.
        joins: Whether steps are computed together with those of other layers; False if the last one was not used.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor

    def __init__(
        self,
        weight: Tensor,
        u_shape: Sequence[int],
        v_shape: Sequence[int],
        coefficient: float,
        n_power_iterations: int,
        n_warmup_iterations: int,
        eps: float,
    ) -> None:
        super().__init__(coefficient)
        self.n_power_iterations = n_power_iterations
        self.n_warmup_iterations = n_warmup_iterations
        self.eps = eps
        # The norm needs more digits than a low-precision weight.
        like = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("u", random_unit(u_shape, like, seed=0))
        self.register_buffer("v", random_unit(v_shape, like, seed=1))
        self.register_buffer("sigma", like.new_zeros(()))
        self._is_warm = False
        self.ready: Step | None = None
        self.joins = True
        self._folded: tuple[Tensor, tuple[int, int], Tensor] | None = None
        self._twins: weakref.WeakSet[PowerIteration] = weakref.WeakSet([self])

    @abstractmethod
    def operator(self, weight: Tensor, v: Tensor) -> Tensor:
        """The operator A applied to v."""

    @abstractmethod
    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """The transposed operator applied to u."""

    @abstractmethod
    def gradient(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The gradient of <u, A v> with respect to the weight, which depends only on the weight's shape."""

    @abstractmethod
    def read_original(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """u and v in the shapes of this operator, from the flat vectors saved by the original code.

        Raises:
            RuntimeError: The vectors match neither the known size of the input nor a square one.
        """

    @property
    def is_sized(self) -> bool:
        """Whether the size of the input is known."""
        return self.v.numel() > 0

    def cold_state(self) -> dict[str, Tensor]:
        """The buffers with a norm of 0, so that the next forward warms up u and v again."""
        return {"u": self.u, "v": self.v, "sigma": torch.zeros_like(self.sigma)}

    def forward(self, weight: Tensor) -> Tensor:
        """The bounded weight. Only training takes steps of the power iteration."""
        if not self.is_sized:
            return weight
        if not self._is_warm:
            self._warm_up(weight)
        if self.training:
            self._folded = None
            # Only a parameter certainly has no axes of ``vmap`` and no tangent, which need plain operations.
            transformed = torch._C._are_functorch_transforms_active() or type(weight) is not nn.Parameter
            if transformed or torch.compiler.is_compiling():
                return self._step(weight)
            return divide(self, weight, self._next_step(weight))
        if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
            return self._bounded(weight)
        return self._fold(weight)

    def _step(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            w = weight.to(self.v.dtype)
            u, v = self._iterate(w.detach(), self.n_power_iterations)
            stretched = self.operator(w, v)
            u = unit(stretched.detach(), u)  # the last half step: u and sigma share one product
            sigma = (u * stretched).sum()
            # The buffers change in place, but the graph holds the new tensors: a second forward before the backward is safe.
            with torch.no_grad():
                self.u.copy_(u)
                self.v.copy_(v)
                self.sigma.copy_(sigma)
            return self._divided(weight, w, sigma)

    def can_join(self, weight: Tensor) -> bool:
        """Whether the next training forward needs only a step for this weight."""
        return self.training and self.joins and self.is_sized and self._is_warm and weight.device == self.v.device

    def _next_step(self, weight: Tensor) -> Step:
        """The step found at the start of the network's forward, or else one found for this layer alone."""
        ready, self.ready, self.joins = self.ready, None, True
        is_fresh = ready is not None and ready.weight is weight and ready.stamp == stamp(weight)
        step = ready if ready is not None and is_fresh else find_steps([self], [weight])[0]
        # The buffers change in place, but the graph holds the new tensors: a second forward before the backward is safe.
        with torch.no_grad():
            torch._foreach_copy_([self.u, self.v, self.sigma], [step.u, step.v, step.sigma])
        return step

    def _bounded(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            # A running average of unit vectors is shorter than one.
            return self.bounded_by(weight, unit(self.u, self.u), unit(self.v, self.v))

    def bounded_by(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The bounded weight for given u and v, with all operations visible to autograd."""
        w = weight.to(v.dtype)
        return self._divided(weight, w, (u * self.operator(w, v)).sum())

    def _divided(self, weight: Tensor, w: Tensor, sigma: Tensor) -> Tensor:
        return (w / ((sigma / self.coefficient).clamp(min=1) + self.eps)).to(weight.dtype)

    def _fold(self, weight: Tensor) -> Tensor:
        now = stamp(weight)
        if self._folded is not None and now is not None:
            # The source is kept alive, so that no other tensor can get its address.
            source, then, folded = self._folded
            if source is weight and then == now:
                return folded
        with lasting(weight), torch.no_grad():
            folded = self._bounded(weight)
        self._folded = None if now is None else (weight, now, folded)
        return folded

    def _iterate(self, w: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """``num_steps`` steps, without the last half step u = A v."""
        with torch.no_grad():
            u, v = self.u, self.v
            for i in range(num_steps):
                if i:
                    u = unit(self.operator(w, v), u)
                v = unit(self.adjoint(w, u), v)
            return u, v

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _warm_up(self, weight: Tensor) -> None:
        with lasting(self.v), torch.no_grad(), full_precision(weight):
            w = weight.detach().to(self.v.dtype)
            if self.n_warmup_iterations:
                u, v = self._iterate(w, self.n_warmup_iterations)
                stretched = self.operator(w, v)
                self.u.copy_(unit(stretched, u))
                self.v.copy_(v)
                self.sigma.copy_(torch.linalg.vector_norm(stretched))
        self._is_warm = True

    # ------------------------------------------------------------------ modes, devices, copies and files

    def train(self, mode: bool = True) -> "PowerIteration":
        """Set the mode, and drop the cached weight."""
        self._folded = self.ready = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "PowerIteration":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._folded = self.ready = None
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_folded", "_twins", "ready")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._folded = self.ready = None
        self._twins = weakref.WeakSet([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> "PowerIteration":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        if not self.is_sized:
            # A weight average is copied before the first forward and receives buffers after it: both need the same size.
            copied._twins = self._twins
            self._twins.add(copied)
        return copied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("u", "v"):
            own, new = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(new, Tensor) and new.ndim == own.ndim and new.shape[:1] == own.shape[:1] != new.shape:
                own.data = own.new_zeros(new.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._folded = self.ready = None
        sigma = state_dict.get(prefix + "sigma")
        self._is_warm = isinstance(sigma, Tensor) and not sigma.is_meta and bool(sigma > 0)

    def extra_repr(self) -> str:
        """The settings for ``print``."""
        return f"{super().extra_repr()}, n_power_iterations={self.n_power_iterations}"
