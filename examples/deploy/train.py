"""The engineer's own project: a classifier of digits 0 to 7 and its training. Nothing here knows of lightning_uq."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 8  # digits 8 and 9 are never seen in training: they play the inputs that nobody expected
SIZES = {"train": 600, "validation": 143, "held_out": 400, "test": 300}


class DigitsClassifier(LightningModule):
    """A network of two hidden layers for rows of 64 pixels."""

    def __init__(self, width: int = 64, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES)]
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, 8]."""
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


def digits(part: str) -> TensorDataset:
    """The rows [N, 64] and labels [N] of one of SIZES, or of the "unknown" digits 8 and 9."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    known = (y < NUM_CLASSES).nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))]
    parts = dict(zip(SIZES, known.split([*SIZES.values()]), strict=True))
    rows = (y >= NUM_CLASSES).nonzero()[:, 0] if part == "unknown" else parts[part]
    return TensorDataset(x[rows], y[rows])


if __name__ == "__main__":
    seed_everything(0)
    keep = ModelCheckpoint(dirpath=Path(sys.argv[1]), filename="best", monitor="val_loss", enable_version_counter=False)
    trainer = Trainer(max_epochs=20, callbacks=[keep], logger=False, enable_progress_bar=False, accelerator="cpu")
    train, validation = DataLoader(digits("train"), 32, shuffle=True), DataLoader(digits("validation"), 128)
    trainer.fit(DigitsClassifier(), train, validation)
