"""Callbacks on segmentation networks, written as their authors write them and without a thought of this package."""

import logging

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule
from lightning_uq.callbacks import (
    CalibratedNLL,
    IsotonicScaling,
    MatrixScaling,
    OODDetection,
    TemperatureScaling,
    VectorScaling,
)
from lightning_uq.errors import InputError
from lightning_uq.functional import auroc, average_precision, fpr_at_tpr, predictive_entropy
from lightning_uq.functional.temperature import calibrated_nll, fit_temperature
from lightning_uq.running.row_sample import RowSample
from lightning_uq.tasks import EvidentialClassification, Segmentation

VOID = 255


class UNet(LightningModule):
    """Down once, up once, with a skip connection."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, x):
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.middle(skip))], 1))

    def _loss(self, batch):
        image, mask = batch
        return F.cross_entropy(self(image), mask, ignore_index=VOID)

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def images(num, seed=0, size=8):
    """Stripes of three brightnesses with noise, their classes, and a void frame."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (num, 1, size), generator=generator).expand(num, size, size).clone()
    x = y.unsqueeze(1) + 0.7 * torch.randn(num, 1, size, size, generator=generator)
    y[:, 0], y[:, -1] = VOID, VOID
    return x, y


def loader(num, seed=0, batch_size=4):
    return DataLoader(TensorDataset(*images(num, seed)), batch_size=batch_size)


def counted_logits(model, x, y):
    """Logits [N, C] and labels [N] of the pixels that are not void."""
    with torch.no_grad():
        logits = model.eval()(x)
    logits = (logits if logits.ndim == 4 else logits[0]).movedim(1, -1).reshape(-1, 3)
    return logits[y.reshape(-1) != VOID], y[y != VOID]


TASK = Segmentation(ignore_index=VOID)


