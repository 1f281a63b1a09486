"""Densities and distances of features at the positions of maps."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, load_fitted
from lightning_uq.callbacks import FitGMM, FitKNN, FitViM, OODDetection, TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.functional import knn_distance
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.networks.positions import resized
from lightning_uq.tasks import Segmentation
from tests.callbacks.test_maps import TASK, VOID, UNet, images, loader, strange


class Strided(nn.Module):
    """A network whose head works on a grid of half the size."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.down(x)), scale_factor=2, mode="bilinear")


class Tokens(nn.Module):
    """Numbers [B, T, 1] to the logits of each token [B, T, 3]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def features_of(model, x):
    """What the layer ``head`` sees [B, D, H, W]."""
    caught = []
    handle = model.head.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("network", [UNet, Strided])
def test_each_pixel_that_counts_is_a_row_of_the_density(network):
    model, (x, y) = network(), images(13)
    gmm = FitGMM(feature_transform="raw", pool="positions", task=TASK, regularization=1e-3).fit(model, loader(13))
    assert gmm.features.resolved == "head"
    features = features_of(model, x)
    labels = resized(y, features.shape[2:])
    kept = labels != VOID
    rows = features.movedim(1, -1)
    expected = GaussianDensity.fit_features(rows[kept], labels[kept], regularization=1e-3)
    scores = gmm.score(model, loader(13))
    assert scores.shape == (13, *features.shape[2:])
    torch.testing.assert_close(scores, expected.score(rows), rtol=1e-5, atol=1e-5)


def test_predictions_carry_the_log_density_of_each_pixel(make_trainer):
    module = DeterministicModule(Strided(), task=TASK)
    own = FitGMM(feature_transform="raw", pool="positions", regularization=1e-3)
    trainer = make_trainer(callbacks=[own], max_epochs=1)
    trainer.fit(module, loader(13))
    x = images(5, 3)[0]
    prediction = module.predict(x)
    assert prediction.log_density.shape == (5, 8, 8)
    torch.testing.assert_close(prediction.log_density, resized(-own.score(module, [x]), (8, 8)))
    rows, _ = TASK.rows(prediction, images(5, 3)[1])
    assert rows.log_density.shape == (len(rows),)


def test_an_ensemble_has_a_density_per_member_and_files_hold_them(make_trainer, tmp_path):
    module = EnsembleModule(Strided, num_members=2, task=TASK, seed=0, optimizer=adam)
    gmm = FitGMM(pool="positions", regularization=1e-3)
    trainer = make_trainer(callbacks=[gmm, TemperatureScaling()], max_epochs=5, enable_checkpointing=True)
    trainer.fit(module, loader(13), loader(9, 1))
    assert len(gmm.densities) == 2
    x = images(5, 3)[0]
    prediction = module.predict(x)
    fitted = load_fitted(gmm.uq_ckpt_path, module)
    probs, log_density, _ = fitted(x).values()
    torch.testing.assert_close(probs, prediction.probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_density, prediction.log_density)
    exported = torch.export.export(fitted, (x,)).module()
    torch.testing.assert_close(exported(x)["log_density"], log_density)


def test_a_foreign_network_s_file_holds_its_task(make_trainer):
    model, gmm = UNet(), FitGMM(pool="positions", task=TASK, regularization=1e-3)
    trainer = make_trainer(callbacks=[gmm, TemperatureScaling(task=TASK)], max_epochs=1, enable_checkpointing=True)
    trainer.fit(model, loader(13), loader(9, 1))
    path, x = gmm.uq_ckpt_path, images(5, 3)[0]
    with pytest.raises(InputError, match=r"was fitted with task=Segmentation\(ignore_index=255\)"):
        load_fitted(path, UNet(), task="segmentation")
    probs, log_density, _ = load_fitted(path, UNet())(x).values()
    assert torch.equal(load_fitted(path, UNet(), task=TASK)(x)["probs"], probs)
    assert probs.shape == (5, 3, 8, 8)
    assert log_density.shape == (5, 8, 8)


def test_tokens_are_rows(make_trainer):
    x = torch.randn(12, 7, 1)
    y = (x.squeeze(2) > 0).long() + (x.squeeze(2) > 1).long()
    data = DataLoader(TensorDataset(x, y), batch_size=5)
    module = DeterministicModule(Tokens(), task=Segmentation(class_axis=-1), optimizer=adam)
    gmm, scaling = FitGMM(feature_transform="raw", pool="positions", regularization=1e-3), TemperatureScaling()
    trainer = make_trainer(callbacks=[gmm, scaling], max_epochs=5)
    trainer.fit(module, data, data)
    assert module.predict(x).log_density.shape == (12, 7)
    rows = module.network.feature_networks()[0].body(x).detach().reshape(-1, 8)
    expected = GaussianDensity.fit_features(rows, y.reshape(-1), regularization=1e-3)
    torch.testing.assert_close(gmm.score(module, [x]).reshape(-1), expected.score(rows), rtol=1e-4, atol=1e-4)


def test_neighbours_are_a_sample_of_the_pixels_that_count():
    model, (x, y) = UNet(), images(13)
    rows = features_of(model, x).movedim(1, -1)
    bank = rows[y != VOID]
    knn = FitKNN(k=3, pool="positions", task=TASK).fit(model, loader(13))
    kept = knn.state_dict()["tensors"]["neighbors"]
    assert kept.shape == (1, *bank.shape)
    torch.testing.assert_close(kept[0], bank)
    expected = knn_distance(rows.reshape(-1, 16), bank, 3)
    torch.testing.assert_close(knn.score(model, [x]).reshape(-1).float(), expected, rtol=1e-3, atol=1e-4)
    some = [FitKNN(k=3, pool="positions", task=TASK, max_rows=50).fit(model, loader(13, batch_size=b)) for b in (2, 5)]
    kept = [one.state_dict()["tensors"]["neighbors"] for one in some]
    assert kept[0].shape == (1, 50, 16)
    torch.testing.assert_close(*kept)


def test_virtual_logits_of_tokens():
    x = torch.randn(12, 7, 1)
    module = DeterministicModule(Tokens(), task=Segmentation(class_axis=-1))
    vim = FitViM(dim=2, pool="positions").fit(module, [x])
    assert vim.score(module, [x]).shape == (12, 7)


def test_density_of_pixels_is_among_the_scores_of_images(make_trainer):
    model = UNet()
    gmm = FitGMM(feature_transform="raw", pool="positions", task=TASK, regularization=1e-3)
    knn = FitKNN(k=3, pool="positions", task=TASK)
    ood = OODDetection({"noise": DataLoader(strange(7), batch_size=3)}, task=TASK)
    pixels = OODDetection(
        {"noise": DataLoader(strange(7), batch_size=3)}, scores="log_density", task=TASK, level="pixel"
    )
    trainer = make_trainer(callbacks=[gmm, knn, ood, pixels], max_epochs=1)
    trainer.fit(model, loader(13))
    (logged,) = trainer.test(model, loader(11, 2), verbose=False)
    for name in ("log_density/mean", "log_density/max", "knn/mean", "predictive_entropy/max", "log_density/pixel"):
        assert math.isfinite(logged[f"ood_auroc/noise/{name}"])
    assert logged["ood_auroc/noise/log_density/mean"] > 0.9


def test_rows_and_labels_that_do_not_fit_are_named_before_the_training(make_trainer):
    for pool, labels, advice in (
        (None, images(13)[1], "Pass `pool='positions'`"),
        ("positions", torch.zeros(13).long(), "than 'positions'"),
    ):
        task = TASK if pool is None else None
        predict = None if pool is None else (lambda model, x: model(x).mean((2, 3)))
        gmm = FitGMM(pool=pool, task=task, predict_fn=predict, feature_layer="head")
        data = DataLoader(TensorDataset(images(13)[0], labels), batch_size=4)
        with pytest.raises(InputError, match=f"needs one label per row of features, .* {advice}"):
            make_trainer(callbacks=[gmm]).fit(UNet(), data)
