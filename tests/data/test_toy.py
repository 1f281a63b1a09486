import math

import pytest
import torch

from lightning_uq.data import ToyCurveDataModule, toy_curve, two_moons
from lightning_uq.errors import InputError


def test_moons_lie_on_two_half_circles():
    x, y = two_moons(400, noise=0.0, generator=torch.Generator().manual_seed(0))
    centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[y]
    torch.testing.assert_close((x - centre).norm(dim=1), torch.ones(400))
    assert (x[y == 0, 1] >= 0).all()
    assert (x[y == 1, 1] <= 0.5).all()
    assert y.bincount().tolist() == [200, 200]
    assert 0.3 < (y[1:] == y[:-1]).double().mean() < 0.7


def test_curve_is_a_cubic_with_the_stated_noise():
    x, y = toy_curve(20_000, generator=torch.Generator().manual_seed(0))
    noise = y - x**3
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 3) < 0.1
    assert -4 <= x.min() < -3.9 < 3.9 < x.max() <= 4
    assert abs(float(x.std()) - ToyCurveDataModule.scale[0]) < 0.05
    # E[x^6] = 4^6 / 7: the scale leaves the noise out.
    assert abs(float((x**3).std()) - ToyCurveDataModule.scale[1]) < 0.3
    assert math.isclose(ToyCurveDataModule.scale[1] ** 2, 4**6 / 7)


def test_curve_data_module_repeats():
    batches = [[torch.cat(b) for b in ToyCurveDataModule(seed=seed).train_dataloader()] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])
    data = ToyCurveDataModule(num_train=10, num_test=7)
    assert [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader())] == [10, 7]
    assert not torch.equal(data.val_dataloader().dataset.tensors[0], data.test_dataloader().dataset.tensors[0])


def test_counts_are_checked():
    with pytest.raises(InputError, match="`num_points` must be at least 1, but it is 0"):
        two_moons(0)
    with pytest.raises(InputError, match="`num_train` must be at least 1, but it is -1"):
        ToyCurveDataModule(num_train=-1)
