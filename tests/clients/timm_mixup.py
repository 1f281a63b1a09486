"""timm: a backbone trained with Mixup in the training step."""

from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


class ImageClassifier(LightningModule):
    """A timm model; Mixup changes the batch in place and draws from numpy."""

    def __init__(self, name: str = "test_resnet", num_classes: int = 3, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=num_classes)
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=num_classes)
        self.criterion = SoftTargetCrossEntropy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = self.mixup(*batch)
        loss = self.criterion(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def loader(split: str) -> Any:
    y = torch.arange(12) % 3
    x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(SEEDS[split]))
    x[torch.arange(12), y] += 1
    return DataLoader(TensorDataset(x * (10 if split == "far" else 1), y), batch_size=6)


CLIENTS = [Client("timm with Mixup", "one class per image", ["timm"], ImageClassifier, loader)]
