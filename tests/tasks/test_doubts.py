"""Outputs that would be read wrongly are refused or named."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    Binary,
    DeterministicModule,
    EnsembleModule,
    FitKNN,
    InputError,
    Multilabel,
    OODDetection,
    Segmentation,
)
from tests.tasks.test_multilabel import ChestXRay, X, Y, loader


class Sure(ChestXRay):
    """Its author likes BCELoss."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.BCELoss()

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class MeanAndVariance(ChestXRay):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)

    def criterion_of(self, out, y):
        return nn.functional.gaussian_nll_loss(out[:, :1], y, out[:, 1:].exp())

    def step(self, batch, name):
        return self.criterion_of(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:All outputs of the network's first batch lie in")
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize(("module", "target"), [(Sure, Y), (MeanAndVariance, X[:, :1])])
def test_an_ensemble_without_a_task_does_not_predict_what_its_batches_contradict(
    make_trainer, tmp_path, module, target, validates
):
    ensemble = EnsembleModule(module, num_members=2, seed=0)
    trainer = make_trainer(precision="64-true")
    trainer.fit(ensemble, loader(target), *([loader(target)] if validates else []))
    with pytest.raises(
        InputError,
        match=r"would be read with `task=Classification\(\)`, but their batches do not fit it.*Pass argument `task`",
    ):
        ensemble.predict(X)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", network=module)
    with pytest.raises(InputError, match="their batches do not fit it"):
        again.double().predict(X)
    named = EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", network=module, task=Multilabel())
    assert named.double().predict(X).probs.shape[0] == 120


def test_an_ensemble_of_classifiers_predicts_with_soft_labels_too(make_trainer):
    class Mixed(ChestXRay):
        def __init__(self):
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    soft = torch.softmax(X[:, :3], 1)
    ensemble = EnsembleModule(Mixed, num_members=2, seed=0)
    make_trainer(precision="64-true").fit(ensemble, loader(soft))
    assert ensemble.predict(X).probs.shape == (120, 3)


@pytest.mark.parametrize(("task", "labels"), [(Binary(), 1), (Multilabel(), 3)])
def test_sigmoids_in_place_of_logits_are_named(make_trainer, task, labels):
    module = DeterministicModule(nn.Sequential(nn.Linear(4, labels), nn.Sigmoid()), task=task)
    data = DataLoader(TensorDataset(X, Y[:, :labels]), batch_size=60)
    with pytest.warns(UserWarning, match=r"lie in \[0, 1\], as probabilities do.*pass `output=torch.logit`"):
        make_trainer(precision="64-true").fit(module, data)


def test_one_logit_per_pixel_is_told_how_to_pass():
    for task in (Segmentation(), Binary()):
        with pytest.raises(
            InputError, match=r"output=lambda logit: torch.cat\(\[torch.zeros_like\(logit\), logit\], 1\)"
        ):
            task.check_output(torch.zeros(1, 2, 1, 4, 4))
    logit = torch.randn(1, 2, 1, 4, 4)
    two = torch.cat([torch.zeros_like(logit), logit], 2)
    probs = Segmentation().predict(two).probs[:, 1]
    torch.testing.assert_close(probs, torch.sigmoid(logit[0, :, 0]))
    assert not math.isnan(float(probs.sum()))


@pytest.mark.parametrize("target", [X[:, :1], torch.arange(360).reshape(120, 3) % 5])
def test_scores_and_attached_predictions_are_not_read_as_a_softmax_against_the_targets(make_trainer, target):
    data, far = loader(target), {"far": loader(target)}
    with pytest.raises(
        InputError, match="outputs of MeanAndVariance would be read as logits of classes, but the targets are .*`task`"
    ):
        make_trainer(precision="64-true", callbacks=[OODDetection(far)]).test(MeanAndVariance(), data, verbose=False)
    module = MeanAndVariance()
    with pytest.raises(InputError, match="would be read as logits of classes, but the targets are"):
        make_trainer(precision="64-true", callbacks=[FitKNN(k=3, attach=True)]).fit(module, data, data)
    # Distances of features need no task.
    knn = FitKNN(k=3)
    trainer = make_trainer(precision="64-true", callbacks=[knn, OODDetection(far, scores=["knn"])])
    trainer.fit(module, loader(X[:, :1]))
    (found,) = trainer.test(module, data, verbose=False)
    assert found["ood_auroc/far/knn"] == pytest.approx(0.5)
