"""LightningModules as their authors would write them, who know nothing of this package."""

import lightning as L
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split


class LitClassifier(L.LightningModule):
    """As in the first pages of Lightning's documentation."""

    def __init__(self, num_features: int = 64, hidden: int = 32, num_classes: int = 8, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(num_features, hidden)
        self.l2 = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.l2(torch.relu(self.l1(x.view(x.size(0), -1))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class LitSilent(LitClassifier):
    """Logs nothing while it validates."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class Letters(Dataset):
    """Samples as mappings: an image, a label, and a path."""

    def __init__(self, num: int = 90):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(num) % 3
        self.x = torch.randn(num, 1, 6, 6, generator=generator) + self.y[:, None, None, None]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"image": self.x[i], "label": self.y[i], "path": f"{i}.png"}


class LettersData(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, num: int = 90):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        generator = torch.Generator().manual_seed(1)
        self.parts = random_split(Letters(self.hparams.num), [0.5, 0.25, 0.25], generator)

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.hparams.batch_size)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": batch["image"] / 2}


class LitLetters(L.LightningModule):
    """Dictionaries in, dictionaries out; torchmetrics; its own predict_step; writes to its logger; a scheduler by steps."""

    def __init__(self, net: nn.Module | None = None, optimizer=torch.optim.AdamW):
        super().__init__()
        self.net = net or nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        self.optimizer = optimizer
        self.acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.outputs = []

    def forward(self, image):
        return self.net(image)

    def step(self, batch):
        logits = self(batch["image"])
        return F.cross_entropy(logits, batch["label"]), logits

    def training_step(self, batch, batch_idx):
        loss, _ = self.step(batch)
        return {"loss": loss}

    def on_train_epoch_end(self):
        self.logger.experiment.add_text("epoch", str(self.current_epoch))

    def validation_step(self, batch, batch_idx):
        loss, logits = self.step(batch)
        self.acc(logits, batch["label"])
        self.outputs.append(loss)
        self.log("val/acc", self.acc)

    def on_validation_epoch_end(self):
        self.log("val/loss", torch.stack(self.outputs).mean())
        self.outputs.clear()

    def predict_step(self, batch, batch_idx):
        return [
            {"path": path, "class": int(label)}
            for path, label in zip(batch["path"], self(batch["image"]).argmax(1), strict=True)
        ]

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=1e-2)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class LitRegressor(L.LightningModule):
    """A plain mean, in the units of the targets."""

    def __init__(self, in_features: int = 10):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_features, 16), nn.ReLU(), nn.Linear(16, 1))
        nn.init.constant_(self.net[-1].bias, 150.0)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_mse", F.mse_loss(self(x), y), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]


class LitFlat(LitRegressor):
    """Its outputs [B] would be broadcast against targets [B, 1]."""

    def forward(self, x):
        return self.net(x).squeeze(-1)


class PlClassifier(pl.LightningModule):
    """Written with the other package of Lightning, around a network of timm."""

    def __init__(self, num_classes: int = 8):
        super().__init__()
        import timm

        self.model = timm.create_model("test_resnet", num_classes=num_classes, in_chans=1)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("valid_accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
