"""Classes whose outputs are evidence: losses, annealing, checks, and every module that takes the task."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Dirichlet, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    HypermodelModule,
    OODDetection,
)
from lightning_uq.errors import InputError
from lightning_uq.losses import EvidentialLoss, FisherEvidentialLoss, MaxNormLoss, RelaxedEvidentialLoss
from lightning_uq.metrics import UnpredictedClasses
from lightning_uq.predictions import DirichletPrediction
from lightning_uq.tasks import EvidentialClassification, OutputShapeError, Progress

RAW = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
WEIGHTS = (1.0, 0.25, 3.0)
LOSSES = {
    "evidential": (EvidentialLoss, {}, 1.0),
    "nll": (EvidentialLoss, {"risk": "nll"}, 1.0),
    "cross_entropy": (EvidentialLoss, {"risk": "cross_entropy"}, 1.0),
    "maxnorm": (MaxNormLoss, {}, 0.1),
    "r_edl": (RelaxedEvidentialLoss, {}, 1.0),
    "re_edl": (RelaxedEvidentialLoss, {}, 0.0),
    "i_edl": (FisherEvidentialLoss, {}, 1.0),
}


def batch_loss(task, output, target, progress=None):
    sums, counts = task.sample_losses(output, target, progress)
    assert sums.shape == counts.shape == (len(output),)
    return sums.sum() / counts.sum()


# ---------------------------------------------------------------------- the loss


def test_the_loss_by_its_definition():
    """Sensoy et al.: the expected squared error under the Dirichlet, and the KL from the uniform one without the right class."""
    sums, counts = EvidentialClassification(max_reg_factor=0.4).sample_losses(RAW[0], LABELS)
    assert counts.tolist() == [1] * 6
    alpha = RAW[0].exp() + 1
    for b, label in enumerate(LABELS.tolist()):
        total = alpha[b].sum()
        mean, y = alpha[b] / total, F.one_hot(LABELS[b], 3)
        risk = ((y - mean).square() + mean * (1 - mean) / (total + 1)).sum()
        wrong = alpha[b].clone()
        wrong[label] = 1
        kl = kl_divergence(Dirichlet(wrong), Dirichlet(torch.ones(3).double()))
        torch.testing.assert_close(sums[b], risk + 0.4 * kl)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("axes", [(), (5,), (2, 3), (2, 1, 3)])
def test_the_mean_is_the_loss_module_s_with_its_gradient(name, weights, ignore_index, axes):
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(4, 3, *axes, generator=generator).double().requires_grad_()
    target = torch.randint(3, (4, *axes), generator=generator)
    if ignore_index is not None:
        target[0] = ignore_index
    task = EvidentialClassification(loss=name, class_weights=weights, ignore_index=ignore_index)
    kind, arguments, factor = LOSSES[name]
    assert task.reg_factor() == task.final_reg_factor == factor
    ignored = -100 if ignore_index is None else ignore_index
    expected = kind("clamped_exp", factor, weight=weights, ignore_index=ignored, **arguments)(output, target)
    value = batch_loss(task, output, target)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(each, output, retain_graph=True)[0] for each in (value, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_positions_reach_neither_the_loss_nor_the_gradient(name, wrong):
    target = torch.where(LABELS == 2, 255, LABELS)
    task = EvidentialClassification(loss=name, ignore_index=255)
    clean, spoilt = RAW[0].clone(), RAW[0].masked_fill((target == 255)[:, None], wrong)
    values, gradients = [], []
    for raw in (clean.requires_grad_(), spoilt.requires_grad_()):
        values.append(batch_loss(task, raw, target))
        values[-1].backward()
        gradients.append(raw.grad)
    assert values[0] == values[1]
    assert torch.equal(*gradients)
    assert (gradients[1][target == 255] == 0).all()


def test_where_nothing_counts_the_loss_is_0_and_so_is_its_gradient():
    module = DeterministicModule(nn.Linear(2, 3), task=EvidentialClassification(ignore_index=255))
    x, target = torch.randn(4, 2), torch.full((4,), 255)
    loss = module.training_loss(x, target, (x, target))
    assert loss == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in module.parameters())


# ---------------------------------------------------------------------- annealing


@given(step=st.integers(0, 50), epoch=st.integers(0, 9), steps=st.integers(0, 40), epochs=st.integers(0, 7) | st.none())
@settings(max_examples=60)
def test_the_factor_rises_linearly_to_its_maximum(step, epoch, steps, epochs):
    task = EvidentialClassification(annealing_steps=steps, annealing_epochs=epochs, max_reg_factor=0.5)
    done, end = (step, steps) if epochs is None else (epoch, epochs)
    progress = Progress(step=step, epoch=epoch)
    assert task.reg_factor(progress) == pytest.approx(0.5 if done >= end else 0.5 * done / end)
    assert task.logged(progress) == {"reg_factor": task.reg_factor(progress)}
    risk, full = (batch_loss(EvidentialClassification(max_reg_factor=factor), RAW[0], LABELS) for factor in (0.0, 0.5))
    value = batch_loss(task, RAW[0], LABELS, progress)
    torch.testing.assert_close(value, risk + task.reg_factor(progress) / 0.5 * (full - risk))
    torch.testing.assert_close(batch_loss(task, RAW[0], LABELS), full)


def test_classes_that_are_never_predicted_are_reported_once_the_annealing_is_over():
    task = EvidentialClassification(annealing_steps=4)
    metric = UnpredictedClasses()
    metric.update(torch.eye(3)[[0, 0]], torch.tensor([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.review({"unpredicted_classes": metric}, Progress(step=3, epoch=9))
        task.review({"unpredicted_classes": UnpredictedClasses()}, None)  # no rows, no classes
    for progress in (None, Progress(step=4, epoch=0)):
        with pytest.warns(UserWarning, match=r"Classes \[1, 2\] .* never predicted.*`max_reg_factor` than 1"):
            task.review({"unpredicted_classes": metric}, progress)


# ---------------------------------------------------------------------- fields and checks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "`num_classes` must be an integer of at least 2, or None, but it is 1"),
        ({"loss": "edl"}, "`loss` must be one of 'evidential', 'nll'"),
        ({"evidence": "exp"}, "`evidence` must be one of 'clamped_exp', 'softplus', 'relu'"),
        ({"annealing_steps": -1}, "`annealing_steps` must be at least 0, but it is -1"),
        ({"annealing_epochs": -1}, "`annealing_epochs` must be at least 0, but it is -1"),
        ({"max_reg_factor": -0.1}, "`max_reg_factor` must be at least 0, but it is -0.1"),
        ({"max_reg_factor": math.nan}, "`max_reg_factor` must be at least 0, but it is nan"),
        ({"class_weights": [1.0, -1.0]}, "`class_weights` must be finite numbers of at least 0"),
        ({"class_weights": [1.0], "num_classes": 2}, "`class_weights` must hold 2 numbers, .* but it holds 1"),
        ({"loss_arguments": {"p_norm": 4}}, "`loss_arguments` must hold arguments of EvidentialLoss: .*p_norm"),
        (
            {"loss_arguments": {"ignore_index": 4}},
            "`loss_arguments` must not hold 'ignore_index': the task has a field",
        ),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(InputError, match=message):
        EvidentialClassification(**fields)


def test_bad_outputs_and_targets():
    task = EvidentialClassification(num_classes=3, ignore_index=255)
    maps = torch.randn(1, 2, 3, 4, 4)
    for outputs in (RAW, maps):
        task.check_output(outputs)
    with pytest.raises(InputError, match="must return 3 logits .* but it returned 4"):
        task.check_output(torch.zeros(1, 2, 4))
    with pytest.raises(OutputShapeError, match="C >= 2"):
        task.check_output(torch.zeros(1, 2, 1))
    with pytest.raises(InputError, match=r"class labels in \[0, 3\), but their values go from 1 to 3"):
        task.check_target(LABELS + 1, RAW)
    with pytest.raises(InputError, match=r"must have shape \[2, 4, 4\], .* but they have \[2\]"):
        task.check_target(LABELS[:2], maps)
    task.check_target(torch.where(LABELS == 2, 255, LABELS), RAW)
    module = DeterministicModule(nn.Linear(2, 3), task=EvidentialClassification(class_weights=(1.0, 2.0)))
    with pytest.raises(InputError, match="`class_weights` must hold 3 numbers, .* but it holds 2"):
        module.training_loss(torch.zeros(1, 2), torch.tensor([0]), None)


def test_predictions_and_scores():
    task = EvidentialClassification()
    prediction = task.predict(RAW)
    assert isinstance(prediction, DirichletPrediction)
    torch.testing.assert_close(prediction.concentration, RAW.exp() + 1)
    alpha = RAW.exp() + 1
    torch.testing.assert_close(prediction.probs, (alpha / alpha.sum(2, keepdim=True)).mean(0))
    assert task.ood_score == "vacuity"
    assert all(prediction.score(name).shape == (6,) for name in task.score_names)
    assert list(task.metrics("val")) == ["accuracy", "nll", "ece", "unpredicted_classes"]
    assert list(task.metrics("test")) == ["accuracy", "nll", "ece", "brier", "unpredicted_classes"]


def test_the_prior_of_the_loss_is_the_prediction_s():
    relaxed = EvidentialClassification(loss="r_edl", evidence="softplus", loss_arguments={"prior": 0.3})
    prediction = relaxed.predict(torch.full((1, 2, 3), -50.0))
    torch.testing.assert_close(prediction.concentration, torch.full((1, 2, 3), 0.3))
    torch.testing.assert_close(prediction.vacuity, torch.ones(2).double())


# ---------------------------------------------------------------------- every module takes it


def blobs(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centers = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return centers[y] + 0.3 * torch.randn(n, 2, generator=generator), y


def mlp():
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def adam(parameters):
    return torch.optim.Adam(parameters, 0.02)


MODULES = {
    "deterministic": (lambda **kw: DeterministicModule(mlp, **kw), 1),
    "ensemble": (lambda **kw: EnsembleModule(mlp, num_members=3, seed=0, **kw), 3),
    "stacked ensemble": (lambda **kw: EnsembleModule(mlp, num_members=3, seed=0, execution="stacked", **kw), 3),
    "adversarial ensemble": (
        lambda **kw: EnsembleModule(mlp, num_members=3, seed=0, adversarial_epsilon=0.01, **kw),
        3,
    ),
    "dropout": (lambda **kw: DropoutModule(mlp(), num_eval_samples=5, **kw), 5),
    "epinet": (lambda **kw: EpinetModule(mlp(), num_eval_samples=5, **kw), 5),
    "epinet, pooled": (lambda **kw: EpinetModule(mlp(), num_eval_samples=40, **kw), 40),
    "hypermodel": (lambda **kw: HypermodelModule(mlp(), index_dim=3, num_eval_samples=5, **kw), 5),
    "bayes by backprop": (lambda **kw: BayesByBackpropModule(mlp(), num_eval_samples=5, kl_weight=1e-3, **kw), 5),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_takes_it(make_trainer, name):
    build, num = MODULES[name]
    torch.manual_seed(0)
    module = build(task=EvidentialClassification(annealing_steps=20), optimizer=adam)
    x, y = blobs()
    data = DataLoader(TensorDataset(x, y), batch_size=20)
    ood = OODDetection({"far": [20 + x]})
    trainer = make_trainer(max_epochs=30, callbacks=[ood])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Classes .* never predicted")
        trainer.fit(module, data, data)
    assert trainer.callback_metrics["reg_factor"] == 1
    (result,) = trainer.test(module, data, verbose=False)
    assert result["test_accuracy"] > 0.95
    assert {"test_unpredicted_classes", f"ood_auroc/far/{module.ood_score}"} <= set(result)
    assert module.ood_score == ("mutual_information" if "ensemble" in name else "vacuity")
    module.eval()
    raw = module(x)
    assert raw.shape == (num, 60, 3)
    alpha = raw.detach().double().clamp(-10, 10).exp() + 1
    prediction = module.predict(x)
    torch.testing.assert_close(
        prediction.probs.double(), (alpha / alpha.sum(2, keepdim=True)).mean(0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        module.prediction(raw).vacuity.double(), (3 / alpha.sum(2)).mean(0), rtol=1e-4, atol=1e-5
    )
    loss = torch.stack([EvidentialLoss(reg_factor=1.0)(each, y) for each in raw.detach()]).mean()
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    "build", [lambda **kw: DeterministicModule(conv, **kw), lambda **kw: EnsembleModule(conv, num_members=2, **kw)]
)
def test_maps_of_evidence(make_trainer, build):
    x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    y[:, 0] = 255
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    module = build(task=EvidentialClassification(ignore_index=255, annealing_steps=10), optimizer=adam)
    trainer = make_trainer(max_epochs=40)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Classes .* never predicted")
        trainer.fit(module, data, data)
    (result,) = trainer.test(module, data, verbose=False)
    prediction = module.eval().predict(x)
    kept = y != 255
    assert prediction.vacuity.shape == (8, 5, 5)
    accuracy = (prediction.label == y)[kept].float().mean()
    assert result["test_accuracy"] == pytest.approx(float(accuracy))
    assert accuracy > 0.8
    assert result["test_unpredicted_classes"] == 0


def conv():
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))


def test_weights_of_a_batch_and_of_noise_reach_it():
    module = EnsembleModule(mlp, num_members=3, seed=0, bootstrap="poisson", task=EvidentialClassification()).eval()
    x, y = blobs(12)
    weight = torch.rand(12)
    batch = {"input": x, "target": y, "weight": weight, "index": torch.arange(12)}
    noise = module.targets(y, batch, torch.arange(3)).noise_weights
    each = torch.stack([EvidentialLoss(reg_factor=1.0, reduction="none")(raw, y) for raw in module.network(x)])
    expected = ((each * noise * weight).sum(1) / weight.sum()).sum()
    torch.testing.assert_close(module.training_loss(x, y, batch), expected)
