"""The UCI reproduction: networks that train side by side are those that train alone, and scores are in the target's units."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq import EnsembleModule, GaussianMixturePrediction, Regression, StudentTPrediction

RATES = [0.01, 0.03, 0.03]


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def ensemble_of(
    module: ModuleType, factory: Callable[[], nn.Module], task: Regression, optimizer: object, execution: str
) -> EnsembleModule:
    return EnsembleModule(
        factory, num_members=2, seed=0, adversarial_epsilon=0.05, execution=execution, task=task, optimizer=optimizer
    )


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("module", ["uci_training"], indirect=True)
def test_networks_side_by_side_end_as_they_would_alone(module: ModuleType, execution: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(230, 3, 2, generator=generator, dtype=torch.float64)
    y = x.sum(2) + torch.randn(230, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    starts = [[small_network() for _ in RATES] for _ in range(2)]
    scales = [(float(mean), float(std)) for mean, std in zip(y.mean(0), y.std(0), strict=True)]
    task = Regression(target_scale=tuple(map(list, zip(*scales, strict=True))))
    stacks = [module.SideBySide(networks, RATES) for networks in starts]
    together = ensemble_of(module, partial(next, iter(stacks)), task, stacks[0].optimizer, execution)
    torch.manual_seed(0)
    module.fit(together, x, y, epochs=3)
    unstacked = [together.network.member(i).unstacked(small_network) for i in range(2)]
    for split, (rate, scale) in enumerate(zip(RATES, scales, strict=True)):
        optimizer = partial(torch.optim.Adam, lr=rate)
        networks = iter([networks[split] for networks in starts])
        alone = ensemble_of(module, partial(next, networks), Regression(target_scale=scale), optimizer, "loop")
        torch.manual_seed(0)
        module.fit(alone, x[:, split], y[:, split : split + 1], epochs=3)
        for member, networks in enumerate(unstacked):
            expected = alone.network.member(member).state_dict()
            torch.testing.assert_close(dict(networks[split].state_dict()), dict(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("module", ["uci_training"], indirect=True)
def test_nll_is_that_of_one_gaussian_with_the_mixtures_moments(module: ModuleType):
    prediction = GaussianMixturePrediction(torch.tensor([[[0.0]], [[2.0]]]), torch.ones(2, 1, 1))
    found = module.score(prediction, torch.tensor([[3.0]]))
    assert found["rmse"] == pytest.approx(2.0)
    assert found["nll"] == pytest.approx(0.5 * math.log(2 * math.pi * 2) + 4 / 4)  # mean 1, variance 2


@pytest.mark.parametrize("module", ["uci_training"], indirect=True)
def test_nll_of_an_evidential_network_is_its_students(module: ModuleType):
    location, nu, alpha, beta = (torch.full((1, 1, 1), value) for value in (0.0, 1.0, 2.0, 3.0))
    prediction = StudentTPrediction(location=location, nu=nu, alpha=alpha, beta=beta)
    expected = torch.distributions.StudentT(4.0, 0.0, math.sqrt(3 * 2 / 2)).log_prob(torch.tensor(1.5))
    assert module.score(prediction, torch.tensor([[1.5]]))["nll"] == pytest.approx(-float(expected), rel=1e-5)


@pytest.mark.parametrize("module", ["uci_training"], indirect=True)
def test_intervals_are_those_of_the_calibration_rows(module: ModuleType):
    network = small_network()
    nn.init.zeros_(network[2].weight)
    nn.init.zeros_(network[2].bias)  # mean 0
    calibration = torch.zeros(19, 2), torch.arange(1.0, 20.0).unsqueeze(1)
    test = torch.zeros(4, 2), torch.tensor([[-40.0], [-30.0], [0.0], [40.0]])
    found = module.score_intervals(network, ([0.0], [2.0]), calibration, test)["absolute"]
    assert found == pytest.approx({"coverage": 0.25, "width": 2 * 18 / 2})  # 18 is the 18th of 19 scores


@pytest.fixture
def data(tmp_path: Path) -> Path:
    values = np.random.RandomState(0).randn(200, 4)
    x, noise = values[:, :3], values[:, 3:]
    (tmp_path / "yacht").mkdir()
    np.savetxt(tmp_path / "yacht" / "data.txt", np.hstack([x, 1000 + 50 * x[:, :1] + 10 * noise]))
    return tmp_path


@pytest.mark.parametrize("method", ["ensemble+AT", "ensemble", "dropout", "evidential", "epinet"])
@pytest.mark.parametrize("module", ["uci"], indirect=True)
def test_methods_learn_in_the_targets_units(
    module: ModuleType, method: str, data: Path, monkeypatch: pytest.MonkeyPatch
):
    # An epinet diverges at 0.03 on these few rows.
    monkeypatch.setattr(module, "RATES", (0.01,) if method == "epinet" else (0.03, 1e-6))
    result = module.run("yacht", method, 2, data, epochs=30)
    assert len(result["splits"]) == 2
    for split in result["splits"]:
        assert set(split) == ({method, "single", "laplace", "conformal"} if method == "ensemble" else {method})
        assert split[method]["rate"] == module.RATES[0]
        for name, found in split.items():
            if name != "conformal":
                assert found["rmse"] < 25  # the standard deviation of the targets is 50
                assert math.isfinite(found["nll"])


@pytest.mark.parametrize("module", ["uci_training"], indirect=True)
def test_an_epinets_gradient_is_cut(module: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """A Gaussian's likelihood has gradients without bound, and a large rate then leaves a training far off."""
    norms = []

    class Watched(torch.optim.Adam):
        def step(self, *args, **kwargs):
            loss = super().step(*args, **kwargs)  # its closure computes the gradients and cuts them
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
            return loss

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    x = torch.randn(20, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = 1e3 * torch.ones(20, 1, dtype=torch.float64)
    y[0] = -1e5
    module.train_epinet(module.make_network(2, 4), module.Rows(x, y), rate=0.01, epochs=2)
    assert len(norms) == 2
    assert max(norms) == pytest.approx(1.0, rel=1e-3)
