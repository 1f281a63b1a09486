"""A task that the first batch shows and a later one contradicts: an error that says what to pass, never a number."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_uq import (
    CalibratedNLL,
    EnsembleModule,
    FitGMM,
    FitKNN,
    InputError,
    OODDetection,
    PointPrediction,
    TemperatureScaling,
)
from lightning_uq.tasks import Binary, Classification, Regression


class Counter(LightningModule):
    """Predicts a number of events: outputs [B, 1], targets [B, 1]."""

    num_outputs = 1

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, self.num_outputs))

    def forward(self, x):
        return 3 * self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y.float().reshape(len(y), -1))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class SeveralCounters(Counter):
    """Predicts three numbers of events: outputs and targets [B, 3]."""

    num_outputs = 3


class Rows(Dataset):
    """A data set that shows no targets but row by row."""

    def __init__(self, *tensors):
        self.rows = list(zip(*tensors, strict=True))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
ON_OFF = (torch.arange(24) % 2).float()


def counts(module=Counter, *, last=17.0, dtype=torch.float32, hidden=False, seen=None):
    """Batches of eight: the first two hold 0 and 1 alone, the last a 3 and another count."""
    y = ON_OFF.clone() if module is Counter else torch.stack([ON_OFF, 1 - ON_OFF.roll(1), ON_OFF], 1)
    y[18], y[20] = 3.0, last
    y = y.unsqueeze(1) if module is Counter else y
    return DataLoader((Rows if hidden else TensorDataset)(X, y[: len(X) if seen is None else seen].to(dtype)), 8)


READ = r"is read with `task=(Binary|Multilabel)\(\)`, because its outputs have the shape of its targets, which are 0 or 1 so far"
SENTENCE = rf"{READ}, but a later batch holds the target 17\. Pass argument `task`, for example `task=Regression\(head='mean'\)`"

each_counter = pytest.mark.parametrize("module", [Counter, SeveralCounters])


@each_counter
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("callback", [TemperatureScaling, FitGMM])
def test_a_fit_under_the_trainer(make_trainer, module, callback, hidden):
    loader = counts(module, hidden=hidden)
    model, fit = module(), callback()
    trainer = make_trainer(callbacks=[fit], max_epochs=1)
    with pytest.raises(InputError, match=f"{module.__name__} {SENTENCE}"):
        trainer.fit(model, loader, loader)
    assert not fit.fitted
    if not hidden:
        assert trainer.global_step == 0  # told before the training


@each_counter
@pytest.mark.parametrize("callback", [TemperatureScaling, FitGMM, FitKNN])
def test_a_fit_without_a_trainer(module, callback):
    with pytest.raises(InputError, match=SENTENCE):
        callback().fit(module(), counts(module))


def test_whole_numbers_are_no_other_case():
    with pytest.raises(InputError, match=SENTENCE):
        TemperatureScaling().fit(Counter(), counts(dtype=torch.long))


def test_the_task_by_name_overrules_it():
    numbers = FitGMM(task=Regression(head="mean")).fit(Counter(), counts())
    assert numbers.fitted
    with pytest.raises(InputError, match=r"does not fit Binary\(\).*go from 0 to 17"):
        TemperatureScaling(task=Binary()).fit(Counter(), counts())


@each_counter
def test_a_test_with_scores(make_trainer, module):
    trainer = make_trainer(callbacks=[OODDetection({"far": DataLoader(TensorDataset(X + 9), 8)})])
    with pytest.raises(InputError, match=SENTENCE):
        trainer.test(module(), counts(module), verbose=False)


def test_targets_of_other_data_contradict_nothing(make_trainer):
    """Those of an ``ood`` loader may be of any kind: its labels are another data set's."""
    labels = torch.arange(24) % 10
    ood = OODDetection({"far": DataLoader(TensorDataset(X + 9, labels), 8)})
    trainer = make_trainer(callbacks=[ood])
    clean = DataLoader(TensorDataset(X, ON_OFF.unsqueeze(1)), 8)
    (tested,) = trainer.test(Counter(), clean, verbose=False)
    assert "ood_auroc/far/predictive_entropy" in tested
    scores = ood.score(Counter(), clean)
    assert scores.keys() == ood.score(Counter(), DataLoader(TensorDataset(X + 9, labels), 8)).keys()


