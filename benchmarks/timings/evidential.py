"""The evidential losses beside uncertainty-loss, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Call, Contender, Work
from lightning_uq import losses

TITLE = "Evidential losses"
ABOUT = "Forward and backward with ten classes, for N rows. Compared are the losses and their gradients. `unchecked` leaves out the checks of the arguments."

CLASSES = 10
NAMES = {"evidential": "evidential_loss", "max-norm": "maxnorm_loss"}


def works(device: str) -> Iterator[Work]:
    """Both losses, with and without their regularisers."""
    for size in (100, 1000, 4000):
        generator = torch.Generator().manual_seed(0)
        evidence = torch.randn(size, CLASSES, generator=generator).exp().to(device)
        target = torch.randint(CLASSES, (size,), generator=generator).to(device)
        for title, name in NAMES.items():
            for factor in (0.0, 1.0):
                contenders = [
                    Contender("lightning-uq", partial(ours, name, factor, True, evidence, target)),
                    Contender("lightning-uq, unchecked", partial(ours, name, factor, False, evidence, target)),
                    Contender(name, partial(peer, name, factor, evidence, target), "uncertainty-loss"),
                ]
                yield Work(f"{title}{', regularised' if factor else ''}, N = {size:,}", contenders)


def ours(name: str, factor: float, checks: bool, evidence: Tensor, target: Tensor) -> Call:
    loss = partial(getattr(losses, name), validate_args=checks)
    return backward(lambda e: loss(e, target, factor) if factor else loss(e, target), evidence)


def peer(name: str, factor: float, evidence: Tensor, target: Tensor) -> Call:
    import uncertainty_loss

    loss = getattr(uncertainty_loss, name)
    return backward(lambda e: loss(e, target, reg_factor=factor) if factor else loss(e, target), evidence)


def backward(loss: Callable[[Tensor], Tensor], evidence: Tensor) -> Call:
    leaf = evidence.clone().requires_grad_()

    def call() -> Tensor:
        leaf.grad = None
        value = loss(leaf)
        value.backward()
        return torch.cat([value.detach().reshape(1), leaf.grad.flatten()])

    return call
