"""segmentation-models-pytorch: the module of its example, with its dice loss and its statistics."""

from typing import Any

import segmentation_models_pytorch as smp
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


class Segmenter(LightningModule):
    """A Unet that collects what its metrics need and reads them at the epoch's end."""

    def __init__(self, encoder_name: str = "resnet18", num_classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = smp.Unet(encoder_name, encoder_weights=None, in_channels=3, classes=num_classes)
        self.loss_fn = smp.losses.DiceLoss(smp.losses.MULTICLASS_MODE, from_logits=True)
        self.outputs: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image)

    def shared_step(self, batch: Any, stage: str) -> torch.Tensor:
        image, mask = batch
        logits = self(image)
        loss = self.loss_fn(logits, mask)
        counts = smp.metrics.get_stats(logits.argmax(1), mask, mode="multiclass", num_classes=self.hparams.num_classes)
        self.outputs[stage].append(counts)
        return loss

    def shared_epoch_end(self, stage: str) -> None:
        counts = [torch.cat(parts) for parts in zip(*self.outputs[stage], strict=True)]
        self.log(f"{stage}_iou", smp.metrics.iou_score(*counts, reduction="micro"))
        self.outputs[stage].clear()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.shared_step(batch, "train")

    def on_train_epoch_end(self) -> None:
        self.shared_epoch_end("train")

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.shared_step(batch, "valid")

    def on_validation_epoch_end(self) -> None:
        self.shared_epoch_end("valid")

    def test_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.shared_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.shared_epoch_end("test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


def loader(split: str) -> Any:
    image = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(SEEDS[split]))
    mask = (image[:, 0] > 0).long() + (image[:, 1] > 1).long()
    return DataLoader(TensorDataset(image * (10 if split == "far" else 1), mask), batch_size=5)


ASKED = ("EnsembleModule", "FitGMM", "FitKNN", "TemperatureScaling", "OODDetection", "EpinetModule", "load_fitted")

CLIENTS = [
    Client(
        "segmentation-models-pytorch Unet",
        "one class per pixel",
        ["segmentation-models-pytorch"],
        Segmenter,
        loader,
        lines={
            **dict.fromkeys(ASKED, "task=Segmentation()"),
            "FitGMM": 'task=Segmentation(), pool="positions"',
            "PredictionWriter": 'format="npz"',
        },
    )
]
