from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.networks.indexers import (
    DirichletIndexer,
    EnsembleIndexer,
    GaussianIndexer,
    GaussianWithUnitIndexer,
    ScaledGaussianIndexer,
    SeedIndexer,
)

DRAWS = np.load(Path(__file__).parents[1] / "reference" / "enn_indexers.npz")
INDEXERS = {
    "gaussian": GaussianIndexer(6),
    "scaled": ScaledGaussianIndexer(6, index_scale=2.0),
    "unit": GaussianWithUnitIndexer(6),
    "ensemble": EnsembleIndexer(int(DRAWS["indexer/ensemble"].max()) + 1),
}


@pytest.mark.parametrize("name", INDEXERS)
def test_moments_are_those_of_the_original(name):
    ours = INDEXERS[name](20_000, torch.Generator().manual_seed(0)).double()
    theirs = torch.from_numpy(DRAWS[f"indexer/{name}"]).double()
    assert ours.shape[1:] == theirs.shape[1:]
    error = theirs.std(0) / len(theirs) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-6).all()
    assert ((ours.std(0) / theirs.std(0).clamp_min(1e-9) - 1).abs() < 0.15).logical_or(theirs.std(0) == 0).all()


def test_dirichlet_rows_are_distributions():
    z = DirichletIndexer([0.5, 1.0, 2.5])(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.sum(1), torch.ones(20_000))
    torch.testing.assert_close(z.mean(0), torch.tensor([0.125, 0.25, 0.625]), atol=0.01, rtol=0)
    assert (z >= 0).all()


def test_the_unit_index_is_not_normalised():
    z = GaussianWithUnitIndexer(5)(1000)
    assert (z[:, 0] == 1).all()
    assert z[:, 1:].square().sum(1).std() > 0.3
    assert torch.equal(GaussianWithUnitIndexer(5).mean_index, torch.tensor([1.0, 0, 0, 0, 0]))


@pytest.mark.parametrize("indexer", [*INDEXERS.values(), DirichletIndexer([1.0, 2.0]), SeedIndexer()], ids=repr)
def test_a_generator_decides_alone(indexer):
    state = torch.get_rng_state()
    first = indexer(7, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, indexer(7, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, indexer(7, torch.Generator().manual_seed(4)))
    torch.manual_seed(3)
    assert torch.equal(first, indexer(7))


def test_only_members_are_a_finite_set():
    assert EnsembleIndexer(4).num_indices == 4
    assert GaussianIndexer(4).num_indices is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianIndexer(0), "`index_dim` must be an integer of at least 1"),
        (lambda: GaussianWithUnitIndexer(1), "`index_dim` must be an integer of at least 2"),
        (lambda: ScaledGaussianIndexer(4, 0.0), "`index_scale` must be positive and finite, but it is 0.0"),
        (lambda: ScaledGaussianIndexer(4, float("inf")), "`index_scale` must be positive and finite, but it is inf"),
        (lambda: EnsembleIndexer(0), "`num_members` must be an integer of at least 1"),
        (lambda: DirichletIndexer([]), "`concentration`"),
        (lambda: DirichletIndexer([1.0, -1.0]), "`concentration`"),
        (lambda: DirichletIndexer([1.0, float("nan")]), "`concentration`"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
