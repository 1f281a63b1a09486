"""Hugging Face: BERT and GPT-2 for sequences, in the LightningModule that tutorials show; GPT-2 reads the last token."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


def bert(**kwargs: Any) -> BertConfig:
    return BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)


class TextClassifier(LightningModule):
    """The batch goes to the model by name, and the model computes the loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        build = {
            "bert": lambda: BertForSequenceClassification(bert()),
            "gpt2": lambda: GPT2ForSequenceClassification(gpt2()),
        }
        self.model = build[kind]()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(**batch).loss)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self(**batch).loss)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(**batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Sentences(Dataset):
    """Words of which each class has ten of its own; far ones have other words."""

    def __init__(self, split: str) -> None:
        generator = torch.Generator().manual_seed(SEEDS[split])
        self.items = []
        for i in range(14):
            length = 3 + int(torch.randint(5, (), generator=generator))
            first = 40 if split == "far" else 10 * (i % 3)
            words = first + torch.randint(1, 11, (length,), generator=generator)
            self.items.append({"input_ids": words, "labels": i % 3})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def padded(items: list[Any]) -> dict[str, torch.Tensor]:
    words = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    labels = torch.tensor([item["labels"] for item in items])
    return {"input_ids": words, "attention_mask": (words > 0).long(), "labels": labels}


def loader(split: str) -> Any:
    return DataLoader(Sentences(split), batch_size=5, collate_fn=padded)


def words(batch: Any) -> Any:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def labels(batch: Any) -> Any:
    return batch["labels"]


CLIENTS = [
    Client(
        "transformers BERT",
        "one class per text",
        ["transformers"],
        partial(TextClassifier, "bert"),
        loader,
        target_of=labels,
        input_of=words,
    ),
    Client(
        "transformers GPT-2",
        "one class per text, at its last token",
        ["transformers"],
        partial(TextClassifier, "gpt2"),
        loader,
        lines=dict.fromkeys(("FitGMM", "FitKNN", "EpinetModule"), 'pool="last_token"'),
        target_of=labels,
        input_of=words,
    ),
]
