"""Raw, polar, direction and combined features: what is fitted, scored, kept and told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    CategoricalPrediction,
    DeterministicModule,
    EnsembleModule,
    FitGMM,
    FitKNN,
    InputError,
    OODDetection,
    load_fitted,
    read_predictions,
)
from lightning_uq.callbacks import PredictionWriter
from lightning_uq.functional.feature_transforms import transform_features
from lightning_uq.functional.tail import fit_tail, tail_score
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.networks.feature_density import FeatureDensity

X = torch.randn(240, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TRAIN = DataLoader(TensorDataset(X[:160], Y[:160]), batch_size=32)
VAL = DataLoader(TensorDataset(X[160:], Y[160:]), batch_size=32)
FAR = 5 * X[:40]
MAKERS = {"gmm": FitGMM, "knn": lambda **kwargs: FitKNN(k=3, **kwargs)}


class Lit(LightningModule):
    """A user's own module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def network():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def features_of(module, x):
    with torch.no_grad():
        return module.net[:2](x)


def expected(module, transform, x, **fit):
    """The score of inputs, from the definitions: the coordinates, one density each, and the tails of validation rows."""
    train, val, points = (features_of(module, part) for part in (X[:160], X[160:], x))
    scores = []
    for name in ("raw", "polar") if transform == "combined" else (transform,):
        density = GaussianDensity.fit_features(transform_features(train, name), Y[:160], **fit)
        score, held = (density.score(transform_features(part, name)) for part in (points, val))
        scores.append(tail_score(score, fit_tail(held)) if transform == "combined" else score)
    return torch.stack(scores).amax(0)


@pytest.mark.parametrize("transform", ["raw", "polar", "direction", "combined"])
def test_the_score_is_what_the_definitions_give(make_trainer, transform):
    module, gmm = Lit(), FitGMM(feature_transform=transform, weights="last")
    make_trainer(max_epochs=2, callbacks=[gmm]).fit(module, TRAIN, VAL)
    torch.testing.assert_close(gmm.score(module, [FAR]), expected(module, transform, FAR), rtol=1e-5, atol=1e-5)


