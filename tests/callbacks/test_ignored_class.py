"""A class whose label is ignored, such as the padding tag of a tagger, has no rows and no density."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EvidentialModule, InputError, load_fitted
from lightning_uq.callbacks import FitGMM, FitKNN, FitViM, TemperatureScaling
from lightning_uq.functional.gaussian import fit_gaussian
from lightning_uq.networks.class_statistics import ClassStatistics
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.tasks import EvidentialClassification, Segmentation

TASK = Segmentation(class_axis=-1, ignore_index=0)
HOW = {"task": TASK, "pool": "positions", "feature_layer": "head"}


class Tagger(LightningModule):
    """Sentences [B, T, 4] to the logits of each word [B, T, 4]; tag 0 is the padding."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=0)

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def sentences(num=30, seed=0, rare=None):
    """Pairs of words [T, 4] and tags [T] from 1 to 3, of several lengths; all words of ``rare`` but one are left out."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num):
        words = torch.randn(int(torch.randint(3, 8, (), generator=generator)), 4, generator=generator)
        found.append((words, words[:, :3].argmax(1) + 1))
    if rare is not None:
        found = [(x, torch.where(y == rare, 1, y)) for x, y in found]
        found[-1][1][0] = rare
    return found


def padded(batch):
    words, tags = zip(*batch, strict=True)
    return pad_sequence(words, batch_first=True), pad_sequence(tags, batch_first=True)


def loader(rows=None, **options):
    return DataLoader(sentences() if rows is None else rows, batch_size=5, collate_fn=padded, **options)


def counted(model, rows=None):
    """Features [N, 6] and tags [N] of all words that are not padding."""
    pairs = sentences() if rows is None else rows
    with torch.no_grad():
        features = torch.cat([model.body(x) for x, _ in pairs])
    return features, torch.cat([y for _, y in pairs])


@pytest.mark.parametrize("regularization", ["held_out", "oas", "ddu", 0.1])
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
@pytest.mark.parametrize("priors", ["uniform", "empirical"])
def test_a_class_without_a_density_changes_nothing_for_the_others(covariance, regularization, priors):
    model = Tagger()
    gmm = FitGMM(
        covariance=covariance, regularization=regularization, priors=priors, feature_transform="raw", **HOW
    ).fit(model, loader())
    x, y = counted(model)
    others = FitGMM(
        covariance=covariance,
        regularization="oas" if regularization == "held_out" else regularization,
        priors=priors,
        feature_transform="raw",
    ).fit_features(x, y - 1)
    found = gmm.log_prob(x)
    assert found.shape == (len(x), 4)
    assert (found[:, 0] == -math.inf).all()
    assert gmm.densities[0].log_prior[0] == -math.inf
    assert not any(t.isnan().any() for t in gmm.densities[0].buffers())
    if regularization != "held_out":  # which chooses by the halves of sentences, not of words
        torch.testing.assert_close(found[:, 1:], others.log_prob(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gmm.log_density(x), others.log_density(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gmm.densities[0].log_prior[1:], others.densities[0].log_prior)
        for name in ("mahalanobis", "relative_mahalanobis"):
            expected = others.densities[0].score(x, name)
            torch.testing.assert_close(gmm.densities[0].score(x, name), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_a_class_in_the_middle():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double()
    y = 2 * (torch.arange(60) % 2)
    statistics, others = ClassStatistics(3, 3), ClassStatistics(2, 3)
    statistics.update(x, y)
    others.update(x, y // 2)
    with pytest.raises(InputError, match="at least 2 rows, but class 1 has 0"):
        fit_gaussian(statistics)
    with pytest.raises(InputError, match="at least 2 rows, but class 1 has 0"):
        fit_gaussian(statistics, absent=0)
    density, expected = GaussianDensity(fit_gaussian(statistics, absent=1)), GaussianDensity(fit_gaussian(others))
    torch.testing.assert_close(density.log_prob(x)[:, [0, 2]], expected.log_prob(x))
    torch.testing.assert_close(density.log_density(x), expected.log_density(x))
    rows = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_density(rows).sum(), rows)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("score", ["log_density", "mahalanobis", "relative_mahalanobis"])
def test_predictions_and_files_of_a_tagger(make_trainer, score):
    model, rest = Tagger(), {"task": TASK, "attach": True}
    gmm = FitGMM(score=score, pool="positions", **rest)
    scaling = TemperatureScaling(**rest)
    trainer = make_trainer(callbacks=[gmm, scaling], max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, loader(), loader(sentences(20, 1)))
    assert gmm.coordinates.names == ("raw", "polar")[: 1 if score == "relative_mahalanobis" else 2]
    x, _ = padded(sentences(5, 2))
    prediction = trainer.predict(model, DataLoader(x, batch_size=5))[0]
    for found in (prediction.log_density, prediction.ood_score):
        assert found.shape == x.shape[:2]
        assert bool(found.isfinite().all())
    loaded = load_fitted(gmm.uq_ckpt_path, Tagger())
    torch.testing.assert_close(loaded(x)["log_density"], prediction.log_density)
    exported = torch.export.export(loaded, (x,)).module()
    torch.testing.assert_close(exported(x)["ood_score"], prediction.ood_score)
    state = FitGMM(score=score, pool="positions", **rest)
    state.load_state_dict(gmm.state_dict())
    rows = counted(model)[0][None]
    if score != "relative_mahalanobis":
        assert torch.equal(state.log_prob(rows), gmm.log_prob(rows))
    assert not bool(state.log_prob(rows).isnan().any())


@pytest.mark.parametrize("num_components", [1, 2])
def test_a_density_without_labels_leaves_out_padding(num_components):
    model = Tagger()
    gmm = FitGMM(num_components=num_components, feature_transform="raw", regularization="oas", **HOW)
    gmm.fit(model, loader())
    expected = FitGMM(num_components=num_components, feature_transform="raw", regularization="oas")
    x, _ = counted(model)
    torch.testing.assert_close(gmm.log_density(x), expected.fit_features(x).log_density(x), rtol=1e-4, atol=1e-4)
    words = [padded(sentences())[0]]  # without tags, nothing is known to be padding
    for callback in (FitGMM(num_components=num_components, **HOW), FitKNN(k=1, **HOW)):
        assert bool(callback.fit(model, words).score(model, words).isfinite().all())


def test_neighbors_and_virtual_logits_leave_out_padding():
    model = Tagger()
    knn, vim = FitKNN(k=1, **HOW).fit(model, loader()), FitViM(dim=2, **HOW).fit(model, loader())
    assert knn.state_dict()["tensors"]["neighbors"].shape[1] == len(counted(model)[0])
    for callback in (knn, vim):
        assert all(bool(callback.score(model, [x[None]]).isfinite().all()) for x, _ in sentences(3))


def test_an_evidential_classifier_leaves_out_inputs_without_a_label(make_trainer):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    for ignored in (-1, 3):  # 3 is the index of the last class
        labels = torch.where(torch.arange(60) < 20, ignored, y)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3 if ignored == -1 else 4))
        module = EvidentialModule(network, task=EvidentialClassification(ignore_index=ignored))
        gmm = FitGMM(feature_transform="raw", regularization="oas")
        make_trainer(callbacks=[gmm]).fit(module, DataLoader(TensorDataset(x, labels), batch_size=20))
        with torch.no_grad():
            features = network[1](network[0](x))
        expected = FitGMM(feature_transform="raw", regularization="oas").fit_features(features[20:], y[20:])
        torch.testing.assert_close(gmm.log_density(features), expected.log_density(features), rtol=1e-4, atol=1e-4)


def test_a_rare_tag_is_found_before_the_training_if_the_data_show_it(make_trainer):
    x, y = padded(sentences(30, rare=2))
    model = Tagger()
    trainer = make_trainer(callbacks=[FitGMM(task=TASK, pool="positions")])
    with pytest.raises(InputError, match="at least 2 rows, but class 2 has 1"):
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=6))
    assert trainer.global_step == 0


def test_a_rare_tag_of_sentences_of_any_length_is_a_warning_after_the_first_epoch(make_trainer):
    trainer = make_trainer(callbacks=[FitGMM(task=TASK, pool="positions")], max_epochs=2)
    with (
        pytest.warns(UserWarning, match="FitGMM will fail after the training, unless .*class 2 has 1"),
        pytest.raises(InputError, match="class 2 has 1"),
    ):
        trainer.fit(Tagger(), loader(sentences(30, rare=2)))


def test_tags_out_of_range_are_found_in_the_first_epoch_of_sentences_of_any_length(make_trainer):
    rows = sentences()
    rows[-1][1][0] = 9
    trainer = make_trainer(callbacks=[FitGMM(task=TASK, pool="positions")], max_epochs=2)
    with pytest.raises(InputError, match=r"class labels in \[0, 4\), but .* 9"):
        trainer.fit(Tagger(), loader(rows))
    assert trainer.current_epoch == 0


class Coarse(nn.Module):
    """A head on half the size of the image."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return F.interpolate(self.head(self.body(x)), scale_factor=2)


def test_rows_are_counted_on_the_grid_of_the_features(make_trainer):
    """Of the four pixels of a class, one is nearest to a position of the features."""
    y = torch.zeros(6, 8, 8, dtype=torch.long)
    y[5, 2:4, 2:4] = 1
    module = DeterministicModule(Coarse(), task=Segmentation())
    trainer = make_trainer(callbacks=[FitGMM(pool="positions")])
    with pytest.raises(InputError, match="at least 2 rows, but class 1 has 1"):
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(6, 1, 8, 8), y), batch_size=3))
    assert trainer.global_step == 0
