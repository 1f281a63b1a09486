"""neuralforecast's NHITS: a class of the other tree, whose steps cut windows from whole series."""

from typing import Any

import numpy as np
import pandas as pd
import torch
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


def last_window(batch: Any) -> Any:
    """Eight steps before the last four of each series, as NHITS takes them, and these four."""
    y = batch["temporal"][:, 0, :, None]
    past = y[:, -12:-4]
    nothing = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    return {"insample_y": past, "insample_mask": torch.ones_like(past), **nothing}, y[:, -4:]


LINE = 'unpack_batch=last_window, task=Regression(head="mean")'
LAST = '"blocks.2.layers.7"'  # of the three blocks, whose outputs are added

CLIENTS = [
    Client(
        "neuralforecast NHITS",
        "a horizon of means",
        ["neuralforecast"],
        build,
        loader,
        lines={
            **dict.fromkeys(("EnsembleModule", "TemperatureScaling", "OODDetection"), LINE),
            **dict.fromkeys(("FitGMM", "FitKNN"), f"{LINE}, feature_layer={LAST}"),
            "EpinetModule": f"{LINE}, feature_layers={LAST}",
            "PredictionWriter": 'format="npz"',
            "load_fitted": 'build(), task=Regression(head="mean")',
        },
        names=[last_window],
        refused={
            "TemperatureScaling": "calibrates probabilities",
            "OODDetection": "has no score for a single network",
        },
        target_of=lambda batch: last_window(batch)[1],
        input_of=lambda batch: last_window(batch)[0],
        trainer="pytorch_lightning",
    )
]
