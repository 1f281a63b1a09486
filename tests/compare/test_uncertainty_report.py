"""UncertaintyReport gives the numbers of the predictions, for any module and on any number of ranks, and leaves the module alone."""

import json
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, FitGMM, InputError, LogFigures, TemperatureScaling, UncertaintyReport
from lightning_uq.compare.directory.reading import read_run
from lightning_uq.errors import UnsupportedError
from lightning_uq.tasks import Regression, Segmentation


class Users(LightningModule):
    """Written without this package."""

    def __init__(self, outputs=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, outputs), nn.Dropout(0.5))

    def forward(self, x):
        return 3 * self.net(x)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])
        batch[0].zero_()  # in place, after its own work


def inputs(num=50):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(num))


def loader(x, *y):
    return DataLoader(TensorDataset(x, *y), batch_size=8)


@pytest.fixture
def tested(make_trainer, tmp_path):
    """Tests a module with the callback; gives its results and its record."""

    def run(module, data, *callbacks, trainer_options=None, **options):
        folder = tmp_path / "page"
        trainer = make_trainer(
            callbacks=[*callbacks, UncertaintyReport(folder, overwrite=True, **options)], **(trainer_options or {})
        )
        arguments = {"datamodule": data} if isinstance(data, LightningDataModule) else {"dataloaders": data}
        trainer.test(module, **arguments, verbose=False)
        results, records = read_run(folder)
        return results, records[options.get("name") or type(module).__name__][0]

    return run  # fmt: skip


def mean(results, key):
    return results["rows"][0][key]["mean"]


def test_an_unmodified_classifier_is_measured_and_left_alone(tested, make_trainer, tmp_path):
    x, y, model = inputs(), torch.arange(50) % 3, Users()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    make_trainer().test(model, loader(x, y), verbose=False)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    results, record = tested(model, loader(x, y), ood={"far": loader(20 + x)})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    log_probs = model(x).log_softmax(1).detach().double()
    assert mean(results, "accuracy") == pytest.approx((log_probs.argmax(1) == y).double().mean().item())
    assert mean(results, "nll") == pytest.approx(-log_probs[torch.arange(50), y].mean().item(), rel=1e-6)
    entropy = [-(p.exp() * p).sum(1) for p in (log_probs, model(20 + x).log_softmax(1).detach().double())]
    wins = (entropy[1].unsqueeze(0) > entropy[0].unsqueeze(1)).double().mean().item()
    assert mean(results, "ood_auroc") == pytest.approx(wins, abs=1e-6)
    assert results["problem"]["sizes"] == {"test": 50, "ood": 50}
    assert torch.equal(record.row_ids, torch.arange(50))
    low, high = results["intervals"]["nll"]["Users"]
    half = 2.0096 * log_probs[torch.arange(50), y].std().item() / 50**0.5  # t with 49 degrees of freedom
    nll = mean(results, "nll")
    assert low * high == pytest.approx(nll**2)  # symmetric in the logarithm
    assert 1 <= nll * math.log(high / low) / 2 / half < 1.1  # a little more, for the skewness
    folder = tmp_path / "page"
    names = {"report.html", "results.json", "records", "reliability_Users.png", "risk_coverage.png", "scores_Users.png"}
    assert {path.name for path in folder.iterdir()} == names
    page = (folder / "report.html").read_text()
    assert "Uncertainty of Users" in page
    assert "On 50 test rows, Users has an accuracy of" in page


def test_our_modules_are_measured_as_calibrated(tested, make_trainer):
    x, y = inputs(200), torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    module, scaling = DeterministicModule(nn.Linear(4, 3)), TemperatureScaling(weights="last")
    make_trainer(callbacks=[scaling]).fit(module, loader(x, y), loader(x, y))
    results, record = tested(module, loader(x, y), scaling)
    with torch.no_grad():
        prediction = module.predict(x)
    assert torch.allclose(record.rows["confidence"].double(), prediction.confidence.double(), atol=1e-6)
    assert not torch.allclose(
        record.rows["confidence"].double(), module(x)[0].softmax(1).detach().amax(1).double(), atol=0.01
    )


