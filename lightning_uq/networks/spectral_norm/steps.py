"""Training steps of the power iteration for many layers in few operations, and the gradient of the bounded weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_uq.networks.spectral_norm.tensors import (
    full_precision,
    inner_products,
    parted,
    spread,
    stamp,
    units,
)

if TYPE_CHECKING:
    from lightning_uq.networks.spectral_norm.power_iteration import PowerIteration


class Step(NamedTuple):
    """The result of one step of the power iteration for one weight.

    Attributes:
        weight: The weight.
        stamp: Its :func:`~lightning_uq.networks.spectral_norm.tensors.stamp` at the step.
        u: The new left singular vector.
        v: The new right singular vector.
        sigma: The norm <u, A v>.
        divisor: The divisor of the weight, d = max(1, sigma / c) + eps.
        pull: u / d^2 if sigma >= c, else 0. The gradient of 1 / d is -pull A_v / c.
    """

    weight: Tensor
    stamp: tuple[int, int] | None
    u: Tensor
    v: Tensor
    sigma: Tensor
    divisor: Tensor
    pull: Tensor


def find_steps(norms: Sequence[PowerIteration], weights: Sequence[Tensor]) -> list[Step]:
    """Find the step of the power iteration for each weight's next training forward, without changing any norm.

    Only the products with the weights are computed layer by layer. The rest takes the same number of operations for one
    layer as for a hundred, because on a GPU, their cost is the launches rather than the work.

    Args:
        norms: Norms with the same device, precision, coefficient, ``eps`` and number of iterations.
        weights: The weight of each norm.
    """
    first = norms[0]
    with torch.no_grad(), full_precision(weights[0]):
        ws = [weight.to(first.v.dtype) for weight in weights]
        us, vs = [norm.u for norm in norms], [norm.v for norm in norms]
        for i in range(first.n_power_iterations):
            if i:
                us = parted(units([norm.operator(w, v) for norm, w, v in zip(norms, ws, vs, strict=True)], us), us)
            vs = parted(units([norm.adjoint(w, u) for norm, w, u in zip(norms, ws, us, strict=True)], vs), vs)
        stretched = [norm.operator(w, v) for norm, w, v in zip(norms, ws, vs, strict=True)]
        flat = units(stretched, us)  # the last half step: u and sigma share one product
        us = parted(flat, us)
        sigma = inner_products(us, stretched)
        excess = sigma / first.coefficient
        divisor = excess.clamp(min=1) + first.eps
        pulls = parted(flat * spread((excess >= 1) / divisor.square(), us), us)
        found = zip(weights, us, vs, sigma.unbind(), divisor.unbind(), pulls, strict=True)
        return [Step(weight, stamp(weight), *tensors) for weight, *tensors in found]


def divide(norm: PowerIteration, weight: Tensor, step: Step) -> Tensor:
    """The bounded weight W / d, whose gradient flows through sigma, but not through u and v."""
    bounded: Tensor = _Divide.apply(weight, step.divisor, step.pull, step.u, step.v, norm)
    return bounded


class _Divide(torch.autograd.Function):
    """The gradient in few operations: sigma is linear in W, so its own gradient is one product of u and v."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, divisor: Tensor, pull: Tensor, u: Tensor, v: Tensor, norm: PowerIteration
    ) -> Tensor:
        ctx.save_for_backward(weight, divisor, pull, u, v)
        ctx.norm = norm
        return (weight.to(v.dtype) / divisor).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, divisor, pull, u, v = ctx.saved_tensors
        norm: PowerIteration = ctx.norm
        if torch.is_grad_enabled():  # this gradient will be differentiated, so autograd must see its origin
            with full_precision(weight):
                bounded = norm.bounded_by(weight, u, v)
                (own,) = torch.autograd.grad(bounded, weight, grad, create_graph=True)
        else:  # autocast does not affect these operations
            w, g = weight.to(v.dtype), grad.to(v.dtype)
            change = torch.dot(g.reshape(-1), w.reshape(-1))
            own = torch.addcmul(g / divisor, norm.gradient(w, pull, v), change, value=-1 / norm.coefficient)
            own = own.to(weight.dtype)
        return own, None, None, None, None, None
