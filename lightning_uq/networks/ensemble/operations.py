"""Operations over lifted tensors, and tables of the supported operations.

A *lifted* tensor stacks the tensors of all members at one point of the forward pass: [M, *shape of one member].
"""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError


def align(*lifted: Tensor) -> list[Tensor]:
    """Give lifted tensors the same number of axes, by inserting ones after the member axis, so that broadcasting stays within each member.

    Example:
        >>> [tuple(t.shape) for t in align(torch.zeros(5, 8, 3), torch.zeros(5, 3), torch.zeros(5))]
        [(5, 8, 3), (5, 1, 3), (5, 1, 1)]
    """
    ndim = max(tensor.ndim for tensor in lifted)
    dtypes = [tensor.dtype for tensor in lifted if tensor.ndim > 1 and tensor.is_floating_point()]
    if dtypes and len(dtypes) < len(lifted):  # a member's scalar does not widen the dtype of the other operand
        dtype = functools.reduce(torch.promote_types, dtypes)
        lifted = tuple(t.to(dtype) if t.ndim == 1 and t.is_floating_point() else t for t in lifted)
    return [_pad_axes(tensor, ndim) for tensor in lifted]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for each member: x [M, ..., in], weight [M, out, in], bias [M, out].

    Example:
        >>> linear(torch.ones(2, 7, 4), torch.ones(2, 3, 4), torch.zeros(2, 3)).shape
        torch.Size([2, 7, 3])
    """
    if x.ndim == 2:
        return linear(x.unsqueeze(1), weight, bias).squeeze(1)
    if x.ndim > 3:
        return linear(x.flatten(1, -2), weight, bias).reshape(*x.shape[:-1], weight.shape[1])
    if torch.is_autocast_enabled(
        x.device.type
    ):  # autocast does not affect the inside of a function with its own backward
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = _narrow(x, dtype), _narrow(weight, dtype), None if bias is None else _narrow(bias, dtype)
    if not torch.is_grad_enabled():  # the call of a Function costs more than the product of a small batch
        return _product(x, weight, bias)
    output: Tensor = _BatchedLinear.apply(x, weight, bias)
    return output


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


class _BatchedLinear(torch.autograd.Function):
    """The product x weight^T + bias of every member, whose weight gradient has the layout of the weight.

    Autograd's gradient is transposed and copied in each step, which takes a fifth of the time of a wide network.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if of_x else None,
            torch.bmm(grad.mT, x) if of_weight else None,
            grad.sum(1) if of_bias else None,
        )


# torch reads this signature at every call, which takes a few percent of a training step unless it is stored.
_BatchedLinear.forward.__signature__ = inspect.signature(_BatchedLinear.forward)  # type: ignore[attr-defined]


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm`` for each member."""
    return _scale_and_shift(F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` for each member."""
    return _scale_and_shift(F.rms_norm(x, normalized_shape, None, eps), weight, None)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    count: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalization of x [M, B, C] or [M, B, C, L], where each member normalizes its own batch.

    The members are M * C channels of one layer. Running statistics change in place if ``training``.
    """
    if x.ndim not in (3, 4):
        raise InputError(f"The input of BatchNorm1d must be [B, C] or [B, C, L], but its shape is {list(x.shape[1:])}.")
    if training and count is not None:
        count += 1
    channels = x.transpose(0, 1).flatten(1, 2)
    mean, variance, weight, bias = (None if t is None else t.view(-1) for t in (mean, variance, weight, bias))
    out = F.batch_norm(channels, mean, variance, weight, bias, training or mean is None, momentum, eps)
    return out.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """``x.reshape(shape)`` for each member."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    return x.reshape(x.shape[0], *sizes)


def member_shape(x: Tensor) -> torch.Size:
    """``x.shape`` for each member."""
    return x.shape[1:]


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    dtype = x.dtype
    if weight is not None:
        x = x * _pad_axes(weight, x.ndim)
    if bias is not None:
        x = x + _pad_axes(bias, x.ndim)
    return x.to(dtype)  # weights are wider under autocast, but norms keep the dtype of their input


def _pad_axes(lifted: Tensor, ndim: int) -> Tensor:
    missing = ndim - lifted.ndim
    return lifted.reshape(lifted.shape[0], *[1] * missing, *lifted.shape[1:]) if missing > 0 else lifted


# ---------------------------------------------------------------------------------------- tables

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.AlphaDropout, nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink,
)  # fmt: skip

ELEMENTWISE = [
    "abs", "add", "celu", "clamp", "contiguous", "cos", "div", "dropout", "elu", "exp", "expm1", "gelu",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "logsigmoid", "maximum", "minimum",
    "mish", "mul", "neg", "pow", "relu", "relu6", "rsqrt", "rsub", "selu", "sigmoid", "silu", "sin", "softplus",
    "softsign", "sqrt", "square", "sub", "tanh", "tanhshrink", "true_divide", "truediv",
]  # fmt: skip

_REQUIRED = object()
# The arguments that are axes: position (the tensor has 0), name, default.
AXES: dict[str, list[tuple[int, str, Any]]] = {
    "flatten": [(1, "start_dim", 0), (2, "end_dim", -1)],
    "cat": [(1, "dim", 0)],
    "stack": [(1, "dim", 0)],
    "chunk": [(2, "dim", 0)],
    "split": [(2, "dim", 0)],
    "unsqueeze": [(1, "dim", _REQUIRED)],
    "squeeze": [(1, "dim", _REQUIRED)],
    "transpose": [(1, "dim0", _REQUIRED), (2, "dim1", _REQUIRED)],
    "softmax": [(1, "dim", _REQUIRED)],
    "log_softmax": [(1, "dim", _REQUIRED)],
    "logsumexp": [(1, "dim", _REQUIRED)],
    "mean": [(1, "dim", _REQUIRED)],
    "sum": [(1, "dim", _REQUIRED)],
    "normalize": [(2, "dim", 1)],
}


def _by_function(names: Sequence[str]) -> dict[Any, str]:
    return {
        function: name
        for name in names
        for room in (torch, F, operator)
        if callable(function := getattr(room, name, None))
    }


LIFTED_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
}
ELEMENTWISE_FUNCTIONS = _by_function(ELEMENTWISE)
AXIS_FUNCTIONS = _by_function(list(AXES))
