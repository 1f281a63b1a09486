"""Several labels per input, each on or off, some of them unknown."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    DeterministicModule,
    EnsembleModule,
    EpinetModule,
    FitGMM,
    FitKNN,
    OODDetection,
    TemperatureScaling,
    VectorScaling,
)
from lightning_uq.errors import InputError
from lightning_uq.tasks import Classification, Multilabel, OutputShapeError, task_of

LABELS = 3
FAST = partial(torch.optim.Adam, lr=0.05)
X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (
    X[:, :LABELS] + 0.7 * torch.randn(120, LABELS, generator=torch.Generator().manual_seed(1)).double() > -0.3
).double()
HOLES = Y.clone()
HOLES[::3, 1] = math.nan
FAR = {"far": DataLoader(TensorDataset(5 * X, Y), batch_size=16)}


def loader(y, **kwargs):
    return DataLoader(TensorDataset(X, y), batch_size=16, **kwargs)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, LABELS))


class ChestXRay(LightningModule):
    """As its author writes it, who has never heard of this package."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, LABELS)
        self.criterion = nn.BCEWithLogitsLoss()

    def forward(self, x):
        return self.head(self.backbone(x))

    def step(self, batch, name):
        x, y = batch
        loss = self.criterion(self(x), y)
        self.log(f"{name}_loss", loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def predict_step(self, batch, batch_idx):
        return torch.sigmoid(self(batch[0]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


def best_temperature(logits, target):
    """The T of least loss, by scipy's bounded search."""
    known = ~target.isnan()

    def loss(u):
        return F.binary_cross_entropy_with_logits((logits / math.exp(u))[known], target[known]).item()

    return math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x)


# ---------------------------------------------------------------------- the loss and the checks


@pytest.mark.parametrize("ignore_index", [None, -1])
def test_the_loss_is_torch_s_over_the_known_labels(ignore_index):
    output = torch.randn(120, LABELS, dtype=torch.float64)
    target = HOLES if ignore_index is None else HOLES.nan_to_num(ignore_index).long()
    sums, counts = Multilabel(ignore_index=ignore_index, pos_weight=[1.0, 2.0, 3.0]).sample_losses(output, target)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    losses = F.binary_cross_entropy_with_logits(output, Y, pos_weight=weight, reduction="none")
    torch.testing.assert_close(sums.sum() / counts.sum(), losses[~HOLES.isnan()].mean())
    assert counts.tolist() == (~HOLES.isnan()).sum(1).tolist()


@pytest.mark.parametrize(
    ("task", "outputs", "target", "error", "message"),
    [
        (
            Multilabel(),
            torch.zeros(1, 4),
            Y[:4],
            OutputShapeError,
            r"one logit per label, \[B, L\].*shape \[4\].*Binary",
        ),
        (
            Multilabel(num_labels=5),
            torch.zeros(1, 4, 3),
            Y[:4],
            InputError,
            r"must return 5 logits .*but it returned 3",
        ),
        (Multilabel(pos_weight=[1, 2]), torch.zeros(1, 4, 3), Y[:4], InputError, "`pos_weight` must hold 3 numbers"),
        (
            Multilabel(),
            torch.zeros(1, 4, 3),
            torch.zeros(4).long(),
            InputError,
            r"shape \[4, 3\].*`task=Classification",
        ),
        (Multilabel(), torch.zeros(1, 4, 3), Y[:4] - 1, InputError, "go from -1 to 0. Pass `ignore_index`"),
        (Multilabel(ignore_index=-1), torch.zeros(1, 4, 3), Y[:4] + 1, InputError, "go from 1 to 2"),
    ],
)
def test_what_does_not_fit_is_named(task, outputs, target, error, message):
    def check():
        task.check_output(outputs)
        task.check_target(target, outputs)

    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize("name", ["poisson", "counts", "ordinal", "survival", "cox"])
def test_tasks_without_a_likelihood_here_are_refused_by_name(name):
    with pytest.raises(
        InputError, match=f"`task` {name!r} is not supported: no task here has a likelihood of .*Subclass Task"
    ):
        task_of(name)


# ---------------------------------------------------------------------- modules


@pytest.mark.parametrize(
    "build",
    [
        lambda: DeterministicModule(network, task="multilabel", optimizer=FAST),
        lambda: EnsembleModule(network, num_members=3, task=Multilabel(), optimizer=FAST),
        lambda: EnsembleModule(network, num_members=3, task=Multilabel(loss="focal"), execution="vmap", optimizer=FAST),
        lambda: EpinetModule(network, task=Multilabel(num_labels=LABELS), num_eval_samples=4, optimizer=FAST),
        lambda: EpinetModule(network, task=Multilabel(), num_eval_samples=40, optimizer=FAST),  # pooled
    ],
)
def test_every_tool_works_and_the_numbers_are_right(make_trainer, build):
    module, scaling, gmm, knn = build(), TemperatureScaling(), FitGMM(), FitKNN(k=3)
    trainer = make_trainer(max_epochs=2, callbacks=[scaling, knn, gmm, OODDetection(FAR)], precision="64-true")
    trainer.fit(module, loader(HOLES), loader(HOLES))
    (logged,) = trainer.test(module, loader(HOLES), verbose=False)
    assert all(math.isfinite(value) for value in logged.values())
    prediction = trainer.predict(module, DataLoader(TensorDataset(X, Y), batch_size=120))[0]
    with torch.no_grad():
        pooled = torch.logit(torch.sigmoid(module.eval()(X)).mean(0))
    assert scaling.temperature.item() == pytest.approx(best_temperature(pooled, HOLES), rel=1e-4)
    expected = torch.sigmoid(pooled / scaling.temperature)
    torch.testing.assert_close(prediction.probs, expected, rtol=1e-6, atol=1e-7)
    known = ~HOLES.isnan()
    assert logged["test_nll"] == pytest.approx(F.binary_cross_entropy(expected[known], Y[known]).item(), rel=1e-5)
    assert prediction.log_density.shape == (120,)


@pytest.mark.parametrize("members", [1, 3])
def test_one_temperature_per_label(make_trainer, members):
    target = HOLES.clone()
    target[:, 2] = 1  # one value: there is nothing to fit
    module = (
        EnsembleModule(network, num_members=members, task=Multilabel(), optimizer=FAST)
        if members > 1
        else DeterministicModule(network, task=Multilabel(), optimizer=FAST)
    )
    scaling = TemperatureScaling(per_label=True)
    trainer = make_trainer(max_epochs=3, callbacks=[scaling], precision="64-true")
    with pytest.warns(UserWarning, match=r"gives labels \[2\] the temperature of all labels"):
        trainer.fit(module, loader(Y), loader(target))
    with torch.no_grad():
        pooled = torch.logit(torch.sigmoid(module.eval()(X)).mean(0))
    for i in range(2):
        assert scaling.temperature[i].item() == pytest.approx(best_temperature(pooled[:, i], target[:, i]), rel=1e-4)
    assert scaling.temperature[2].item() == pytest.approx(best_temperature(pooled, target), rel=1e-4)
    torch.testing.assert_close(module.predict(X).probs, torch.sigmoid(pooled / scaling.temperature))


def test_what_a_calibration_cannot_do_is_refused_before_the_training(make_trainer):
    module = DeterministicModule(network, task=Multilabel(), optimizer=FAST)
    with pytest.raises(InputError, match=r"VectorScaling scales classes, which Multilabel\(\) does not have"):
        make_trainer(callbacks=[VectorScaling()]).fit(module.double(), loader(Y), loader(Y))
    with pytest.raises(InputError, match="`per_label` needs scope='pooled'"):
        TemperatureScaling(per_label=True, scope="shared")
    classifier = DeterministicModule(network).double()
    classes = DataLoader(TensorDataset(X, Y[:, 0].long()), batch_size=16)
    with pytest.raises(InputError, match="`per_label` needs several labels per input, but the task is Classification"):
        make_trainer(callbacks=[TemperatureScaling(per_label=True)]).fit(classifier, classes, classes)
    soft = loader(0.9 * Y)
    with pytest.raises(InputError, match="must have labels, but the targets of a batch are probabilities"):
        make_trainer(callbacks=[TemperatureScaling()]).fit(module.double(), loader(Y), soft)


# ---------------------------------------------------------------------- a user's module


def test_an_unmodified_module_is_calibrated_and_scored(make_trainer):
    module, scaling = ChestXRay(), TemperatureScaling(task=Multilabel(), attach=True)
    gmm, ood = FitGMM(task="multilabel"), OODDetection(FAR, task=Multilabel())
    trainer = make_trainer(max_epochs=2, callbacks=[scaling, gmm, ood], precision="64-true")
    trainer.fit(module, loader(Y), loader(Y))
    (logged,) = trainer.test(module, loader(Y), verbose=False)
    assert {"ood_auroc/far/predictive_entropy", "ood_auroc/far/density", "test_loss"} < logged.keys()
    assert scaling.temperature.item() == pytest.approx(best_temperature(module(X).detach(), Y), rel=1e-4)
    probs = torch.cat([one.probs for one in trainer.predict(module, loader(Y))])
    torch.testing.assert_close(probs, torch.sigmoid(module(X) / scaling.temperature), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("callback", [TemperatureScaling, FitGMM])
def test_without_a_task_its_targets_show_it_and_that_is_told(make_trainer, callback, monkeypatch):
    told = []
    monkeypatch.setattr(
        "lightning_uq.guessing.rank_zero_info", lambda text: told.append(text) if "task=" in text else None
    )
    module, found = ChestXRay(), callback()
    make_trainer(callbacks=[found], precision="64-true").fit(module, loader(Y), loader(Y))
    assert found.logits.task(module) == Multilabel()
    assert told == [
        "ChestXRay is read with `task=Multilabel()`, because its outputs have the shape of its targets, which are 0 or 1. If they "
        "mean something else, pass `task`."
    ]


@pytest.mark.parametrize("callback", [TemperatureScaling, FitGMM])
def test_probabilities_without_a_task_are_refused_before_the_training(make_trainer, callback):
    class Sure(ChestXRay):
        def __init__(self):
            super().__init__()
            self.criterion = nn.BCELoss()

        def forward(self, x):
            return torch.sigmoid(super().forward(x))

    module = Sure()
    with pytest.raises(InputError, match="Multilabel|the `task` of these targets"):
        make_trainer(callbacks=[callback()], precision="64-true").fit(module, loader(Y), loader(Y))
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("given", [{"task": Multilabel()}, {}], ids=["named", "shown"])
def test_an_ensemble_of_them_reads_sigmoids(make_trainer, given):
    ensemble = EnsembleModule(lambda: ChestXRay(), num_members=3, seed=0, **given)
    trainer = make_trainer(max_epochs=2, precision="64-true")
    trainer.fit(ensemble, loader(Y), loader(Y))
    (logged,) = trainer.test(ensemble, loader(Y), verbose=False)
    probs = ensemble.predict(X).probs
    assert probs.mean(0).sub(Y.mean(0)).abs().max() < 0.25
    assert logged["ensemble/test_nll"] == pytest.approx(F.binary_cross_entropy(probs, Y).item(), rel=1e-6)


# ---------------------------------------------------------------------- probabilities as targets of a softmax


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_of_classes_are_torch_s(weights, smoothing):
    output, soft = torch.randn(6, 3), torch.softmax(torch.randn(6, 3), 1)
    task = Classification(class_weights=weights, label_smoothing=smoothing)
    sums, counts = task.sample_losses(output, soft)
    weight = None if weights is None else torch.tensor(weights)
    torch.testing.assert_close(
        sums.sum() / counts.sum(), F.cross_entropy(output, soft, weight, label_smoothing=smoothing)
    )
    task.check_target(soft, output.unsqueeze(0))
    with pytest.raises(InputError, match="must be probabilities that sum to 1.*`task=Multilabel"):
        task.check_target(torch.ones(6, 3), output.unsqueeze(0))


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
def test_the_focal_loss_is_its_definition_for_hard_and_soft_targets(weights):
    output, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    task = Classification(loss="focal", focal_gamma=1.5, class_weights=weights)
    p = output.softmax(1)[torch.arange(6), labels]
    weight = torch.ones(6, dtype=torch.float64) if weights is None else torch.tensor(weights).double()[labels]
    sums, counts = task.sample_losses(output, labels)
    torch.testing.assert_close(sums, weight * (1 - p) ** 1.5 * -p.log())
    torch.testing.assert_close(counts, weight)
    soft, _ = task.sample_losses(output, F.one_hot(labels, 3).double())
    torch.testing.assert_close(soft, sums)
    with pytest.raises(InputError, match="`label_smoothing` must be 0 with loss='focal'"):
        Classification(loss="focal", label_smoothing=0.1)


def test_mixup_in_training_and_labels_in_validation(make_trainer):
    labels = Y[:, 0].long()
    soft = 0.7 * F.one_hot(labels, 3).double() + 0.3 * F.one_hot(labels.flip(0), 3).double()
    module = DeterministicModule(network)
    trainer = make_trainer(max_epochs=2, callbacks=[TemperatureScaling()], precision="64-true")
    trainer.fit(module, loader(soft), loader(labels))
    with pytest.warns(UserWarning, match="JointLogLoss has not seen 2 rows"):
        (logged,) = trainer.test(module, loader(soft), verbose=False)
    probs = module.predict(X).probs
    assert logged["test_nll"] == pytest.approx(F.cross_entropy(probs.log(), soft).item(), rel=1e-6)
    assert math.isnan(logged["test_accuracy"])  # not defined for probabilities
    assert math.isnan(logged["test_ece"])
