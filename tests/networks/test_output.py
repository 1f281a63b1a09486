import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.output import OutputReader

LOGITS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("output", "raw"),
    [
        ("logits", LOGITS),
        ("log_probs", LOGITS.log_softmax(-1)),
        ("probs", LOGITS.softmax(-1)),
        (lambda out: out["logits"], {"logits": LOGITS}),
        (lambda out: out[1], (None, LOGITS)),
    ],
)
def test_each_form_gives_the_same_probabilities(output, raw):
    torch.testing.assert_close(OutputReader(output)(raw).softmax(-1), LOGITS.softmax(-1))


def test_a_probability_of_zero_stays_finite():
    assert OutputReader("probs")(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("raw", [{"out": LOGITS}, (0, LOGITS), None])
def test_what_is_no_tensor_names_the_argument(raw):
    with pytest.raises(InputError, match="`output`, a function that picks the logits"):
        OutputReader()(raw)


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="'probabilities'"):
        OutputReader("probabilities")


def test_a_picked_output_is_compiled_without_a_break_in_the_graph():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x), x

    network, x = DeterministicNetwork(Pair()), torch.randn(4, 2)
    index = network.evaluation_index(1)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, index)[0], network.network.layer(x))
    with pytest.warns(UserWarning, match="whose first part"):
        network(x, index)
    torch.compiler.reset()