def test_a_foreign_module_is_measured_as_the_trainers_callbacks_calibrate_it(make_trainer, tmp_path):
    x, y, model = inputs(200), torch.randint(3, (200,), generator=torch.Generator().manual_seed(0)), Users()
    scaling = TemperatureScaling().fit(model, loader(x, y))
    logger, folder = CSVLogger(tmp_path / "logs"), tmp_path / "page"
    trainer = make_trainer(callbacks=[scaling, LogFigures(), UncertaintyReport(folder)], logger=logger)
    trainer.test(model, loader(x, y), verbose=False)
    results, records = read_run(folder)
    logged = trainer.callback_metrics
    assert mean(results, "nll") == pytest.approx(logged["uq/test_nll_calibrated"].item(), rel=1e-5)
    assert mean(results, "nll") < logged["uq/test_nll"].item() - 0.01
    assert logged["report/nll"].item() == pytest.approx(mean(results, "nll"), rel=1e-5)
    assert "The predictions were calibrated by TemperatureScaling." in (folder / "report.html").read_text()
    names = {path.name for path in (tmp_path / "logs").rglob("*.png")}  # the diagram once
    assert names == {"test_reliability-0000000.png", "test_risk_coverage-0000000.png"}
    assert model.predict_step.__func__ is LightningModule.predict_step


def test_a_callbacks_score_is_the_default(tested, make_trainer):
    x, y = inputs(200), torch.arange(200) % 3
    module, density = DeterministicModule(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))), FitGMM(feature_transform="raw")  # fmt: skip
    make_trainer(callbacks=[density]).fit(module, loader(x, y))
    results, record = tested(module, loader(x, y), density, ood={"a": loader(9 + x[:7]), "b": loader(5 + x[:5])})
    with torch.no_grad():
        expected = -module.predict(x).log_density
    assert results["methods"]["DeterministicModule"]["ood_score"] == "log_density"
    assert torch.allclose(record.rows["ood_score"].double(), expected.double(), rtol=1e-3)
    assert results["problem"]["ood"] == {"a": 7, "b": 5}
    assert len(record.outside["ood_score"]) == 12


def test_numbers_with_missing_targets(tested):
    x = inputs(60)
    y = x[:, :1] + torch.randn(60, 1)
    module = DeterministicModule(nn.Linear(4, 2), task=Regression())
    results, record = tested(module, loader(x, y))
    with torch.no_grad():
        prediction = module.predict(x)
    assert mean(results, "rmse") == pytest.approx((prediction.mean - y).square().mean().sqrt().item(), rel=1e-5)
    low, high = prediction.interval(0.9)
    covered = ((low <= y) & (y <= high)).double().mean().item()
    assert f"Its 90 % intervals hold {100 * covered:.1f} % of the targets" in results["verdict"][1]
    y[3] = torch.nan
    _, record = tested(module, loader(x, y))
    assert record.rows["squared_error"].isnan().nonzero().flatten().tolist() == [3]


def test_maps(tested):
    class Maps(Users):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 3, 1)

    x, y = torch.randn(20, 1, 3, 2), torch.randint(3, (20, 3, 2))
    module = Maps()
    results, _ = tested(module, loader(x, y), task=Segmentation())
    assert mean(results, "accuracy") == pytest.approx((module(x).argmax(1) == y).double().mean().item())


def test_loaders_data_modules_and_names(tested):
    x, y = inputs(), torch.arange(50) % 3

    class Data(LightningDataModule):
        name = "mine"

        def test_dataloader(self):
            return [loader(x, y), loader(x[:9], y[:9])]

        def ood_dataloaders(self):
            return {"far": loader(9 + x[:5])}

    results, record = tested(Users(), Data(), in_distribution=1, name="second")
    assert results["data"] == "mine"
    assert results["problem"]["sizes"] == {"test": 9, "ood": 5}
    assert record.method == "second"


def test_a_sample_of_many_rows_is_the_same_in_any_batches(tested):
    x, y, model = inputs(), torch.arange(50) % 3, Users()
    kept = []
    for batch_size in (7, 50):
        data = DataLoader(TensorDataset(x, y), batch_size=batch_size)
        results, record = tested(model, data, max_rows=10)
        assert results["problem"]["sizes"]["test"] == 50
        assert results["problem"]["kept"] == 10
        kept.append(record.row_ids)
    assert torch.equal(*kept)


