import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.functional.gaussian import fit_gaussian
from lightning_uq.functional.mahalanobis import squared_distances
from tests.functional.class_rows import KINDS, covariance_of, rows, stream
from tests.no_float64 import device_without_float64


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_distances_are_the_definition(seed, kind):
    x, y = rows(seed)
    fit = fit_gaussian(stream(x, y, kind), regularization=0.1)
    got = squared_distances(x, fit.mean, fit.whitening)
    precision = torch.linalg.inv(covariance_of(fit)).expand(3, 4, 4)
    offset = x[:, None] - fit.mean
    expected = torch.einsum("ncd,cde,nce->nc", offset, precision, offset)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_a_single_class_and_a_single_feature():
    x = torch.tensor([[0.0], [2.0], [4.0]])
    for kind in KINDS:
        for regularization in ("oas", 0.0):
            fit = fit_gaussian(stream(x, torch.zeros(3, dtype=torch.long), kind, c=1), regularization=regularization)
            distances = squared_distances(x.double(), fit.mean, fit.whitening).squeeze(1)
            torch.testing.assert_close(distances, torch.tensor([1.0, 0, 1], dtype=torch.float64), rtol=1e-5, atol=1e-9)


def test_far_classes_under_one_covariance_keep_their_digits(monkeypatch):
    mean = torch.tensor([[0.0, 0.0], [3e4, 0.0], [0.0, -5e4]])
    features, whitening = mean + torch.tensor([0.3, -0.4]), torch.eye(2)[None]
    expected = (features.double()[:, None] - mean.double()).square().sum(2)
    torch.testing.assert_close(squared_distances(features, mean, whitening), expected, rtol=1e-2, atol=1e-3)
    with device_without_float64(monkeypatch):
        distances = squared_distances(features, mean, whitening)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-2, atol=1e-3)