def test_each_test_decides_anew(make_trainer):
    ood = OODDetection(
        {"far": DataLoader(TensorDataset(X + 9), 8)}, scores={"size": lambda logits: logits.abs().sum(-1).sum(0)}
    )
    make_trainer(callbacks=[ood]).test(Counter(), DataLoader(TensorDataset(X, ON_OFF.unsqueeze(1)), 8), verbose=False)
    assert ood.read.inferred_task == "binary"
    make_trainer(callbacks=[ood]).test(Counter(), DataLoader(TensorDataset(X, X[:, :1])), verbose=False)
    assert ood.read.inferred_task == "mean"


def test_rows_under_two_tasks_do_not_mix(make_trainer):
    """A batch that shows nothing was read by the default, so one that shows a task comes too late."""
    y = torch.zeros(16, 3)
    y[8:] = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).repeat(4, 1)
    size = {"size": lambda logits: logits.abs().sum(-1).sum(0)}
    with pytest.raises(
        InputError,
        match="first batches of SeveralCounters do not imply the task that later ones do. Pass argument `task`",
    ):
        OODDetection(scores=size).score(SeveralCounters(), DataLoader(TensorDataset(X[:16], y), 8))


def test_a_monitor_under_the_trainer(make_trainer):
    trainer = make_trainer(callbacks=[CalibratedNLL()], max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(InputError, match=SENTENCE):
        trainer.fit(Counter(), counts(), counts())


# ---------------------------------------------------------------------- an ensemble


@each_counter
@pytest.mark.parametrize("where", ["training", "validation"])
def test_an_ensemble_trains_and_refuses_to_predict(make_trainer, tmp_path, module, where):
    clean = DataLoader(TensorDataset(*(part[:16] for part in counts(module).dataset.tensors)), 8)
    loaders = (counts(module), None) if where == "training" else (clean, counts(module))
    ensemble = EnsembleModule(module, num_members=2, seed=0)
    trainer = make_trainer(
        max_epochs=2, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True
    )
    trainer.fit(ensemble, *loaders)
    for predict in (lambda: ensemble.predict(X), lambda: trainer.predict(ensemble, clean)):
        with pytest.raises(InputError, match=f"{module.__name__} {SENTENCE}"):
            predict()
    again = EnsembleModule.load_from_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=READ):
        again.predict(X)
    numbers = EnsembleModule.load_from_checkpoint(tmp_path / "last.ckpt", task=Regression(head="mean"))
    assert isinstance(numbers.predict(X), PointPrediction)
    labels = EnsembleModule.load_from_checkpoint(tmp_path / "last.ckpt", task=again.task)
    assert labels.predict(X).probs.shape == (24, 2 if module is Counter else 3)


def test_a_fit_of_an_ensemble(make_trainer):
    ensemble = EnsembleModule(Counter, num_members=2, seed=0)
    with pytest.raises(InputError, match=rf"{READ}|does not fit Binary"):
        make_trainer(max_epochs=1, callbacks=[TemperatureScaling()]).fit(ensemble, counts(), counts())
    with pytest.raises(InputError, match=rf"{READ}|does not fit Binary"):
        TemperatureScaling().fit(ensemble, counts())


