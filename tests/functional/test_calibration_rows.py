"""Rows of a calibration by class: their order, and classes of which there is none."""

import math

import pytest
import torch

from lightning_uq.functional.calibration_rows import calibration_rows, in_order, pooled_rows
from lightning_uq.functional.isotonic import fit_isotonic
from lightning_uq.functional.matrix_scaling import fit_matrix_scaling
from lightning_uq.functional.temperature import fit_ensemble_temperature, fit_temperature
from lightning_uq.functional.vector_scaling import fit_vector_scaling
from tests.counting import peak_bytes


def rows(n=400, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), target] += 2
    return logits, target


@pytest.mark.parametrize("special", [0.0, -math.inf, -1e30], ids=["plain", "ruled out", "huge"])
def test_rows_have_one_order_whatever_order_they_come_in(special):
    logits, target = rows(c=3)
    logits[torch.rand(400, 3, generator=torch.Generator().manual_seed(1)) < 0.3] += special
    logits[:7], target[:3], target[3:7] = logits[0], 0, 1  # equal rows, of two classes
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    found, expected = in_order(logits[shuffled], target[shuffled]), in_order(logits, target)
    assert all(map(torch.equal, found, expected))
    pairs = [sorted(map(tuple, torch.cat([x, y[:, None]], 1).tolist())) for x, y in ((logits, target), expected)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_differ_are_not_compared_with_one_another(monkeypatch, dtype):
    logits, target = rows(n=3000)
    logits = logits.to(dtype)
    expected = in_order(logits, target)
    monkeypatch.setattr(torch, "unique", None)
    shuffled = torch.randperm(3000)
    found = in_order(logits[shuffled], target[shuffled])
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found[0].sort(0).values, logits.sort(0).values)


@pytest.mark.parametrize("fit", [fit_isotonic, fit_matrix_scaling, fit_vector_scaling])
def test_a_class_without_a_row_is_named(fit):
    logits, target = rows()
    target = torch.where(target == 2, 3, target)
    with pytest.warns(UserWarning, match="No row is of class 2, so the fit makes their probabilities very small"):
        fit(logits, target)
    fit(*rows())  # and no class is, where each has rows
    fit(logits.index_fill(1, torch.tensor(2), -math.inf), target)  # nor one that every row rules out


def test_of_many_classes_without_a_row_some_are_named():
    logits, target = rows(c=30)
    with pytest.warns(UserWarning, match="of class 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 10 more,"):
        fit_isotonic(logits, target % 10)


def test_float32_rows_are_not_copied_and_pooled_ones_stay_float32():
    logits, target = rows()
    members = torch.stack([logits, 2 * logits]).float()
    assert calibration_rows(members[0], target, 2)[0].data_ptr() == members.data_ptr()
    pooled = pooled_rows(members)
    assert pooled.dtype == torch.float32
    expected = members.double().softmax(2).mean(0).log()
    torch.testing.assert_close(pooled, expected.float())
    assert pooled_rows(members.double()).dtype == torch.float64
    assert float(fit_ensemble_temperature(members, target)) == pytest.approx(
        float(fit_temperature(expected, target)), rel=1e-5
    )


@pytest.mark.parametrize("fit", [fit_ensemble_temperature, lambda x, y: fit_vector_scaling(pooled_rows(x), y)])
def test_a_pooled_fit_needs_no_more_memory_for_more_members(monkeypatch, fit):
    for name in ("calibration_rows._CHUNK", "temperature_search._CHUNK_ELEMENTS", "vector_scaling._PART_ELEMENTS"):
        monkeypatch.setattr(f"lightning_uq.functional.{name}", 2**10)
    logits, target = rows(n=4000)
    logits = logits.float()

    def peak(num_members):
        members = logits.expand(num_members, -1, -1)
        return peak_bytes(lambda: fit(members, target))

    assert peak(16) < 1.1 * peak(2) < 12 * logits.nbytes
    if fit is fit_ensemble_temperature:
        assert peak(16) < 2 * logits.nbytes
