from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional import whitening as module
from lightning_uq.functional.whitening import DDU_JITTERS

REFERENCE = Path(__file__).parents[1] / "reference"


def test_the_ddu_schedule_is_the_originals_without_what_rounds_to_the_same():
    expected = np.load(REFERENCE / "ddu_gmm_jitters.npz")["float32"]
    assert np.array_equal(np.array(DDU_JITTERS), expected)


def test_the_ddu_schedule_gives_up_with_advice():
    with pytest.raises(InputError, match=r"any jitter of regularization=\"ddu\", up to 0.1"):
        module.ddu_jitter(lambda c: torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), 2)


def test_the_ddu_schedule_rechecks_every_class_after_a_rise():
    # Class 0 factors at 0 and, as rounding can make it, not at 1e-3; class 1 needs 1e-3 or more.
    def covariance(c):
        return torch.tensor([[float(c)]], dtype=torch.float64)

    def factor(matrix):
        value = float(matrix)
        if value < 1:  # class 0: succeeds at 0, and above 5e-3
            return matrix if value == 0 or value > 5e-3 else None
        return matrix if value >= 1.0009 else None

    original = module.cholesky
    module.cholesky = factor
    try:
        assert module.ddu_jitter(covariance, 2) == pytest.approx(1e-2)
    finally:
        module.cholesky = original
