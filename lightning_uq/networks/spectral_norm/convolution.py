"""The bound of a convolution, whose operator depends on the size of its input."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.networks.spectral_norm.power_iteration import PowerIteration
from lightning_uq.networks.spectral_norm.tensors import fit, lasting, pad, random_unit, unit, unpad

CONVOLUTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, F.conv_transpose1d),
    nn.Conv2d: (F.conv2d, F.conv_transpose2d),
    nn.Conv3d: (F.conv3d, F.conv_transpose3d),
}


class ConvolutionNorm(PowerIteration):
    """The convolution of one input [in, *size]; the size is learned from the inputs.

    Args:
        layer: The convolution.
        kind: Class of the convolution in ``torch.nn``.
        coefficient: The largest allowed norm of the operator.
        n_power_iterations: Steps of the power iteration in each training forward.
        n_warmup_iterations: Steps at the first forward, and at the first one of a new size.
        eps: Added to the divisor of the weight.
    """

    def __init__(
        self,
        layer: nn.Module,
        kind: type[nn.Module],
        coefficient: float,
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
            coefficient,
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
        self.padding = tuple(side for pair in reversed(sides) for side in pair)  # in F.pad's order: the last axis first
        # Convolutions can pad with equally many zeros on both sides; anything else needs a call of ``pad``.
        if self.padding_mode == "constant" and all(before == after for before, after in sides):
            self.own_padding, self.outer_padding = tuple(before for before, _ in sides), (0,) * len(self.padding)
        else:
            self.own_padding, self.outer_padding = (0,) * dims, self.padding

    def operator(self, weight: Tensor, v: Tensor) -> Tensor:
        """The convolution of v, without bias."""
        convolve, _ = CONVOLUTIONS[self.kind]
        padded = pad(v, self.outer_padding, self.padding_mode)
        return convolve(padded, weight, None, self.stride, self.own_padding, self.dilation, self.groups)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """The transposed convolution of u, with the adjoint of the padding."""
        _, transpose = CONVOLUTIONS[self.kind]
        size = self.v.shape[1:]
        # With a stride, inputs of several sizes have outputs of the same size; the output padding selects the right one.
        rest = [
            full - (out - 1) * stride - reach - 1
            for full, out, stride, reach in zip(self._padded(size), u.shape[1:], self.stride, self.reach, strict=True)
        ]
        padded = transpose(u, weight, None, self.stride, self.own_padding, rest, self.groups, self.dilation)
        return unpad(padded, size, self.outer_padding, self.padding_mode)

    def gradient(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The weight's gradient when u is the gradient of the output of v."""
        padded = pad(v, self.outer_padding, self.padding_mode)
        geometry = (self.stride, self.own_padding, self.dilation, False, (0,) * len(self.stride), self.groups)
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            u.unsqueeze(0), padded.unsqueeze(0), weight, None, *geometry, (False, True, False)
        )
        return found[1]

    def learn_size(self, size: Sequence[int]) -> None:
        """Resize u and v for inputs of ``size``; in evaluation, only if no size is known yet."""
        if tuple(self.v.shape[1:]) == tuple(size) or (self.is_sized and not self.training):
            return
        self._resize(size)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _resize(self, size: Sequence[int]) -> None:
        was_sized = self.is_sized
        v_shape, u_shape = [len(self.v), *size], [len(self.u), *self._output_size(size)]
        with lasting(self.v), torch.no_grad():
            v, u = random_unit(v_shape, self.v, seed=1), random_unit(u_shape, self.u, seed=0)
            if was_sized:
                # The old vector is padded with zeros and stretched as before, so the bound does not jump.
                v, u = (unit(fit(old, new.shape), new) for old, new in ((self.v, v), (self.u, u)))
            for twin in list(self._twins):
                if twin is self or not twin.is_sized:
                    # The tensors stay the same objects, because others hold references, such as DDP to buffers.
                    twin.u.data = u.to(twin.u, copy=True)
                    twin.v.data = v.to(twin.v, copy=True)
                    twin._is_warm, twin._folded, twin.ready = False, None, None
        self._twins = weakref.WeakSet([self])

    def read_original(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`PowerIteration.read_original`; it tries the known size of the input first, then a square one."""
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
