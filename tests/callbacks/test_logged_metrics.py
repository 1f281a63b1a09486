"""A calibration can be seen: what a fit found is logged after it, and a test logs the metrics before and after it."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, TemperatureScaling, VectorScaling
from lightning_uq.functional.calibration import expected_calibration_error
from lightning_uq.tasks import Multilabel, Segmentation


def data(num, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 4, generator=generator)
    noisy = torch.rand(num, generator=generator) < 0.25
    y = torch.where(noisy, torch.randint(3, (num,), generator=generator), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    return x, y


def loader(num=64, seed=0, **kwargs):
    return DataLoader(TensorDataset(*data(num, seed)), batch_size=8, **kwargs)


class Users(LightningModule):
    """Overconfident, and written without this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        return 5 * self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))
        batch[0].zero_()  # in place, after its own work

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def of(module, x, y, calibrated):
    """NLL, ECE and Brier score, recomputed from the logits."""
    with torch.no_grad():
        log_probs = calibrated(module.eval()(x).double().log_softmax(-1))
    probs, onehot = log_probs.exp(), F.one_hot(y, 3)
    return {
        "nll": F.nll_loss(log_probs, y).item(),
        "ece": expected_calibration_error(probs, y).item(),
        "brier": (probs - onehot).square().sum(1).mean().item(),
    }


SGD = partial(torch.optim.SGD, lr=0.3)


def same(log_probs):
    return log_probs


@pytest.mark.parametrize("make", [TemperatureScaling, VectorScaling])
def test_a_test_of_an_unmodified_module_shows_before_and_after(make_trainer, make):
    module, scaling = Users(), make(weights="last")
    trainer = make_trainer(max_epochs=4, callbacks=[scaling])
    trainer.fit(module, loader(), loader(80, 1))
    (tested,) = trainer.test(module, loader(51, 2), verbose=False)
    x, y = data(51, 2)

    def calibrated(log_probs):
        if make is TemperatureScaling:
            return (log_probs / scaling.temperature).log_softmax(-1)
        scale, bias = scaling.class_scaling
        centred = log_probs - log_probs.mean(1, keepdim=True)
        return (scale * centred + bias).log_softmax(-1)

    for end, change in (("", same), ("_calibrated", calibrated)):
        for name, value in of(module, x, y, change).items():
            assert tested[f"uq/test_{name}{end}"] == pytest.approx(value, rel=1e-4)
    assert tested["uq/test_nll_calibrated"] < tested["uq/test_nll"] - 0.05
    assert tested["test_loss"] == pytest.approx(tested["uq/test_nll"], rel=1e-5)
    assert set(tested) == {"test_loss"} | {
        f"uq/test_{name}{end}" for name in ("nll", "ece", "brier") for end in ("", "_calibrated")
    }


