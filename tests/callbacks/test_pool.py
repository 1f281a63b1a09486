"""Densities of networks that see tokens [B, T, D]: a row of a padded batch is scored as it is alone."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.knn import FitKNN
from lightning_uq.callbacks.load import load_fitted
from lightning_uq.callbacks.ood import OODDetection
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.callbacks.vim import FitViM
from lightning_uq.errors import InputError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import CategoricalPrediction
from tests.versions import NESTED_EXPORT, skip_on_torch_2_6

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of nn.TransformerEncoder

GENERATOR = torch.Generator().manual_seed(3)
WORDS, WIDTH = 20, 8
TEXTS = [
    torch.randint(1, WORDS, (int(n),), generator=GENERATOR) for n in torch.randint(2, 7, (60,), generator=GENERATOR)
]
LABELS = torch.tensor([int(text[0] > 9) for text in TEXTS])
MAKE = {
    "gmm": lambda **kwargs: FitGMM(feature_transform="raw", regularization=1e-2, **kwargs),
    "knn": lambda **kwargs: FitKNN(k=3, **kwargs),
    "vim": lambda **kwargs: FitViM(dim=2, **kwargs),
}


def padded(texts, side="right", labels=None, length=None):
    """A batch whose padding is words of no meaning."""
    length = length or max(map(len, texts))
    ids = torch.randint(1, WORDS, (len(texts), length), generator=GENERATOR)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[i, place], mask[i, place] = text, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch if labels is None else {**batch, "labels": labels}


def batches(side="right", size=10):
    return [padded(TEXTS[i : i + size], side, LABELS[i : i + size]) for i in range(0, len(TEXTS), size)]


def loader(side="right"):
    rows = list(zip(TEXTS, LABELS, strict=True))
    return DataLoader(
        rows,
        batch_size=10,
        collate_fn=lambda some: padded([x for x, _ in some], side, torch.stack([y for _, y in some])),
    )


def unpack(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}, batch.get("labels")


class TextNetwork(nn.Module):
    """The head reads every token, and the logits of the real ones are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids, attention_mask):
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        h = self.encoder(self.words(input_ids) + self.places(places), src_key_padding_mask=attention_mask == 0)
        logits = self.head(h) * attention_mask.unsqueeze(2)
        return logits.sum(1) / attention_mask.sum(1, keepdim=True)


