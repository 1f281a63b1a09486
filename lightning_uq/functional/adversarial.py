"""The fast gradient sign method, and a loss smoothed by it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def fgsm(x: Tensor, gradient: Tensor, epsilon: float | Tensor) -> Tensor:
    """x + epsilon * sign(gradient): the step within a box of size epsilon that raises the loss most, to first order.

    Args:
        x: Inputs [..., B, ...].
        gradient: Gradient of the loss with respect to ``x``. If it is zero or NaN, ``x`` is unchanged.
        epsilon: Size of the step in units of ``x``, a number or a tensor that broadcasts to ``x``.

    Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015 (arXiv 1412.6572).

    Example:
        >>> fgsm(torch.zeros(3), torch.tensor([5.0, -0.1, 0.0]), 0.5)
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    return x + epsilon * gradient.sign().nan_to_num()


def adversarial_loss(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    epsilon: float | Tensor,
    *,
    loss_scale: float = 1.0,
    second_pass: AbstractContextManager[object] | None = None,
) -> Tensor:
    """0.5 * loss(x) + 0.5 * loss(x'), with x' = :func:`fgsm` of x, held fixed: two forward and two backward passes.

    The paper adds the two losses; the mean keeps the size of the gradient, and so the meaning of a learning rate. The backward pass
    of the clean loss gives the gradients of the input and of the parameters together. The latter are passed on to the backward of
    the returned loss, so ``.grad`` is unchanged until then, and DDP and gradient scaling work as for any loss.

    Args:
        loss: Called with x first and then with x'; returns a scalar. It may sum the losses of several members if each has
            its own slice of ``x``.
        x: Inputs.
        parameters: All parameters that ``loss`` trains; gradients to other tensors are lost.
        epsilon: Size of the step in units of ``x``, a number or a tensor that broadcasts to ``x``.
        loss_scale: Factor on the clean loss in its backward pass, against underflow in half precision; it is divided out
            afterwards.
        second_pass: Context for the pass of x', for instance :func:`~lightning_uq.networks.held_buffers.held_buffers`.

    Source: Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474), section 2.3; the mean is deep-ensembles-pytorch's.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> adversarial_loss(lambda x: (weight * x).square().sum(), torch.ones(1), [weight], 0.5).backward()
        >>> weight.grad
        tensor(6.5000)
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    leaf = x.detach().requires_grad_()
    clean = loss(leaf)
    gradient, *gradients = torch.autograd.grad(clean * loss_scale, [leaf, *trained], allow_unused=True)
    x_adversarial = x.detach() if gradient is None else fgsm(x.detach(), gradient, epsilon)
    known = [(p, g / loss_scale) for p, g in zip(trained, gradients, strict=True) if g is not None]
    handed_over: Tensor = _GivenGradient.apply(clean.detach(), *(p for p, _ in known), *(g for _, g in known))
    with second_pass or nullcontext():
        return 0.5 * (handed_over + loss(x_adversarial))


class _GivenGradient(torch.autograd.Function):
    """A value with known gradients: (value, *parameters, *gradients) to value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters_and_gradients: Tensor) -> Tensor:
        gradients = parameters_and_gradients[len(parameters_and_gradients) // 2 :]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(grad_outputs[0] * gradient for gradient in gradients), *(None for _ in gradients))
