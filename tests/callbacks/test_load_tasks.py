"""From a ``-uq.ckpt`` back to a plain network, for labels that are on or off."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    DeterministicModule,
    EnsembleModule,
    Factory,
    FitGMM,
    InputError,
    TemperatureScaling,
    load_fitted,
)
from lightning_uq.tasks import Multilabel, Regression
from tests.tasks.test_multilabel import ChestXRay, X, Y, loader

LINEAR = Factory("torch.nn.Linear", {"in_features": 4, "out_features": 3})
FAST = partial(torch.optim.Adam, lr=0.05)


def trained(make_trainer, tmp_path, module, *callbacks, data=None):
    data = loader(Y) if data is None else data
    trainer = make_trainer(
        callbacks=[ModelCheckpoint(tmp_path, monitor="val_loss"), *callbacks],
        enable_checkpointing=True,
        precision="64-true",
        max_epochs=2,
    )
    trainer.fit(module, data, data)
    return callbacks[0].uq_ckpt_path


@pytest.mark.parametrize("calibration", [{}, {"per_label": True}, {"scope": "shared"}, {"scope": "member"}], ids=str)
@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_labels_come_back_calibrated(make_trainer, tmp_path, task, calibration):
    if task == "binary" and "per_label" in calibration:
        pytest.skip("one label")
    target = Y if task == "multilabel" else Y[:, :1]
    factory = Factory("torch.nn.Linear", {"in_features": 4, "out_features": target.shape[1]})
    module = EnsembleModule(factory, num_members=3, task=task, optimizer=FAST)
    data = DataLoader(TensorDataset(X, target), batch_size=16)
    path = trained(make_trainer, tmp_path, module, TemperatureScaling(**calibration), FitGMM(), data=data)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    expected = module.predict(X)
    fitted = load_fitted(path).double()
    probs, log_density, _ = fitted(X).values()
    torch.testing.assert_close(probs, expected.probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_density, expected.log_density, rtol=1e-6, atol=1e-6)
    assert "temperature" in repr(expected) or calibration.get("scope", "pooled") != "pooled"
    exported = torch.export.export(fitted, (X[:5],), strict=False).module()
    torch.testing.assert_close(exported(X[:5])["probs"], probs[:5])


class OwnLabels(Multilabel):
    """Somebody's own task."""


@pytest.mark.parametrize("task", [Multilabel(), Multilabel(pos_weight=(1.0, 2.0, 1.0)), OwnLabels()], ids=str)
def test_the_file_holds_the_task_of_an_unmodified_module_unless_it_is_ones_own(make_trainer, tmp_path, task):
    module, scaling = ChestXRay(), TemperatureScaling(task=task, attach=True)
    path = trained(make_trainer, tmp_path, module, scaling)
    fitted = load_fitted(path, ChestXRay(), task=task).double()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        torch.testing.assert_close(fitted(X)["probs"], torch.sigmoid(module.double()(X) / scaling.temperature))
    if type(task) is OwnLabels:
        with pytest.raises(InputError, match=r"was fitted with task=OwnLabels\(\): pass it as argument `task`"):
            load_fitted(path, ChestXRay())
    else:
        torch.testing.assert_close(load_fitted(path, ChestXRay()).double()(X), fitted(X))
    with pytest.raises(InputError, match=r"was fitted with task=.*: (leave argument `task` out|pass it as)"):
        load_fitted(path, ChestXRay(), task="classification")


def test_states_of_two_tasks_do_not_go_together(make_trainer, tmp_path):
    module, scaling = ChestXRay(), TemperatureScaling(task=Multilabel())
    path = trained(make_trainer, tmp_path, module, scaling, FitGMM(task=Multilabel(num_labels=3)))
    with pytest.raises(InputError, match="different tasks: .*Pass the keys of one task as `states`"):
        load_fitted(path, ChestXRay())
    assert load_fitted(path, ChestXRay(), states=["TemperatureScaling"])(X.float())["probs"].shape == (len(X), 3)


@pytest.mark.parametrize("kind", ["multilabel", "binary"])
def test_a_task_that_the_data_showed_comes_back_with_the_file(make_trainer, tmp_path, kind):
    """Nobody said it: a softmax over several labels would be wrong without a word."""

    class Lit(ChestXRay):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, target.shape[1])

    target = Y if kind == "multilabel" else (X[:, :1] > 0).double()
    module, scaling = Lit(), TemperatureScaling()
    data = DataLoader(TensorDataset(X, target), batch_size=16)
    path = trained(make_trainer, tmp_path, module, scaling, data=data)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        expected = torch.sigmoid(module.double().eval()(X) / scaling.temperature)
        fitted = load_fitted(path, module)
        found = fitted(X)["probs"]
    torch.testing.assert_close(found if kind == "multilabel" else found[:, 1:], expected)
    torch.testing.assert_close(load_fitted(path, module, task=kind)(X)["probs"], found)


def test_numbers_have_a_density_beside_their_mean(make_trainer, tmp_path):
    module = DeterministicModule(LINEAR, task=Regression(head="mean"))
    path = trained(make_trainer, tmp_path, module, FitGMM(), data=DataLoader(TensorDataset(X, X[:, :3]), batch_size=16))
    found, expected = load_fitted(path).double()(X), module.double().predict(X).to_dict()
    assert list(found) == ["mean", "log_density", "ood_score"]
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)