def test_auto_is_combined_where_there_are_held_out_rows_and_else_polar(make_trainer, caplog):
    module = Lit()
    make_trainer(max_epochs=2).fit(module, TRAIN)
    combined, polar = expected(module, "combined", FAR), expected(module, "polar", FAR)
    with caplog.at_level("INFO"):
        for gmm, score in (
            (FitGMM(held_out=VAL).fit(module, TRAIN), combined),
            (FitGMM().fit(module, TRAIN), polar),
        ):
            torch.testing.assert_close(gmm.score(module, [FAR]), score, rtol=1e-5, atol=1e-5)
            raw = -expected(module, "raw", FAR)
            torch.testing.assert_close(gmm.log_density(features_of(module, FAR)), raw, rtol=1e-5, atol=1e-5)
    told = [r.message for r in caplog.records if "not trained on" in r.message]
    assert len(told) == 1
    assert "as `held_out`" in told[0]


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_combined_needs_held_out_rows_before_the_training(make_trainer, maker):
    module = Lit()
    make = MAKERS[maker]
    for val, options in ((None, {}), ([VAL, VAL], {}), (VAL, {"limit_val_batches": 0})):
        trainer = make_trainer(max_epochs=1, callbacks=[make(feature_transform="combined")], **options)
        with pytest.raises(
            InputError, match="needs rows that the network was not trained on, .* Pass argument `held_out`"
        ):
            trainer.fit(module, TRAIN, val)
        assert module.global_step == 0
    with pytest.raises(InputError, match="there is no Trainer"):
        make(feature_transform="combined").fit(module, TRAIN)
    with pytest.raises(InputError, match=r"`held_out` needs feature_transform='combined', but it is 'raw'"):
        make(feature_transform="raw", held_out=VAL)
    with pytest.raises(InputError, match="`feature_transform` must be"):
        make(feature_transform="cubic")
    scorer = make(feature_transform="combined", held_out=VAL)
    make_trainer(max_epochs=1, callbacks=[scorer]).fit(module, TRAIN)
    assert scorer.fitted


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("transform", ["raw", "polar", "direction", "combined", "auto"])
def test_states_files_and_other_weights(make_trainer, tmp_path, maker, transform):
    make = MAKERS[maker]
    module, scorer = Lit(), make(feature_transform=transform)
    trainer = make_trainer(
        max_epochs=2,
        callbacks=[scorer, ModelCheckpoint(tmp_path, monitor="val_loss")],
        enable_checkpointing=True,
    )
    trainer.fit(module, TRAIN, VAL)
    best = Lit.load_from_checkpoint(scorer.uq_ckpt_path)
    before = scorer.score(best, [FAR])
    fresh = make(feature_transform=transform)
    detection = OODDetection({"far": DataLoader(TensorDataset(FAR, Y[:40]), batch_size=9)}, scores=[scorer.score_name])
    (tested,) = make_trainer(callbacks=[fresh, detection]).test(
        Lit(), VAL, ckpt_path=scorer.uq_ckpt_path, verbose=False, weights_only=True
    )
    assert torch.equal(fresh.score(best, [FAR]), before)
    assert tested[f"ood_auroc/far/{scorer.score_name}"] > 0.6
    other = "polar" if transform == "raw" else "raw"
    with pytest.raises(InputError, match="feature_transform"):
        make(feature_transform=other).load_state_dict(scorer.state_dict())
    # Other weights: fitted again, from the loaders of the training.
    with torch.no_grad():
        module.net[0].weight.mul_(1.1)
    with pytest.warns(UserWarning, match="it was fitted again"):
        trainer.test(module, VAL, verbose=False)
    again = scorer.score(module, [FAR])
    held_out = {"held_out": VAL} if transform in ("combined", "auto") else {}
    repeated = make(feature_transform=transform, **held_out)
    torch.testing.assert_close(repeated.fit(module, TRAIN).score(module, [FAR]), again)


def test_predictions_tables_and_exports_carry_the_same_score(make_trainer, tmp_path):
    for module in (DeterministicModule(Lit().net), EnsembleModule(network, num_members=2, seed=0), Lit()):
        own = not isinstance(module, Lit)
        gmm = FitGMM(attach=not own)
        folder = tmp_path / type(module).__name__
        writer = PredictionWriter(folder / "out", format="csv")
        trainer = make_trainer(
            max_epochs=2,
            callbacks=[gmm, writer, ModelCheckpoint(folder, monitor="val_loss")],
            enable_checkpointing=True,
        )
        trainer.fit(module, TRAIN, VAL)
        loader = DataLoader(TensorDataset(FAR, Y[:40]), batch_size=16)
        found = CategoricalPrediction.cat(trainer.predict(module, loader, ckpt_path="best", weights_only=True))
        score = gmm.score(module, [FAR])
        torch.testing.assert_close(found.ood_score, score, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.score("ood_score"), found.ood_score)
        assert not torch.allclose(found.ood_score, -found.log_density)
        table = read_predictions(folder / "out")
        torch.testing.assert_close(torch.as_tensor(table["ood_score"]), score, rtol=1e-6, atol=1e-6)
        given = None if own and not isinstance(module, DeterministicModule) else network() if own else Lit()
        fitted = load_fitted(gmm.uq_ckpt_path, given)
        torch.testing.assert_close(fitted(FAR)["ood_score"], score, rtol=1e-5, atol=1e-5)
        rows = ({0: torch.export.Dim("rows")},)
        exported = torch.export.export(fitted, (FAR[:5],), dynamic_shapes=rows, strict=False).module()
        torch.testing.assert_close(exported(FAR), fitted(FAR))
        half = copy.deepcopy(fitted).bfloat16()
        assert half.feature_score.tails["raw"].knots.dtype == torch.float64


