"""Labels that a fit cannot take are told before the training or in its first epoch, never after all of it."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_uq import FitGMM, InputError, TemperatureScaling
from lightning_uq.data import Indexed

X = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
MASKED, RARE = Y.clone(), Y.clamp_max(1)
MASKED[70] = -100  # not in the first batch
RARE[71] = 2


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        self.epochs = 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_epoch_end(self):
        self.epochs += 1

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class WithTargets(Dataset):
    """As torchvision's: images that are loaded, targets in a list."""

    def __init__(self, x, y, change=None):
        self.x, self.targets, self.change = x, y.tolist(), change

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.targets[i] if self.change is None else self.change(self.targets[i])


class Opaque(Dataset):
    """Nothing shows its labels but its items."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def pairs(y):
    return list(zip(X, y, strict=True))


SHOWN = {
    "tensors": lambda y: TensorDataset(X, y),
    "targets": lambda y: WithTargets(X, y),
    "pairs": pairs,
    "a part": lambda y: Subset(TensorDataset(torch.cat([X, X]), torch.cat([Y, y])), range(80, 160)),
    "a part in its own order": lambda y: Subset(WithTargets(X, y), [*range(40), *reversed(range(40, 80))]),
    "a chain": lambda y: ConcatDataset([TensorDataset(X[:40], y[:40]), TensorDataset(X[40:], y[40:])]),
    "indexed": lambda y: Indexed(TensorDataset(X, y)),
}


def fit(make_trainer, callbacks, train, val=None, epochs=3, **options):
    module = Lit()
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, **options)
    error = None
    try:
        trainer.fit(module, train, val)
    except InputError as raised:
        error = raised
    return module, error


@pytest.mark.parametrize("data", SHOWN)
def test_a_data_set_that_shows_its_labels_is_looked_through_before_the_training(make_trainer, data):
    build = SHOWN[data]
    good = DataLoader(build(Y), batch_size=20)
    for callback, train, val, message in (
        (FitGMM(), DataLoader(build(MASKED), batch_size=20), None, r"class labels in \[0, 3\), but .* from -100 to 2"),
        (
            FitGMM(),
            DataLoader(build(RARE), batch_size=20, shuffle=True),
            None,
            "needs at least 2 rows, but class 2 has 1",
        ),
        (TemperatureScaling(), good, DataLoader(build(MASKED), batch_size=20), "from -100 to 2"),
    ):
        module, error = fit(make_trainer, [callback], train, val, num_sanity_val_steps=0)
        assert error is not None
        assert re.search(message, str(error))
        assert module.epochs == 0
        assert module.global_step == 0


def test_what_is_right_is_fitted(make_trainer):
    for build in [*SHOWN.values(), lambda y: Opaque(X, y)]:
        gmm, scaling = FitGMM(), TemperatureScaling()
        loader = DataLoader(build(Y), batch_size=20, shuffle=True)
        module, error = fit(make_trainer, [gmm, scaling], loader, DataLoader(build(Y), batch_size=20), epochs=1)
        assert error is None
        assert gmm.fitted
        assert scaling.fitted


def test_labels_that_a_data_set_changes_are_not_misread(make_trainer):
    # Raw targets 1 to 3, and a label of 9 that the data set maps to 0.
    raw = Y + 1
    raw[75] = 9
    data = WithTargets(X, raw, change=lambda y: 0 if y == 9 else y - 1)
    gmm = FitGMM()
    module, error = fit(make_trainer, [gmm], DataLoader(data, batch_size=20), epochs=1)
    assert error is None
    assert gmm.fitted


@pytest.mark.parametrize("kind", [Opaque, Stream])
def test_labels_that_only_batches_show_are_looked_at_in_the_first_epoch(make_trainer, kind):
    train = DataLoader(kind(X, MASKED), batch_size=20)
    module, error = fit(make_trainer, [FitGMM()], train)
    assert "from -100 to 2" in str(error)
    assert module.epochs == 0
    good = DataLoader(Opaque(X, Y), batch_size=20)
    module, error = fit(make_trainer, [TemperatureScaling()], good, DataLoader(kind(X, MASKED), batch_size=20))
    assert "from -100 to 2" in str(error)
    assert module.epochs <= 1


def test_a_stream_that_cannot_be_read_is_refused_at_the_first_batch_of_the_training(make_trainer):
    class Triples(IterableDataset):
        def __iter__(self):
            return iter([{"a": x, "b": x, "y": y} for x, y in pairs(Y)])

    class Reads(Lit):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["a"]), batch["y"])

    module, trainer = Reads(), make_trainer(max_epochs=2, callbacks=[FitGMM()])
    with pytest.raises(InputError, match="Pass `unpack_batch`"):
        trainer.fit(module, DataLoader(Triples(), batch_size=20))
    assert module.global_step == 0


def test_a_rare_class_that_only_batches_show_is_a_warning_after_the_first_epoch(make_trainer):
    gmm = FitGMM()
    trainer = make_trainer(max_epochs=2, callbacks=[gmm])
    with (
        pytest.warns(UserWarning, match="FitGMM will fail after the training, unless .*class 2 has 1"),
        pytest.raises(InputError, match="class 2 has 1"),
    ):
        trainer.fit(Lit(), DataLoader(Opaque(X, RARE), batch_size=20))


def test_a_last_class_that_no_row_has_is_a_warning_after_the_first_epoch(make_trainer):
    """The labels alone do not tell that there is one class more: the outputs do."""
    with (
        pytest.warns(UserWarning, match="FitGMM will fail after the training, unless .*class 2 has 0"),
        pytest.raises(InputError, match="class 2 has 0"),
    ):
        make_trainer(max_epochs=2, callbacks=[FitGMM()]).fit(
            Lit(), DataLoader(Opaque(X, Y.clamp_max(1)), batch_size=20)
        )


def test_a_validation_that_never_comes_looks_at_no_label_so_they_are_looked_at_before(make_trainer):
    good, bad = (DataLoader(Opaque(X, y), batch_size=20) for y in (Y, MASKED))
    module, error = fit(make_trainer, [TemperatureScaling()], good, bad, epochs=3, check_val_every_n_epoch=5)
    assert "from -100 to 2" in str(error)
    assert module.global_step == 0


@pytest.mark.parametrize(
    "kind", [lambda y: DataLoader(Opaque(X, y), batch_size=20), lambda y: [(X[:40], y[:40]), (X[40:], y[40:])]]
)
def test_a_loader_of_its_own_is_read_before_the_training(make_trainer, kind):
    good = DataLoader(TensorDataset(X, Y), batch_size=20)
    for callback, message in (
        (FitGMM(dataloader=kind(RARE)), "class 2 has 1"),
        (TemperatureScaling(dataloader=kind(MASKED)), "from -100 to 2"),
    ):
        module, error = fit(make_trainer, [callback], good)
        assert message in str(error)
        assert module.global_step == 0


def test_a_data_modules_own_fitting_data_is_read_before_the_training(make_trainer):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(X, Y), batch_size=20)

        def uq_fit_dataloader(self):
            return DataLoader(Opaque(X, RARE), batch_size=20)

    module = Lit()
    with pytest.raises(InputError, match="class 2 has 1"):
        make_trainer(max_epochs=2, callbacks=[FitGMM()]).fit(module, datamodule=Data())
    assert module.global_step == 0


def test_mixed_targets_of_the_training_are_no_fault(make_trainer):
    """Mixup makes probabilities of the labels, in the training alone."""

    class Mixing(Lit):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x, F.one_hot(y, 3).float()) if self.trainer.training else batch

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    for data in (TensorDataset(X, Y), Opaque(X, Y)):
        gmm = FitGMM()
        make_trainer(max_epochs=1, callbacks=[gmm]).fit(Mixing(), DataLoader(data, batch_size=20))
        assert gmm.fitted


def test_a_limited_fit_counts_the_rows_that_it_reads(make_trainer):
    y = Y.clone()
    y[:40] = y[:40].clamp_max(1)  # class 2 comes late
    loader = DataLoader(TensorDataset(X, y), batch_size=20)
    module, error = fit(make_trainer, [FitGMM()], loader, limit_train_batches=2)
    assert "class 2 has 0" in str(error)
    assert module.global_step == 0
    gmm = FitGMM()
    module, error = fit(make_trainer, [gmm], loader, fast_dev_run=True)
    assert error is None
    assert gmm.fitted


RANKS = """
import json
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from lightning_uq import FitGMM, InputError, TemperatureScaling
from tests.callbacks.test_label_checks import MASKED, RARE, X, Y, Lit, Opaque

