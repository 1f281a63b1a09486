"""The coordinates in which a callback scores features: direction and length, together or separately."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.callbacks.held_out_rows import HeldOutRows
from lightning_uq.errors import InputError
from lightning_uq.functional.feature_transforms import FEATURE_TRANSFORMS, FeatureTransform, coordinates_of
from lightning_uq.functional.tail import TailFit, fit_tail
from lightning_uq.functional.validation import check_choice
from lightning_uq.guessing import report_guess
from lightning_uq.running.loaders import can_be_reread


class FeatureCoordinates:
    """The coordinates of a callback's features, and the tails that put two scores on one scale.

    Args:
        transform: ``"raw"``, the features f; ``"direction"``, f / |f|; ``"polar"``, f / |f| and log(1 + |f|); ``"combined"``, both raw and
            polar, whose scores are merged on the scale of -log p, where p is the share of held-out rows with a score at least as high.
            ``"auto"`` is "combined" if there are held-out rows, and "polar" otherwise.
        held_out: Rows that the network was not trained on; by default the only validation loader.

    Attributes:
        names: The fitted coordinates.

    Raises:
        InputError: An argument is invalid.
    """

    def __init__(self, transform: FeatureTransform, held_out: Any = None) -> None:
        check_choice("feature_transform", transform, FEATURE_TRANSFORMS)
        self.transform = transform
        self.names = coordinates_of(transform)
        if held_out is not None and len(self.names) == 1:
            raise InputError(
                f"`held_out` needs feature_transform='combined', but it is {transform!r}. Leave `held_out` out."
            )
        self.held_out = HeldOutRows(held_out)
        self._lack: str | None = None  # why the held-out rows of this training cannot be read

    def check(self, callback: FeatureCallback, model: LightningModule, trainer: Trainer) -> None:
        """Read a batch of held-out rows before a training, after one of the fitting data.

        If the fitting data are a stream, which is only tried in the training, :meth:`tails` reports what is wrong with the held-out rows: both may
        be unreadable for the same reason.

        Raises:
            InputError: With ``"combined"``, there are no held-out rows, or they cannot be read.
        """
        self.held_out.forget()
        self._lack = None
        if len(self.names) == 1:
            return
        try:
            loader = self._loader(trainer, type(callback).__name__)
            if loader is not None and can_be_reread(loader):
                with callback.logits.trying():
                    self.held_out.try_batch(
                        lambda batch: callback.features(model, batch, trainer), model, trainer, loader
                    )
                callback.features.reset()
        except InputError as error:
            if self.transform == "combined":
                raise
            self._lack = str(error)
            if not callback.waits:
                self._report_lack(callback, model, self._lack)

    def tails(
        self,
        callback: FeatureCallback,
        model: nn.Module,
        trainer: Trainer | None,
        score: Callable[[Tensor, FeatureTransform], Tensor],
    ) -> dict[FeatureTransform, TailFit]:
        """The tail of each score [N] of held-out features [M, N, D]; empty without held-out rows. A collective.

        Raises:
            InputError: With ``"combined"``, there are no held-out rows, or they cannot be read.
        """
        if len(self.names) == 1:
            return {}
        if self._lack is not None and trainer is not None:
            self._report_lack(callback, model, self._lack)  # unless it was reported before the training
            return {}
        loader = self._loader(trainer, type(callback).__name__)
        if loader is None:
            self._report_lack(callback, model, "it has no held-out rows.")
            return {}
        exact = self.held_out.exact(loader, trainer)
        try:
            features = callback.gather_features(model, exact, trainer, MAX_FEATURES)
            return {name: fit_tail(score(features, name)) for name in self.names}
        except InputError as error:
            if self.transform == "combined":
                raise InputError(f"{self.held_out.where}: {error}") from error
            self._report_lack(callback, model, str(error))
            return {}

    def _report_lack(self, callback: FeatureCallback, model: nn.Module, reason: str) -> None:
        report_guess(
            f"{type(callback).__name__} scores only the direction and the length of features: {reason.rstrip('.')}. To score the raw features too, "
            "pass rows that the network was not trained on as `held_out`. To keep this behavior, pass `feature_transform='polar'`.",
            model,
        )

    def _loader(self, trainer: Trainer | None, who: str) -> Any:
        """The loader of held-out rows, or None if there is none; raises for "combined"."""
        loader, reason = self.held_out.find(trainer)
        if loader is None and self.transform == "combined":
            raise InputError(
                f"{who}(feature_transform='combined') needs rows that the network was not trained on, but {reason}. Pass argument "
                "`held_out`, or `feature_transform='polar'`."
            )
        return loader