def test_a_length_and_a_direction_are_both_found():
    """Each of two shifts that one kind of coordinates misses."""
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(600, 8, generator=generator), dim=1) * torch.tensor(
        [1.0, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]
    )
    train, val, test = (
        2 * F.normalize(direction, dim=1) * torch.exp(torch.randn(600, 1, generator=generator) * s) for s in (0.1,) * 3
    )
    network = nn.Sequential(nn.Identity(), nn.Linear(8, 2))
    labels = torch.zeros(600, dtype=torch.long)
    labels[::2] = 1
    scorers = {
        t: FitGMM(feature_transform=t, **({"held_out": [(val, labels)]} if t == "combined" else {}))
        for t in ("direction", "combined")
    }
    for scorer in scorers.values():
        scorer.fit(network, [(train, labels)])
    longer = 4 * test
    gap = {t: (s.score(network, [longer]).median() - s.score(network, [test]).median()) for t, s in scorers.items()}
    assert abs(gap["direction"]) < 1e-3
    assert gap["combined"] > 3


def test_the_module_of_all_of_it_goes_through_plain_tensors():
    x, y = torch.randn(2, 60, 5), torch.arange(60) % 2
    parts = {n: [GaussianDensity.fit_features(transform_features(m, n), y) for m in x] for n in ("raw", "polar")}
    plain = FeatureDensity(parts)
    tails = {n: fit_tail(plain.part_score(x, n)) for n in parts}
    density = FeatureDensity(parts, tails, "mahalanobis")
    again = FeatureDensity.from_tensors(density.tensors())
    assert torch.equal(again(x), density(x))
    assert torch.equal(again.log_density(x), plain.log_density(x))
    assert again.score == "mahalanobis"
    assert torch.equal(plain(x), plain.part_score(x, "polar"))
    torch.testing.assert_close(
        plain.log_density(x),
        torch.logsumexp(torch.stack([d.log_density(m) for d, m in zip(parts["raw"], x, strict=True)]), 0)
        - torch.tensor(2.0).log(),
    )
    assert not plain.is_log_density
    assert FeatureDensity({"raw": parts["raw"]}).is_log_density


def test_the_relative_distance_takes_the_raw_features(make_trainer):
    assert FitGMM(score="relative_mahalanobis").coordinates.names == ("raw",)
    assert FitGMM(score="relative_mahalanobis").score_name == "relative_mahalanobis"
    assert FitGMM(score="mahalanobis").score_name == "combined_mahalanobis"
    assert FitGMM().score_name == "density"


RANKS = """
import json
import torch
from lightning.pytorch import Trainer
from lightning_uq import FitGMM, FitKNN
from tests.callbacks.test_coordinates import FAR, TRAIN, VAL, Lit, X, Y
from torch.utils.data import DataLoader, TensorDataset

if __name__ == "__main__":
    train = DataLoader(TensorDataset(X[:151], Y[:151]), batch_size=16)
    callbacks = [FitGMM(), FitKNN(k=3, feature_transform="combined")]
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )
    module = Lit()
    trainer.fit(module, train, VAL)
    if trainer.is_global_zero:
        alone = [FitGMM(held_out=VAL), FitKNN(k=3, feature_transform="combined", held_out=VAL)]
        gaps = [
            float((a.fit(module, train).score(module, [FAR]) - b.score(module, [FAR])).abs().max())
            for a, b in zip(alone, callbacks)
        ]
        with open(out, "w") as file:
            json.dump(gaps, file)
    trainer.strategy.barrier()
"""


def test_two_ranks_give_what_one_gives(run_script):
    assert max(run_script(RANKS)) < 1e-5


