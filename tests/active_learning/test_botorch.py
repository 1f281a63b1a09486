"""Modules as BoTorch models: the posterior's moments and joint samples, gradients, acquisition functions, and refusals."""

import copy
import doctest
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    FitLaplace,
    HypermodelModule,
    NotFittedError,
    Regression,
)
from lightning_uq.active_learning import as_botorch_model
from lightning_uq.active_learning.botorch import _model_class
from lightning_uq.errors import InputError, MissingExtraError, UnsupportedError
from lightning_uq.networks import EpinetHead, PriorIndependentLayers

pytest.importorskip("botorch")
# The older acquisition functions advise their users to take the newer ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*has known numerical issues.*")

PAGE = Path(__file__).parents[2] / "docs" / "active_learning.md"
MEAN = Regression(head="mean", target_scale=(5.0, 3.0))
GAUSSIAN = Regression(head="mean_variance", target_scale=(5.0, 3.0))


def network(outputs: int = 1, dropout: float = 0.0) -> nn.Sequential:
    layers = [nn.Linear(2, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, outputs)]
    return nn.Sequential(*(layer for layer in layers if dropout or not isinstance(layer, nn.Dropout)))


def rows(num: int = 30) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.rand(num, 2)
    return [(x, 5 + 3 * x.sum(1, keepdim=True).sin())]


def laplace(module, **options):
    FitLaplace(select="marginal_likelihood", **options).fit(module, rows())
    return module


