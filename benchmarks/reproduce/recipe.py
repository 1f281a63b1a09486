"""What the scripts that train image classifiers share: a Trainer, a learning rate, and every out-of-distribution score of this package."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_uq import FitGMM, FitKNN, FitViM, UncertaintyModule
from lightning_uq.callbacks.ood_scores import OODScorer

LOGIT_SCORES = ("predictive_entropy", "max_softmax", "energy", "max_logit", "gen")
MEMBER_SCORES = ("mutual_information",)


class Recipe(UncertaintyModule):
    """A learning rate that falls along a cosine, and predictions that are logits and scores.

    Attributes:
        scores: Names of scores by their label in the results.
    """

    scores: dict[str, str]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps, last = int(self.trainer.estimated_stepping_batches), 1e-5  # of the first rate
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: last + (1 - last) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """``logits`` [B, Z, C] and all scores [B] by label, from one call of the network, as OODDetection computes them."""
        scorers = [one for one in self.trainer.callbacks if isinstance(one, OODScorer)]  # type: ignore[attr-defined]
        with ExitStack() as stack:
            provided = [stack.enter_context(one.ood_scores(self)) for one in scorers]
            outputs = self(batch[0])
        with torch.autocast(self.device.type, enabled=False):
            values = {name: value for function in provided for name, value in function(outputs).items()}
            prediction = self.task.predict(outputs)
        found = {
            label: (values[name] if name in values else prediction.score(name)).double().cpu()
            for label, name in self.scores.items()
        }
        return {"logits": outputs.movedim(1, 0).float().cpu(), **found}


def densities() -> dict[str, FitGMM]:
    """A Gaussian per class in each of the coordinates, by label."""
    return {
        f"gmm_{transform}": FitGMM(feature_transform=transform, name=transform)
        for transform in ("raw", "polar", "direction", "combined")
    }


def distances() -> dict[str, Any]:
    """The other scores of features, by label."""
    mahalanobis = {
        name: FitGMM(covariance="tied", score=name, name=name) for name in ("mahalanobis", "relative_mahalanobis")
    }
    return {**mahalanobis, "knn": FitKNN(), "vim": FitViM()}


def score_names(fits: dict[str, Any], *, members: bool = False) -> dict[str, str]:
    """The scores of logits, of members if there are several, and of features, by label."""
    own = {name: name for name in LOGIT_SCORES + MEMBER_SCORES * members}
    return own | {label: fit.ood_score_names[0] for label, fit in fits.items()}


def collect(trainer: Trainer, module: Recipe, loader: DataLoader[Any]) -> dict[str, Tensor]:
    """The logits and all scores of a set."""
    batches: Any = trainer.predict(module, loader)
    return {label: torch.cat([batch[label] for batch in batches]) for label in batches[0]}


def quiet_trainer(callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A Trainer on one device, a GPU if there is one, that shows and writes nothing by itself; ``options`` replace its own."""
    gpu = torch.cuda.is_available()
    own = {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": 1,
        "benchmark": gpu,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=[*callbacks], **own | options)
