"""Subclasses of our modules and callbacks as a user's project has them: own arguments, metrics, losses, optimizers and hooks."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from tests.contract.cases import CallbackCase, ModuleCase, UsersModule, UsersRegressor, dataset


def has_users_members(case: ModuleCase) -> bool:
    """Whether LightningModules of a user's are the members of an ensemble."""
    return case.build.args in ((UsersModule,), (UsersRegressor,)) if hasattr(case.build, "args") else False


def class_of(case: ModuleCase | CallbackCase) -> type:
    return type(case.build())


def subclass_of(case: ModuleCase) -> type:
    """The case's module as somebody extends it."""
    base: Any = class_of(case)

    class Extended(base):
        def __init__(self, *args: Any, penalty: float = 0.0, tag: str = "none", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.save_hyperparameters()
            self.penalty = penalty
            self.seen = MeanMetric()

        def unpack_batch(self, batch: Any) -> tuple[Tensor, Tensor | None]:
            return (batch["features"], batch.get("wanted")) if isinstance(batch, dict) else super().unpack_batch(batch)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(1.0 * x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            second = sum(p.square().sum() for p in self.parameters() if p.requires_grad)
            self.log("second_loss", second)
            return loss + self.penalty * second

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx, dataloader_idx)
            self.seen.update(1.0)
            self.log("val_seen", self.seen)

        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            self.log("own_epoch", float(self.current_epoch))

    class Optimized(Extended):
        def configure_optimizers(self) -> dict[str, Any]:
            first, *others = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam([{"params": [first], "lr": 0.001}, {"params": others}], lr=0.01)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Extended if has_users_members(case) else Optimized


def build(case: ModuleCase) -> tuple[type, LightningModule]:
    """The subclass, and an instance with the case's arguments and some of its own."""
    kind, made = subclass_of(case), case.build
    arguments: dict[str, Any] = {}
    args: tuple[Any, ...] = ()
    while hasattr(made, "func"):
        arguments, args, made = {**made.keywords, **arguments}, (*made.args, *args), made.func
    return kind, kind(*args, **arguments, penalty=1e-3, tag="mine")


def batches(case: ModuleCase, num: int, seed: int = 0) -> DataLoader:
    """Mappings with names of their own, where the module unpacks them; members that are LightningModules take pairs."""
    data = dataset(case.task, num, seed)
    if has_users_members(case):
        return DataLoader(data, batch_size=8)
    return DataLoader([{"features": x, "wanted": y} for x, y in data], batch_size=8)


def extended_callback(case: CallbackCase) -> Any:
    """The case's callback as somebody extends it."""
    base: Any = class_of(case)

    class Extended(base):
        def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.note = note
            self.heard: list[str] = []

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            self.heard.append(stage)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_end(trainer, pl_module)
            self.heard.append("train end")

        def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_test_batch_end(trainer, pl_module, *args)
            self.heard.append("batch")

    made, args, arguments = case.build, (), {}
    while hasattr(made, "func"):
        arguments, args, made = {**made.keywords, **arguments}, (*made.args, *args), made.func
    if not isinstance(made, type):
        from tests.contract.cases import far_loader

        args = ({"far": far_loader()},)
    return Extended(*args, **arguments, note="mine")