HEAD = EpinetHead(index_dim=3, hidden_sizes=(5,))
MODULES = {
    "ensemble": lambda: EnsembleModule(network, num_members=5, task=MEAN, seed=0),
    "ensemble of Gaussians": lambda: EnsembleModule(lambda: network(2), num_members=4, task=GAUSSIAN, seed=0),
    "loop": lambda: EnsembleModule(network, num_members=3, task=MEAN, seed=0, execution="loop"),
    "mixture density": lambda: EnsembleModule(
        lambda: network(6), num_members=3, task=Regression(head="mixture", components=2), seed=0
    ),
    "student": lambda: EnsembleModule(lambda: network(3), num_members=3, task=Regression(head="student_t"), seed=0),
    "epinet": lambda: EpinetModule(network(), head=HEAD, task=MEAN, num_eval_samples=9),
    "epinet with a prior, a frozen base and inputs": lambda: EpinetModule(
        network(),
        head=EpinetHead(index_dim=3, hidden_sizes=(5,), include_inputs=True),
        prior=lambda: PriorIndependentLayers(2, 1, index_dim=3),
        freeze_base=True,
        task=MEAN,
        num_eval_samples=9,
    ),
    "dropout": lambda: DropoutModule(network(dropout=0.3), task=MEAN, num_eval_samples=9),
    "bayes_by_backprop": lambda: BayesByBackpropModule(network(2), task=GAUSSIAN, num_eval_samples=9),
    "hypermodel": lambda: HypermodelModule(network(), task=MEAN, num_eval_samples=9),
    "laplace": lambda: laplace(DeterministicModule(network(), task=MEAN), num_samples=12),
    "laplace of Gaussians": lambda: laplace(DeterministicModule(network(2), task=GAUSSIAN), num_samples=12),
    "laplace of an ensemble": lambda: laplace(
        EnsembleModule(network, num_members=3, task=MEAN, seed=0), num_samples=12
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_samples_are_the_modules_functions_at_all_points_at_once(name):
    """In every batch of candidates, row by row, in the units of the targets."""
    module = MODULES[name]()
    model = as_botorch_model(module)
    X = torch.rand(3, 2, 4, 2, dtype=torch.float64)
    with torch.no_grad():
        posterior = model.posterior(X)
    values = posterior.values
    assert values.dtype == torch.float64
    assert values.shape[:2] == (3, 2)
    assert values.shape[3:] == (4, 1)
    # The functions are the same wherever a point stands, so all draws of a sample belong together.
    alone = model(X.reshape(-1, 1, 2)).detach().reshape(3, 2, 4, -1).transpose(2, 3)
    torch.testing.assert_close(values.squeeze(-1), alone, rtol=1e-4, atol=1e-4)
    samples = posterior.rsample(torch.Size([50]))
    distance = (samples.unsqueeze(-3) - values).abs().amax((-1, -2)).amin(-1)
    assert not distance.any()
    assert float(posterior.variance.min()) > 0
    if "laplace" not in name:
        prediction = module.predict(X.reshape(-1, 2).float())
        number = values.shape[2]
        torch.testing.assert_close(posterior.mean.reshape(-1, 1).float(), prediction.mean, rtol=1e-4, atol=1e-4)
        variance = posterior.variance.reshape(-1, 1).float() * (number - 1) / number
        torch.testing.assert_close(variance, prediction.epistemic_variance, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["ensemble of Gaussians", "epinet", "dropout"])
def test_the_covariance_of_two_points_is_the_members(name):
    module = MODULES[name]()
    module.return_members = True
    X = torch.rand(2, 2)
    members = module.predict(X).member_mean.squeeze(-1)
    samples = as_botorch_model(module).posterior(X).rsample(torch.Size([40_000])).squeeze(-1)
    expected = torch.cov(members.T, correction=0)
    torch.testing.assert_close(
        torch.cov(samples.T), expected, rtol=0.05, atol=0.02 * float(expected.detach().diagonal().max())
    )


@pytest.mark.parametrize("name", ["laplace", "laplace of Gaussians"])
def test_laplace_draws_have_the_moments_of_its_posterior(name):
    """The covariance of two points too: phi_1^T Sigma phi_2, from the posterior itself."""
    torch.manual_seed(1)
    module = MODULES[name]()
    transform = laplace(module, num_samples=20_000).prediction_transforms.before("", module)[0]
    X = torch.tensor([[0.1, 0.2], [0.9, 0.4]])
    posterior = as_botorch_model(module).posterior(X)
    prediction = module.predict(X)
    torch.testing.assert_close(posterior.mean, prediction.mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(posterior.variance, prediction.epistemic_variance, rtol=0.05, atol=0)
    (one,) = transform.posteriors
    phi = nn.functional.pad(module.network.network[:-1](X).double(), (0, 1), value=1.0)
    vectors = one.eigenvectors[0]
    covariance = 9 * phi @ vectors / one.precision[0] @ vectors.T @ phi.T  # in units of a standard deviation of 3
    samples = posterior.values.squeeze(-1).T.double()
    torch.testing.assert_close(
        torch.cov(samples), covariance.detach(), rtol=0.05, atol=0.03 * float(covariance.detach().max())
    )


@pytest.mark.parametrize("name", MODULES)
def test_gradients_reach_the_inputs(name):
    module = MODULES[name]()
    model = as_botorch_model(module.double())
    X = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda X: model.posterior(X).values, X)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("name", ["ensemble", "epinet", "dropout", "laplace"])
def test_acquisition_functions_are_finite_and_can_be_optimized(name):
    from botorch.acquisition import qLogExpectedImprovement, qLogNoisyExpectedImprovement, qNoisyExpectedImprovement
    from botorch.optim import optimize_acqf
    from botorch.sampling.index_sampler import IndexSampler

    model = as_botorch_model(MODULES[name]())
    ((x, y),) = rows(6)
    baseline = x.double()
    sampler = IndexSampler(torch.Size([16]), seed=0)
    best = float(model.posterior(baseline).mean.detach().max())
    functions = [
        qLogExpectedImprovement(model, best_f=best, sampler=sampler),
        qLogNoisyExpectedImprovement(model, baseline, sampler=sampler, prune_baseline=True, cache_root=False),
        qNoisyExpectedImprovement(model, baseline, sampler=sampler, prune_baseline=False, cache_root=False),
    ]
    for function in functions:
        X = torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True)
        value = function(X)
        (gradient,) = torch.autograd.grad(value.sum(), X)
        assert value.shape == (3,)
        assert bool(value.isfinite().all())
        assert bool(gradient.isfinite().all())
    assert bool(gradient.any())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    point, value = optimize_acqf(functions[0], bounds, q=1, num_restarts=2, raw_samples=8, options={"maxiter": 5})
    grid = torch.rand(64, 1, 2, dtype=torch.float64)
    assert bool((point >= 0).all() and (point <= 1).all())
    assert float(value.detach()) >= float(functions[0](grid).detach().median())


def test_expected_improvement_is_that_of_the_functions():
    """EI = mean_z max(max_q f(x_q, z) - best, 0), over the functions that the sampler draws."""
    from botorch.acquisition import qExpectedImprovement
    from botorch.sampling.index_sampler import IndexSampler

    model = as_botorch_model(MODULES["ensemble"]())
    X = torch.rand(1, 3, 2, dtype=torch.float64)
    best = float(model.posterior(X).mean.detach().min())
    found = qExpectedImprovement(model, best_f=best, sampler=IndexSampler(torch.Size([20_000])))(X)
    values = model(X)[0].squeeze(-1)
    torch.testing.assert_close(found[0], (values.amax(1) - best).clamp_min(0).mean(), rtol=0.05, atol=0)


def test_thompson_sampling_picks_the_best_point_of_a_function():
    from botorch.generation import MaxPosteriorSampling

    model = as_botorch_model(MODULES["ensemble"]())
    X = torch.rand(40, 2, dtype=torch.float64)
    best = {tuple(X[i].tolist()) for i in model(X).squeeze(-1).argmax(1)}
    picked = MaxPosteriorSampling(model, replacement=True)(X, num_samples=60)
    assert {tuple(row) for row in picked.tolist()} == best


def test_several_targets_and_their_indices():
    module = EnsembleModule(lambda: network(3), num_members=4, task=Regression(head="mean"), seed=0)
    X = torch.rand(5, 2)
    model = as_botorch_model(module, num_outputs=3)
    assert model.num_outputs == 3
    assert model.posterior(X).mean.shape == (5, 3)
    torch.testing.assert_close(model.posterior(X, output_indices=[2]).mean, module.predict(X).mean[:, 2:])
    with pytest.raises(InputError, match="number of the module's outputs, 3, but it is 1"):
        as_botorch_model(module).posterior(X)


def test_the_module_keeps_its_modes_and_the_model_follows_its_weights():
    module = MODULES["dropout"]()
    model = as_botorch_model(module)
    X = torch.rand(4, 2)
    before = model.posterior(X).mean
    assert module.training
    assert module.network.network[2].training
    assert torch.equal(copy.deepcopy(model).posterior(X).mean, before)
    with torch.no_grad():
        module.network.network[-1].bias += 1
    torch.testing.assert_close(model.posterior(X).mean, before + 3)  # a standard deviation of the targets


def test_an_input_transform_is_applied():
    from botorch.models.transforms import Normalize

    module = MODULES["dropout"]()
    X = torch.rand(4, 2, dtype=torch.float64)
    expected = as_botorch_model(module).posterior(X).mean
    model = as_botorch_model(module)
    model.input_transform = Normalize(2, bounds=torch.tensor([[0.0, 10.0], [5.0, 30.0]], dtype=torch.float64))
    torch.testing.assert_close(
        model.posterior(X * torch.tensor([5.0, 20.0]) + torch.tensor([0.0, 10.0])).mean, expected
    )
    assert module.training
    assert not model.input_transform.training


def test_a_laplace_posterior_of_other_weights_is_refused():
    module = MODULES["laplace"]()
    model = as_botorch_model(module)
    nn.init.zeros_(module.network.network[-1].bias)
    with pytest.raises(NotFittedError, match="other weights"):
        model.posterior(torch.rand(4, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (network, "must be an UncertaintyModule, but it is a Sequential"),
        (lambda: DeterministicModule(network(), task=MEAN), "has only one. Use an ensemble, an epinet"),
        (lambda: EpinetModule(network(), head=HEAD, task=MEAN, num_eval_samples=1), "only one. Raise `num_eval_sam"),
        (lambda: laplace(DeterministicModule(network(), task=MEAN), num_samples=1), "only one. Raise `num_samples`"),
        (lambda: DropoutModule(network(dropout=0.1), task=MEAN, mask="per_example"), "Use `mask='shared'`"),
        (lambda: EnsembleModule(network, num_members=2, seed=0), "a regressor that predicts means, but the task"),
        (
            lambda: EnsembleModule(lambda: network(3), num_members=2, task=Regression(head="quantiles"), seed=0),
            "a regressor that predicts means",
        ),
    ],
)
def test_modules_without_joint_samples_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        as_botorch_model(make())


def test_observation_noise_is_refused():
    with pytest.raises(UnsupportedError, match="without observation noise"):
        as_botorch_model(MODULES["ensemble"]()).posterior(torch.rand(4, 2), observation_noise=True)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "botorch.models.ensemble", None)
    _model_class.cache_clear()
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'lightning-uq[botorch]'")):
        as_botorch_model(MODULES["ensemble"]())


def test_the_docstrings_example_runs():
    """It is skipped among the other docstrings, which are run without BoTorch too."""
    text = as_botorch_model.__doc__.replace("# doctest: +SKIP", "")
    example = doctest.DocTestParser().get_doctest(text, {"as_botorch_model": as_botorch_model}, "example", None, 0)
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_pages_example_runs(tmp_path, monkeypatch, make_trainer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", lambda **given: make_trainer(**{**given, "max_epochs": 20}))
    text = PAGE.read_text().partition("## Bayesian optimisation")[2]
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(compile(block, PAGE.name, "exec"), names)
    assert names["batch"].shape == names["thompson"].shape == (2, 2)
    assert bool(((names["batch"] >= 0) & (names["batch"] <= 1)).all())
