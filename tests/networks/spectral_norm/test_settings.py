"""Bounded networks in other precisions, compiled, checkpointed and on two ranks."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_uq.networks import spectral_normalize
from tests.networks.spectral_norm.bounded import X, norm_of, original, small_net, trained, true_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_keep_the_power_iteration_precise(dtype):
    net = spectral_normalize(small_net(), coefficient=0.3, n_warmup_iterations=1000).to(dtype)
    net(X.to(dtype))
    norm = norm_of(net[0])
    assert net[0].weight.dtype == dtype
    assert norm.v.dtype == norm.sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm_of(spectral_normalize(nn.Linear(2, 2, dtype=dtype))).v.dtype == norm.v.dtype
    truth = true_norm(net[0], (6, 6), weight=original(net[0]))
    assert norm.sigma.item() == pytest.approx(truth, rel=1e-4)
    net.eval()
    with torch.no_grad():
        net(X.to(dtype))
        assert net[0].weight.dtype == dtype
        assert net.float()(X).dtype == torch.float32  # the folded weight moved along


def test_autocast_does_not_touch_the_norm():
    net = spectral_normalize(small_net(), coefficient=0.3)
    plain = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(X)
    assert out.dtype == torch.bfloat16
    plain(X)
    for i in (0, 3, 5):
        assert torch.equal(norm_of(net[i]).sigma, norm_of(plain[i]).sigma)
    out.float().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        net.eval()(X)
        assert net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("sized", [False, True])
def test_compiled_networks_agree(sized):
    net = spectral_normalize(small_net(), coefficient=0.3)
    if sized:
        net(X)
    expected, got = copy.deepcopy(net), net
    torch._dynamo.reset()
    compiled = torch.compile(got, backend="aot_eager")
    for _ in range(2):
        want, have = expected(X), compiled(X)
        torch.testing.assert_close(have, want)
        want.sum().backward()
        have.sum().backward()
    torch.testing.assert_close(original(got[0]).grad, original(expected[0]).grad)
    torch.testing.assert_close(norm_of(got[0]).v, norm_of(expected[0]).v)
    expected.eval()
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), expected(X))
        original(got[5]).mul_(3)
        original(expected[5]).mul_(3)
        torch.testing.assert_close(compiled(X), expected(X))


def test_gradient_checkpointing():
    net = trained()
    torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False).sum().backward()
    assert original(net[0]).grad.isfinite().all()


ONE_RANK = """
import os
import sys
import torch
from torch import nn
from lightning_uq.networks.spectral_norm import spectral_normalize

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(rank)  # ranks need not share a seed
net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
net = nn.parallel.DistributedDataParallel(spectral_normalize(net, coefficient=0.3, bound_batchnorm=True))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.randn(2, 2, 6, 6)).square().sum().backward()
    optimizer.step()
net.eval()
with torch.no_grad():
    net(torch.randn(2, 2, 6, 6))  # rank 0's buffers arrive
torch.save(net.module.state_dict(), f"{folder}/{rank}.pt")
os._exit(0)  # at once: see tests/conftest.py
"""


def test_two_ranks_agree(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", ONE_RANK, str(tmp_path), str(rank)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["0.parametrizations.weight.0.v"].shape == (2, 6, 6)
    for key in first:
        torch.testing.assert_close(first[key], second[key], msg=key)