def test_rows_that_the_network_was_trained_on_are_no_held_out_rows(make_trainer, caplog):
    same = DataLoader(TRAIN.dataset, batch_size=7)
    for val in (TRAIN, same):
        module, gmm = Lit(), FitGMM()
        with caplog.at_level("INFO"):
            make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, TRAIN, val)
        torch.testing.assert_close(
            gmm.score(module, [FAR]), FitGMM(feature_transform="polar").fit(module, TRAIN).score(module, [FAR])
        )
        with pytest.raises(InputError, match="the validation loader reads the training data. Pass argument `held_out`"):
            make_trainer(max_epochs=1, callbacks=[FitGMM(feature_transform="combined")]).fit(Lit(), TRAIN, val)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_evaluated_is_never_held_out(make_trainer, maker):
    """A fit that is repeated inside of an evaluation reads the rows of the training's validation."""
    module, scorer = Lit(), MAKERS[maker](feature_transform="combined")
    trainer = make_trainer(max_epochs=1, callbacks=[scorer])
    trainer.fit(module, TRAIN, VAL)
    far = DataLoader(TensorDataset(FAR, Y[:40]), batch_size=16)
    for stage in ("validate", "test"):
        with torch.no_grad():
            module.net[0].weight.mul_(1.01)
        with pytest.warns(UserWarning, match="it was fitted again"):
            getattr(trainer, stage)(module, far, verbose=False)
        honest = MAKERS[maker](feature_transform="combined", held_out=VAL).fit(module, TRAIN)
        torch.testing.assert_close(scorer.score(module, [FAR]), honest.score(module, [FAR]))
    with pytest.raises(InputError, match="there is no Trainer"):  # the rows of another training are not this one's
        scorer.fit(Lit(), TRAIN)


def test_held_out_rows_that_cannot_be_read_are_told_before_the_training(make_trainer, caplog):
    bad = {
        "are empty": [],
        "cannot be read like the training data": [(torch.randn(8, 7), Y[:8])],
        "A mapping batch must hold": [{"a": X[:8], "b": X[:8]}],
    }
    for text, held_out in bad.items():
        module = Lit()
        with pytest.raises(InputError, match=f"The held-out rows from argument `held_out`.*{text}"):
            make_trainer(max_epochs=1, callbacks=[FitGMM(feature_transform="combined", held_out=held_out)]).fit(
                module, TRAIN
            )
        assert module.global_step == 0
        with caplog.at_level("INFO"):
            gmm = FitGMM(held_out=held_out)
            make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, TRAIN)
        assert gmm.fitted
        assert any(
            "scores only the direction and the length of features" in r.message and text in r.message
            for r in caplog.records
        )
    module, gmm = Lit(), FitGMM()  # one row is no tail
    make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, TRAIN, DataLoader(TensorDataset(X[160:161], Y[160:161])))
    assert gmm.fitted


def test_neighbours_of_features_in_double_precision_keep_their_digits():
    network = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double()
    bank = 1e6 + 1e-3 * torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = 1e6 + 1e-3 * torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    knn = FitKNN(k=1, feature_transform="raw").fit(network, [bank])
    torch.testing.assert_close(
        knn.score(network, [points]), torch.cdist(points - 1e6, bank - 1e6).amin(1), rtol=1e-3, atol=0
    )


def test_two_densities_of_one_prediction_are_told(make_trainer, caplog):
    module = DeterministicModule(network())
    first, second = FitGMM(), FitGMM(name="tied", covariance="tied")
    with caplog.at_level("INFO"):
        make_trainer(max_epochs=1, callbacks=[first, second]).fit(module, TRAIN, VAL)
    assert any("Predictions carry only one density: that of" in record.message for record in caplog.records)
    torch.testing.assert_close(module.predict(FAR).ood_score, second.score(module, [FAR]))


def test_predictions_without_members_keep_the_score(make_trainer):
    module = DeterministicModule(network())
    gmm = FitGMM()
    make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, TRAIN, VAL)
    prediction = module.predict(FAR)
    assert torch.equal(prediction.pool().ood_score, prediction.ood_score)


def test_a_density_that_does_not_fit_into_the_memory_is_refused_before_the_training(make_trainer):
    module = Lit()
    with pytest.raises(InputError, match=r"3 classes of 16 features .* in 2 copies \(members and coordinates\)"):
        make_trainer(max_epochs=1, callbacks=[FitGMM(memory_budget=10_000)]).fit(module, TRAIN, VAL)
    assert module.global_step == 0
    gmm = FitGMM(memory_budget=10_000, feature_transform="raw")
    make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, TRAIN, VAL)
    assert gmm.fitted
