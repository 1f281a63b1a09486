"""The examples of CONTRIBUTING.md work as they stand there, from a project of somebody's own."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule, Factory, OODDetection
from lightning_uq.cli import main

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
METHOD, TASK, METRIC, CALLBACK, SCORE, DATA = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _forget_modules():
    """Other tests have modules of the same names."""
    before = set(sys.modules)
    yield
    for name in {"my_method", "my_task", "my_metric", "my_score"} & (set(sys.modules) - before):
        del sys.modules[name]


def run(code, name):
    """The names that a block of code defines, as a module of its own."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(code, f"{name}.py", "exec"), module.__dict__)
    return module.__dict__


def classes(num=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(torch.randn(num, 4, generator=generator), torch.arange(num) % 3), batch_size=num // 2
    )


def test_the_table_has_a_row_for_each_example():
    rows = re.findall(r"^\| (\w[\w ]*) \| (?:a function in )?`(\w+)/", TEXT, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["method", "task", "metric", "callback", "score", "data set"]
    package = Path(__file__).parents[1] / "lightning_uq"
    assert all((package / room).is_dir() for _, room in rows)
    headings = re.findall(r"^### (.*)$", TEXT, flags=re.MULTILINE)
    assert [heading.split(" ", 1)[1] for heading in headings] == [name for name, _ in rows]
    cases = (Path(__file__).parent / "contract" / "cases.py").read_text()
    assert "\nLISTED_MODULES = [" in cases
    assert "\nLISTED_CALLBACKS = [" in cases


def test_the_method_trains_tests_and_predicts(tmp_path):
    names = run(METHOD, "my_method")
    module = names["NoisyLogitsModule"](torch.nn.Linear(4, 3), num_classes=3)
    loader = classes()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    (result,) = trainer.test(module, loader, verbose=False)
    assert 0 < result["test_nll"] < 10
    prediction = trainer.predict(module, loader)[0]
    assert prediction.probs.shape == (10, 3)
    assert prediction.mutual_information.max() > 0
    assert names["METHOD"].name == "noisy_logits"


def test_the_task_works_with_every_tool(tmp_path, make_trainer):
    task = run(TASK, "my_task")["KnownNoise"](std=0.5)
    x = torch.randn(20, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=10)
    network = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))  # noqa: E731
    for module in (EnsembleModule(network, num_members=3, task=task), DropoutModule(network(), task=task)):
        trainer = make_trainer()
        trainer.fit(module, loader, loader)
        (result,) = trainer.test(module, loader, verbose=False)
        assert {"test_loss", "test_nll", "test_rmse", "test_crps", "test_coverage_95"} <= result.keys()
        prediction = trainer.predict(module, loader)[0]
        torch.testing.assert_close(prediction.aleatoric_variance, torch.full((10, 1), 0.25))
        assert prediction.epistemic_variance.min() > 0
        assert module.ood_score == "epistemic_variance"
        trainer.save_checkpoint(tmp_path / "task.ckpt")
        again = type(module).load_from_checkpoint(tmp_path / "task.ckpt", network=network, weights_only=True)
        assert again.task == task


def test_the_metric_sums_in_float64():
    metric = run(METRIC, "my_metric")["TopTwoAccuracy"]().to(torch.bfloat16)
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    for _ in range(200):  # in bfloat16 a count would stop at 256
        metric.update(probs, torch.tensor([1, 2, 2]))
    assert metric.rows.dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(2 / 3)


def test_the_callback_is_fitted_saved_compared_and_scored(project, make_trainer):
    (project / "my_callback.py").write_text(CALLBACK)
    import my_callback  # it is in the working directory

    loader = classes()
    module = DeterministicModule(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)))
    callback = my_callback.FitCentre()
    make_trainer(callbacks=[callback]).fit(module, loader)
    inner = module.network.network
    with torch.no_grad():
        features = torch.cat([inner[:2](x) for x, _ in loader])
    expected = (features - features.mean(0)).norm(dim=1).double()
    torch.testing.assert_close(callback.score(module, loader).double(), expected, rtol=1e-4, atol=1e-5)
    again = my_callback.FitCentre()
    again.load_state_dict(callback.state_dict())
    torch.testing.assert_close(again.score(module, loader), callback.score(module, loader))
    assert main(["compare", "--methods", "my_callback.py", "--seeds", "1", "--max-epochs", "1", "--out", "out"]) == 0
    (row,) = json.loads((project / "out" / "results.json").read_text())["rows"]
    assert row["method"] == "centre"
    assert 0 < row["ood_auroc"]["mean"] < 1


def test_the_score_is_taken_by_the_detection():
    margin = run(SCORE, "my_score")["margin"]
    logits = torch.tensor([[[9.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])
    certain, torn = margin(logits)
    assert float(certain) < 0.01
    assert float(torn) == pytest.approx(1)
    found = OODDetection(scores={"margin": margin}).score(torch.nn.Identity(), [logits[0]])
    torch.testing.assert_close(found["margin"].float(), margin(logits))


@pytest.mark.filterwarnings("ignore:The likelihood has no finite positive temperature")  # one epoch teaches little
def test_the_data_set_is_split_and_evaluated(project, make_trainer, capsys):
    (project / "my_data.py").write_text(DATA)
    import my_data  # it is in the working directory

    data = my_data.Blobs(ood_classes=(3,))
    data.setup()
    assert (data.num_features, data.num_classes, data.num_train) == (2, 3, 180)
    module = DeterministicModule(Factory("torch.nn.Linear", {"in_features": 2, "out_features": 3}))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, data)
    trainer.save_checkpoint("blobs.ckpt")
    evaluate = ("evaluate", "--run", "blobs.ckpt", "--module", "lightning_uq.DeterministicModule", "--out", "out.json")
    assert main([*evaluate, "--data", "my_data.Blobs", "--ood", "3"]) == 0
    assert "Accuracy" in capsys.readouterr().out
