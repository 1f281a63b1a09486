"""The method and the task that CONTRIBUTING.md adds in one file each work as they stand there."""

import re
import sys
import types
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DropoutModule, EnsembleModule

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


METHOD, TASK = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def run(code, name):
    """The names that a block of code defines, as a module of its own."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, f"{name}.py", "exec"), module.__dict__)
    return module.__dict__


def test_the_example_method_trains_tests_and_predicts(tmp_path):
    names = run(METHOD, "my_method")
    module = names["NoisyLogitsModule"](torch.nn.Linear(4, 3), num_classes=3)
    data = TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))
    loader = DataLoader(data, batch_size=10)
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


def test_the_example_task_works_with_every_tool(tmp_path, make_trainer):
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
