"""pytorch-forecasting's Temporal Fusion Transformer: a mapping of eleven tensors, quantiles of a horizon in a named tuple."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

from tests.clients.client import Client


def series(split: str) -> TimeSeriesDataSet:
    time, groups = np.tile(np.arange(30), 4), np.repeat(list("abcd"), 30)
    shift = {"train": 0.0, "val": 0.5, "test": 1.0, "far": 0.0}[split]
    y = np.sin(np.arange(120) / 3 + shift) * (40 if split == "far" else 1) + np.repeat(np.arange(4.0), 30)
    frame = pd.DataFrame({"time": time, "group": groups, "y": y})
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="y",
        group_ids=["group"],
        max_encoder_length=8,
        max_prediction_length=3,
        time_varying_unknown_reals=["y"],
        static_categoricals=["group"],
    )


def loader(split: str) -> Any:
    return series(split).to_dataloader(train=False, batch_size=16, num_workers=0)


def build() -> Any:
    return TemporalFusionTransformer.from_dataset(
        series("train"),
        hidden_size=8,
        attention_head_size=1,
        hidden_continuous_size=4,
        loss=QuantileLoss([0.1, 0.5, 0.9]),
        output_size=3,
    )


def past_and_future(batch: Any) -> Any:
    return batch[0], batch[1][0]


def quantiles(output: Any) -> torch.Tensor:
    return output.prediction


READ = 'output=quantiles, task=Regression(head="quantiles")'
LINE = f"unpack_batch=past_and_future, {READ}"

CLIENTS = [
    Client(
        "pytorch-forecasting TemporalFusionTransformer",
        "quantiles of a horizon",
        ["pytorch-forecasting"],
        build,
        loader,
        lines={
            **dict.fromkeys(("EnsembleModule", "TemperatureScaling", "OODDetection"), LINE),
            **dict.fromkeys(("FitGMM", "FitKNN"), f'{LINE}, pool="mean"'),
            "EpinetModule": f'{LINE}, pool="positions"',
            "PredictionWriter": 'format="npz"',
            "load_fitted": f"build(), {READ}",
        },
        names=[past_and_future, quantiles],
        refused={"TemperatureScaling": "calibrates probabilities"},
        target_of=lambda batch: batch[1][0],
        input_of=lambda batch: batch[0],
    )
]
