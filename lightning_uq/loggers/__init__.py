"""Figures for a Trainer's loggers: TensorBoard, CSV, Weights & Biases and MLflow."""

from lightning_uq.loggers.callback import LogFigures
from lightning_uq.loggers.figures import log_figure, takes_figures

__all__ = ["LogFigures", "log_figure", "takes_figures"]
