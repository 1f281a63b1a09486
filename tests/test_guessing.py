"""What is assumed about a module that is not ours is told once of each module, with how to overrule it."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, FitGMM, FitKNN, FitViM, OODDetection, TemperatureScaling
from lightning_uq.batches import unpack_batch
from lightning_uq.guessing import report_guess

Y = torch.arange(24) % 3
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
OTHER = 3 * X[:, :1]


class Classifier(LightningModule):
    """Returns its logits and the features beside them; batches may have more than two elements."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        features = self.body(x)
        return self.head(features), features.unsqueeze(2)

    def training_step(self, batch, batch_idx):
        x, *_, y = batch
        return F.cross_entropy(self(x)[0], y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.fixture
def told(monkeypatch):
    """What is told, each with whether it is a warning."""
    lines = []
    monkeypatch.setattr("lightning_uq.guessing.rank_zero_info", lambda text: lines.append((text, False)))
    monkeypatch.setattr("lightning_uq.guessing.rank_zero_warn", lambda text: lines.append((text, True)))
    return lines


def about(told, words):
    return [(text, doubtful) for text, doubtful in told if words in text]


def loader(*tensors):
    return DataLoader(TensorDataset(*tensors), 8)


# ---------------------------------------------------------------------- once of each module


def test_each_module_hears_it_and_each_once(told):
    for _ in range(2):
        model = Classifier()
        for _ in range(2):
            FitGMM().fit(model, loader(X, Y))
    assert len(about(told, "whose first part, a tensor with 2 axes, is used as its output")) == 2


def test_several_callbacks_of_one_trainer_tell_it_once(make_trainer, told):
    model = Classifier()
    callbacks = [TemperatureScaling(), FitGMM(), FitKNN(k=2), OODDetection({"far": loader(X + 9, Y)})]
    trainer = make_trainer(callbacks=callbacks, max_epochs=2)
    trainer.fit(model, loader(X, Y), loader(X, Y))
    trainer.test(model, loader(X, Y), verbose=False)
    texts = [text for text, _ in told]
    assert len(texts) == len(set(texts)) == 2
    assert len(about(told, "is used as its output")) == 1
    assert about(told, "are the input of layer") == [
        (
            "The features of Classifier are the input of layer 'head', because that layer feeds the output. To use another layer, "
            "pass its name as `feature_layer`.",
            False,
        )
    ]


def test_an_ensemble_tells_it_once(make_trainer, told):
    ensemble = EnsembleModule(Classifier, num_members=3, seed=0)
    make_trainer(max_epochs=1).fit(ensemble, loader(X, Y), loader(X, Y))
    ensemble.predict(X)
    assert len(about(told, "is used as its output")) == 1


def test_it_keeps_no_module_alive(told):
    model = nn.Linear(1, 1)
    report_guess("a guess", model)
    report_guess("a guess", model)
    assert told == [("a guess", False)]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    report_guess("a guess of nobody", None)
    report_guess("a guess of nobody", None)
    assert len(told) == 2


# ---------------------------------------------------------------------- the layer


@pytest.mark.parametrize("callback", [FitGMM, FitViM, partial(FitKNN, k=2)])
def test_the_layer_that_was_found_is_told(told, callback):
    for network in (Classifier(), DeterministicModule(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))):
        fit = callback().fit(network, loader(X, Y))
        ((line, doubtful),) = about(told, "are the input of layer")
        assert f"The features of {type(network).__name__} are the input of layer {fit.features.resolved!r}" in line
        assert not doubtful
        told.clear()


def test_a_layer_that_was_named_is_not(told):
    FitGMM(feature_layer="head").fit(Classifier(), loader(X, Y))
    assert not about(told, "are the input of layer")


# ---------------------------------------------------------------------- batches of three and more


def read(told, batch, **kwargs):
    unpack_batch(batch, about=nn.Identity(), **kwargs)
    return [(text, doubtful) for text, doubtful in told if "Batches have" in text]


@pytest.mark.parametrize(
    ("batch", "doubtful"),
    [
        ((X, Y, ["a"] * 24), False),
        ((X, Y, OTHER), False),
        ([X, Y, torch.arange(24)], False),  # the position in the data set
        ((X, OTHER, OTHER), False),
        ((X, OTHER, Y), True),
        ((X, OTHER, Y.unsqueeze(1)), True),
        ((X, OTHER[:, 0], "name", Y), True),
        ((X, torch.arange(4), Y), True),  # of another length
        ((X, None, Y), True),
        ((X, {"age": OTHER}, Y), True),
    ],
)
def test_the_second_of_several_elements_is_a_guess(told, batch, doubtful):
    ((line, found),) = read(told, batch)
    assert found is doubtful
    assert (
        f"Batches have {len(batch)} elements, of which the first is read as the input and the second as the target"
        in line
    )
    other = next((i for i, part in enumerate(batch) if i > 1 and getattr(part, "dtype", None) == torch.long), 2)
    assert f"`unpack_batch`, for example `lambda batch: (batch[0], batch[{other}])`" in line


def test_labels_behind_lengths_are_doubted(told):
    """Both are integers per row; the positions of the samples are too, but no two are the same."""
    lengths = torch.randint(3, 8, (24,))
    unpack_batch((X, lengths, Y), about=nn.Identity())
    doubts = [text for text, doubtful in told if doubtful]
    assert len(doubts) == 1
    assert "element 2 too, which repeat as labels do" in doubts[0]
    assert "`lambda batch: (batch[0], batch[2])`" in doubts[0]
    told.clear()
    unpack_batch((X, Y, torch.arange(24)), about=nn.Identity())
    assert not [text for text, doubtful in told if doubtful]


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], (X,), X, {"input": X, "target": Y, "other": OTHER}])
def test_pairs_are_no_guess(told, batch):
    assert not read(told, batch)


def test_a_fit_on_such_batches_warns_and_the_argument_helps(told):
    """The mistake: the second element is a second input."""
    batches = loader(X, OTHER, Y)
    with pytest.raises(Exception, match="labels"):
        TemperatureScaling().fit(Classifier(), batches)
    assert [doubtful for _, doubtful in about(told, "Batches have 3 elements")] == [True]
    told.clear()
    FitGMM(unpack_batch=lambda batch: (batch[0], batch[2])).fit(Classifier(), batches)
    assert not about(told, "Batches have")


def test_our_own_modules_tell_it_too(told):
    for _ in range(2):
        module = DeterministicModule(nn.Linear(4, 3))
        for _ in range(2):
            module.unpack_batch((X, Y, OTHER))
    assert len(about(told, "Batches have 3 elements")) == 2
