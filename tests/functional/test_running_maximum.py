import pytest
import torch
from torch import nn

from lightning_uq.functional.running_maximum import running_maximum


class RunningMaximum(nn.Module):
    def forward(self, x):
        return running_maximum(x)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_graph_gives_the_same(size, dtype):
    x = (9 * torch.randn(20, size, generator=torch.Generator().manual_seed(size))).to(dtype)
    program = torch.export.export(RunningMaximum(), (x,))
    assert "aten.cummax.default" not in {str(node.target) for node in program.graph.nodes}
    assert torch.equal(program.module()(x), x.cummax(1).values)
    assert torch.equal(running_maximum(x), x.cummax(1).values)
