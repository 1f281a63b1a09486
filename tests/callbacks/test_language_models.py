"""Causal language models, as their authors write them: a posterior and an epinet at the last token of a prompt, a temperature of all tokens."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq import (
    CategoricalPrediction,
    DeterministicModule,
    EpinetModule,
    FitLaplace,
    InputError,
    NotFiniteError,
    Segmentation,
    TemperatureScaling,
    load_fitted,
)
from lightning_uq.callbacks import laplace as laplace_file
from lightning_uq.data import next_token_batch
from lightning_uq.running import temperature_reader
from lightning_uq.running.logits import LogitReader
from tests.trainers import quiet_trainer

transformers = pytest.importorskip("transformers")

WORDS, ANSWERS, LENGTH = 100, [70, 20, 45], 12
TOKENS = {"task": Segmentation(class_axis=-1, ignore_index=-100), "unpack_batch": next_token_batch}
both_sides = pytest.mark.parametrize("side", ["right", "left"])


class LanguageModel(LightningModule):
    """The batch goes to the model by name, and the model computes the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
        )
        config.loss_type = "ForCausalLM"
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def prompts(num, seed=0):
    """Pairs of words, whose kind the answer names, and the answer's position in ANSWERS."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for kind in torch.randint(3, (num,), generator=generator).tolist():
        length = int(torch.randint(1, LENGTH, (), generator=generator))
        found.append((3 + 10 * kind + torch.randint(60, (length,), generator=generator), kind))
    return found


def padded(rows, side):
    """Prompts and answers, padded with words that could be real; only the answer has a label."""
    ids = torch.randint(3, WORDS, (len(rows), LENGTH), generator=torch.Generator().manual_seed(9))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (words, kind) in enumerate(rows):
        text = torch.cat([words, torch.tensor(ANSWERS[kind : kind + 1])])
        start = 0 if side == "right" else LENGTH - len(text)
        ids[i, start : start + len(text)], mask[i, start : start + len(text)] = text, 1
        labels[i, start + len(text) - 1] = text[-1]
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # without them, GPT-2 counts padding on the left
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def loader(num, side="right", seed=0, size=16):
    return DataLoader(prompts(num, seed), batch_size=size, collate_fn=lambda rows: padded(rows, side))


def texts(num, side="right", seed=0, size=16):
    """Every word has a label, as in a training on texts."""

    def collate(rows):
        batch = padded(rows, side)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return DataLoader(prompts(num, seed), batch_size=size, collate_fn=collate)


def prompt_and_answer(batch):
    """The words before the answer, and which answer it is."""
    if "labels" not in batch:
        return batch, None
    x = {name: value.clone() for name, value in batch.items() if name != "labels"}
    rows, at = torch.arange(len(batch["labels"])), batch["labels"].ne(-100).long().argmax(1)
    x["attention_mask"][rows, at] = 0
    answer = batch["labels"][rows, at]
    return x, (answer[:, None] == torch.tensor(ANSWERS, device=answer.device)).long().argmax(1)


def words_after(model, x):
    """The logits of the next word."""
    mask = x["attention_mask"]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return model(**x).logits[torch.arange(len(last)), last]


def answers(model, x):
    return words_after(model, x)[:, ANSWERS]


def prompt_and_word(batch):
    x, answer = prompt_and_answer(batch)
    return x, None if answer is None else torch.tensor(ANSWERS)[answer]


KINDS = {"answers": (answers, prompt_and_answer, ANSWERS), "words": (words_after, prompt_and_word, list(range(WORDS)))}


def fitted_laplace(kind, side, size=16, **options):
    predict_fn, unpack_batch, _ = KINDS[kind]
    return FitLaplace(
        pool="last_token",
        predict_fn=predict_fn,
        unpack_batch=unpack_batch,
        held_out=loader(30, side, 1, size),
        num_samples=8,
        **options,
    ).fit(LanguageModel(), loader(45, side, 0, size))


def alone(kind, num, seed):
    """The layer of the answers by itself, and its rows: features of prompts without padding, and answers."""
    _, unpack_batch, index = KINDS[kind]
    model, rows = LanguageModel().eval(), []
    for words, answer in prompts(num, seed):
        with torch.no_grad():
            features = model.model.transformer(input_ids=words[None]).last_hidden_state[0, -1]
        rows.append((features, answer if index is ANSWERS else ANSWERS[answer]))
    layer = nn.Linear(32, len(index), bias=False)
    layer.weight.data = model.model.lm_head.weight.detach()[index].clone()
    return layer, DataLoader(rows, batch_size=16)


@both_sides
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 16])  # 45 rows: the last batch is smaller
def test_a_posterior_at_the_last_token_is_that_of_the_layer_alone(kind, side, size):
    laplace = fitted_laplace(kind, side, size)
    layer, rows = alone(kind, 45, 0)
    expected = FitLaplace(held_out=alone(kind, 30, 1)[1], num_samples=8).fit(layer, rows)
    (found,), (other,) = laplace.transform().posteriors, expected.transform().posteriors
    assert laplace.transform().outputs.rows.tolist() == KINDS[kind][2]
    for one, two in zip((found.mean, found.prior_precision), (other.mean, other.prior_precision), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    batch = padded(prompts(7, 3), side)
    x = torch.stack([features for features, _ in alone(kind, 7, 3)[1].dataset])
    ours, theirs = laplace.predict(LanguageModel(), batch), expected.predict(layer, x)
    torch.testing.assert_close(ours.probs, theirs.probs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.mutual_information, theirs.mutual_information, rtol=1e-2, atol=1e-4)
    assert ours.logits.shape == (8, 7, len(KINDS[kind][2]))


def test_the_logits_of_padding_are_refused():
    def of_padding(model, x):
        return model(**x).logits[:, -1][:, ANSWERS]

    options = {"predict_fn": of_padding, "unpack_batch": prompt_and_answer, "select": "marginal_likelihood"}
    with pytest.raises(
        InputError, match=r"'model.lm_head' does not make them from the features of `pool='last_token'`"
    ):
        FitLaplace(pool="last_token", **options).fit(LanguageModel(), loader(20))

    def changed(model, x):
        return 2 * answers(model, x)

    with pytest.raises(InputError, match="does not make them"):
        FitLaplace(pool="last_token", **{**options, "predict_fn": changed}).fit(LanguageModel(), loader(20))
    with pytest.raises(InputError, match=r"must be pooled\. Pass 'mean', 'last_token'"):
        FitLaplace(**options).fit(LanguageModel(), loader(20))
    with pytest.raises(InputError, match="`pool` cannot be 'positions'"):
        FitLaplace(pool="positions")


def test_a_layer_that_sees_the_last_token_alone():
    """With padding on the left, `logits_to_keep` saves the logits of all other words."""

    def kept(model, x):
        return model.model(**x, logits_to_keep=2).logits[:, 0, ANSWERS]  # the answer is the last token here

    laplace = FitLaplace(pool="cls", predict_fn=kept, unpack_batch=prompt_and_answer, held_out=loader(30, "left", 1))
    laplace.fit(LanguageModel(), loader(45, "left"))
    (found,), (other,) = laplace.transform().posteriors, fitted_laplace("answers", "left").transform().posteriors
    torch.testing.assert_close(found.eigenvalues, other.eigenvalues, rtol=1e-4, atol=1e-6)


@both_sides
def test_a_row_of_padding_alone_is_never_an_answer(side):
    def with_empty_row(batch):
        x, y = prompt_and_answer(batch)
        x["attention_mask"][1] = 0
        return x, y

    options = {"predict_fn": answers, "held_out": loader(30, side, 1), "pool": "last_token"}
    with pytest.raises(InputError, match="A row of padding alone has NaN: leave such rows out"):
        FitLaplace(unpack_batch=with_empty_row, **options).fit(LanguageModel(), loader(20, side))
    laplace = fitted_laplace("answers", side)
    batch = padded(prompts(4, 3), side)
    whole = laplace.predict(LanguageModel(), batch)
    prediction = laplace.predict(LanguageModel(), with_empty_row(batch)[0])
    assert prediction.label[1] == -1
    for name in ("confidence", "predictive_entropy", "mutual_information"):
        assert getattr(prediction, name).isnan().tolist() == [False, True, False, False], name
    torch.testing.assert_close(prediction.probs[[0, 2, 3]], whole.probs[[0, 2, 3]])
    assert laplace.score(LanguageModel(), [with_empty_row(batch)[0]])[1] == torch.inf


def test_outputs_that_need_too_much_memory(monkeypatch):
    monkeypatch.setattr(laplace_file, "MAX_BYTES", 8 * 100**2)
    with pytest.raises(InputError, match=r"for the second moments of 32 features and 100 outputs .*predict_fn"):
        fitted_laplace("words", "right", link="probit")
    monkeypatch.setattr(laplace_file, "MAX_BYTES", 8 * (100**2 + 32**2))
    fitted_laplace("words", "right", link="probit")
    with pytest.raises(InputError, match=r"for the draws of the weights .* a few answers .*, or `link='probit'`"):
        fitted_laplace("words", "right")
    fitted_laplace("answers", "right")


@both_sides
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_posterior_under_a_trainer_persists(side, precision, tmp_path):
    def callback():
        return FitLaplace(pool="last_token", predict_fn=answers, unpack_batch=prompt_and_answer, attach=True)

    model, options = LanguageModel(), {"precision": precision, "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, callbacks=[callback()], **options)
    trainer.fit(model, loader(45, side), loader(30, side, 1))
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    new = loader(17, side, 5)  # the last batch has one row
    prediction = CategoricalPrediction.cat(trainer.predict(model, new))
    assert prediction.logits.shape == (32, 17, 3)
    assert prediction.mutual_information.min() > 0
    (path,) = tmp_path.rglob("uq-last.ckpt")
    again = quiet_trainer(tmp_path, callbacks=[callback()], precision=precision)
    reloaded = CategoricalPrediction.cat(again.predict(LanguageModel(), new, ckpt_path=str(path)))
    torch.testing.assert_close(reloaded.probs, prediction.probs, rtol=1e-5, atol=1e-6)
    network = load_fitted(path, LanguageModel(), predict_fn=answers)
    probs = torch.cat([network(prompt_and_answer(batch)[0])["probs"] for batch in new])
    tolerance = 1e-5 if precision == "32-true" else 0.05  # `load_fitted` runs in float32
    torch.testing.assert_close(probs, prediction.probs.float(), rtol=tolerance, atol=tolerance)


@both_sides
@pytest.mark.parametrize("kind", KINDS)
def test_an_epinet_on_a_frozen_model_reads_the_last_token(kind, side, tmp_path):
    predict_fn, unpack_batch, index = KINDS[kind]
    base = LanguageModel().model
    before = copy.deepcopy(base.state_dict())
    options = {"pool": "last_token", "predict_fn": predict_fn, "unpack_batch": unpack_batch, "num_eval_samples": 8}
    module = EpinetModule(base, freeze_base=True, **options)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, loader(33, side))
    assert all(torch.equal(value, before[name]) for name, value in module.network.base.state_dict().items())
    batch = padded(prompts(7, 3), side)
    whole = module.predict(unpack_batch(batch)[0])
    assert whole.logits.shape == (8, 7, len(index))
    assert whole.mutual_information.min() > 0
    for i, (words, _) in enumerate(prompts(7, 3)):
        row = module.predict({"input_ids": words[None], "attention_mask": torch.ones(1, len(words), dtype=torch.long)})
        torch.testing.assert_close(row.logits[:, 0], whole.logits[:, i], rtol=1e-4, atol=1e-5)
    trainer.save_checkpoint(tmp_path / "epinet.ckpt")
    again = EpinetModule.load_from_checkpoint(tmp_path / "epinet.ckpt", network=LanguageModel().model, **options)
    torch.testing.assert_close(again.predict(unpack_batch(batch)[0]).logits, whole.logits, rtol=1e-5, atol=1e-6)
    assert again.network.base.lm_head.weight is again.network.base.transformer.wte.weight
    empty = unpack_batch(batch)[0]
    empty["attention_mask"][2] = 0
    with pytest.raises(NotFiniteError, match="for 1 of 7 rows"):
        module.predict(empty)


# ---------------------------------------------------------------------- all tokens


def next_token_rows(model, batches):
    """Logits [N, V] in float64 and the words that followed [N], apart from those after padding."""
    rows = []
    for batch in batches:
        x = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            logits = model.eval()(**x).logits[:, :-1].double()
        kept = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] == 1)
        rows.append((logits[kept], batch["labels"][:, 1:][kept]))
    return tuple(map(torch.cat, zip(*rows, strict=True)))


def best_temperature(logits, labels):
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([log_t], max_iter=200, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def nll():
        search.zero_grad()
        loss = F.cross_entropy(logits * (-log_t).exp(), labels)
        loss.backward()
        return loss

    search.step(nll)
    return float(log_t.detach().exp())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    model = LanguageModel()
    quiet_trainer(Path(tmp_path_factory.mktemp("trained")), max_epochs=3).fit(model, texts(60))
    return model.eval()


@both_sides
@pytest.mark.parametrize("size", [1, 16])
def test_a_temperature_of_tokens_minimises_the_nll_of_the_next_ones(trained, side, size):
    data = texts(37, side, 1, size)
    logits, labels = next_token_rows(trained, data)
    scaling = TemperatureScaling(**TOKENS).fit(trained, data)
    assert float(scaling.temperature) == pytest.approx(best_temperature(logits, labels), rel=1e-4)
    numbers = scaling.fitted_numbers
    assert numbers["fit_nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert numbers["fit_nll_calibrated"] < numbers["fit_nll"]


def test_the_rows_are_those_of_the_models_own_loss(trained):
    (batch,) = texts(30, "right", 1, 30)
    numbers = TemperatureScaling(**TOKENS).fit(trained, [batch]).fitted_numbers
    assert numbers["fit_nll"] == pytest.approx(trained(**batch).loss.item(), rel=1e-5)


def test_the_side_of_the_padding_makes_no_difference(trained):
    found = [
        float(TemperatureScaling(**TOKENS).fit(trained, texts(30, side)).temperature) for side in ("right", "left")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_labels_that_are_not_shifted_are_reported():
    (batch,) = texts(30, "right", 1, 30)
    text = r"repeats `input_ids`, .*unpack_batch=lightning_uq\.data\.next_token_batch"
    with pytest.warns(UserWarning, match=text):
        DeterministicModule(LanguageModel().model, task=TOKENS["task"]).unpack_batch(batch)
    reader = LogitReader(task=TOKENS["task"])
    with pytest.warns(UserWarning, match=text):
        reader.unpack(LanguageModel(), batch)
    with pytest.warns(UserWarning, match=text):  # without a mask, too
        reader.unpack(LanguageModel().model, {name: batch[name] for name in ("input_ids", "labels")})
    tags = (batch["labels"] % 3).masked_fill(batch["labels"] < 0, -100)  # not the words themselves
    reader.unpack(LanguageModel(), {**batch, "labels": tags})
    reader.unpack(LanguageModel(), {**batch, "labels": batch["input_ids"][:, 0]})


def test_only_a_part_of_the_logits_is_converted_at_a_time(trained, monkeypatch):
    sizes = []
    converted = temperature_reader.TemperatureReader.logits_of

    def logits_of(self, prediction):
        found = converted(self, prediction)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(temperature_reader.TemperatureReader, "logits_of", logits_of)
    whole = TemperatureScaling(**TOKENS).fit(trained, texts(30))
    assert max(sizes) > 20 * WORDS
    sizes.clear()
    monkeypatch.setattr(temperature_reader, "_PART", 20 * WORDS)
    parts = TemperatureScaling(**TOKENS).fit(trained, texts(30))
    assert max(sizes) == 20 * WORDS
    torch.testing.assert_close(parts.temperature, whole.temperature, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_temperature_of_tokens_under_a_trainer(trained, precision, tmp_path):
    model, scaling = copy.deepcopy(trained).train(), TemperatureScaling(attach=True, **TOKENS)
    trainer = quiet_trainer(tmp_path, callbacks=[scaling], precision=precision)
    trainer.fit(model, texts(33), texts(17, "left", 1))
    logits, labels = next_token_rows(model, texts(17, "left", 1))
    tolerance = 1e-4 if precision == "32-true" else 0.02
    assert float(scaling.temperature) == pytest.approx(best_temperature(logits, labels), rel=tolerance)
    (prediction, *_) = trainer.predict(model, texts(16, "right", 2))
    assert prediction.probs.shape == (16, WORDS, LENGTH)
    tested = trainer.test(model, texts(17, "left", 1), verbose=False)[0]
    assert tested["uq/test_nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=max(tolerance, 1e-4))


def test_a_batch_without_any_label_adds_nothing(trained):
    data = list(texts(30))
    empty = {**data[0], "labels": torch.full_like(data[0]["labels"], -100)}
    found = [TemperatureScaling(**TOKENS).fit(trained, one).temperature for one in (data, [empty, *data])]
    assert torch.equal(*found)
    with pytest.raises(InputError, match="empty"):
        TemperatureScaling(**TOKENS).fit(trained, [empty])