def test_figures_go_to_the_loggers(tested, tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    tested(Users(), loader(inputs(), torch.arange(50) % 3), trainer_options={"logger": logger})
    names = {path.name for path in (tmp_path / "logs").rglob("*.png")}
    assert names == {"test_reliability_Users-0000000.png", "test_risk_coverage-0000000.png"}


def test_data_without_targets_have_no_page_but_a_warning(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[UncertaintyReport(tmp_path / "page")])
    with pytest.warns(UserWarning, match="UncertaintyReport writes no page: .*test data"):
        trainer.test(Users(), loader(inputs()), verbose=False)
    assert not list((tmp_path / "page").iterdir())


def test_a_trial_run_writes_nothing(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[UncertaintyReport(tmp_path / "page")], fast_dev_run=True)
    trainer.test(Users(), loader(inputs(), torch.arange(50) % 3), verbose=False)
    assert not (tmp_path / "page").exists()


def test_refusals(make_trainer, tmp_path):
    data = loader(inputs(), torch.arange(50) % 3)
    with pytest.raises(InputError, match="`name` must be made of letters"):
        UncertaintyReport(tmp_path, name="a/b")
    with pytest.raises(InputError, match="`max_rows`"):
        UncertaintyReport(tmp_path, max_rows=1)
    with pytest.raises(InputError, match=r"`ood\['far'\]` must be a DataLoader"):
        UncertaintyReport(tmp_path, ood={"far": 3})
    with pytest.raises(InputError, match="one of the 1 test loaders, but it is 2"):
        make_trainer(callbacks=[UncertaintyReport(tmp_path / "a", in_distribution=2)]).test(Users(), data)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="`directory` already holds results"):
        make_trainer(callbacks=[UncertaintyReport(tmp_path)]).test(Users(), data)

    class Iterates(Users):
        def test_step(self, dataloader_iter):
            pass

    with pytest.raises(UnsupportedError, match="`test_step\\(dataloader_iter\\)`"):
        UncertaintyReport(tmp_path / "b").setup(*_tester(make_trainer, Iterates()), "test")


def _tester(make_trainer, module):
    return make_trainer(), module


RANKS = """
import json, os, pathlib, torch
from torch import nn
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq import DeterministicModule, UncertaintyReport
from lightning_uq.compare.directory.reading import read_run

def page(devices, module, x, y, name, **options):
    folder = pathlib.Path("pages") / f"{name}-{devices}-{os.environ.get('LOCAL_RANK', 0)}"  # rank 1 runs this script again
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[UncertaintyReport(folder, ood={"far": DataLoader(TensorDataset(9 + x[:5]), batch_size=2)}, **options)])
    trainer.test(module, DataLoader(TensorDataset(x, y), batch_size=4), verbose=False)
    if trainer.is_global_zero:
        results, records = read_run(folder)
        return trainer, [results["rows"], records["DeterministicModule"][0].row_ids.tolist(), results["problem"]]
    return trainer, None

def fails(model, x):
    if (x[:, 0] == 1).any():
        raise RuntimeError("this rank's own error")
    return model.network.network(x)

def main():
    torch.manual_seed(0)
    x = torch.randn(21, 4)
    y, module = (x[:, 0] > 0).long(), DeterministicModule(nn.Linear(4, 3))
    found = []
    for name, n, options in (("all", 21, {}), ("sample", 21, {"max_rows": 6}), ("one", 1, {})):  # with one row, a rank has none
        one = page(1, module, x[:n], y[:n], name, **options)[1]
        trainer, two = page(2, module, x[:n], y[:n], name, **options)
        found.append([one, two])
    bad, text, texts = x.clone(), None, [None, None]
    bad[1, 0] = 1  # rank 1's alone
    try:
        page(2, module, bad, y, "bad", predict_fn=fails)
    except RuntimeError as error:
        text = str(error)
    torch.distributed.all_gather_object(texts, text)
    if trainer.is_global_zero:
        json.dump({"found": found, "texts": texts}, open(out, "w"))

if __name__ == "__main__":
    main()
"""


def test_two_ranks_write_what_one_writes(run_script):
    result = run_script(RANKS)
    assert len(result["found"]) == 3
    for one, two in result["found"]:
        assert two == one
    assert all("this rank's own error" in text for text in result["texts"])
    assert json.dumps(result["found"][0][0]).count("ood_auroc") == 1
