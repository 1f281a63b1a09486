"""The figures show what the predictions of all rows give, for any module and on any number of ranks."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, LogFigures, TemperatureScaling
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.tasks import Binary, Multilabel, Regression, Segmentation


@pytest.fixture
def logged(monkeypatch):
    """The figures that are logged, by name."""
    found = {}

    def log(trainer, name, figure):
        assert name not in found
        found[name] = figure

    monkeypatch.setattr("lightning_uq.loggers.callback.log_figure", log)
    return found


@pytest.fixture
def trainer_of(make_trainer, tmp_path):
    def make(*callbacks, **options):
        return make_trainer(callbacks=[*callbacks], logger=CSVLogger(tmp_path), **options)

    return make


class Users(LightningModule):
    """Written without this package."""

    def __init__(self, outputs=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, outputs), nn.Dropout(0.5))

    def forward(self, x):
        return 3 * self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])
        batch[0].zero_()  # in place, after its own work

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def inputs(num=50):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(num))


def loader(x, *y):
    return DataLoader(TensorDataset(x, *y), batch_size=8)


def bars(figure):
    """The heights of the upper and the lower bars, by the number of the bin."""
    return [
        {round(15 * (bar.get_x() + bar.get_width() / 2) - 0.5): bar.get_height() for bar in axes.patches}
        for axes in figure.axes
    ]


def by_hand(probability, came_true):
    """Frequencies and counts of 15 bins."""
    p, hit = probability.double().flatten().numpy(), came_true.double().flatten().numpy()
    number = (-(-15 * p // 1) - 1).clip(0, 14).astype(int)  # bins (lo, hi]
    used = sorted(set(number.tolist()))
    return [{k: hit[number == k].mean() for k in used}, {k: (number == k).sum() for k in used}]


def assert_bars(figure, probability, came_true):
    for found, expected in zip(bars(figure), by_hand(probability, came_true), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def coverage(figure):
    """The drawn coverage by level."""
    x, y = figure.axes[0].lines[1].get_data()
    return dict(zip(x.round(6).tolist(), y.tolist(), strict=True))


def test_an_unmodified_classifier(trainer_of, logged):
    x, y, model = inputs(), torch.arange(50) % 3, Users()
    states = []
    for callbacks in ([], [LogFigures()]):
        trainer = trainer_of(*callbacks)
        torch.manual_seed(0)
        trainer.validate(model, loader(x, y), verbose=False)
        trainer.test(model, loader(x[:20], y[:20]), verbose=False)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)
    assert list(logged) == ["val_reliability", "test_reliability"]
    probs = model.eval()(x).softmax(1).detach()
    confidence, label = probs.max(1)
    assert_bars(logged["val_reliability"], confidence, label == y)
    assert_bars(logged["test_reliability"], confidence[:20], label[:20] == y[:20])
    assert "Validation data, step 0" in logged["val_reliability"].axes[0].get_title()


def test_a_calibration_shows_in_the_figure_of_our_modules(trainer_of, logged):
    x, y = inputs(200), torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    module, scaling = DeterministicModule(nn.Linear(4, 3)), TemperatureScaling(weights="last")
    trainer_of(scaling).fit(module, loader(x, y), loader(x, y))
    raw = module(x)[0].softmax(1).detach()
    trainer_of(scaling, LogFigures()).test(module, loader(x, y), verbose=False)
    with torch.no_grad():
        prediction = module.predict(x)
    assert (prediction.probs - raw).abs().max() > 0.05
    assert_bars(logged["test_reliability"], prediction.confidence, prediction.label == y)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(trainer_of, logged, precision):
    x, y = inputs(600), torch.arange(600) % 3
    for model in (Users(), DeterministicModule(nn.Linear(4, 3))):
        trainer_of(LogFigures(), precision=precision).test(model, loader(x, y), verbose=False)
        assert sum(bars(logged.pop("test_reliability"))[1].values()) == 600  # bfloat16 would stop counting at 256


def test_an_ensembles_figure_is_that_of_its_mean(trainer_of, logged):
    x, y = inputs(), torch.arange(50) % 3
    module = EnsembleModule(lambda: nn.Linear(4, 3), num_members=3)
    trainer_of(LogFigures()).test(module, loader(x, y), verbose=False)
    probs = module.eval()(x).softmax(2).mean(0).detach()
    assert_bars(logged["test_reliability"], probs.max(1).values, probs.argmax(1) == y)


def test_labels_and_maps(trainer_of, logged):
    x = inputs()
    y = (torch.rand(50, 2) < 0.3).float()
    y[0, 0] = torch.nan  # not known
    module = DeterministicModule(nn.Linear(4, 2), task=Multilabel())
    trainer_of(LogFigures()).validate(module, loader(x, y), verbose=False)
    known = ~y.isnan()
    assert_bars(logged.pop("val_reliability"), module(x)[0].sigmoid().detach()[known], y[known] == 1)

    module, y = DeterministicModule(nn.Linear(4, 1), task=Binary()), (x[:, 0] > 0).long()
    trainer_of(LogFigures()).validate(module, loader(x, y), verbose=False)
    positive = module(x)[0].sigmoid().detach().flatten()
    confidence = torch.maximum(positive, 1 - positive)
    assert_bars(logged.pop("val_reliability"), confidence, (positive > 0.5) == y)

    class Maps(Users):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 3, 1)

    x, y = torch.randn(20, 1, 3, 2), torch.randint(3, (20, 3, 2))
    y[0, 0, 0] = 255
    module = Maps()
    trainer_of(LogFigures(task=Segmentation(ignore_index=255))).validate(module, loader(x, y), verbose=False)
    confidence, label = module(x).softmax(1).detach().max(1)
    counted = y != 255
    assert_bars(logged["val_reliability"], confidence[counted], (label == y)[counted])


def test_intervals_of_numbers(trainer_of, logged):
    x = inputs(200)
    y = x[:, :1] + torch.randn(200, 1)
    y[3] = torch.nan
    known = ~y.isnan()
    module = DeterministicModule(nn.Linear(4, 2), task=Regression())
    trainer_of(LogFigures()).test(module, loader(x, y), verbose=False)
    found = coverage(logged.pop("test_coverage"))
    assert list(found) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    with torch.no_grad():
        prediction = module.predict(x)
    for level, share in found.items():
        low, high = prediction.interval(level)
        assert share == pytest.approx(((low <= y) & (y <= high))[known].double().mean().item())

    module = Users(outputs=3)
    task = Regression(head="quantiles", levels=(0.2, 0.5, 0.8))
    trainer_of(LogFigures(task=task)).test(module, loader(x, y), verbose=False)
    found = coverage(logged["test_coverage"])
    assert list(found) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # nothing is known beyond the outermost quantiles
    low, _, high = module.eval()(x).sort(1).values.T
    inside = (low <= y[:, 0]) & (y[:, 0] <= high)
    assert found[0.6] == pytest.approx(inside[known[:, 0]].double().mean().item())


def test_each_loader_has_its_own(trainer_of, logged):
    x, y, model = inputs(), torch.arange(50) % 3, Users()
    trainer_of(LogFigures()).test(model, [loader(x, y), loader(x[:9], y[:9])], verbose=False)
    assert list(logged) == ["test_reliability/dataloader_idx_0", "test_reliability/dataloader_idx_1"]
    assert [sum(bars(figure)[1].values()) for figure in logged.values()] == [50, 9]


@pytest.mark.parametrize(
    ("make_loader", "options", "reason"),
    [
        (lambda x: loader(x), {}, "the validation data"),
        (lambda x: loader(x, torch.full((50,), 7)), {}, r"labels in \[0, 3\)"),
        (lambda x: loader(x, x[:, :3]), {"task": Regression(head="mean")}, "predicts neither class probabilities nor"),
    ],
)  # fmt: skip
def test_a_loader_without_a_figure_is_told_once(trainer_of, logged, make_loader, options, reason):
    x = inputs()
    trainer = trainer_of(LogFigures(**options), max_epochs=2)
    with pytest.warns(
        UserWarning, match=f"LogFigures draws no figure for the validation data: (?i:.*{reason})"
    ) as told:
        trainer.fit(Users(), loader(x), make_loader(x))
    assert sum("draws no figure" in str(one.message) for one in told) == 1
    assert trainer.current_epoch == 2
    assert not logged


def test_without_a_logger_nothing_is_computed(make_trainer, monkeypatch):
    monkeypatch.setattr(LogFigures, "_add", lambda *args: pytest.fail("a pass"))
    make_trainer(callbacks=[LogFigures()]).test(Users(), loader(inputs(), torch.arange(50) % 3), verbose=False)


def test_refusals(trainer_of):
    with pytest.raises(InputError, match="`num_bins` must be"):
        LogFigures(num_bins=0)
    with pytest.raises(InputError, match="several LogFigures, which would write the same figures"):
        trainer_of(LogFigures(), LogFigures()).test(Users(), loader(inputs()))

    class Iterates(Users):
        def test_step(self, dataloader_iter):
            pass

    with pytest.raises(UnsupportedError, match="steps that take `dataloader_iter`"):
        LogFigures().setup(trainer_of(), Iterates(), "test")


RANKS = """
import json, torch
import lightning_uq.loggers.callback as room
from torch import nn
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq import DeterministicModule, InputError, LogFigures
from lightning_uq.tasks import Regression

