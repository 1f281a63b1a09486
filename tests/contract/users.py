"""Five kinds of LightningModule as somebody writes them who has never heard of this package, and their data.

The last kind, a pretrained backbone, is here twice: Hugging Face's (a mapping of several inputs, an object as output) and
timm's. Both are small and random, from a configuration, so that nothing is downloaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_uq import EnsembleModule, EpinetModule
from tests.contract.cases import CLASSES, FEATURES, rows


class TupleModule(LightningModule):
    """Batches `(x, y)`."""

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class DictModule(LightningModule):
    """Batches `{"features": x, "label": y}`."""

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = F.cross_entropy(self(batch["features"]), batch["label"])
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["features"]), batch["label"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch["features"]).argmax(1) == batch["label"]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"label": self(batch["features"]).argmax(1)}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}


class ManualModule(TupleModule):
    """Steps its optimizer by hand."""

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(x), y)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log("train_loss", loss)


class TwoOptimizersModule(LightningModule):
    """A body and a head, each with an optimizer (and the body with a scheduler) of its own."""

    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("train_loss", loss)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        body = torch.optim.Adam(self.body.parameters(), lr=self.hparams.lr / 10)
        head = torch.optim.SGD(self.head.parameters(), lr=self.hparams.lr)
        return [body, head], [torch.optim.lr_scheduler.StepLR(body, 10)]


def bert(hidden_size: int = 16) -> nn.Module:
    """A text classifier of one layer."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, hidden_size=hidden_size, num_labels=CLASSES, **sizes)
    )


class HuggingFaceModule(LightningModule):
    """Batches of several inputs and `labels`, as a tokenizer and its collator give; `forward` gives their output object."""

    def __init__(self, hidden_size: int = 16, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = bert(hidden_size)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(**batch).loss)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(**batch).logits.argmax(1) == batch["labels"]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).logits.argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def timm_network(name: str = "test_efficientnet") -> nn.Module:
    """An image classifier."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES)


class TimmModule(LightningModule):
    """Images, with BatchNorm, a schedule and a learning rate that the backbone's name is saved with."""

    def __init__(self, backbone: str = "test_efficientnet", lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = timm_network(backbone)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


# ---------------------------------------------------------------------- their data

WORDS = 30


class Rows(Dataset):
    """A list with the interface of a data set."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def tuples(num: int, seed: int = 0, shift: float = 0.0) -> Dataset:
    x, y = rows(num, seed)
    return Rows(list(zip(x + shift, y, strict=True)))


def mappings(num: int, seed: int = 0, shift: float = 0.0) -> Dataset:
    x, y = rows(num, seed)
    return Rows([{"features": features, "label": label} for features, label in zip(x + shift, y, strict=True)])


def mislabelled(y: Tensor) -> Tensor:
    """Some labels are wrong, so that no network is always right, and there is a temperature to find."""
    return torch.where(torch.arange(len(y)) % 7 == 6, (y + 1) % CLASSES, y)


def images(num: int, seed: int = 0, shift: float = 0.0) -> Dataset:
    """Noise, brighter in the channel of the class."""
    y = torch.arange(num) % CLASSES
    x = torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(num), y] += 1
    return Rows(list(zip(x + shift, mislabelled(y), strict=True)))


def sentences(num: int, seed: int = 0, shift: float = 0.0) -> Dataset:
    """Words of which each class has ten of its own, in sentences of three to eight; shifted ones have only some."""
    generator = torch.Generator().manual_seed(seed)
    labels = mislabelled(torch.arange(num) % CLASSES).tolist()
    items = []
    for i in range(num):
        length = 3 + int(torch.randint(6, (), generator=generator))
        words = torch.randint(1, 10, (length,), generator=generator) + (0 if shift else 10 * (i % CLASSES))
        items.append({"input_ids": words, "labels": labels[i]})
    return Rows(items)


def padded(items: list[Any]) -> Any:
    """What a collator of Hugging Face's gives: padded words, their mask, and the labels, in a mapping of its own class."""
    from transformers import BatchEncoding

    words = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    labels = torch.tensor([item["labels"] for item in items])
    return BatchEncoding({"input_ids": words, "attention_mask": (words > 0).long(), "labels": labels})


# ---------------------------------------------------------------------- what they tell the package of their batches


def features_and_label(batch: Any) -> tuple[Any, Any]:
    return batch["features"], batch.get("label")


class DictEnsemble(EnsembleModule):
    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return features_and_label(batch)


class DictEpinet(EpinetModule):
    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return features_and_label(batch)


def words_and_labels(batch: Any) -> tuple[Any, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}, batch.get("labels")


def logits_of(output: Any) -> Tensor:
    return output.logits


class TextEnsemble(EnsembleModule):
    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return words_and_labels(batch)


class TextEpinet(EpinetModule):
    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return words_and_labels(batch)


# ---------------------------------------------------------------------- the list


@dataclass(frozen=True)
class UserCase:
    """A user's LightningModule, its data, and what the package must be told of them.

    Attributes:
        name: Its row in the grid.
        module: The class.
        data: ``data(num, seed, shift)`` is a data set.
        inner: The network inside a trained one, which an epinet goes around.
        collate: Makes a batch.
        unpack_batch: What its batches hold, where they are neither pairs nor mappings with ``input``.
        output: Picks the logits, where they are not what is returned.
        ensemble: The class whose ``unpack_batch`` is that.
        epinet: The same.
        by_hand: Whether it optimizes by hand, and so trains apart from other members.
        needs: A package beyond the dependencies.
        unsupported: Axes that it does not support, with the reason.
    """

    name: str
    module: type[LightningModule]
    data: Callable[..., Dataset] = tuples
    inner: Callable[[Any], nn.Module] = lambda module: module.net
    collate: Callable[[list[Any]], Any] | None = None
    unpack_batch: Callable[[Any], tuple[Any, Any]] | None = None
    output: Callable[[Any], Tensor] | None = None
    ensemble: type[EnsembleModule] = EnsembleModule
    epinet: type[EpinetModule] = EpinetModule
    by_hand: bool = False
    needs: str = "torch"
    unsupported: Mapping[str, str] = field(default_factory=dict)

    def loader(self, num: int, seed: int = 0, shift: float = 0.0, **kwargs: Any) -> DataLoader:
        return DataLoader(self.data(num, seed, shift), batch_size=8, collate_fn=self.collate, **kwargs)

    @property
    def model_arguments(self) -> dict[str, Any]:
        return {} if self.output is None else {"output": self.output}

    @property
    def callback_arguments(self) -> dict[str, Any]:
        given = {"unpack_batch": self.unpack_batch, "output": self.output}
        return {name: value for name, value in given.items() if value is not None}


USERS = [
    UserCase("Tuple batches", TupleModule),
    UserCase(
        "Dict batches",
        DictModule,
        mappings,
        unpack_batch=features_and_label,
        ensemble=DictEnsemble,
        epinet=DictEpinet,
    ),
    UserCase("Manual optimization", ManualModule, by_hand=True),
    UserCase("Two optimizers", TwoOptimizersModule, by_hand=True, inner=lambda module: module),
    UserCase(
        "Hugging Face backbone",
        HuggingFaceModule,
        sentences,
        lambda module: module.model,
        padded,
        words_and_labels,
        logits_of,
        TextEnsemble,
        TextEpinet,
        needs="transformers",
    ),
    UserCase("timm backbone", TimmModule, images, lambda module: module.backbone, needs="timm"),
]
