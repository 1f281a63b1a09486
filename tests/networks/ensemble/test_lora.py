"""LoRA members: each is PEFT's own model with its adapter, in outputs, training and files."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq import EnsembleModule, InputError, Segmentation, TemperatureScaling, UnsupportedError
from lightning_uq.networks import LoraEnsembleNetwork
from tests.trainers import quiet_trainer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT reads a property that transformers will rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
M = 3


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=32, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config)


CONFIGS = {
    bert: partial(peft.LoraConfig, task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"]),
    gpt2: partial(peft.LoraConfig, task_type="SEQ_CLS", r=4, target_modules=["c_attn"], fan_in_fan_out=True),
}


def batch(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (rows, 10), generator=generator)
    mask = (torch.arange(10) < torch.randint(4, 11, (rows, 1), generator=generator)).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def drawn(network):
    """Adapters that change the outputs: B is zero at first."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name or "copies" in name:
                p += 0.1 * torch.randn_like(p)
    return network.eval()


@pytest.mark.parametrize("make", [bert, gpt2])
def test_each_member_is_the_model_with_its_adapter_alone(make, tmp_path):
    network, x = drawn(LoraEnsembleNetwork(make(), CONFIGS[make](), M)), batch()
    runs = []
    norm = next(module for module in network.modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    whole = network(x)
    assert runs == [6 * M]  # the base runs once for all members
    assert whole.shape == (M, 6, 3)
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    folders = network.save_adapters(tmp_path)
    for i, folder in enumerate(folders):
        alone = peft.PeftModel.from_pretrained(make(), folder).eval()
        torch.testing.assert_close(whole[i], alone(**x).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole[i], network.member(i)(**x).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(x, torch.tensor([2, 0])), whole[[2, 0]], rtol=1e-5, atol=1e-5)
    other = LoraEnsembleNetwork(make(), CONFIGS[make](), M).eval()
    other.load_adapters(folders)
    torch.testing.assert_close(other(x), whole, rtol=1e-5, atol=1e-5)


def test_a_step_of_training_is_that_of_each_adapter_alone(tmp_path):
    module = EnsembleModule(
        bert,
        num_members=M,
        seed=0,
        sharing=CONFIGS[bert](),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        task="classification",
    )
    network, x, y = drawn(module.network), batch(), torch.arange(6) % 3
    alone = [
        peft.PeftModel.from_pretrained(bert(), f, is_trainable=True).eval() for f in network.save_adapters(tmp_path)
    ]
    module.training_loss(x, y, {**x, "labels": y}).backward()
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name or "copies" in name for name in names)
    for i, one in enumerate(alone):
        nn.functional.cross_entropy(one(**x).logits, y).backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        for name, p in network.named_parameters():
            if "lora_" in name:
                place = (
                    name.removeprefix("shared.")
                    .replace("lora_A", "lora_A.default.weight")
                    .replace("lora_B", "lora_B.default.weight")
                )
                torch.testing.assert_close(p.grad[i], gradients[f"base_model.model.{place}"], rtol=1e-4, atol=1e-6)
            elif f".copies.{i}." in name:
                place = name.removeprefix("shared.").replace(f".copies.{i}.", ".modules_to_save.default.")
                torch.testing.assert_close(p.grad, gradients[f"base_model.model.{place}"], rtol=1e-4, atol=1e-6)


def test_five_members_have_few_weights_and_start_with_different_adapters():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=2, vocab_size=1000))
    plain = sum(p.numel() for p in model.parameters())
    network = LoraEnsembleNetwork(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]), 5
    )
    assert sum(p.numel() for p in network.parameters()) < 1.1 * plain
    first = next(p for name, p in network.named_parameters() if "lora_A" in name)
    assert not torch.equal(first[0], first[1])


def test_it_trains_with_a_trainer_and_loads(tmp_path):
    with torch.no_grad():
        columns = {**batch(12), "labels": bert().eval()(**batch(12)).logits.argmax(1)}
    columns["labels"][0] = 2  # one is wrong, so that a temperature has an optimum
    loader = DataLoader([{key: value[i] for key, value in columns.items()} for i in range(12)], 4)
    make = partial(EnsembleModule, bert, num_members=M, seed=0, sharing=CONFIGS[bert](), task="classification")
    module, scaling = make(), TemperatureScaling(weights="last")
    base = copy.deepcopy({name: p for name, p in module.network.named_parameters() if not p.requires_grad})
    trainer = quiet_trainer(tmp_path, callbacks=[scaling], max_epochs=2, gradient_clip_val=1.0)
    trainer.fit(module, loader, loader)
    assert all(torch.equal(p, base[name]) for name, p in module.network.named_parameters() if name in base)
    assert scaling.temperature is not None
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    loaded = make()
    loaded.load_state_dict(torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(loaded.predict(batch()).logits, module.predict(batch()).logits)
    assert trainer.predict(module, loader)[0].probs.shape == (4, 3)


def test_tokens(tmp_path):
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=4
    )
    module = EnsembleModule(
        lambda: transformers.BertForTokenClassification(config),
        num_members=2,
        sharing=peft.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query"]),
        task=Segmentation(class_axis=-1),
    )
    assert module.predict(batch()).probs.shape == (6, 4, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "`use_dora`"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["word_embeddings"]}, "word_embeddings.* is none"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
    ],
)
def test_other_kinds_of_lora_are_refused(options, message):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["query"], **options})
    with pytest.raises(UnsupportedError, match=message):
        LoraEnsembleNetwork(bert(), config, M)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    network = LoraEnsembleNetwork(bert(), CONFIGS[bert](), M)
    with pytest.raises(InputError, match="`folders` must name 3 adapters"):
        network.load_adapters([tmp_path])
    folders = LoraEnsembleNetwork(bert(), CONFIGS[bert](r=2), M).save_adapters(tmp_path)
    with pytest.raises(InputError, match="does not fit"):
        network.load_adapters(folders)