class TextModule(LightningModule):
    """Nothing in it knows of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TextNetwork()
        self.steps = 0

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def validation_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch["labels"]))

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return self(batch["input_ids"], batch["attention_mask"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OfTexts(DeterministicModule):
    def unpack_batch(self, batch):
        return unpack(batch)


def alone(score):
    """Scores of the texts, each in a batch of its own."""
    return torch.cat([score(padded([text])) for text in TEXTS])


# ---------------------------------------------------------------------- padding does not count


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pool", ["mean", "last_token"])
@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
@pytest.mark.filterwarnings("ignore:The largest logits of the training rows")
def test_a_padded_row_is_scored_as_it_is_alone(make, pool, side):
    module = TextModule().eval()
    scorer = make(pool=pool, unpack_batch=unpack).fit(module, batches(side))
    assert scorer.features.resolved == "model.head"
    assert scorer.features(module, batches(side)[0]).shape == (1, 10, WIDTH)
    expected = alone(lambda batch: scorer.score(module, [batch]))
    torch.testing.assert_close(scorer.score(module, batches(side)), expected, rtol=1e-4, atol=1e-4)
    longer = [padded(TEXTS, side, length=12)]
    torch.testing.assert_close(scorer.score(module, longer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("predict_fn", "unpack_batch"),
    [
        (lambda module, x: module.model(x["input_ids"], attention_mask=x["attention_mask"]), unpack),
        (
            lambda module, x: module.model(x[0], x[1]),
            lambda b: ((b["input_ids"], b["attention_mask"]), b.get("labels")),
        ),
    ],
    ids=["by name", "by position"],
)
def test_the_mask_of_a_network_that_the_module_calls(predict_fn, unpack_batch):
    module = TextModule().eval()
    expected = FitKNN(k=3, pool="mean", unpack_batch=unpack).fit(module, batches()).score(module, batches())
    knn = FitKNN(k=3, pool="mean", unpack_batch=unpack_batch, predict_fn=predict_fn).fit(module, batches())
    torch.testing.assert_close(knn.score(module, batches()), expected)


@pytest.mark.parametrize("pool", ["mean", "last_token", "cls"])
@pytest.mark.parametrize("layer", ["model.encoder", "model.encoder.layers.0"])
def test_an_encoders_layers_see_nested_tensors(layer, pool):
    """``nn.TransformerEncoder`` drops the padding on the right before its layers."""
    module = TextModule().eval()
    knn = FitKNN(k=3, feature_layer=layer, pool=pool, unpack_batch=unpack).fit(module, batches())
    expected = alone(lambda batch: knn.score(module, [batch]))
    torch.testing.assert_close(knn.score(module, [padded(TEXTS, length=9)]), expected, rtol=1e-4, atol=1e-4)


def test_a_training_a_prediction_a_file_and_an_export_agree(make_trainer, tmp_path):
    callbacks = [
        ModelCheckpoint(tmp_path, "best", monitor="val_loss"),
        FitGMM(feature_transform="raw", pool="mean", unpack_batch=unpack, attach=True),
        TemperatureScaling(unpack_batch=unpack, attach=True),
        OODDetection({"far": [padded(TEXTS)]}, unpack_batch=unpack),
    ]
    module, trainer = TextModule(), make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, loader(), loader())
    prediction = CategoricalPrediction.cat(trainer.predict(module, loader("left"), ckpt_path="best"))
    assert "ood_auroc/far/log_density" in trainer.test(module, loader(), ckpt_path="best")[0]
    fitted = load_fitted(tmp_path / "best-uq.ckpt", TextModule())
    expected = alone(lambda batch: fitted(batch)["log_density"])
    torch.testing.assert_close(prediction.log_density, expected, rtol=1e-4, atol=1e-4)
    batch = padded(TEXTS[:10], length=7)
    probs, log_density, _ = fitted(batch).values()
    torch.testing.assert_close(probs, prediction.probs[:10].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_density, expected[:10], rtol=1e-4, atol=1e-4)
    skip_on_torch_2_6(NESTED_EXPORT)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(
        fitted, (batch,), dynamic_shapes=(dict.fromkeys(batch, sizes),), strict=False
    ).module()
    torch.testing.assert_close(exported(batch), fitted(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported(padded(TEXTS, length=9))["log_density"], expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(fitted, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), fitted(batch), rtol=1e-4, atol=1e-4)


def test_a_module_of_ours_carries_the_density_of_its_tokens():
    module = OfTexts(TextNetwork()).eval()
    gmm = FitGMM(feature_transform="raw", pool="last_token", regularization=1e-2).fit(module, batches("left"))
    batch = unpack(padded(TEXTS))[0]
    expected = alone(lambda one: gmm.score(module, [one]))
    torch.testing.assert_close(module.predict(batch).log_density, -expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- other networks


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout, self.head = nn.Linear(4, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.dropout(self.body(x).relu())).mean(1)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, WIDTH, 3), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.body(x).relu().permute(0, 2, 3, 1)).mean((1, 2))


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x.transpose(0, 1)).mean(0)


TOKENS = torch.randn(60, 5, 4, generator=GENERATOR)
HEAD_FIRST = Factory("tests.callbacks.test_pool.HeadFirst", {})


@pytest.mark.parametrize(
    ("network", "x"),
    [(HeadFirst(), TOKENS), (ChannelsLast(), torch.randn(60, 3, 6, 6))],
    ids=["tokens", "channels last"],
)
def test_features_are_the_last_axis_of_a_heads_input_wherever_it_stands(network, x):
    with pytest.raises(
        InputError, match=r"input of layer 'head' is .*. Its last axis holds the features, and the others"
    ):
        FitGMM().fit(network, [(x, LABELS)])
    gmm = FitGMM(pool="mean").fit(network, [(x, LABELS)])
    assert gmm.densities[0].mean.shape == (2, WIDTH)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EnsembleModule(HEAD_FIRST, num_members=2, execution="stacked"),
        lambda: EnsembleModule(HEAD_FIRST, num_members=2, execution="loop"),
        lambda: DropoutModule(HeadFirst(), num_eval_samples=3),
    ],
    ids=["stacked", "loop", "dropout"],
)
def test_every_member_is_pooled(make):
    module = make().eval()
    gmm = FitGMM(feature_transform="raw", pool="last_token").fit(module, [(TOKENS, LABELS)])
    (member, *_) = gmm.features.found.networks(module)
    expected = member.body(TOKENS[:, -1]).relu()
    torch.testing.assert_close(gmm.features(module, TOKENS)[0], expected)
    torch.testing.assert_close(module.predict(TOKENS).log_density, -gmm.score(module, [TOKENS]))


def test_a_batch_axis_that_is_not_first_is_named():
    with pytest.raises(InputError, match=r"one row per sample, but there are 5 rows for 60 samples\. Axis 0 of"):
        FitKNN(pool="mean").fit(TimeMajor(), [TOKENS])
    knn = FitKNN(pool=lambda x, mask: x.mean(0)).fit(TimeMajor(), [TOKENS])
    torch.testing.assert_close(knn.features(TimeMajor(), TOKENS)[0], TOKENS.mean(1))


def test_two_heads_that_begin_at_one_address_are_two():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x).relu()
            return self.a(h) + self.b(h[:, :4])

    with pytest.raises(InputError, match="Several layers with different inputs"):
        FitGMM().fit(Net(), [(TOKENS[:, 0], LABELS)])


# ---------------------------------------------------------------------- errors and states


@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
def test_a_missing_pool_is_named_before_the_training(make_trainer, make):
    module = TextModule()
    match = r"The input of layer 'model.head' is \[10, \d, 8\].* Pass 'mean', 'last_token', 'cls' or a function"
    with pytest.raises(InputError, match=match):
        make_trainer(callbacks=[make(unpack_batch=unpack)]).fit(module, loader())
    assert module.steps == 0


def first_words(x, mask):
    return x[:, :2].mean(1)


def test_a_state_belongs_to_its_pool(make_trainer, tmp_path):
    gmm = FitGMM(pool="mean", unpack_batch=unpack).fit(TextModule(), batches())
    assert gmm.state_dict()["settings"]["pool"] == "mean"
    for pool in (None, "cls", first_words):
        with pytest.raises(InputError, match="has pool=.*, but its state was fitted with pool='mean'"):
            FitGMM(pool=pool, unpack_batch=unpack).load_state_dict(gmm.state_dict())
    with pytest.raises(
        InputError, match="`pool` must be 'mean', 'last_token', 'cls', 'positions' or a function, but it is 'max'"
    ):
        FitGMM(pool="max")


@pytest.mark.parametrize(
    ("fitted", "given", "match"),
    [
        ("mean", None, None),
        ("mean", "mean", None),
        ("mean", "cls", "was fitted with pool='mean', but argument `pool` is 'cls'. Leave argument `pool` out"),
        (None, "cls", "was fitted with pool=None, but argument `pool` is 'cls'"),
        (first_words, first_words, None),
        (
            first_words,
            None,
            "pool='function first_words', but argument `pool` is None. Pass that function as argument `pool`",
        ),
        (first_words, "mean", "Pass that function"),
    ],
)
def test_a_file_is_loaded_with_its_pool(make_trainer, tmp_path, fitted, given, match):
    network = HeadFirst() if fitted is not None else nn.Sequential(nn.Flatten(), nn.Linear(20, 2))
    module, gmm = DeterministicModule(network), FitGMM(feature_transform="raw", pool=fitted, weights="last")
    pairs = DataLoader(list(zip(TOKENS, LABELS, strict=True)), batch_size=20)
    trainer = make_trainer(callbacks=[ModelCheckpoint(tmp_path), gmm], enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, pairs)
    if match is None:
        expected = -gmm.score(module, [TOKENS])
        torch.testing.assert_close(load_fitted(gmm.uq_ckpt_path, network, pool=given)(TOKENS)["log_density"], expected)
    else:
        with pytest.raises(InputError, match=match):
            load_fitted(gmm.uq_ckpt_path, network, pool=given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, by release
@pytest.mark.parametrize("pool", ["mean", "tests.callbacks.test_pool.first_words", None])
def test_the_command_line_builds_a_pool(pool):
    pytest.importorskip("jsonargparse")
    parser = LightningArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    entries = [{"class_path": "lightning_uq.FitGMM", "init_args": {"pool": pool}}]
    (gmm,) = parser.instantiate_classes(parser.parse_object({"callbacks": entries})).callbacks
    wanted = pool if pool in ("mean", None) else "function first_words"
    assert gmm.settings["pool"] == wanted


# ---------------------------------------------------------------------- epinets


class EpinetOfTexts(EpinetModule):
    def unpack_batch(self, batch):
        return unpack(batch)


@pytest.mark.parametrize("pool", ["mean", "last_token"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_epinet_reads_a_padded_row_as_it_is_alone(make_trainer, pool, side):
    module = EpinetOfTexts(TextNetwork(), pool=pool, num_eval_samples=3)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(side))
    assert module.network.layers == ["head"]
    module.eval()
    with torch.no_grad():
        whole = module(unpack(padded(TEXTS, side))[0])
        rows = [module(unpack(padded([text]))[0]) for text in TEXTS]
    torch.testing.assert_close(whole, torch.cat(rows, 1), rtol=1e-4, atol=1e-4)


def test_an_epinet_names_a_missing_pool_and_takes_a_function():
    with pytest.raises(InputError, match=r"input of layer 'head' is \[60, 5, 8\]. Its last axis holds the features"):
        EpinetModule(HeadFirst())(TOKENS)
    with pytest.raises(InputError, match="`pool` must be"):
        EpinetModule(HeadFirst(), pool="max")
    module = EpinetModule(HeadFirst(), pool=lambda x, mask: x.flatten(1)).eval()
    assert module(TOKENS).shape == (100, 60, 2)
    assert module.network.epinet.learned.layers[0].in_features == 5 * WIDTH + 8
    with pytest.raises(InputError, match=r"one row per sample \[60, F\], but their shapes are \[\[5, 4\]\]"):
        EpinetModule(TimeMajor(), pool="mean")(TOKENS)


# ---------------------------------------------------------------------- Hugging Face


class HuggingFace(LightningModule):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def logits(output):
    return output.logits


@pytest.mark.parametrize("pool", ["mean", "last_token"])
def test_bert(pool):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=WORDS, num_labels=2, **sizes)
    module = HuggingFace(transformers.BertForSequenceClassification(config)).eval()
    layer = "model.bert.encoder.layer.1.intermediate.dense"
    knn = FitKNN(k=3, feature_layer=layer, pool=pool, unpack_batch=unpack, output=logits).fit(module, batches())
    expected = alone(lambda batch: knn.score(module, [batch]))
    torch.testing.assert_close(knn.score(module, batches()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_gpt(side):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 2}
    config = transformers.GPT2Config(vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    with pytest.raises(InputError, match="input of layer 'score' .* as `pool`"):
        FitGMM(unpack_batch=unpack, output=logits).fit(model, batches(side))
    gmm = FitGMM(pool="last_token", unpack_batch=unpack, output=logits).fit(model, batches(side))
    batch = batches(side)[0]
    with torch.no_grad():
        hidden = model.transformer(**unpack(batch)[0]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1 if side == "right" else torch.full((10,), hidden.shape[1] - 1)
    torch.testing.assert_close(gmm.features(model, batch)[0], hidden[torch.arange(10), last])
