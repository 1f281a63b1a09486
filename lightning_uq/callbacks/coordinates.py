"""In which coordinates a callback scores features: their direction and their length, together or apart."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.errors import InputError
from lightning_uq.functional.feature_transforms import FEATURE_TRANSFORMS, FeatureTransform, coordinates_of
from lightning_uq.functional.tail import TailFit, fit_tail
from lightning_uq.functional.validation import check_choice
from lightning_uq.guessing import report_guess
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.loaders import (
    can_be_reread,
    check_loader,
    exact_loader,
    reads_same_data,
    training_loader,
    validation_loaders,
)
from lightning_uq.running.ranks import raising_on_all_ranks


class FeatureCoordinates:
    """The coordinates of a callback's features, and the tails that bring two scores onto one scale.

    Args:
        transform: ``"raw"``, the features f; ``"direction"``, f / |f|; ``"polar"``, f / |f| and log(1 + |f|); ``"combined"``, both raw and
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
        self._lacks = False  # whether the rows of this training cannot be read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # it may hold worker processes or open files

    def check(self, callback: FeatureCallback, model: LightningModule, trainer: Trainer) -> None:
        """Look at a batch of held-out rows before a training.

        Raises:
            InputError: With ``"combined"``, there are no such rows, or they cannot be read.
        """
        self._known, self._lacks = None, False
        if len(self.names) == 1:
            return
        try:
            loader = self._loader(trainer, type(callback).__name__)
            if loader is not None and can_be_reread(loader):
                self._try_batch(callback, model, trainer, loader)
        except InputError as error:
            if self.transform == "combined":
                raise
            self._report_lack(callback, model, str(error))
            self._lacks = True

    def tails(
        self,
        callback: FeatureCallback,
        model: nn.Module,
        trainer: Trainer | None,
        score: Callable[[Tensor, FeatureTransform], Tensor],
    ) -> dict[FeatureTransform, TailFit]:
        """The tail of each score [N] of held-out features [M, N, D]; none where there are no held-out rows. A collective.

        Raises:
            InputError: With ``"combined"``, there are no held-out rows, or they cannot be read.
        """
        if len(self.names) == 1 or (self._lacks and trainer is not None):
            return {}
        loader = self._loader(trainer, type(callback).__name__)
        if loader is None:
            self._report_lack(callback, model, "there are no rows that the network was not trained on.")
            return {}
        limit = None if trainer is None or self.held_out is not None else trainer.limit_val_batches
        exact = exact_loader(loader, trainer, name="argument `held_out`", limit=limit)
        try:
            features = callback.gather_features(model, exact, trainer, MAX_FEATURES)
            return {name: fit_tail(score(features, name)) for name in self.names}
        except InputError as error:
            if self.transform == "combined":
                raise InputError(f"{self._where}: {error}") from error
            self._report_lack(callback, model, str(error))
            return {}

    @property
    def _where(self) -> str:
        return "The held-out rows, those of " + (
            "the validation loader" if self.held_out is None else "argument `held_out`"
        )

    def _report_lack(self, callback: FeatureCallback, model: nn.Module, reason: str) -> None:
        report_guess(
            f"{type(callback).__name__} scores the direction and the length of features alone: {reason.rstrip('.')}. Pass rows that the network "
            "was not trained on as `held_out`, and the raw features are scored too; or say so: `feature_transform='polar'`.",
            model,
        )

    def _try_batch(self, callback: FeatureCallback, model: LightningModule, trainer: Trainer, loader: Any) -> None:
        with raising_on_all_ranks(trainer), evaluating(model, trainer, fitting=True):
            for raw in exact_loader(loader, name="argument `held_out`", limit=1):
                try:
                    with torch.compiler.set_stance("force_eager"):
                        callback.features(model, to_device(raw, model, trainer), trainer)
                except (InputError, RuntimeError) as error:  # torch's own, of a batch of another shape
                    raise InputError(f"{self._where}, cannot be read as the training data are: {error}") from error
                callback.features.reset()
                return
            raise InputError(f"{self._where}, are empty.")

    def _loader(self, trainer: Trainer | None, who: str) -> Any:
        """Argument ``held_out``, else the validation loader of the training; of a repeated fit, that of the one before."""
        if self.held_out is not None:
            return self.held_out
        if trainer is None:
            self._known, reason = None, "there is no Trainer"
        elif trainer.state.fn == TrainerFn.FITTING:
            loaders = validation_loaders(trainer) if trainer.limit_val_batches else []
            self._known = loaders[0] if len(loaders) == 1 else None
            reason = f"there is not one validation loader, but {len(loaders) or 'none'}"
            if self._known is not None and reads_same_data(self._known, training_loader(trainer)):
                self._known, reason = None, "the validation loader reads the training data"
        else:
            reason = "this run has no training"
        if self._known is None and self.transform == "combined":
            raise InputError(
                f"{who}(feature_transform='combined') needs rows that the network was not trained on, but {reason}. Pass argument "
                "`held_out`, or `feature_transform='polar'`."
            )
        return self._known
