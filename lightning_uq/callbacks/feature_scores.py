"""The base of callbacks that fit a network's features on the training data and score inputs by them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.density_transform import DensityTransform
from lightning_uq.callbacks.fitting_data import TrainingData
from lightning_uq.callbacks.post_training import PostTrainingCallback
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.networks.feature_score import FeatureScore
from lightning_uq.networks.pooling import Pool, pool_setting
from lightning_uq.networks.positions import resized, score_positions
from lightning_uq.predictions import Prediction
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.features import FeatureReader
from lightning_uq.running.finite import FiniteRows
from lightning_uq.running.loaders import can_be_reread, exact_loader
from lightning_uq.running.ranks import first_of_ranks, gather_objects, gather_rows, raising_on_all_ranks
from lightning_uq.running.row_sample import RowSample, row_keys
from lightning_uq.running.transforms import PredictionTransform

MAX_FEATURES = 2**17
"""Default number of feature rows to keep, such as positions of a map. 2^17 rows of 256 numbers take 128 MB."""


class FeatureCallback(PostTrainingCallback):
    """Fits features [M, B, D] of the training data and scores inputs by theirs. Higher scores are more out of distribution.

    A subclass defines what to fit (:meth:`fit_tensors`) and how to score features: by a module of buffers (:meth:`make_scorer`), or by its
    own function (:meth:`feature_scores`). With a module, predictions carry the score as ``ood_score``. :class:`OODDetection` in the
    same Trainer logs the score, and :meth:`score` returns it for any loader.

    Args:
        feature_layer: Name of the layer whose input holds the features, or ``"auto"``: the linear layer that feeds the output.
        pool: How tokens [B, T, D] become features [B, D]: ``"mean"``, ``"last_token"``, ``"cls"`` (the first token), or a function
                ``pool(x, mask)`` of the layer's input. "mean" and "last_token" skip the padding marked by the ``attention_mask`` or
                ``src_key_padding_mask`` that the network, or a module in it, is called with. A linear layer with an input of more than two
                axes needs a ``pool``. The input [B, D, H, W] of a convolution is averaged by default. With ``"positions"``, each position of a map
                is a row, such as each pixel of a segmentation, and the score is a map too. See
            :func:`~lightning_uq.networks.pooling.pool_features`.
        fitting: Arguments of :class:`FittingCallback`: ``dataloader``, ``weights``, ``name`` and others. The default
            fitting data are the data module's ``uq_fit_dataloader()``, else the training data, in order.

    Attributes:
        score_name: Name of the score.
        scorer: The module that scores features; None before a fit.
    """

    fitting_data = TrainingData()

    score_name: str
    scorer: FeatureScore | None = None

    def __init__(self, *, feature_layer: str = "auto", pool: Pool | None = None, **fitting: Any) -> None:
        super().__init__(**fitting)
        self.features = FeatureReader(feature_layer, self.logits, pool)

    def make_scorer(self, tensors: dict[str, Any]) -> FeatureScore | None:
        """The module that scores features, from the fitted tensors; None if the subclass overrides :meth:`feature_scores`."""
        return None

    def feature_scores(self, features: Tensor) -> Tensor:
        """The scores [B] of features [M, B, D], on their device, in float64."""
        scores: Tensor = self._fitted_scorer(features)(features)
        return scores

    def preview(self, prediction: Prediction) -> Prediction:
        """A prediction with a score, for checks before the training."""
        return prediction.replace(ood_score=torch.zeros(len(prediction)))

    def transform(self) -> PredictionTransform | None:
        """The transform that adds the score to predictions."""
        if self.scorer is None:
            return None
        return DensityTransform(self.features.at_layer.layer, self.scorer, self.features.pool)

    def _fitted_scorer(self, features: Tensor) -> FeatureScore:
        """The scorer, on the device of the features."""
        if self.scorer is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted: train with it, or call `fit(model, loader)`.")
        return self.scorer.to(features.device)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        layer = {"feature_layer": self.features.layer, "pool": pool_setting(self.features.pool)}
        return {**super().settings, **layer}

    # ------------------------------------------------------------------ fitting

    def largest_shape(self, shape: tuple[int, ...], trainer: Trainer | None) -> tuple[int, ...]:
        """The largest shape of all ranks. It also shares the layer's name with ranks that have no rows. A collective.

        Raises:
            InputError: No rank has a row: the first number, the members, is 0.
        """
        if trainer is not None and trainer.world_size > 1:
            shapes = gather_rows(torch.tensor([shape], device=trainer.strategy.root_device), trainer)
            shape = tuple(shapes.amax(0).tolist())
            self.features.reset(*first_of_ranks([self.features.resolved], trainer))
        if not shape[0]:
            raise InputError(f"{type(self).__name__}'s fitting data are empty.")
        return shape

    def gather_features(
        self, model: nn.Module, loader: Any, trainer: Trainer | None, max_rows: int | None = None
    ) -> Tensor:
        """The features [M, N, D] of all rows of all ranks, or of a sample, on the CPU. They are float64 if the inputs are, else float32.

        Raises:
            InputError: There is no row, or a row is not finite. It is raised on all ranks.
        """
        held = SimpleNamespace(
            sample=RowSample(max_rows), shape=(0, 0), dtype=torch.float32, layer=self.features.resolved
        )
        reading = self.reading(model, loader, trainer)
        with raising_on_all_ranks(trainer):
            for batch in reading.batches(held):
                self.logits.look_at_task(model, batch, trainer)
                features = self.features(model, batch, trainer)
                if not bool(features.isfinite().all()):
                    raise InputError(
                        f"The features that {type(self).__name__} is fitted to, the input of layer {self.features.resolved!r}, "
                        "hold NaN or infinity."
                    )
                keys, positions = self._rows_that_count(model, batch, features, reading.numbers(features.shape[1]))
                held.shape, held.dtype = (len(features), features.shape[2]), features.dtype
                held.layer = self.features.resolved
                chosen = held.sample.choose(keys)
                rows = features if features.ndim == 3 else features.movedim(2, -1).flatten(1, -2)[:, positions]
                rows = rows[:, chosen].transpose(0, 1).cpu()  # rows first, so that they can be gathered
                held.sample.add(keys[chosen], rows)
        self.features.reset(held.layer)
        self.largest_shape(held.shape, trainer)
        found: Tensor = held.sample.gather(trainer, type(self).__name__)[0]
        wide = any(gather_objects(held.dtype == torch.float64, trainer))
        return found.to(torch.float64 if wide else torch.float32).cpu().transpose(0, 1).contiguous()

    def _rows_that_count(
        self, model: nn.Module, batch: Any, features: Tensor, samples: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sampling keys of a batch's rows and, for features [M, B, D, *P], the indices of the counted positions in the flattened [B, *P]."""
        if features.ndim == 3:
            return row_keys(samples), samples
        size = features.shape[3:].numel()
        positions = self.counted_positions(model, batch, features)
        if positions is None:
            positions = torch.arange(len(samples) * size)
        return row_keys(samples[positions // size], positions % size), positions

    def counted_positions(self, model: nn.Module, batch: Any, features: Tensor) -> Tensor | None:
        """The indices of the counted positions of features [M, B, D, *P] in the flattened [B, *P]; None if all count."""
        grid = features.shape[3:]
        _, target = self.logits.unpack(model, batch)
        if not grid or not isinstance(target, Tensor) or target.ndim != 1 + len(grid):
            return None  # no label marks a position that does not count
        return self.logits.task(model).row_positions(resized(target, grid).cpu())

    def try_fit(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        """Try the fit on the first batch, or on the first batch of the training if reading the loader would take batches from it."""
        if can_be_reread(loader):
            super().try_fit(trainer, pl_module, loader)
        else:
            self.waits = not self.has_own_data(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the targets of the first epoch, unless the data set gave access to all of them."""
        mixed = self.waits and self.fits_targets(pl_module) and self._has_probabilities(pl_module, batch)
        if not mixed:  # Mixup and CutMix only affect the training
            self.check_epoch_targets(trainer, pl_module, batch)

    def _has_probabilities(self, model: nn.Module, batch: Any) -> bool:
        _, target = self.logits.unpack(model, batch)
        return isinstance(target, Tensor) and target.is_floating_point()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the check of the first epoch."""
        self.end_epoch_check(trainer)

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Check that the features can be read."""
        self.logits.look_at_task(model, batch, trainer)
        self.features(model, batch, trainer)
        self.features.reset()

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Set the layer that was fitted, or none, and free the memory of the fit."""
        self.features.reset(None if tensors is None else tensors["feature_layer"])
        self.scorer = None if tensors is None else self.make_scorer(tensors)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the memory of the test's scores."""
        if self.features.found is not None:
            self.features.found.release()

    # ------------------------------------------------------------------ scoring

    def score(self, model: nn.Module, loader: Any) -> Tensor:
        """The scores [N] of a loader's samples in order, on the CPU in float64. Higher is more out of distribution.

        With ``pool="positions"``, scores are maps [N, *P] on the grid of the features. A row whose features overflow has a score of plus infinity.

        Raises:
            NotFiniteError: An input row holds NaN or infinity. With ``nonfinite="inf"``, its score is plus infinity instead.
            NotFittedError: The callback is not fitted, or was fitted on other weights than those of ``model``.
        """
        self.check_fitted(model)
        scores = []
        with evaluating(model):
            for i, raw in enumerate(exact_loader(loader, name="argument `loader`")):
                batch = to_device(raw, model)
                rows = FiniteRows(self.logits.unpack(model, batch)[0], self.nonfinite, f"of batch {i}")
                features = rows.features(self.features(model, batch))
                scores.append(score_positions(self.feature_scores, features).cpu())
        self.features.at_layer.release()
        if not scores:
            raise InputError("`loader` must hold samples, but it is empty.")
        return torch.cat(scores)

    @property
    def ood_score_names(self) -> tuple[str, ...]:
        """The names of the scores for :class:`OODDetection`."""
        return (self.score_name if self.name in (None, self.score_name) else f"{self.name}_{self.score_name}",)

    @contextmanager
    def ood_scores(self, model: nn.Module) -> Iterator[Callable[[Tensor | None], dict[str, Tensor]]]:
        """A context for one call of the model; the function that it yields returns the score [B] after the call."""
        with self.features.recording(model) as features:
            yield lambda logits: {self.ood_score_names[0]: self._scores_like(logits, features())}

    def _scores_like(self, logits: Tensor | None, features: Tensor) -> Tensor:
        """The scores [B], or maps [B, *P] on the grid of the logits [Z, B, C, *P], if given."""
        scores = score_positions(self.feature_scores, features)
        return scores if scores.ndim == 1 or logits is None else resized(scores, logits.shape[3:])
