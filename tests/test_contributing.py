"""The method that CONTRIBUTING.md adds in one file works as it stands there."""

import re
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_uq.registry as registry

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def test_the_example_method_trains_tests_predicts_and_registers(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {"__name__": "my_method"}
    exec(compile(code, "my_method.py", "exec"), names)
    module = names["NoisyLogitsModule"](torch.nn.Linear(4, 3))
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
    assert registry._METHODS["noisy_logits"].ood_score == "mutual_information"
