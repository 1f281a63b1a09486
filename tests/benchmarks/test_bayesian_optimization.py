"""The benchmark of Bayesian optimisation: a run of each method, and its table."""

from types import ModuleType

import pytest

pytest.importorskip("botorch")
pytestmark = [
    pytest.mark.parametrize("module", ["bayesian_optimization"], indirect=True),
    # BoTorch's advice about inputs and values of a Gaussian process with few points.
    pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning"),
    # A Gaussian process at 2,000 points of the plane has a nearly singular covariance.
    pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.NumericalWarning"),
]


@pytest.mark.parametrize(
    "method", ["random", "gp", "ensemble", "epinet", "dropout", "laplace", "gp Thompson", "ensemble Thompson"]
)
def test_a_run_starts_with_the_same_points_and_never_gets_worse(module: ModuleType, monkeypatch, method: str):
    monkeypatch.setattr(module, "TRAINING_STEPS", 3)
    regret = module.run("branin", method, 0, 2)["regret"]
    assert len(regret) == 3
    assert regret[0] == module.run("branin", "random", 0, 0)["regret"][0]
    assert sorted(regret, reverse=True) == regret
    assert regret[-1] > 0


def test_thompson_sampling_takes_the_best_candidate_of_one_member(module: ModuleType, monkeypatch):
    """With two members whose best candidates differ, each is chosen at times, and no other point is."""
    import torch
    from botorch.models.ensemble import EnsembleModel

    class Members(EnsembleModel):
        num_outputs = 1

        def forward(self, X):
            return torch.stack([X.sum(-1), -X.sum(-1)], -2).unsqueeze(-1)

    monkeypatch.setattr(module, "fit_model", lambda method, X, Y: {"ensemble": Members()}[method])
    X = torch.rand(4, 2, dtype=torch.float64)
    sums = [float(module.next_point("ensemble Thompson", X, X[:, :1], seed).sum()) for seed in range(10)]
    assert all(total < 0.2 or total > 1.8 for total in sums)
    assert min(sums) < 0.2
    assert max(sums) > 1.8


def test_the_table_has_means_standard_errors_and_medians(module: ModuleType):
    values = {"branin-gp-0": [9.0, 1.0], "branin-gp-1": [9.0, 3.0], "branin-random-0": [9.0, 5.0]}
    table = module.table({job: {"regret": regret} for job, regret in values.items()})
    assert "| gp | 2.000 ±1.000 | 2.000 |" in table
    assert "| random | 5.000 | 5.000 |" in table
    assert table.endswith("Seeds per row: 1, 2.")


def test_a_network_sees_the_unit_cube_from_minus_one_to_one(module: ModuleType, monkeypatch):
    """In its training and in BoTorch's posterior alike."""
    import torch

    X = torch.tensor([[0.0, 1.0], [1.0, 0.25]], dtype=torch.float64)
    seen = []
    monkeypatch.setattr(module, "TRAINING_STEPS", 1)
    make = module.make_network

    def watched(inputs: int, dropout: float = 0.0):
        network = make(inputs, dropout)
        network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
        return network

    monkeypatch.setattr(module, "make_network", watched)
    model = module.fit_model("dropout", X, X.sum(1, keepdim=True))
    trained = seen[-1][:2]
    model.posterior(X)
    torch.testing.assert_close(trained, 2 * X - 1)
    torch.testing.assert_close(seen[-1][:2], 2 * X - 1)
