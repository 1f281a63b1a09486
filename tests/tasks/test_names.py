import numpy as np
import pytest
import torch

from lightning_uq.data import NpzDataModule
from lightning_uq.tasks import Binary, Classification, Multilabel, Regression, task_for


@pytest.mark.parametrize(
    ("y", "task", "expected"),
    [
        (np.arange(60) % 3, "auto", Classification(num_classes=3)),
        (np.arange(60) % 2, "binary", Binary()),
        (np.stack([np.arange(60) % 2, np.arange(60) % 3 == 0], 1), "auto", Multilabel(num_labels=2)),
    ],
)
def test_the_task_of_a_data_module_takes_its_batches(tmp_path, y, task, expected):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(60, 3)), y=y)
    data = NpzDataModule(str(tmp_path / "data.npz"), task=task)
    assert task_for(data) == expected
    x, targets = next(iter(data.test_dataloader()))
    outputs = torch.randn(1, len(x), data.num_outputs)
    expected.check_output(outputs)
    expected.check_target(targets, outputs)


def test_the_task_of_a_regression_has_the_scale_of_the_training_targets(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.arange(60.0)[:, None], y=np.arange(120.0).reshape(60, 2))
    data = NpzDataModule(str(tmp_path / "data.npz"))
    assert task_for(data) == Regression(target_scale=data.target_scale)
