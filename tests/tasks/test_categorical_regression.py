"""Numbers under a distribution over atoms per hypothesis."""

import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.tasks import CategoricalRegression, OutputShapeError

ATOMS = (-2.0, -0.5, 0.0, 1.0, 3.0)
TASK = CategoricalRegression(ATOMS)
OUTPUTS = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(0))  # Z, B, D A + D with D = 2
TARGET = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))


def two_hot(value):
    """Weights of the two atoms beside a value, so that their mean is the value; clipped to the atoms' range."""
    value = min(max(value, ATOMS[0]), ATOMS[-1])
    k = max(i for i in range(len(ATOMS) - 1) if ATOMS[i] <= value)
    share = (value - ATOMS[k]) / (ATOMS[k + 1] - ATOMS[k])
    weights = [0.0] * len(ATOMS)
    weights[k], weights[k + 1] = 1 - share, share
    return torch.tensor(weights)


def test_the_loss_by_its_definition():
    sums, counts = TASK.sample_losses(OUTPUTS[0], TARGET)
    assert counts.tolist() == [2] * 6
    logits, prior = OUTPUTS[0, :, :10].reshape(6, 2, 5), OUTPUTS[0, :, 10:]
    for b in range(6):
        expected = sum(
            -(two_hot(float(TARGET[b, d] - prior[b, d])) * logits[b, d].log_softmax(0)).sum() for d in range(2)
        )
        torch.testing.assert_close(sums[b], expected)


def test_predictions_have_the_distributions_moments():
    prediction = TASK.predict(OUTPUTS)
    probs, atoms = OUTPUTS[..., :10].reshape(3, 6, 2, 5).softmax(-1), torch.tensor(ATOMS)
    mean = (probs * atoms).sum(-1)
    torch.testing.assert_close(prediction.member_mean, mean + OUTPUTS[..., 10:])
    variance = (probs * (atoms - mean.unsqueeze(-1)).square()).sum(-1)
    torch.testing.assert_close(prediction.member_variance, variance + 1e-6)
    assert TASK.ood_score in TASK.score_names


def test_atoms_come_as_any_sequence():
    assert TASK == CategoricalRegression(list(ATOMS)) == CategoricalRegression(torch.tensor(ATOMS))
    assert TASK.outputs_per_target == 6


@pytest.mark.parametrize("atoms", [(), (1.0,), (1.0, 1.0), (2.0, 1.0)])
def test_bad_atoms(atoms):
    with pytest.raises(InputError, match="atoms"):
        CategoricalRegression(atoms)


def test_bad_outputs_and_targets():
    TASK.check_output(OUTPUTS)
    TASK.check_target(TARGET, OUTPUTS)
    with pytest.raises(OutputShapeError, match=r"must return \[B, 6 D\], .* but it returned shape \[6, 11\]"):
        TASK.check_output(OUTPUTS[..., :11])
    with pytest.raises(InputError, match=r"must have shape \[6, 2\], .* but they have \[6, 1\]"):
        TASK.check_target(TARGET[:, :1], OUTPUTS)