def figures(devices, module, x, y, **options):
    found = {}
    def log(trainer, name, figure):
        if trainer.is_global_zero:
            found[name] = [[bar.get_height() for bar in axes.patches] or axes.lines[1].get_data()[1].tolist() for axes in figure.axes]
    room.log_figure = log
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=CSVLogger("."),
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[LogFigures(**options)])
    trainer.test(module, DataLoader(TensorDataset(x, y), batch_size=4), verbose=False)
    return trainer, found

def fails(model, x):
    if (x[:, 0] == 1).any():
        raise RuntimeError("this rank's own error")
    return model.network.network(x)

def main():
    torch.manual_seed(0)
    x = torch.randn(21, 4)
    classes, numbers = (x[:, 0] > 0).long(), x[:, :1] + torch.randn(21, 1)
    classifier, regressor = DeterministicModule(nn.Linear(4, 3)), DeterministicModule(nn.Linear(4, 2), task=Regression())
    result = {"found": []}
    for module, y in ((classifier, classes), (regressor, numbers)):
        for n in (21, 1):  # with one row, a rank has none
            _, one = figures(1, module, x[:n], y[:n])
            trainer, two = figures(2, module, x[:n], y[:n])
            result["found"].append([one, two])
    bad = x.clone()
    bad[1, 0] = 1  # rank 1's alone
    text = None
    try:
        figures(2, classifier, bad, classes, predict_fn=fails)
    except RuntimeError as error:
        text = str(error)
    texts = [None, None]
    torch.distributed.all_gather_object(texts, text)
    if trainer.is_global_zero:
        json.dump({**result, "texts": texts}, open(out, "w"))

if __name__ == "__main__":
    main()
"""


def test_two_ranks_draw_what_one_draws(run_script):
    result = run_script(RANKS)
    for one, two in result["found"]:
        assert len(one) == 1
        assert two == one
    assert all("this rank's own error" in text for text in result["texts"])
