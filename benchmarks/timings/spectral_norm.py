"""A training step of a ResNet-18 with spectral normalization, beside torch's own and a network without."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.harness import Call, Contender, Work
from lightning_uq.networks.backbones import resnet18
from lightning_uq.networks.spectral_norm import spectral_normalize

TITLE = "Spectral normalization"
ABOUT = """Forward, backward and step of SGD of a ResNet-18 on 32x32 images, with one power iteration. torch bounds the reshaped kernel of each convolution, as
`conv_norm="reshaped"` does; the default, `"operator"`, bounds the convolution itself. torch divides by the norm always, ours where it exceeds the
coefficient, so the results differ and are not compared; tests hold ours to the singular values."""


def works(device: str) -> Iterator[Work]:
    """One batch size: a GPU's, or one that a CPU can take."""
    batch = 128 if device != "cpu" else 16
    variants = {
        "lightning-uq, operator": lambda network: spectral_normalize(network, exclude=["fc"]),
        "lightning-uq, reshaped": lambda network: spectral_normalize(network, exclude=["fc"], conv_norm="reshaped"),
        "torch.nn.utils": torchs,
        "no normalization": lambda network: network,
    }
    contenders = [
        Contender(name, partial(step, bound, batch, device), agrees=i == 0)
        for i, (name, bound) in enumerate(variants.items())
    ]
    yield Work(f"ResNet-18, batch {batch}", contenders)


def torchs(network: nn.Module) -> nn.Module:
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d):
            spectral_norm(module)
    return network


def step(bound: object, batch: int, device: str) -> Call:
    torch.manual_seed(0)
    network = bound(resnet18()).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10

    def call() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        return loss

    call()  # the sizes are learned, and the first iterations are done
    return call
