"""Predictions of a trained model for the rows of a file, as Parquet in constant memory: ``lightning-uq score``.

A model (:mod:`~lightning_uq.score.models`) gives named outputs for a batch. Rows come from a table (:mod:`~lightning_uq.score.tables`) or from an array
(:mod:`~lightning_uq.score.arrays`), a piece at a time. :mod:`~lightning_uq.score.run` joins them, and :mod:`~lightning_uq.score.output` names the columns.
"""

from lightning_uq.score.models import Model, load_model
from lightning_uq.score.rows import Rows, open_rows
from lightning_uq.score.run import Settings, Summary, score

__all__ = ["Model", "Rows", "Settings", "Summary", "load_model", "open_rows", "score"]