def test_the_reason_stands_where_metrics_are_missing(make_trainer, caplog):
    ensemble = EnsembleModule(Counter, num_members=2, seed=0)
    with caplog.at_level("INFO"):
        trainer = make_trainer(max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(ensemble, counts(), counts())
    assert "ensemble/val_nll" not in trainer.callback_metrics
    (line,) = [one.message for one in caplog.records if "has no metrics" in one.message]
    assert "is read with `task=Binary()`" in line
    assert "holds the target 17" in line
    assert "val_loss" in trainer.callback_metrics


def test_probabilities_of_classes_that_turn_out_to_be_labels(make_trainer):
    """One label per row in the first batch, several in a later one: the default task is a guess as well."""
    y = F.one_hot(torch.arange(24) % 3, 3).float()
    y[20] = torch.tensor([1.0, 1.0, 1.0])
    ensemble = EnsembleModule(SeveralCounters, num_members=2, seed=0)
    make_trainer(max_epochs=1).fit(ensemble, DataLoader(TensorDataset(X, y), 8))
    message = r"is read with `task=Classification\(\)`.*a later batch holds rows that sum to 3\. Pass argument `task`, for example `task=Multilabel\(\)`"
    with pytest.raises(InputError, match=message):
        ensemble.predict(X)


def test_a_resumed_ensemble_goes_on_looking(make_trainer, tmp_path):
    clean = DataLoader(TensorDataset(X[:16], ON_OFF[:16].unsqueeze(1)), 8)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(EnsembleModule(Counter, num_members=2, seed=0), clean)
    again = EnsembleModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.task == Binary()
    assert again.predict(X).probs.shape == (24, 2)
    make_trainer(max_epochs=1).fit(again, counts())
    with pytest.raises(InputError, match=READ):
        again.predict(X)


def test_a_checkpoint_without_a_sign_stays_open(make_trainer, tmp_path):
    nothing = DataLoader(TensorDataset(X, torch.zeros(24, 1)), 8)
    trainer = make_trainer(
        max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True
    )
    trainer.fit(EnsembleModule(Counter, num_members=2, seed=0), nothing)
    again = EnsembleModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.task == Classification()
    make_trainer(max_epochs=1).fit(again, DataLoader(TensorDataset(X, X[:, :1]), 8))
    assert isinstance(again.predict(X), PointPrediction)


# ---------------------------------------------------------------------- no sign at all


def test_both_readings_are_advised(make_trainer):
    nothing = DataLoader(TensorDataset(X, torch.zeros(24, 1)), 8)
    both = r"`task=Binary\(\)` for one logit per input, `task=Regression\(head='mean'\)` for one number"
    ensemble = EnsembleModule(Counter, num_members=2, seed=0)
    make_trainer(max_epochs=1).fit(ensemble, nothing)
    with pytest.raises(InputError, match=both):
        ensemble.predict(X)
    with pytest.raises(InputError, match=both):
        OODDetection().score(Counter(), nothing)


# ---------------------------------------------------------------------- ranks


RANKS = """
import json, os, torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset
from lightning_uq import EnsembleModule, OODDetection, TemperatureScaling
from lightning_uq.errors import InputError
from tests.running.test_contradicted_task import Counter, ON_OFF, X

RANK = int(os.environ.get("LOCAL_RANK", 0))
counts = ON_OFF.clone()
counts[18] = 17


class Rows(IterableDataset):
    def __init__(self, of_ranks):
        self.of_ranks = of_ranks

    def __iter__(self):
        return iter(zip(X, self.of_ranks[RANK].unsqueeze(1)))


def trainer(*callbacks):
    torch.manual_seed(0)
    return Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), use_distributed_sampler=False,
    )


def message(run):
    try:
        run()
    except InputError as error:
        return str(error)
    return None


results = {}
for name, of_ranks in {
    "one doubts": (ON_OFF, counts),
    "one has no sign": (ON_OFF, torch.zeros(24)),
    "one begins otherwise": (ON_OFF, counts.flip(0) + 2),
}.items():
    loader = DataLoader(Rows(of_ranks), 8)
    ensemble = EnsembleModule(Counter, num_members=2, seed=0)
    trainer().fit(ensemble, loader)
    found = [message(lambda: ensemble.predict(X)), type(ensemble.task).__name__]
    found.append(message(lambda: trainer(TemperatureScaling()).fit(Counter(), loader, loader)))
    found.append(message(lambda: trainer(OODDetection({"far": DataLoader(X + 9, 8)})).test(Counter(), loader, verbose=False)))
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, found)
    results[name] = gathered
if RANK == 0:
    json.dump(results, open(out, "w"))
"""


@pytest.mark.slow
def test_a_doubt_of_one_rank_is_that_of_all(run_script):
    found = run_script(RANKS, timeout=240)
    assert all(first == second for first, second in found.values())
    predicted, task, fitted, tested = found["one doubts"][0]
    assert "holds the target 17" in predicted
    assert task == "Binary"
    assert "holds the target 17" in fitted
    assert "holds the target 17" in tested
    predicted, task, *_ = found["one has no sign"][0]
    assert predicted is None
    assert task == "Binary"
    predicted, _, fitted, tested = found["one begins otherwise"][0]
    assert predicted is not None
    assert fitted is not None
    assert tested is not None
