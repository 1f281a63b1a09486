"""One prediction of each type, with B rows."""

import torch

from lightning_uq.predictions import (
    BernoulliPrediction,
    CategoricalPrediction,
    DirichletPrediction,
    GaussianMixturePrediction,
    PooledBernoulliPrediction,
    PooledCategoricalPrediction,
    PooledRegressionPrediction,
    StudentTPrediction,
)


def generator(b):
    return torch.Generator().manual_seed(b)


def categorical(b=4, *, z=3, shape=(5,), **kwargs):
    return CategoricalPrediction(torch.randn(z, b, *shape, generator=generator(b)), **kwargs)


def bernoulli(b=4, *, z=3, shape=(5,), **kwargs):
    return BernoulliPrediction(torch.randn(z, b, *shape, generator=generator(b)), **kwargs)


def dirichlet(b=4, *, z=3, shape=(5,), **kwargs):
    return DirichletPrediction(torch.rand(z, b, *shape, generator=generator(b)) * 9 + 0.1, **kwargs)


def gaussian_mixture(b=4, *, z=3, d=2, **kwargs):
    g = generator(b)
    return GaussianMixturePrediction(
        torch.randn(z, b, d, generator=g), torch.rand(z, b, d, generator=g) + 0.1, **kwargs
    )


def student_t(b=4, *, z=3, d=2, **kwargs):
    g = generator(b)
    location = torch.randn(z, b, d, generator=g)
    nu, alpha, beta = torch.rand(3, z, b, d, generator=g) + 0.2
    return StudentTPrediction(location, nu, alpha + 1.5, beta, **kwargs)


def pooled_categorical(b=4, **kwargs) -> PooledCategoricalPrediction:
    return categorical(b, **kwargs).pool()


def pooled_bernoulli(b=4, **kwargs) -> PooledBernoulliPrediction:
    return bernoulli(b, **kwargs).pool()


def pooled_regression(b=4, **kwargs) -> PooledRegressionPrediction:
    return gaussian_mixture(b, **kwargs).pool()


WITH_MEMBERS = [categorical, bernoulli, dirichlet, gaussian_mixture, student_t]
ALL = [*WITH_MEMBERS, pooled_categorical, pooled_bernoulli, pooled_regression]


def tensors(prediction):
    """The tensors that a prediction holds, by name."""
    return {name: tensor for name, tensor, _ in prediction._present()}


def assert_same(found, expected):
    assert type(found) is type(expected)
    assert tensors(found).keys() == tensors(expected).keys()
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(found)[name], tensor), name
