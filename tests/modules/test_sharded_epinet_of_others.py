"""An epinet on a network of Hugging Face or timm that FSDP2 shards over two processes: the metrics of one process."""

import os
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_uq import EpinetHead
from tests.modules.test_sharded_epinet import SGD, SameIndices

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

IMAGES = {"resnet18": {}, "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}}
LANGUAGE_MODELS = ("bert", "gpt2")  # the second one shares the weight of its first layer and its last


def texts(num, seed):
    """Texts of different lengths, with padding. The label is in their first two tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num):
        ids = torch.randint(3, 40, (8,), generator=generator)
        mask = (torch.arange(8) < torch.randint(4, 9, (), generator=generator)).long()
        label = int((ids[:2] > 20).sum())
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": label})
    return rows


def images(num, seed):
    x = torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    y = (x[:, :2].mean((2, 3)) > 0).sum(1)
    return list(zip(x, y.tolist(), strict=True))


def last_token(model, inputs):
    """The logits of three tokens at the end of each text."""
    mask = inputs["attention_mask"]
    return model(**inputs).logits[torch.arange(len(mask)), mask.sum(1) - 1][:, :3]


def make(name):
    """The frozen network, and the arguments of a module with it."""
    if name in IMAGES:
        torch.manual_seed(3)
        return timm.create_model(name, num_classes=3, **IMAGES[name]), {}
    reading = {"unpack_batch": lambda batch: ({k: v for k, v in batch.items() if k != "labels"}, batch["labels"])}
    small = {"vocab_size": 40, "attention_probs_dropout_prob": 0.0}
    if name == "gpt2":
        config, build = transformers.GPT2Config, transformers.GPT2LMHeadModel  # imported here, so before the seed
        torch.manual_seed(3)
        network = build(config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small))
        return network, {**reading, "pool": "last_token", "predict_fn": last_token}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config, build = transformers.BertConfig, transformers.BertForSequenceClassification
    torch.manual_seed(3)
    return build(config(num_labels=3, **sizes, **small)), reading


def metrics(name, devices, directory):
    """Train on 16 rows per step, in all, validate and test."""
    base, arguments = make(name)
    start = sum(float(one.detach().double().abs().sum()) for one in base.parameters())
    torch.manual_seed(5 + int(os.environ.get("LOCAL_RANK", 0)))
    head = EpinetHead(index_dim=2, hidden_sizes=(4,))
    options = {"freeze_base": True, "num_train_samples": 3, "num_eval_samples": 10, "optimizer": SGD}
    module = SameIndices(base, head=head, **options, **arguments)
    sharded = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=sharded if devices > 1 else "auto", max_epochs=2, logger=False,
        default_root_dir=directory, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    rows = images if name in IMAGES else texts
    train = partial(DataLoader, rows(32, 0), 16 // devices)
    training = train() if devices > 1 else train(sampler=DistributedSampler(rows(32, 0), 1, 0))
    trainer.fit(module, training, DataLoader(rows(21, 1), 5))
    found = dict(trainer.callback_metrics)
    trainer.test(module, DataLoader(rows(21, 2), 5), verbose=False)
    found |= trainer.callback_metrics
    # The training loss is the one of a rank, as under DDP.
    found = {key: float(value) for key, value in found.items() if key != "train_loss"}
    return {"start": start, **found}, all(isinstance(one, DTensor) for one in module.network.base.parameters())


CODE = """
import json
from tests.modules.test_sharded_epinet_of_others import *

found = {name: metrics(name, 2, DIRECTORY) for name in (*IMAGES, *LANGUAGE_MODELS)}
if int(os.environ["LOCAL_RANK"]) == 0:
    json.dump(found, open(out, "w"))
"""


def test_two_processes_give_what_one_gives(tmp_path, run_script):
    two = run_script(CODE.replace("DIRECTORY", repr(str(tmp_path))), timeout=200)
    for name, (found, all_are_sharded) in two.items():
        expected, _ = metrics(name, 1, tmp_path)
        assert all_are_sharded, name
        assert found["start"] == expected["start"], name
        assert found == pytest.approx(expected, rel=2e-3), name
