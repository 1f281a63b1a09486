"""What callbacks share that score the length and the direction of features, together or apart."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.errors import InputError
from lightning_uq.functional.feature_transforms import FEATURE_TRANSFORMS, FeatureTransform, coordinates_of
from lightning_uq.functional.tail import TailFit, fit_tail
from lightning_uq.functional.validation import check_choice
from lightning_uq.running.loaders import check_loader, exact_loader, validation_loaders


class TransformedFeatures(FeatureCallback):
    """Fits features in coordinates of their own.

    Args:
        feature_transform: ``"raw"``, the features f; ``"direction"``, f / |f|; ``"polar"``, f / |f| and log |f|; ``"combined"``, both raw and
            polar, whose scores become one on the scale of -log p: p is the share of held-out rows that score as high.
        held_out: Rows for ``"combined"`` that the network was not trained on; by default the one validation loader.
        fitting: Arguments of :class:`FeatureCallback`.

    Raises:
        InputError: An argument is not as above; at the start of the training, ``"combined"`` has no held-out rows.
    """

    def __init__(self, *, feature_transform: FeatureTransform, held_out: Any = None, **fitting: Any) -> None:
        super().__init__(**fitting)
        check_choice("feature_transform", feature_transform, FEATURE_TRANSFORMS)
        if held_out is not None and feature_transform != "combined":
            raise InputError(
                f"`held_out` is for `feature_transform='combined'`, but it is {feature_transform!r}. Leave `held_out` out."
            )
        self.feature_transform: FeatureTransform = feature_transform
        self.coordinates = coordinates_of(feature_transform)
        self.held_out = held_out
        self._known_held_out: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on."""
        return {**super().settings, "feature_transform": self.feature_transform}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known_held_out": None}  # as of the loader of the fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the held-out rows before the training."""
        if self.feature_transform == "combined":
            check_loader(self._held_out_loader(trainer), "argument `held_out`")
        super().on_fit_start(trainer, pl_module)

    def fit_tails(
        self, model: nn.Module, trainer: Trainer | None, score: Callable[[Tensor, FeatureTransform], Tensor]
    ) -> dict[FeatureTransform, TailFit]:
        """The tail of each score [N] of held-out features [M, N, D], where there are several scores. A collective.

        Raises:
            InputError: There are no held-out rows.
        """
        if self.feature_transform != "combined":
            return {}
        loader = self._held_out_loader(trainer)
        limit = None if trainer is None or self.held_out is not None else trainer.limit_val_batches
        exact = exact_loader(loader, trainer, name="argument `held_out`", limit=limit)
        features = self.gather_features(model, exact, trainer, MAX_FEATURES)
        return {coordinates: fit_tail(score(features, coordinates)) for coordinates in self.coordinates}

    def _held_out_loader(self, trainer: Trainer | None) -> Any:
        if self.held_out is not None:
            return self.held_out
        loaders = [] if trainer is None else validation_loaders(trainer)
        if len(loaders) == 1:
            self._known_held_out = loaders[0]
        elif self._known_held_out is None:
            raise InputError(
                f"{type(self).__name__}(feature_transform='combined') needs rows that the network was not trained on, but there is "
                f"{'no Trainer' if trainer is None else f'not one validation loader, but {len(loaders)}'}. Pass argument `held_out`, or "
                "`feature_transform='polar'`."
            )
        return self._known_held_out
