"""The same members in every execution, and what is compared between them."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_uq.networks import (
    MLP,
    EnsembleNetwork,
    NetworkWithPrior,
    StackedEnsembleNetwork,
    TabularNetwork,
    VmapEnsembleNetwork,
    build_ensemble,
)

KINDS = {"loop": EnsembleNetwork, "stacked": StackedEnsembleNetwork, "vmap": VmapEnsembleNetwork}
AT_ONCE = ["stacked", "vmap"]


def build(make, execution, num=3, seed=0, **kwargs):
    """The same members in every execution."""
    torch.manual_seed(seed)
    return build_ensemble([make() for _ in range(num)], execution, **kwargs)


def state_of(network, what=lambda t: t):
    """Detached copies by the members' names."""
    return {name: what(t).detach().clone() for name, t in network.state_dict(keep_vars=True).items()}


def gradients(network):
    """Gradients by the members' names; the network is spoilt."""
    for p in network.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    return {name: t for name, t in network.state_dict().items() if t.is_floating_point()}


def assert_same(a, b, **kwargs):
    assert list(a) == list(b)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, msg=lambda text, name=name: f"{name}: {text}", **kwargs)


class Functional(nn.Module):
    """Does in functions and methods, on shapes of its own, what modules usually do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12))
        self.bias = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.register_buffer("shift", torch.randn(1, 6))
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = x.reshape(x.shape[0], 3, 4)
        x = (x - x.mean(-1, keepdim=True)).view(x.size(0), -1)
        h = F.linear(x, self.weight, bias=self.bias) * self.scale + self.shift
        a, b = F.silu(h).chunk(2, dim=-1)
        h = torch.cat([a, b.tanh()], 1) + 0.5 * h
        h = F.layer_norm(h, (6,), self.bias.abs(), None) + F.rms_norm(h, (6,), weight=self.bias)
        h = torch.stack([h, h.exp().clamp(max=3.0)], dim=1).sum(1)
        out = F.normalize(self.last(h), dim=-1) ** 2
        return F.log_softmax(out[..., :3], dim=1).unsqueeze(1).transpose(1, 2).squeeze(-1).contiguous()


class Images(nn.Module):
    """Flattens, and has linear layers on more than two axes."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(15, 3), nn.Softmax(dim=-1))

    def forward(self, x):
        return self.head(self.rows(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=True)) for _ in range(2))
        self.shared = nn.LayerNorm(12, elementwise_affine=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(self.shared(x))
        return x


ARCHITECTURES = {
    "linear": lambda: nn.Linear(12, 3),
    "no bias": lambda: nn.Sequential(nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "mlp": lambda: MLP(12, 3, hidden_sizes=(8, 8)),
    "rms": lambda: MLP(12, 3, hidden_sizes=(8,), activation="gelu", norm="rms"),
    "layer": lambda: MLP(12, 3, hidden_sizes=(8,), activation="silu", norm="layer"),
    "batch": lambda: MLP(12, 3, hidden_sizes=(8,), activation="tanh", norm="batch"),
    "batch, plain": lambda: nn.Sequential(nn.BatchNorm1d(12, affine=False), nn.Linear(12, 3)),
    "batch, no statistics": lambda: nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    "tabular": lambda: TabularNetwork(12, 2, hidden_features=8),
    "tabular logits": lambda: TabularNetwork(12, 3, hidden_features=8, heads=None),
    "prior": lambda: NetworkWithPrior(
        MLP(12, 3, hidden_sizes=(8,)), MLP(12, 3, hidden_sizes=(4,), norm="batch", dropout=0.5), 2.0
    ),
    "functional": Functional,
    "images": Images,
    "residual": Residual,
}


def inputs(name, batch=7):
    return torch.randn(batch, 3, 4) if name == "images" else torch.randn(batch, 12)


def run(network, x, each):
    network.zero_grad()
    xs = x.expand(network.num_indices, *x.shape).clone() if each else x.clone()
    if each:
        xs = xs + torch.arange(network.num_indices, dtype=x.dtype).view(-1, *[1] * x.ndim)
    xs.requires_grad_()
    output = network.forward_each(xs) if each else network(xs)
    # An uneven loss, so that no gradient vanishes by symmetry.
    (output.float() * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return output, xs.grad, state_of(network), gradients(network)
