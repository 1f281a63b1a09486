"""pytorch-tabular's CategoryEmbeddingModel: a class of the other tree, a mapping in, a mapping out."""

from typing import Any

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


def frame(split: str) -> pd.DataFrame:
    rng = np.random.default_rng(SEEDS[split])
    scale = 30 if split == "far" else 1
    found = pd.DataFrame({"a": scale * rng.normal(size=40), "b": scale * rng.normal(size=40), "c": list("xyzx") * 10})
    found["y"] = np.arange(40) % 3
    return found


def model() -> TabularModel:
    return TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=["a", "b"], categorical_cols=["c"], num_workers=0),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-8"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=16, max_epochs=1, accelerator="cpu"),
        verbose=False,
    )


def loader(split: str) -> Any:
    data = model().prepare_dataloader(train=frame("train"), validation=frame("train"), seed=1)
    return data.prepare_inference_dataloader(frame(split), batch_size=16)


def build() -> Any:
    made = model()
    return made.prepare_model(made.prepare_dataloader(train=frame("train"), validation=frame("train"), seed=1))


def row_and_class(batch: Any) -> Any:
    return batch, batch["target"].squeeze(1)


USES = ("EnsembleModule", "FitGMM", "FitKNN", "TemperatureScaling", "OODDetection", "EpinetModule")

CLIENTS = [
    Client(
        "pytorch-tabular CategoryEmbeddingModel",
        "one class per row",
        ["pytorch-tabular"],
        build,
        loader,
        lines={**dict.fromkeys(USES, "unpack_batch=row_and_class"), "load_fitted": "build()"},
        names=[row_and_class],
        target_of=lambda batch: row_and_class(batch)[1],
        input_of=lambda batch: batch,
        trainer="pytorch_lightning",
    )
]
