"""In which coordinates a callback scores features: their direction and their length, together or apart."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.errors import InputError
from lightning_uq.functional.feature_transforms import FEATURE_TRANSFORMS, FeatureTransform, coordinates_of
from lightning_uq.functional.tail import TailFit, fit_tail
from lightning_uq.functional.validation import check_choice
from lightning_uq.guessing import report_guess
from lightning_uq.running.loaders import check_loader, exact_loader, validation_loaders


class FeatureCoordinates:
    """The coordinates of a callback's features, and the tails that bring two scores onto one scale.

    Args:
        transform: ``"raw"``, the features f; ``"direction"``, f / |f|; ``"polar"``, f / |f| and log |f|; ``"combined"``, both raw and
            polar, whose scores become one on the scale of -log p: p is the share of held-out rows that score as high. ``"auto"`` is
            combined where there are held-out rows, and else scores the polar ones.
        held_out: Rows that the network was not trained on; by default the one validation loader.

    Attributes:
        names: The coordinates that are fitted.

    Raises:
        InputError: An argument is not as above.
    """

    def __init__(self, transform: FeatureTransform, held_out: Any = None) -> None:
        check_choice("feature_transform", transform, FEATURE_TRANSFORMS)
        self.transform = transform
        self.names = coordinates_of(transform)
        if held_out is not None and len(self.names) == 1:
            raise InputError(
                f"`held_out` is for `feature_transform='combined'`, but it is {transform!r}. Leave `held_out` out."
            )
        if held_out is not None:
            check_loader(held_out, "argument `held_out`")
        self.held_out = held_out
        self._known: Any = None  # of the fit that another one may repeat

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # it may hold worker processes or open files

    def check(self, trainer: Trainer, who: str) -> None:
        """Refuse, before a training, what has no held-out rows and was told to combine.

        Raises:
            InputError: So it is.
        """
        self._known = None
        if self.transform == "combined":
            self._loader(trainer, who)

    def tails(
        self,
        callback: FeatureCallback,
        model: nn.Module,
        trainer: Trainer | None,
        score: Callable[[Tensor, FeatureTransform], Tensor],
    ) -> dict[FeatureTransform, TailFit]:
        """The tail of each score [N] of held-out features [M, N, D]; none where there are no held-out rows. A collective.

        Raises:
            InputError: With ``"combined"``, there are no held-out rows.
        """
        if len(self.names) == 1:
            return {}
        loader = self._loader(trainer, type(callback).__name__)
        if loader is None:
            report_guess(
                f"{type(callback).__name__} scores the direction and the length of features, since there are no rows that the network was "
                "not trained on. Pass them as `held_out`, and the raw features are scored too; or say so: `feature_transform='polar'`.",
                model,
            )
            return {}
        limit = None if trainer is None or self.held_out is not None else trainer.limit_val_batches
        exact = exact_loader(loader, trainer, name="argument `held_out`", limit=limit)
        features = callback.gather_features(model, exact, trainer, MAX_FEATURES)
        return {name: fit_tail(score(features, name)) for name in self.names}

    def _loader(self, trainer: Trainer | None, who: str) -> Any:
        if self.held_out is not None:
            return self.held_out
        loaders = validation_loaders(trainer) if trainer is not None and trainer.limit_val_batches else []
        if len(loaders) == 1:
            self._known = loaders[0]
        elif self._known is None and self.transform == "combined":
            raise InputError(
                f"{who}(feature_transform='combined') needs rows that the network was not trained on, but there is "
                f"{'no Trainer' if trainer is None else f'not one validation loader, but {len(loaders) or None}'}. Pass argument "
                "`held_out`, or `feature_transform='polar'`."
            )
        return self._known
