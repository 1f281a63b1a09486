"""neuralforecast's NHITS: a class of the other tree, whose steps cut windows from whole series."""

from typing import Any

import numpy as np
import pandas as pd
from neuralforecast.losses.pytorch import MAE
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

from tests.clients.client import Client

SHIFTS = {"train": 0.0, "val": 0.5, "test": 1.0, "far": 0.0}


def loader(split: str) -> Any:
    scale = 50 if split == "far" else 1
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat(list("abcd"), 40),
            "ds": np.tile(np.arange(40), 4),
            "y": scale * np.sin(np.arange(160) / 3 + SHIFTS[split]),
        }
    )
    series, *_ = TimeSeriesDataset.from_df(frame)
    return TimeSeriesDataModule(series, batch_size=2).val_dataloader()


def build() -> Any:
    return NHITS(
        h=4,
        input_size=8,
        max_steps=2,
        n_blocks=[1, 1, 1],
        mlp_units=[[16, 16]] * 3,
        loss=MAE(),
        scaler_type="identity",
        batch_size=2,
        windows_batch_size=16,
    )


CLIENTS = [
    Client(
        "neuralforecast NHITS",
        "a horizon of means",
        ["neuralforecast"],
        build,
        loader,
        trainer="pytorch_lightning",
    )
]
