"""The statistics that standardise an epinet's features, against their definition."""

import pytest
import torch

from lightning_uq.networks.epinet.feature_scaler import FeatureScaler


@pytest.mark.parametrize(("momentum", "offset"), [(0.0, 0.0), (0.1, 3.0), (0.1, 1000.0)])
def test_the_statistics_are_averages_over_batches(momentum, offset):
    generator = torch.Generator().manual_seed(0)
    batches = offset + torch.randn(15, 32, 4, generator=generator) * torch.tensor([0.5, 1.0, 2.0, 4.0])
    scaler = FeatureScaler(4, momentum=momentum)
    mean, square = torch.zeros(4).double(), torch.zeros(4).double()
    for number, batch in enumerate(batches, 1):
        scaled = scaler(batch)
        weight, wide = max(1 / number, momentum), batch.double() - offset
        mean, square = mean + weight * (wide.mean(0) - mean), square + weight * (wide.square().mean(0) - square)
    variance = square - mean.square()
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(scaler.running_mean.double() - offset, mean, **tolerance)
    torch.testing.assert_close(scaler.running_var.double(), variance, **tolerance)
    torch.testing.assert_close(scaled.double(), (wide - mean) / variance.sqrt(), rtol=1e-3, atol=1e-3)


def test_features_that_hardly_vary_do_not_explode():
    scaler = FeatureScaler(3)
    scaler(torch.tensor([[-1.0, 5.0, 2.0], [1.0, 5.0, 2.0]]))
    floor = (0.01 / 3) ** 0.5  # a tenth of the root mean square of the standard deviations (1, 0, 0)
    found = scaler.eval()(torch.tensor([[1.0, 6.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / floor, 0.0]]))
    alone = FeatureScaler(2)
    alone(torch.tensor([[3.0, 4.0]]))  # one row has no variance at all: its features are centred alone
    torch.testing.assert_close(alone.eval()(torch.tensor([[4.0, 4.0]])), torch.tensor([[1.0, 0.0]]))


def test_half_precision_is_scaled_in_float32():
    scaler = FeatureScaler(2).bfloat16()
    assert scaler(torch.randn(8, 2).bfloat16()).dtype == torch.float32