def test_what_was_fitted_is_logged_at_the_end_of_the_training(make_trainer, tmp_path):
    logger, scaling, module = CSVLogger(tmp_path), TemperatureScaling(weights="last"), Users()
    trainer = make_trainer(max_epochs=4, callbacks=[scaling], logger=logger)
    trainer.fit(module, loader(), loader(80, 1))
    x, y = data(80, 1)
    after = of(module, x, y, lambda log_probs: (log_probs / scaling.temperature).log_softmax(-1))
    expected = {
        "uq/temperature": scaling.temperature.item(),
        "uq/fit_nll": of(module, x, y, same)["nll"],
        "uq/fit_nll_calibrated": after["nll"],
    }
    assert {name: trainer.callback_metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    logger.save()
    *_, last = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert f"{expected['uq/temperature']:.4f}"[:5] in last
    assert expected["uq/fit_nll_calibrated"] < expected["uq/fit_nll"]
    again = TemperatureScaling(weights="last")
    again.load_state_dict(scaling.state_dict())
    assert again.fitted_numbers == scaling.fitted_numbers


@pytest.mark.parametrize("scope", ["shared", "member"])
def test_temperatures_of_members_and_our_own_modules_have_the_same_names(make_trainer, scope):
    module = EnsembleModule(lambda: nn.Linear(4, 3), num_members=2, seed=0)
    scaling = TemperatureScaling(scope=scope, weights="last")
    trainer = make_trainer(max_epochs=4, callbacks=[scaling])
    trainer.fit(module, loader(), loader(80, 1))
    names = {"uq/temperature"} if scope == "shared" else {"uq/temperature/0", "uq/temperature/1"}
    assert names < trainer.callback_metrics.keys()
    (tested,) = trainer.test(module, loader(51, 2), verbose=False)
    for name in ("nll", "ece", "brier"):
        assert tested[f"uq/test_{name}_calibrated"] == pytest.approx(tested[f"test_{name}"], rel=1e-5)
        assert tested[f"uq/test_{name}"] != pytest.approx(tested[f"test_{name}"], rel=1e-5)


@pytest.mark.parametrize("task", [Multilabel(), Segmentation(ignore_index=255), "binary"])
def test_every_task_that_takes_a_calibration(make_trainer, task):
    x, y = data(96, 3)
    targets = {
        "Multilabel": torch.stack([y == 0, y == 1, y == 2], 1).float(),
        "Segmentation": torch.where(torch.rand(96, 1, 2) < 0.3, torch.tensor(255), y.reshape(96, 1, 1)).long(),
        "str": (y > 0).float().unsqueeze(1),
    }[type(task).__name__]
    out = {"Multilabel": 3, "Segmentation": 6, "str": 1}[type(task).__name__]
    shape = (3, 1, 2) if out == 6 else (out,)
    module = DeterministicModule(
        lambda: nn.Sequential(nn.Linear(4, out), nn.Unflatten(1, shape)), task=task, optimizer=SGD
    )
    scaling = TemperatureScaling(weights="last", per_label=isinstance(task, Multilabel))
    batches = DataLoader(TensorDataset(x, targets), batch_size=8)
    trainer = make_trainer(max_epochs=9, callbacks=[scaling])
    trainer.fit(module, batches, batches)
    (tested,) = trainer.test(module, batches, verbose=False)
    for name in ("nll", "ece", "brier"):
        assert tested[f"uq/test_{name}_calibrated"] == pytest.approx(tested[f"test_{name}"], rel=1e-4)
    # Fitted and tested on the same rows.
    numbers = scaling.fitted_numbers
    assert numbers["fit_nll_calibrated"] == pytest.approx(tested["uq/test_nll_calibrated"], rel=1e-4)
    assert numbers["fit_nll"] == pytest.approx(tested["uq/test_nll"], rel=1e-4)


def test_two_calibrations_of_an_unmodified_module_have_names_of_their_own(make_trainer):
    module = Users()
    trainer = make_trainer(callbacks=[TemperatureScaling(), VectorScaling(name="v"), TemperatureScaling(name="t")])
    trainer.fit(module, loader(), loader(80, 1))
    (tested,) = trainer.test(module, loader(51, 2), verbose=False)
    assert {f"uq/{name}/test_nll_calibrated" for name in ("TemperatureScaling", "v", "t")} < tested.keys()
    assert tested["uq/t/test_nll_calibrated"] == tested["uq/TemperatureScaling/test_nll_calibrated"]


def test_a_loader_that_cannot_be_scored_stops_nothing(make_trainer, caplog):
    class Reads(Users):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("seen", 1.0)

    module, scaling = Reads(), TemperatureScaling(weights="last")
    trainer = make_trainer(callbacks=[scaling])
    trainer.fit(module, loader(), loader(80, 1))
    unlabelled = DataLoader(torch.randn(20, 4), batch_size=8)
    tested = trainer.test(module, [loader(51, 2), unlabelled], verbose=False)
    (alone,) = trainer.test(module, loader(51, 2), verbose=False)
    for results in tested:  # values of a whole test are in the results of each loader
        assert results["uq/test_nll/dataloader_idx_0"] == alone["uq/test_nll"]
        assert not any(name.endswith("nll/dataloader_idx_1") for name in results)
    assert trainer.test(module, unlabelled, verbose=False) == [{"seen": 1.0}]
    assert "TemperatureScaling logs no metrics of the test set: The test data must have targets" in caplog.text


def test_the_test_stays_what_it_was(make_trainer):
    results = []
    for callbacks in ([], [TemperatureScaling(weights="last")]):
        torch.manual_seed(0)
        module = Users()
        trainer = make_trainer(callbacks=callbacks, max_epochs=2)
        trainer.fit(module, loader(), loader(80, 1))
        module.net[2].train = lambda mode=True, layer=module.net[2]: layer  # dropout that draws in a test too
        module.net[2].training = True
        torch.manual_seed(1)
        results.append(trainer.test(module, loader(51, 2), verbose=False)[0]["test_loss"])
    assert results[0] == results[1]


class Silent(Users):
    def test_step(self, batch, batch_idx):
        pass


def silent():
    """Better than chance, and the same in every process."""
    module = Silent()
    nn.init.zeros_(module.net[0].bias)
    with torch.no_grad():
        module.net[0].weight.copy_(torch.eye(16, 4))  # class 1 or 2 if one or both of the first numbers are positive
        module.net[3].weight.copy_(torch.zeros(3, 16))
        module.net[3].weight[:, :2] = torch.tensor([[-1.0, -1.0], [0.3, 0.3], [0.6, 0.6]])
        module.net[3].bias.copy_(torch.tensor([0.4, 0.0, -0.3]))
    return module


RANKS = """
import json
import torch
from lightning.pytorch import Trainer
from tests.callbacks.test_logged_metrics import loader, silent
from lightning_uq import TemperatureScaling
from torch.utils.data import DataLoader, IterableDataset

class Rows(IterableDataset):  # all rows on rank 0, none on rank 1
    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return iter([] if rank else list(loader(51, 2).dataset))

def trainer(devices, *callbacks):
    return Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices == 2 else "auto", max_epochs=1, logger=False,
                   enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks))
def fitted():
    return TemperatureScaling().fit(module, loader(80, 1))
module = silent()
two = trainer(2, fitted())
(tested,) = two.test(module, loader(51, 2), verbose=False)
(uneven,) = two.test(module, DataLoader(Rows(), batch_size=8), verbose=False)
if two.is_global_zero:
    json.dump([tested, uneven], open(out, "w"))
"""


def test_two_ranks_count_each_row_once_and_a_rank_without_rows_waits_for_nobody(run_script, make_trainer):
    tested, uneven = run_script(RANKS)
    module = silent()
    trainer = make_trainer(callbacks=[TemperatureScaling().fit(module, loader(80, 1))])
    (alone,) = trainer.test(module, loader(51, 2), verbose=False)
    assert tested == pytest.approx(alone, rel=1e-5)
    assert uneven == pytest.approx(alone, rel=1e-5)


def test_an_object_that_the_test_step_changes_is_scored_as_it_came(make_trainer):
    class Graphs:
        def __init__(self, x, y):
            self.x, self.y = x, y

    class Normalising(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, batch):
            return self.layer(batch.x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch), batch.y)

        def validation_step(self, batch, batch_idx):
            pass

        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self(batch), batch.y), batch_size=len(batch.y))
            batch.x.mul_(9)
            batch.y.zero_()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader():
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 4, generator=generator), torch.arange(32) % 3
        data = list(zip(x, y, strict=True))
        return DataLoader(
            data,
            batch_size=8,
            collate_fn=lambda items: Graphs(*(torch.stack(part) for part in zip(*items, strict=True))),
        )

    module = Normalising()
    trainer = make_trainer(max_epochs=1, callbacks=[TemperatureScaling()])
    trainer.fit(module, loader(), loader())
    (tested,) = trainer.test(module, loader(), verbose=False)
    assert tested["uq/test_nll"] == pytest.approx(tested["test_loss"], abs=1e-5)
