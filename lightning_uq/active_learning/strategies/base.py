"""What an acquisition strategy is: numbers that are kept of every input, and a choice among them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_uq.active_learning.scores import member_log_probs
from lightning_uq.batches import num_rows, unpack_batch
from lightning_uq.errors import InputError
from lightning_uq.predictions import Prediction
from lightning_uq.running.features import FeatureReader
from lightning_uq.running.logits import LogitReader

Rows = tuple[Tensor, ...]
"""What is kept of N inputs: one or several tensors [N, ...]."""


class PoolBatch:
    """A batch as a trained module reads it. Each part is computed when it is first asked for.

    Args:
        module: The module, in evaluation mode.
        batch: The batch, on its device.
        features: Reads the features.
        trainer: The Trainer of the module, if there is one.
    """

    def __init__(self, module: LightningModule, batch: Any, features: FeatureReader, trainer: Trainer | None) -> None:
        self._module, self._batch, self._reader, self._run_by = module, batch, features, trainer

    @cached_property
    def prediction(self) -> Prediction:
        """The prediction of ``predict_step``, with all calibrations and densities of the module."""
        with self._precision():
            prediction = self._module.predict_step(self._batch, 0)
        if not isinstance(prediction, Prediction):
            raise InputError(
                f"A strategy needs predictions of this package, but `predict_step` of {type(self._module).__name__} returned a "
                f"{type(prediction).__name__}. Pass `attach=True` to a callback of its training, as in "
                "`TemperatureScaling(attach=True)`, or use a module of this package."
            )
        return prediction

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the members [B, Z, C]."""
        return member_log_probs(self.prediction).transpose(0, 1)

    @cached_property
    def features(self) -> Tensor:
        """Features of the layer before the outputs [B, D]; those of several members side by side."""
        features = self._reader(self._module, self._batch, self._run_by)
        return features.transpose(0, 1).flatten(1)

    def __len__(self) -> int:
        found = num_rows(*self._unpacked)
        if found is None:
            raise InputError(f"The number of inputs in a batch of type {type(self._batch).__name__} is unknown.")
        return found

    @property
    def labels(self) -> Tensor | None:
        """Labels, if the batch holds them."""
        return self._unpacked[1]

    @property
    def _unpacked(self) -> tuple[Any, Tensor | None]:
        return cast(tuple[Any, Tensor | None], getattr(self._module, "unpack_batch", unpack_batch)(self._batch))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if self._run_by is None:
            yield
        else:
            with self._run_by.precision_plugin.predict_step_context():
                yield


class Strategy(ABC):
    """Which inputs of a pool to label next.

    A strategy keeps a row of numbers per input (:meth:`rows`), gathered from all processes, and then picks inputs by their rows
    (:meth:`choose`). So that every process picks the same inputs, the choice must depend on its arguments alone.

    Attributes:
        reference: Inputs besides the pool whose rows the choice needs: ``"labelled"``, a map-style data set, or None.
        feature_layer: Name of the layer whose input are the features; ``"auto"`` finds the one that makes the outputs.
    """

    reference: Any = None
    feature_layer: str = "auto"

    @abstractmethod
    def rows(self, batch: PoolBatch) -> Rows:
        """What is kept of a batch: one or several floating-point tensors [B, ...]."""

    @abstractmethod
    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """Positions [num] in the pool, in the order of their acquisition.

        Args:
            pool: Rows of the pool, [P, ...] on the CPU.
            num: Number of positions, at most P.
            reference: Rows of the reference, [R, ...]; None without one.
            generator: Source of all random numbers, on the CPU.
        """

    def make_feature_reader(self) -> FeatureReader:
        """What reads the features of a module."""
        return FeatureReader(self.feature_layer, LogitReader())
