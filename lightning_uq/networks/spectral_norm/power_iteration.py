"""Spectral normalisation: bound how far every layer can stretch its input, in the norm of the operator it really is."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_uq.errors import InputError, NotFittedError, UnsupportedError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONVOLUTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, F.conv_transpose1d),
    nn.Conv2d: (F.conv2d, F.conv_transpose2d),
    nn.Conv3d: (F.conv3d, F.conv_transpose3d),
}
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


def spectral_normalize(
    module: ModuleT,
    coeff: float = 3.0,
    n_power_iterations: int = 1,
    bound_batchnorm: bool = False,
    *,
    exclude: Sequence[str] = (),
    conv_norm: Literal["operator", "reshaped"] = "operator",
    n_warmup_iterations: int = 15,
    eps: float = 0.0,
) -> ModuleT:
    r"""Bound the Lipschitz constant of every linear layer and convolution in ``module`` by ``coeff``, in place.

    The bound is soft: :math:`\bar W = W / \max(1, \sigma / c)`, where :math:`\sigma` is the largest singular value of the
    layer as a linear operator, so that a layer within the bound is left alone. Power iteration follows :math:`\sigma` by
    ``n_power_iterations`` steps a training forward; the gradient flows through :math:`\sigma = u^T W v`, not through u
    and v. A convolution's operator depends on the size of its input: the size is learnt at its first forward, and again
    whenever it changes while training. Until then ``weight`` is the unbounded one. In evaluation the bound is the one
    that training saw last, at any input size.

    The layers keep their classes' behaviour; their trained parameter becomes ``parametrizations.weight.original`` (the
    same object, so an optimizer made before goes on). Copies, pickles, checkpoints, weight averages, autocast and low
    precision (u, v and sigma are float32 or better) are safe. In evaluation without gradient the bounded weight is
    computed once and reused until ``eval()``, ``train()``, ``load_state_dict`` or a change of the parameter; only a
    write through ``.data`` goes unseen, so call ``eval()`` after one. A compiled network computes it in its graph: use
    :func:`remove_spectral_norm` for what is only deployed.

    Two processes agree on u and v: they start from a fixed seed, never from the global random state, and as buffers
    they are what ``DistributedDataParallel`` broadcasts. All processes must see inputs of one size in one step.

    ``load_state_dict`` also takes a plain network's weights, and those of the original code (``weight_orig``,
    ``weight_u``, ``weight_v``, ``weight_sigma``).

    Args:
        module: The network, of any origin. Attention, recurrent layers and embeddings have no such operator and are
            left alone.
        coeff: The bound c on the norm of one layer.
        n_power_iterations: Steps of the power iteration in each training forward.
        bound_batchnorm: Also bound :math:`\max_i |\gamma_i| / \sqrt{\mathrm{var}_i + \epsilon}` of every BatchNorm, with
            its running variance. Without it, the original's choice, the network as a whole has no Lipschitz bound.
        exclude: Names of submodules to leave alone, with what is in them, such as ``["fc"]`` for the last layer.
        conv_norm: ``"operator"``, or ``"reshaped"`` for the norm of the kernel as a matrix [out, in * k * k], as in SNGP:
            cheaper, and no bound of the operator. They agree where the kernel has one element and ``groups=1``.
        n_warmup_iterations: Steps at a layer's first forward, so that the bound holds from the start: the norm comes from
            below, and 15 steps leave about 3 % of it to find for a random 3x3 kernel. The original has 0.
        eps: Added to the divisor where a convolution's operator is bounded; the original adds 1e-5, always.

    Returns:
        The same module.

    Raises:
        InputError: An argument out of range, an unknown name in ``exclude``, nothing to bound, or a layer bound already.
        UnsupportedError: A layer whose operator is not known: a transposed convolution, a subclass with its own
            ``forward``, an uninitialized layer, a BatchNorm without scale or running variance.

    Source: Mukhoti et al., "Deep Deterministic Uncertainty", CVPR 2023 (arXiv 2102.11582); the soft bound and the norm
    of the convolution after Gouk et al., "Regularisation of neural networks by enforcing Lipschitz continuity", Machine
    Learning 110 (2021, arXiv 1804.04368), also for BatchNorm; Behrmann et al., ICML 2019 (arXiv 1811.00995).

    Example:
        >>> net = spectral_normalize(nn.Sequential(nn.Linear(2, 2, bias=False)), coeff=0.5)
        >>> with torch.no_grad():
        ...     _ = net[0].parametrizations.weight.original.copy_(torch.diag(torch.tensor([4.0, 1.0])))
        >>> net.eval()(torch.eye(2)).detach()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.1250]])
    """
    if not (math.isfinite(coeff) and coeff > 0):
        raise InputError(f"Expected argument `coeff` to be a positive number, but got {coeff}.")
    if n_power_iterations < 1:
        raise InputError(f"Expected argument `n_power_iterations` to be at least 1, but got {n_power_iterations}.")
    if n_warmup_iterations < 0:
        raise InputError(f"Expected argument `n_warmup_iterations` to be at least 0, but got {n_warmup_iterations}.")
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"Expected argument `eps` to be at least 0, but got {eps}.")
    if conv_norm not in ("operator", "reshaped"):
        raise InputError(f"Expected argument `conv_norm` to be 'operator' or 'reshaped', but got {conv_norm!r}.")
    names = dict(module.named_modules())
    for name in exclude:
        if name not in names:
            raise InputError(f"Expected argument `exclude` to hold names of submodules, but there is no {name!r}.")

    chosen: list[tuple[nn.Module, _Bound]] = []
    for name, layer in names.items():
        if any(name == outer or name.startswith(f"{outer}.") for outer in exclude):
            continue
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if bound_batchnorm:
                _check_batchnorm(layer, name or "the module")
                chosen.append((layer, _BoundedBatchNorm(layer, coeff)))
        elif isinstance(layer, _LAYERS):
            kind = _check_layer(layer, name or "the module")
            conv: Any = layer
            as_matrix = kind is nn.Linear or (conv.weight[0, 0].numel() == 1 and conv.groups == 1)
            if as_matrix or conv_norm == "reshaped":
                bound: _Bound = _MatrixNorm(conv.weight, coeff, n_power_iterations, n_warmup_iterations)
            else:
                bound = _ConvolutionNorm(conv, kind, coeff, n_power_iterations, n_warmup_iterations, eps)
            chosen.append((layer, bound))
    if not chosen:
        raise InputError(
            "Expected argument `module` to hold a linear layer or a convolution to bound, but there is none."
        )
    for layer, bound in chosen:  # only now: an error leaves the module as it was
        _register(layer, bound)
    return module


def remove_spectral_norm(module: ModuleT) -> ModuleT:
    """Put the bounded weights in place of :func:`spectral_normalize`, as plain parameters, e.g. for export.

    Args:
        module: A network that :func:`spectral_normalize` has changed; it is changed back, in place.

    Returns:
        The same module: in evaluation it computes what it did, with its classes and state keys as they were before.

    Raises:
        InputError: Nothing in ``module`` is bounded.
        NotFittedError: A convolution has seen no input yet, so that its norm is not known.

    Example:
        >>> net = spectral_normalize(nn.Linear(3, 2), coeff=0.1)
        >>> x = torch.ones(1, 3)
        >>> expected = net.eval()(x)
        >>> torch.equal(remove_spectral_norm(net)(x), expected), sorted(net.state_dict())
        (True, ['bias', 'weight'])
    """
    layers = [(name, layer) for name, layer in module.named_modules() if _own(layer) is not None]
    if not layers:
        raise InputError("Expected argument `module` to be spectral-normalized, but no layer of it is.")
    for name, layer in layers:
        own = _own(layer)
        if isinstance(own, _PowerIteration) and not own.is_sized:
            raise NotFittedError(
                f"Expected every convolution to have seen an input, on whose size its norm depends, but {name or 'the module'} "
                "has not. Run one forward first."
            )
    for _, layer in layers:
        own = _own(layer)
        assert own is not None
        own.eval()  # reading the weight takes no step
        for handle in own.handles:
            handle.remove()
        parametrize.remove_parametrizations(layer, "weight")
    return module


class _Bound(nn.Module):
    """What the parametrizations of this file share."""

    def __init__(self, coeff: float) -> None:
        super().__init__()
        self.coeff = coeff
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def extra_repr(self) -> str:
        return f"coeff={self.coeff}"


class _PowerIteration(_Bound):
    """W -> W / (max(1, sigma / coeff) + eps), with sigma = <u, A v> and A the layer's operator.

    Attributes:
        u: Left singular vector, in the shape of one output of the layer.
        v: Right singular vector, in the shape of one input.
        sigma: The norm at the last training forward or at the warm-up; 0 before. Evaluation changes none of the three.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor

    def __init__(
        self,
        weight: Tensor,
        u_shape: Sequence[int],
        v_shape: Sequence[int],
        coeff: float,
        n_power_iterations: int,
        n_warmup_iterations: int,
        eps: float,
    ) -> None:
        super().__init__(coeff)
        self.n_power_iterations = n_power_iterations
        self.n_warmup_iterations = n_warmup_iterations
        self.eps = eps
        # The norm of a rounded weight is wanted to more digits than the weight has.
        like = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("u", _random_unit(u_shape, like, seed=0))
        self.register_buffer("v", _random_unit(v_shape, like, seed=1))
        self.register_buffer("sigma", like.new_zeros(()))
        self._is_warm = False
        self._folded: tuple[Tensor, tuple[int, int], Tensor] | None = None
        self._twins: weakref.WeakSet[_PowerIteration] = weakref.WeakSet([self])

    def operator(self, weight: Tensor, v: Tensor) -> Tensor:
        """A v."""
        raise NotImplementedError

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """A^T u."""
        raise NotImplementedError

    @property
    def is_sized(self) -> bool:
        """Whether the size of the input is known."""
        return self.v.numel() > 0

    def forward(self, weight: Tensor) -> Tensor:
        """The bounded weight; a step of the power iteration is taken in training alone."""
        if not self.is_sized:
            return weight
        if not self._is_warm:
            self._warm_up(weight)
        if self.training:
            self._folded = None
            return self._step(weight)
        if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
            return self._bounded(weight)
        return self._fold(weight)

    def _step(self, weight: Tensor) -> Tensor:
        with _full_precision(weight):
            w = weight.to(self.v.dtype)
            u, v = self._iterate(w.detach(), self.n_power_iterations)
            stretched = self.operator(w, v)
            u = _unit(stretched.detach(), u)  # the last half step: one application of A serves u and sigma
            sigma = (u * stretched).sum()
            # In place on the buffers, but with the new tensors in the graph: a second forward before the backward is safe.
            with torch.no_grad():
                self.u.copy_(u)
                self.v.copy_(v)
                self.sigma.copy_(sigma)
            return self._divided(weight, w, sigma)

    def _bounded(self, weight: Tensor) -> Tensor:
        with _full_precision(weight):
            w = weight.to(self.v.dtype)
            # A running average of unit vectors is shorter than one.
            u, v = _unit(self.u, self.u), _unit(self.v, self.v)
            return self._divided(weight, w, (u * self.operator(w, v)).sum())

    def _divided(self, weight: Tensor, w: Tensor, sigma: Tensor) -> Tensor:
        return (w / ((sigma / self.coeff).clamp(min=1) + self.eps)).to(weight.dtype)

    def _fold(self, weight: Tensor) -> Tensor:
        stamp = _stamp(weight)
        if self._folded is not None and stamp is not None:
            # The source is kept alive, so that no other tensor can have its address.
            source, old_stamp, folded = self._folded
            if source is weight and old_stamp == stamp:
                return folded
        with _lasting(weight), torch.no_grad():
            folded = self._bounded(weight)
        self._folded = None if stamp is None else (weight, stamp, folded)
        return folded

    def _iterate(self, w: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """``num_steps`` steps but for the last half, A v."""
        with torch.no_grad():
            u, v = self.u, self.v
            for i in range(num_steps):
                if i:
                    u = _unit(self.operator(w, v), u)
                v = _unit(self.adjoint(w, u), v)
            return u, v

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _warm_up(self, weight: Tensor) -> None:
        with _lasting(self.v), torch.no_grad(), _full_precision(weight):
            w = weight.detach().to(self.v.dtype)
            if self.n_warmup_iterations:
                u, v = self._iterate(w, self.n_warmup_iterations)
                stretched = self.operator(w, v)
                self.u.copy_(_unit(stretched, u))
                self.v.copy_(v)
                self.sigma.copy_(torch.linalg.vector_norm(stretched))
        self._is_warm = True

    # ------------------------------------------------------------------ modes, moves, copies and files

    def train(self, mode: bool = True) -> "_PowerIteration":
        self._folded = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "_PowerIteration":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._folded = None
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_folded", "_twins")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._folded = None
        self._twins = weakref.WeakSet([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PowerIteration":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        if not self.is_sized:
            # A weight average is copied before the first forward and gets its buffers copied in after it: the sizes that
            # one of the two learns must be the other's too.
            copied._twins = self._twins
            self._twins.add(copied)
        return copied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("u", "v"):
            own, new = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(new, Tensor) and new.ndim == own.ndim and new.shape[:1] == own.shape[:1] != new.shape:
                own.data = own.new_zeros(new.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._folded = None
        sigma = state_dict.get(prefix + "sigma")
        self._is_warm = isinstance(sigma, Tensor) and not sigma.is_meta and bool(sigma > 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_power_iterations={self.n_power_iterations}"


class _MatrixNorm(_PowerIteration):
    """The weight as a matrix [out, rest]."""

    def __init__(self, weight: Tensor, coeff: float, n_power_iterations: int, n_warmup_iterations: int) -> None:
        rows, columns = weight.flatten(1).shape
        super().__init__(weight, [rows], [columns], coeff, n_power_iterations, n_warmup_iterations, eps=0.0)

    def operator(self, weight: Tensor, v: Tensor) -> Tensor:
        return weight.flatten(1) @ v

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        return weight.flatten(1).T @ u

    def read_original(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """u and v as the original code saves them."""
        return u, v


class _ConvolutionNorm(_PowerIteration):
    """The convolution of one input [in, *size], whose size is learnt from the inputs."""

    def __init__(
        self,
        layer: nn.Module,
        kind: type[nn.Module],
        coeff: float,
        n_power_iterations: int,
        n_warmup_iterations: int,
        eps: float,
    ) -> None:
        conv: Any = layer
        dims = len(conv.kernel_size)
        unknown = [0] * dims
        super().__init__(
            conv.weight,
            [conv.out_channels, *unknown],
            [conv.in_channels, *unknown],
            coeff,
            n_power_iterations,
            n_warmup_iterations,
            eps,
        )
        self.kind = kind
        self.stride: tuple[int, ...] = conv.stride
        self.dilation: tuple[int, ...] = conv.dilation
        self.groups: int = conv.groups
        self.padding_mode: str = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.reach = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        if conv.padding == "same":
            sides = [(reach // 2, reach - reach // 2) for reach in self.reach]
        elif conv.padding == "valid":
            sides = [(0, 0)] * dims
        else:
            sides = [(size, size) for size in conv.padding]
        self.padding = tuple(side for pair in reversed(sides) for side in pair)  # as F.pad takes it: last axis first

    def operator(self, weight: Tensor, v: Tensor) -> Tensor:
        convolve, _ = _CONVOLUTIONS[self.kind]
        padded = _pad(v, self.padding, self.padding_mode)
        return convolve(padded, weight, None, self.stride, 0, self.dilation, self.groups)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        _, transpose = _CONVOLUTIONS[self.kind]
        size = self.v.shape[1:]
        # With a stride several sizes give one output; this is the rest that brings back the right one.
        rest = [
            full - (out - 1) * stride - reach - 1
            for full, out, stride, reach in zip(self._padded(size), u.shape[1:], self.stride, self.reach, strict=True)
        ]
        padded = transpose(u, weight, None, self.stride, 0, rest, self.groups, self.dilation)
        return _unpad(padded, size, self.padding, self.padding_mode)

    def learn_size(self, size: Sequence[int]) -> None:
        """Make u and v fit inputs of ``size``: at first from random ones, then from the old ones, cropped or padded."""
        if tuple(self.v.shape[1:]) == tuple(size) or (self.is_sized and not self.training):
            return
        self._resize(size)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _resize(self, size: Sequence[int]) -> None:
        was_sized = self.is_sized
        v_shape, u_shape = [len(self.v), *size], [len(self.u), *self._output_size(size)]
        with _lasting(self.v), torch.no_grad():
            v, u = _random_unit(v_shape, self.v, seed=1), _random_unit(u_shape, self.u, seed=0)
            if was_sized:
                # Padded with zeros the old vector is stretched as before, so the bound does not jump.
                v, u = (_unit(_fit(old, new.shape), new) for old, new in ((self.v, v), (self.u, u)))
            for twin in list(self._twins):
                if twin is self or not twin.is_sized:
                    # The tensors that others hold on to, as DDP does with buffers, stay the same objects.
                    twin.u.data = u.to(twin.u, copy=True)
                    twin.v.data = v.to(twin.v, copy=True)
                    twin._is_warm, twin._folded = False, None
        self._twins = weakref.WeakSet([self])

    def read_original(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Flat u and v as the original code saves them, for square inputs or the size that is known."""
        size = list(self.v.shape[1:])
        if math.prod(self.v.shape) != v.numel():
            side = round((v.numel() / len(self.v)) ** (1 / len(size)))
            size = [side] * len(size)
        return u.reshape(len(self.u), *self._output_size(size)), v.reshape(len(self.v), *size)

    def _padded(self, size: Sequence[int]) -> list[int]:
        before, after = self.padding[-2::-2], self.padding[-1::-2]
        return [s + b + a for s, b, a in zip(size, before, after, strict=True)]

    def _output_size(self, size: Sequence[int]) -> list[int]:
        return [
            (full - reach - 1) // stride + 1
            for full, reach, stride in zip(self._padded(size), self.reach, self.stride, strict=True)
        ]


class _BoundedBatchNorm(_Bound):
    """gamma -> gamma / max(1, s / coeff), with s the largest |gamma| / sqrt(running_var + eps)."""

    def __init__(self, layer: nn.Module, coeff: float) -> None:
        super().__init__(coeff)
        self._layer = (layer,)  # in a tuple, so that it is no submodule of its own parametrization

    def forward(self, weight: Tensor) -> Tensor:
        """The bounded scale."""
        layer: Any = self._layer[0]
        with _full_precision(weight):
            gamma = weight.to(torch.promote_types(weight.dtype, torch.float32))
            stretch = (gamma * (layer.running_var.to(gamma.dtype) + layer.eps).rsqrt()).abs().max()
            bounded: Tensor = gamma / (stretch / self.coeff).clamp(min=1)
            return bounded.to(weight.dtype)


# ---------------------------------------------------------------------- registration


def _register(layer: Any, bound: _Bound) -> None:
    parametrize.register_parametrization(layer, "weight", bound, unsafe=True)
    _make_copyable(layer)
    if isinstance(bound, _ConvolutionNorm):
        bound.handles.append(layer.register_forward_pre_hook(_learn_size, with_kwargs=True))
    bound.handles.append(layer.register_load_state_dict_pre_hook(_translate_keys))


def _own(layer: nn.Module) -> _Bound | None:
    """The parametrization of this file on ``layer``'s weight, if any."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    found = [item for item in _on_weight(layer) if isinstance(item, _Bound)]
    return found[0] if found else None


def _on_weight(layer: nn.Module) -> Iterator[nn.Module]:
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    on_weight = lists["weight"]
    assert isinstance(on_weight, parametrize.ParametrizationList)
    return iter(on_weight)


def _check_layer(layer: Any, name: str) -> type[nn.Module]:
    """The base class whose operator ``layer`` has."""
    if isinstance(layer, _TRANSPOSED):
        raise UnsupportedError(
            f"Spectral normalization has no transposed convolutions, but {name} is one. Name it in `exclude`."
        )
    kind = next(base for base in _LAYERS if isinstance(layer, base))
    if type(layer).forward is not kind.forward:
        raise UnsupportedError(
            f"{name} is a {type(layer).__name__} with its own forward, so that the operator to bound is not known. Name it in "
            "`exclude`."
        )
    if isinstance(getattr(layer, "weight", None), nn.UninitializedParameter):
        raise UnsupportedError(f"{name} is not initialized yet. Run one forward first.")
    _check_unbound(layer, name)
    return kind


def _check_batchnorm(layer: Any, name: str) -> None:
    if layer.weight is None or layer.running_var is None or isinstance(layer.weight, nn.UninitializedParameter):
        raise UnsupportedError(
            f"`bound_batchnorm` needs a BatchNorm with a scale and a running variance, but {name} is {layer}. "
            "Name it in `exclude`."
        )
    _check_unbound(layer, name)


def _check_unbound(layer: nn.Module, name: str) -> None:
    if _own(layer) is not None:
        raise InputError(f"Expected a module that is not spectral-normalized yet, but {name} is.")
    if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight"):
        raise UnsupportedError(
            f"The weight of {name} is no parameter: something else computes it before each forward. Remove that, or name the "
            "layer in `exclude`."
        )


def _learn_size(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a convolution."""
    own = _own(layer)
    assert isinstance(own, _ConvolutionNorm)
    x: Tensor = args[0] if args else kwargs["input"]
    own.learn_size(x.shape[1 - own.v.ndim :])


def _translate_keys(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """State pre-hook: keys of the original code, or of a layer without a bound, become this layer's."""
    own = _own(layer)
    assert own is not None
    target = f"{prefix}parametrizations.weight."
    to = f"{target}{list(_on_weight(layer)).index(own)}."
    if isinstance(own, (_MatrixNorm, _ConvolutionNorm)) and f"{prefix}weight_orig" in state_dict:
        state_dict[f"{target}original"] = state_dict.pop(f"{prefix}weight_orig")
        state_dict.pop(f"{prefix}weight", None)
        u, v, sigma = (state_dict.pop(f"{prefix}weight_{key}", None) for key in ("u", "v", "sigma"))
        if u is None or v is None or sigma is None:
            missing_keys.extend(
                f"{prefix}weight_{key}" for key, x in (("u", u), ("v", v), ("sigma", sigma)) if x is None
            )
            return
        try:
            u, v = own.read_original(u, v)
        except RuntimeError as error:
            error_msgs.append(f"`{prefix}weight_u` and `{prefix}weight_v` are not of a square input: {error}")
            return
        state_dict.update({f"{to}u": u, f"{to}v": v, f"{to}sigma": sigma.reshape(())})
    elif f"{prefix}weight" in state_dict and f"{target}original" not in state_dict:
        state_dict[f"{target}original"] = state_dict.pop(f"{prefix}weight")
        if isinstance(own, _PowerIteration):
            # u and v belong to other weights: a norm of 0 has them warmed up again.
            state_dict.update({f"{to}u": own.u, f"{to}v": own.v, f"{to}sigma": torch.zeros_like(own.sigma)})


def _make_copyable(layer: nn.Module) -> None:
    """Say how to make the parametrized class again: torch refuses to pickle it, since it is made on the spot.

    Torch's own deep copies share that class, and with it the property: to remove it from a copy breaks the other.
    """
    made: Any = type(layer)
    made.__reduce_ex__ = _reduce
    if "__deepcopy__" in vars(made):
        del made.__deepcopy__  # copies go through __reduce_ex__


def _reduce(layer: nn.Module, protocol: Any) -> tuple[Any, ...]:
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return _rebuild, (parametrize.type_before_parametrizations(layer), list(lists)), layer.__dict__


def _rebuild(base: type[nn.Module], names: list[str]) -> nn.Module:
    """A module of the parametrized class, empty: unpickling fills it."""
    layer = base.__new__(base)
    nn.Module.__init__(layer)
    for name in names:
        layer.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
    _make_copyable(layer)
    return layer


# ---------------------------------------------------------------------- tensors


def _random_unit(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """A unit vector that every process draws alike, without a touch on the global random state."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return F.normalize(x.flatten(), dim=0).reshape(shape).to(like)


def _unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """x / |x|, or what was there before where x vanishes or overflows: from zero no iteration would ever return."""
    norm = torch.linalg.vector_norm(x)
    return torch.where((norm > 1e-12) & norm.isfinite(), x / norm, otherwise)


def _fit(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` cut or padded with zeros to ``shape``."""
    change = [new - old for new, old in zip(shape[1:], x.shape[1:], strict=True)]
    return F.pad(x, [side for c in reversed(change) for side in (0, c)])


def _pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    return F.pad(x, list(padding), mode=mode) if any(padding) else x


def _unpad(x: Tensor, size: Sequence[int], padding: Sequence[int], mode: str) -> Tensor:
    """The adjoint of :func:`_pad`: every padded element goes back to the one that it is a copy of."""
    if mode == "constant":
        return F.pad(x, [-side for side in padding])
    places = torch.arange(math.prod(size), dtype=torch.float64).reshape(1, *size)
    index = _pad(places, padding, mode).long().flatten().to(x.device)
    return x.new_zeros(len(x), math.prod(size)).index_add(1, index, x.flatten(1)).reshape(len(x), *size)


def _full_precision(weight: Tensor) -> torch.autocast:
    return torch.autocast(weight.device.type, enabled=False)


def _lasting(like: Tensor) -> torch.inference_mode:
    """Out of inference mode, unless ``like`` was made in it: a tensor made in it could enter no later backward."""
    return torch.inference_mode(like.is_inference())


def _stamp(weight: Tensor) -> tuple[int, int] | None:
    """What changes when ``weight`` is written or replaced; None where nothing does (inference mode, vmap)."""
    if weight.is_inference():
        return None
    try:
        return weight._version, weight.data_ptr()
    except RuntimeError:  # a slice under vmap has no memory of its own
        return None