good = DataLoader(Opaque(X, Y), batch_size=10)
masked = Y.clone()
masked[71] = -100  # rank 1's alone
bad = DataLoader(Opaque(X, masked), batch_size=10)

if __name__ == "__main__":
    found = {}
    for name, callback, loaders in (
        ("temperature", TemperatureScaling(), (good, bad)),
        ("density", FitGMM(), (bad, None)),
        ("right", FitGMM(), (good, None)),
    ):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=2,
            enable_model_summary=False, enable_checkpointing=False, callbacks=callback, num_sanity_val_steps=0,
        )
        module = Lit()
        try:
            trainer.fit(module, *loaders)
            found[name] = ["fitted", module.epochs]
        except InputError as error:
            found[name] = [str(error), module.epochs]
    with open(out if trainer.is_global_zero else out + "1", "w") as file:
        json.dump(found, file)
    trainer.strategy.barrier()
"""


def test_two_ranks_tell_the_fault_of_one(run_script, tmp_path):
    found = run_script(RANKS)
    assert found == json.loads((tmp_path / "out.json1").read_text())
    for name in ("temperature", "density"):
        text, epochs = found[name]
        assert "from -100 to" in text
        assert epochs <= 1
    assert found["right"][0] == "fitted"


class Filtered(Dataset):
    """A wrapper that leaves out what has no label, as users write it."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.kept = [i for i in range(len(dataset)) if int(dataset[i][1]) >= 0]

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i):
        return self.dataset[self.kept[i]]


@pytest.mark.parametrize("callback", [FitGMM, TemperatureScaling])
def test_a_wrapper_that_filters_its_data_is_not_misread(make_trainer, callback):
    """The labels inside are not those of its items, although the first batch has the same."""
    data = DataLoader(Filtered(TensorDataset(X, MASKED)), batch_size=16)
    fitted = callback()
    make_trainer(callbacks=[fitted], max_epochs=1).fit(Lit(), data, data)
    assert fitted.fitted