@pytest.mark.parametrize("callback", [TemperatureScaling, VectorScaling, MatrixScaling, IsotonicScaling])
def test_a_calibration_of_a_foreign_network_reads_the_pixels_that_count(make_trainer, callback):
    model, scaling = UNet(), callback(task=TASK, attach=True)
    trainer = make_trainer(callbacks=[scaling], max_epochs=2)
    trainer.fit(model, loader(13), loader(11, 1))
    logits, labels = counted_logits(model, *images(11, 1))
    alone = callback().fit_logits(logits, labels)
    torch.testing.assert_close(scaling._get(), alone._get(), rtol=1e-4, atol=1e-5)
    prediction = trainer.predict(model, loader(11, 1))[0]
    assert prediction.probs.shape == (4, 3, 8, 8)
    rows, target = TASK.rows(prediction, images(11, 1)[1][:4])
    expected = alone.calibrate(type(prediction)(logits[None, : len(target)])).log_probs
    torch.testing.assert_close(rows.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_a_calibration_above_its_budget_reads_a_sample_and_says_so_once(make_trainer, caplog):
    fits = {}
    for batch_size in (4, 7):
        torch.manual_seed(1)
        model, scaling = UNet(), VectorScaling(task=TASK, max_rows=400)
        trainer = make_trainer(callbacks=[scaling], max_epochs=1)
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            trainer.fit(model, loader(13), loader(40, 1, batch_size))
        said = [m for m in caplog.messages if "random sample" in m]
        assert said == ["VectorScaling reads a random sample of 400 of 1,920 rows (`max_rows`)."]
        caplog.clear()
        fits[batch_size] = scaling.class_scaling
    torch.testing.assert_close(fits[4], fits[7], rtol=1e-3, atol=1e-4)  # the same pixels in batches of another size
    whole = VectorScaling().fit_logits(*counted_logits(model, *images(40, 1))).class_scaling
    assert not torch.allclose(fits[4], whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fits[4], whole, rtol=0.3, atol=0.5)


def test_a_temperature_reads_every_pixel_and_keeps_none(make_trainer, monkeypatch):
    monkeypatch.setattr(RowSample, "add", lambda *_: pytest.fail("rows were kept"))
    model, scaling = UNet(), TemperatureScaling(task=TASK, max_rows=1)
    logged = CalibratedNLL(task=TASK)
    make_trainer(callbacks=[scaling, logged], max_epochs=1).fit(model, loader(13), loader(40, 1))
    logits, labels = counted_logits(model, *images(40, 1))
    T = fit_temperature(logits, labels)
    assert float(scaling.temperature) == pytest.approx(float(T), rel=1e-6)
    assert scaling.fitted_numbers["fit_nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert scaling.fitted_numbers["fit_nll_calibrated"] == pytest.approx(
        float(calibrated_nll(logits, labels)), rel=1e-6
    )


def test_a_budget_that_is_not_reached_changes_nothing():
    model = DeterministicModule(UNet(), task=TASK)
    fits = [
        TemperatureScaling(max_rows=budget, name=str(budget), scope="shared").fit(model, loader(11, 1))
        for budget in (528, None)
    ]
    assert fits[0].temperature == fits[1].temperature


# ---------------------------------------------------------------------- out of distribution


def entropies(model, x):
    with torch.no_grad():
        logits = model.eval()(x)
    return predictive_entropy(logits if logits.ndim == 5 else logits[None])


def strange(num, seed=5, size=8):
    generator = torch.Generator().manual_seed(seed)
    return 6 * torch.randn(num, 1, size, size, generator=generator)


def expected_numbers(inside, outside, fpr95_positive="in"):
    score = torch.cat([inside, outside])
    is_ood = torch.arange(len(score)) >= len(inside)
    return {
        "ood_auroc": float(auroc(score, is_ood)),
        "ood_auprc_out": float(average_precision(score, is_ood)),
        "ood_fpr95": float(fpr_at_tpr(score, is_ood, positive=fpr95_positive)),
    }


MODELS = {
    "foreign": (UNet, TASK),
    "ours": (lambda: EnsembleModule(UNet, num_members=2, task=TASK), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_images_are_told_apart_by_their_mean_and_by_their_largest_score(make_trainer, name):
    build, task = MODELS[name]
    model, x = build(), strange(7)
    ood = OODDetection({"noise": DataLoader(x, batch_size=3)}, scores="predictive_entropy", task=task)
    (logged,) = make_trainer(callbacks=[ood]).test(model, loader(11, 2), verbose=False)
    inside, outside = entropies(model, images(11, 2)[0]), entropies(model, x)
    for reduction, reduce in (("mean", lambda s: s.flatten(1).mean(1)), ("max", lambda s: s.flatten(1).amax(1))):
        for metric, value in expected_numbers(reduce(inside), reduce(outside)).items():
            assert logged[f"{metric}/noise/predictive_entropy/{reduction}"] == pytest.approx(value, abs=1e-6)
    scores = ood.score(model, DataLoader(x, batch_size=3))
    assert list(scores) == ["predictive_entropy/mean", "predictive_entropy/max"]
    torch.testing.assert_close(scores["predictive_entropy/max"], outside.flatten(1).amax(1))


def test_an_evidential_map_has_its_scores_by_image(make_trainer):
    model = DeterministicModule(nn.Conv2d(1, 3, 1), task=EvidentialClassification(ignore_index=VOID))
    ood = OODDetection({"noise": DataLoader(strange(7), batch_size=3)})
    (logged,) = make_trainer(callbacks=[ood]).test(model, loader(11, 2), verbose=False)
    assert {"ood_auroc/noise/vacuity/mean", "ood_auroc/noise/vacuity/max"} <= logged.keys()


@pytest.mark.parametrize(("masks", "fpr95_positive"), [(False, "in"), (True, "out")])
def test_pixels_are_told_apart_without_the_void(make_trainer, masks, fpr95_positive):
    model, x = UNet(), strange(7)
    mask = torch.randint(3, (7, 8, 8), generator=torch.Generator().manual_seed(2))
    data = TensorDataset(x, mask) if masks else TensorDataset(x)
    ood = OODDetection(
        {"noise": DataLoader(data, batch_size=3)},
        scores={"h": "predictive_entropy"},
        task=TASK,
        level="pixel",
        masks=masks,
        fpr95_positive=fpr95_positive,
        unpack_batch=lambda batch: (batch[0], batch[1] if len(batch) > 1 else None),
    )
    (logged,) = make_trainer(callbacks=[ood]).test(model, loader(11, 2), verbose=False)
    inside = entropies(model, images(11, 2)[0])[images(11, 2)[1] != VOID]
    outside = entropies(model, x)
    outside = outside[mask == 1] if masks else outside.flatten()
    for metric, value in expected_numbers(inside, outside, fpr95_positive).items():
        assert logged[f"{metric}/noise/h/pixel"] == pytest.approx(value, abs=2e-3)
    with pytest.raises(InputError, match="`score` returns one number per input, so it needs `level='image'`"):
        ood.score(model, [x])


def test_what_does_not_fit_a_level_is_named(make_trainer):
    x = strange(4)
    with pytest.raises(InputError, match="`masks=True` needs `level='pixel'`"):
        OODDetection({"noise": [x]}, masks=True)
    with pytest.raises(InputError, match="`level` must be one of 'image', 'pixel', but it is 'voxel'"):
        OODDetection({"noise": [x]}, level="voxel")
    ood = OODDetection({"noise": [x]}, task=TASK, level="pixel", masks=True)
    with pytest.raises(InputError, match=r"must be masks \[4, 8, 8\] of the positions .* but a batch has none"):
        make_trainer(callbacks=[ood]).test(UNet(), loader(4), verbose=False)
    ood = OODDetection({"noise": [x]}, {"size": lambda z: z[0].flatten(1).norm(dim=1)}, task=TASK, level="pixel")
    with pytest.raises(
        InputError, match=r"needs a map of scores \[B, ...\], but score 'size' is \[4\], one number per"
    ):
        make_trainer(callbacks=[ood]).test(UNet(), loader(4), verbose=False)


def test_ignored_positions_count_in_neither_loader():
    """By position, the same sentences with more padding are as much in distribution as before."""
    torch.manual_seed(0)
    words, labels = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6, 5))
    longer = torch.cat([words, 9 * torch.ones(6, 4, 4, dtype=torch.float64)], 1)
    padded = torch.cat([labels, torch.full((6, 4), -100)], 1)
    task = Segmentation(class_axis=-1, ignore_index=-100)
    model = nn.Linear(4, 3).double()
    plain, with_padding = DataLoader(TensorDataset(words, labels), 3), DataLoader(TensorDataset(longer, padded), 3)

    class Tagger(LightningModule):
        def __init__(self):
            super().__init__()
            self.head = model

        def forward(self, x):
            return self.head(x)

        def test_step(self, batch, batch_idx):
            pass

    callback = OODDetection({"longer": with_padding}, task=task, level="pixel")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        precision="64-true",
        callbacks=[callback],
    )
    (found,) = trainer.test(Tagger(), plain, verbose=False)
    assert found["ood_auroc/longer/predictive_entropy/pixel"] == pytest.approx(0.5)


