"""Densities and distances of models that have no classes, no labels, or no logits at all."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, FitGMM, FitKNN, InputError, OODDetection, Regression
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.networks.gaussian_mixture import fit_mixture, in_order

X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
X[:40, 0] += 6
TARGETS = torch.full((120,), -100)
LOADER = DataLoader(TensorDataset(X, TARGETS), batch_size=32)
FAR = DataLoader(TensorDataset(X[:40] + 30, TARGETS[:40]), batch_size=16)


class Detector(LightningModule):
    """A user's detector: its output is a list of boxes for each image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        found = self.head(torch.tanh(self.body(x)))
        return [{"box": row[:4], "score": row[4]} for row in found]

    def training_step(self, batch, batch_idx):
        return torch.stack([one["box"].square().mean() + one["score"] ** 2 for one in self(batch[0])]).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        self.log("boxes", float(len(self(batch[0]))), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def features_of(model, x):
    with torch.no_grad():
        return torch.tanh(model.body(x))


SCORERS = {
    "one Gaussian": lambda: FitGMM(num_components=1),
    "a mixture": lambda: FitGMM(num_components=2),
    "combined": lambda: FitGMM(num_components=2, feature_transform="combined", held_out=LOADER),
    "neighbours": lambda: FitKNN(k=3),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_detector_has_features_to_score(make_trainer, name):
    module, scorer = Detector(), SCORERS[name]()
    detection = OODDetection({"far": FAR}, scores=[scorer.score_name])
    trainer = make_trainer(max_epochs=1, callbacks=[scorer, detection])
    trainer.fit(module, LOADER, LOADER)
    (tested,) = trainer.test(module, LOADER, verbose=False)
    assert tested[f"ood_auroc/far/{scorer.score_name}"] > 0.8
    assert tested["boxes"] > 0
    assert scorer.score(module, FAR).shape == (40,)
    with pytest.raises(InputError, match="Pass argument"):
        make_trainer(callbacks=[OODDetection({"far": FAR}, scores=["energy"])]).test(module, LOADER, verbose=False)


def test_the_mixture_is_of_the_features():
    module = Detector()
    gmm = FitGMM(num_components=2, feature_transform="raw").fit(module, LOADER)
    rows = in_order(features_of(module, X)[None])[0]
    expected = GaussianDensity(fit_mixture(rows, 2))
    torch.testing.assert_close(gmm.score(module, FAR), expected.score(features_of(module, X[:40] + 30)))
    direct = FitGMM(num_components=2, feature_transform="raw").fit_features(rows)
    torch.testing.assert_close(direct.log_density(rows), expected.log_density(rows))
    one = FitGMM(num_components=1, feature_transform="raw", regularization=0.01).fit(module, LOADER)
    normal = torch.distributions.MultivariateNormal(
        rows.double().mean(0), torch.cov(rows.double().T) + 0.01 * torch.eye(8)
    )
    torch.testing.assert_close(one.log_density(rows), normal.log_prob(rows.double()))


def test_labels_are_not_looked_at(make_trainer):
    """Those here are of no class, which a density of classes refuses."""

    class Lit(Detector):
        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1].clamp_min(0))

    with pytest.raises(InputError, match="from -100 to -100"):
        make_trainer(max_epochs=1, callbacks=[FitGMM()]).fit(Lit(), LOADER)
    gmm = FitGMM(num_components=2)
    make_trainer(max_epochs=1, callbacks=[gmm]).fit(Lit(), LOADER)
    assert gmm.fitted
    with pytest.raises(InputError, match="num_components"):
        FitGMM(num_components=3).load_state_dict(gmm.state_dict())
    with pytest.raises(InputError, match="`num_components` must be"):
        FitGMM(num_components=0)
    with pytest.raises(InputError, match="needs `labels`, or"):
        FitGMM().fit_features(X)
    with pytest.raises(InputError, match="needs `labels`, or"):
        FitGMM(num_components=2).fit_features(X, TARGETS)


def test_a_regressor_of_ours_carries_a_mixtures_density(make_trainer):
    y = X[:, :1] * 2
    loader = DataLoader(TensorDataset(X, y), batch_size=32)
    module = DeterministicModule(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), task=Regression(head="mean")
    )
    gmm = FitGMM(num_components=2)
    make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, loader, loader)
    prediction = module.predict(X[:5] + 30)
    assert (prediction.ood_score > module.predict(X[:50]).ood_score.median()).all()


RANKS = """
import json
from lightning.pytorch import Trainer
from tests.callbacks.test_without_labels import FAR, LOADER, Detector
from lightning_uq import FitGMM

if __name__ == "__main__":
    gmm, module = FitGMM(num_components=2, feature_transform="polar"), Detector()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, callbacks=gmm,
    )
    trainer.fit(module, LOADER)
    if trainer.is_global_zero:
        alone = FitGMM(num_components=2, feature_transform="polar").fit(module, LOADER).score(module, FAR)
        with open(out, "w") as file:
            json.dump(float((alone - gmm.score(module, FAR)).abs().max() / alone.abs().max()), file)
    trainer.strategy.barrier()
"""


def test_two_ranks_give_what_one_gives(run_script):
    assert run_script(RANKS) < 1e-5


@pytest.mark.parametrize(
    "y", [torch.arange(120) % 2, torch.rand(120), torch.rand(120, 3)], ids=["0 or 1", "numbers", "rows"]
)
def test_targets_of_any_kind_ask_for_no_outputs(y):
    loader = DataLoader(TensorDataset(X, y), batch_size=32)
    for scorer in (FitGMM(num_components=1, feature_layer="head"), FitKNN(k=2, feature_layer="head")):
        assert scorer.fit(Detector(), loader).score(Detector(), loader).isfinite().all()


def test_data_without_labels_is_told_what_to_use():
    class Bare(Detector):
        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    with pytest.raises(InputError, match=r"`FitGMM\(num_components=1\)` needs no labels"):
        FitGMM().fit(Bare(), [X])
