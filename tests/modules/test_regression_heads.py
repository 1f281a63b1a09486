"""Every head of a regression under every method: trained, tested and predicted, with a horizon and missing targets."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    HypermodelModule,
    InputError,
    PooledRegressionPrediction,
    PredictionWriter,
    Regression,
    read_predictions,
)
from lightning_uq.data import Indexed
from lightning_uq.losses import GaussianTargetNoise
from lightning_uq.networks import EpinetHead
from lightning_uq.tasks import OutputShapeError
from tests.tasks.test_regression_heads import HEADS

H, D = 3, 2


class Horizon(nn.Module):
    """Outputs [B, H, k D]."""

    def __init__(self, k: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, H * k * D))

    def forward(self, x):
        return self.net(x).unflatten(-1, (H, -1))


METHODS = {
    "deterministic": lambda k, **kw: DeterministicModule(Horizon(k), **kw),
    "loop": lambda k, **kw: EnsembleModule(lambda: Horizon(k), num_members=2, execution="loop", seed=0, **kw),
    "vmap": lambda k, **kw: EnsembleModule(lambda: Horizon(k), num_members=2, execution="vmap", seed=0, **kw),
    "adversarial": lambda k, **kw: EnsembleModule(
        lambda: Horizon(k), num_members=2, seed=0, adversarial_epsilon=0.01, adversarial_scale="absolute", **kw
    ),
    "dropout": lambda k, **kw: DropoutModule(Horizon(k, 0.3), num_eval_samples=4, **kw),
    "hypermodel": lambda k, **kw: HypermodelModule(Horizon(k), index_dim=2, num_eval_samples=4, **kw),
    "bayes": lambda k, **kw: BayesByBackpropModule(Horizon(k), num_eval_samples=4, **kw),
}


def loader(missing: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator)
    y = x[:, :D].unsqueeze(1) * torch.arange(1, H + 1).reshape(H, 1) + torch.randn(20, H, D, generator=generator)
    if missing:
        y[::3, 1, 0], y[5] = math.nan, math.nan
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_trained_tested_and_predicted(make_trainer, head, method):
    task = Regression(head=head, target_scale=(1.0, 2.0))
    build = METHODS[method]
    if method == "bayes" and not task.has_likelihood:
        with pytest.raises(InputError, match=r"needs a negative log-likelihood, but the loss of Regression\(head="):
            build(task.outputs_per_target, task=task)
        return
    torch.manual_seed(0)
    module = build(task.outputs_per_target, task=task, optimizer=lambda p: torch.optim.Adam(p, 0.02))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader())
    (tested,) = trainer.test(module, loader(), verbose=False)
    assert all(math.isfinite(value) for value in tested.values())
    x, y = loader().dataset.tensors
    prediction = module.eval().predict(x)
    assert type(prediction) is HEADS[head]
    assert prediction.target_shape == (20, H, D)
    known = ~y.isnan()
    errors = (prediction.point.detach() - y)[known]
    assert tested["test_mae" if head in ("mean", "quantiles") else "test_rmse"] == pytest.approx(
        (errors.abs().mean() if head in ("mean", "quantiles") else errors.square().mean().sqrt()).item(), rel=1e-5
    )
    sums, counts = zip(*(task.sample_losses(output, y) for output in module(x)), strict=True)
    expected = torch.stack(sums).sum() / torch.stack(counts).sum()
    assert tested["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    if method == "dropout" and head in ("mean", "quantiles"):
        module.return_members = False
        pooled = module.predict(x)
        assert pooled.num_indices is None
        torch.testing.assert_close(pooled.epistemic_variance, prediction.epistemic_variance)


@pytest.mark.parametrize("head", HEADS)
def test_an_epinet_on_rows(make_trainer, head):
    """An epinet's head gives one row per input, so a horizon of it is D = H numbers."""
    task = Regression(head=head)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, task.outputs_per_target * H))
    module = EpinetModule(network, head=EpinetHead(hidden_sizes=(4,), index_dim=2), num_eval_samples=3, task=task)
    x, y = loader().dataset.tensors
    rows = DataLoader(TensorDataset(x, y[..., 0]), batch_size=8)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, rows)
    (tested,) = trainer.test(module, rows, verbose=False)
    assert all(math.isfinite(value) for value in tested.values())
    assert type(module.predict(x)) is HEADS[head]


def test_a_missing_target_changes_no_gradient(make_trainer):
    """A training with NaN targets ends with the weights of a training whose loss leaves those targets out by hand."""

    def by_hand(output, target):
        known = target.isfinite()
        return (output[known] - target[known]).square().mean()

    weights = []
    for options in ({"task": Regression(head="mean")}, {"task": Regression(head="mean"), "loss": by_hand}):
        torch.manual_seed(0)
        module = DeterministicModule(Horizon(1), optimizer=lambda p: torch.optim.SGD(p, 0.05), **options)
        make_trainer(max_epochs=2).fit(module, loader())
        weights.append(torch.cat([p.flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[0], weights[1])


def test_noise_on_targets_that_are_missing(make_trainer):
    x, y = loader().dataset.tensors
    data = DataLoader(Indexed(TensorDataset(x, y[:, 0])), batch_size=8)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, D))
    noise = GaussianTargetNoise(0.1, seed=0)
    module = EnsembleModule(lambda: network, num_members=1, seed=0, task=Regression(head="mean"), data_noise=noise)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, data)
    assert math.isfinite(trainer.callback_metrics["train_loss"])


def test_many_hypotheses_of_a_distribution_are_pooled_to_moments():
    for head in ("mean_variance", "student_t", "mixture"):
        task = Regression(head=head)
        module = DropoutModule(Horizon(task.outputs_per_target, 0.3), num_eval_samples=40, task=task)
        prediction = module.predict(torch.zeros(5, 4))
        assert isinstance(prediction, PooledRegressionPrediction)
        assert prediction.variance.shape == (5, H, D)


def test_a_network_of_means_is_told_its_task(make_trainer):
    rows = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 2)), batch_size=8)
    for out, target in ((3, 3), (2, 2), (1, 1)):
        data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, target)), batch_size=8)
        with pytest.raises(InputError, match=r"pass `task=Regression\(head='mean'\)`"):
            make_trainer().fit(DeterministicModule(nn.Linear(4, out), task="regression"), data)
    with pytest.raises(OutputShapeError, match=r"\[B, 2 D\].*returned shape \[8, 3\]"):
        make_trainer().fit(DeterministicModule(nn.Linear(4, 3), task="regression"), rows)


def test_a_horizon_is_written_as_columns(make_trainer, tmp_path):
    module = DeterministicModule(Horizon(2), task="regression")
    writer = PredictionWriter(tmp_path, "csv", interval=0.9)
    (first, *rest) = make_trainer(callbacks=[writer]).predict(module, loader())
    whole, columns = type(first).cat([first, *rest]), read_predictions(tmp_path)
    for h in range(H):
        for d in range(D):
            torch.testing.assert_close(torch.from_numpy(columns[f"mean_{h}_{d}"]), whole.mean[:, h, d].double())
            upper = whole.interval(0.9)[1][:, h, d].double()
            torch.testing.assert_close(torch.from_numpy(columns[f"upper_{h}_{d}"]), upper)