class Tagger(LightningModule):
    """A token classifier in the manner of Hugging Face; padding has features of its own."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids, attention_mask=None):
        return self.head(self.words(ids))

    def test_step(self, batch, batch_idx):
        pass


class MappedTagger(Tagger):
    def forward(self, batch):
        return super().forward(batch["ids"])


def sentences(num, padding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, lengths = (
        torch.randint(1, 20, (num, 5), generator=generator),
        torch.randint(1, 6, (num, 1), generator=generator),
    )
    ids = F.pad(ids, (0, padding))
    mask = (torch.arange(5 + padding) < lengths).long()
    return ids * mask, mask


@pytest.mark.parametrize("level", ["image", "pixel"])
@pytest.mark.parametrize("calls", ["by name", "by position", "in a mapping"])
def test_padding_that_the_network_was_told_of_counts_nowhere(make_trainer, level, calls):
    """The same sentences with more padding are as much in distribution as before, with no targets that say so."""
    call = {
        "by name": lambda model, x: model(x[0], attention_mask=x[1]),
        "by position": lambda model, x: model(*x),
        "in a mapping": lambda model, x: model({"ids": x[0], "attention_mask": x[1]}),
    }[calls]
    torch.manual_seed(0)
    model, unpack = (MappedTagger if calls == "in a mapping" else Tagger)(), lambda batch: (tuple(batch), None)
    ood = OODDetection(
        {"longer": DataLoader(TensorDataset(*sentences(11, 7)), 4)},
        "predictive_entropy",
        task=Segmentation(class_axis=-1),
        predict_fn=call,
        unpack_batch=unpack,
        level=level,
    )
    (logged,) = make_trainer(callbacks=[ood]).test(
        model, DataLoader(TensorDataset(*sentences(11, 0)), 3), verbose=False
    )
    for reduction in ("mean", "max") if level == "image" else ("pixel",):
        assert logged[f"ood_auroc/longer/predictive_entropy/{reduction}"] == pytest.approx(
            0.5, abs=0.02
        )  # ties are rounded
    if level == "image":
        ids, mask = sentences(11, 7)
        entropy = predictive_entropy(model.head(model.words(ids)).movedim(2, 1)[None]).detach()
        scores = ood.score(model, DataLoader(TensorDataset(ids, mask), 4))
        torch.testing.assert_close(
            scores["predictive_entropy/mean"], (entropy * mask).sum(1) / mask.sum(1), atol=1e-6, rtol=1e-5
        )


def test_a_sentence_of_padding_alone_has_no_score():
    ids, mask = sentences(3, 2)
    mask[1] = 0
    ood = OODDetection(
        {"o": [0]},
        "predictive_entropy",
        task=Segmentation(class_axis=-1),
        predict_fn=lambda model, x: model(*x),
        unpack_batch=lambda batch: (batch, None),
    )
    with pytest.raises(
        InputError, match="1 inputs of a batch have no score 'predictive_entropy', .* marks all tokens as padding"
    ):
        ood.score(Tagger(), [(ids, mask)])
