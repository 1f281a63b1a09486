"""Out-of-distribution scores: providers, storage per loader, and detection metrics."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.ood import Positive, auroc, average_precision, fpr_at_tpr
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.score_histogram import (
    NUM_BINS,
    histogram_auroc,
    histogram_average_precision,
    histogram_fpr95,
    score_histogram,
)
from lightning_uq.running.ranks import gather_objects, gather_rows

Score = Callable[[Tensor], Tensor]
AnyScore = Callable[[Any], Any] | str  # the command line takes the first match; a function's path is also a str


@runtime_checkable
class OODScorer(Protocol):
    """The interface of a module or callback whose scores :class:`OODDetection` logs.

    The model runs once per batch, inside the context that :meth:`ood_scores` returns, so a scorer may hook a layer there.
    The function that the context yields is called after the model. A scorer's name takes precedence over the same name of a prediction.
    Both methods must not use collectives, since ranks may have different numbers of batches.

    Example:
        >>> from contextlib import contextmanager
        >>> from lightning.pytorch import Callback
        >>> class Distance(Callback):  # the least distance of a layer's features to stored ones
        ...     ood_score_names = ("distance",)
        ...     def __init__(self, features): self.features = features
        ...     @contextmanager
        ...     def ood_scores(self, model):
        ...         seen = []
        ...         handle = model.layer.register_forward_hook(lambda module, x, out: seen.append(out))
        ...         try:
        ...             yield lambda logits: {"distance": torch.cdist(seen[-1], self.features).amin(1)}
        ...         finally:
        ...             handle.remove()
        >>> isinstance(Distance(torch.zeros(2, 3)), OODScorer)
        True
    """

    @property
    def ood_score_names(self) -> Sequence[str]:
        """Names of the scores, the same on every rank and before the first batch."""

    def ood_scores(self, model: Any) -> AbstractContextManager[Callable[[Tensor | None], Mapping[str, Tensor]]]:
        """A context for one call of the model, which yields ``f(logits [Z, B, C]) -> {name: [B]}``.

        The logits are None for a model that does not return any, such as a detector.
        """


class LoaderScores:
    """The scores of one loader's samples, by name: one number per sample.

    A map of scores [B, *P] becomes two: ``<name>/mean`` and ``<name>/max`` over its positions.
    """

    def __init__(self, wanted: Mapping[str, str | Score], scorers: Sequence[OODScorer]) -> None:
        self.wanted = wanted
        self.scorers = scorers
        self._scores: dict[str, list[Tensor]] = {}

    def restart(self, other: "LoaderScores") -> None:
        """Replace the scores to compute by those of ``other``, before any row was added."""
        self.wanted, self.scorers = other.wanted, other.scorers

    @property
    def is_empty(self) -> bool:
        """Whether no scores were added."""
        return not self._scores

    def add(self, name: str, scores: Tensor, counted: Tensor | None = None) -> None:
        """Add the scores of a batch, [B] or maps [B, *P].

        Args:
            name: Their name.
            scores: The scores.
            counted: The mask [B, *P] of the positions that count, for scores by position; None counts all.

        Raises:
            InputError: No position of an input counts.
        """
        named = {name: upcast(scores)} if scores.ndim == 1 else _over_positions(name, upcast(scores), counted)
        for one, rows in named.items():
            self._scores.setdefault(one, []).append(rows)

    @property
    def all_provided(self) -> bool:
        """Whether scorers provide all of the scores."""
        provided = {name for scorer in self.scorers for name in scorer.ood_score_names}
        return provided.issuperset(map(str, self.wanted.values()))

    def add_provided(self, values: Mapping[str, Tensor], rows: Callable[[int], Tensor | None]) -> None:
        """Add a batch's scores by name; ``rows(B)`` is the mask of the rows that count; None counts all."""
        for name, score in self.wanted.items():
            value = values[str(score)]
            check_score(name, value, list(value.shape))
            keep = rows(len(value))
            self.add(name, value if keep is None else value[keep.to(value.device)])

    def merged(self, trainer: Trainer | None, where: str) -> dict[str, Tensor]:
        """The scores of all ranks, by name. A collective.

        Raises:
            InputError: There are no scores, or one is NaN.
        """
        names = self._shared_names(trainer)
        if not names:
            raise InputError(f"{where[0].upper()}{where[1:]} must hold samples, but it is empty.")
        return {name: self._merged(name, trainer, where) for name in names}

    @staticmethod
    def metrics(inside: Tensor, outside: Tensor, fpr95_positive: Positive = "in") -> dict[str, Tensor]:
        """The four logged metrics."""
        return detection_metrics(inside, outside, fpr95_positive)

    def _shared_names(self, trainer: Trainer | None) -> list[str]:
        """The names that were added on any rank."""
        of_ranks = [names for names in gather_objects(list(self._scores), trainer) if names]
        if any(set(names) != set(of_ranks[0]) for names in of_ranks):
            raise InputError(
                f"The ranks have different scores: {' and '.join(map(str, of_ranks))}. Pass `output` and `scores`, to make them the "
                "same on every rank."
            )
        return of_ranks[0] if of_ranks else []

    def _merged(self, name: str, trainer: Trainer | None, where: str) -> Tensor:
        rows = torch.cat(self._scores[name]) if name in self._scores else torch.empty(0)
        if trainer is not None:  # a rank without rows needs the same device and dtype
            rows = gather_rows(widen(rows.to(trainer.strategy.root_device)), trainer)
        check_no_nan_score(name, rows, where)
        return rows


def _over_positions(name: str, scores: Tensor, counted: Tensor | None) -> dict[str, Tensor]:
    """The mean and the maximum of each input's scores [B, *P] over the positions that count."""
    flat = scores.flatten(1)
    if counted is None:
        return {f"{name}/mean": flat.mean(1), f"{name}/max": flat.amax(1)}
    kept = counted.to(flat.device).flatten(1)
    empty = int((~kept.any(1)).sum())
    if empty:
        raise InputError(
            f"{empty} inputs of a batch have no score {name!r}, because their mask marks all tokens as padding."
        )
    mean = flat.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
    return {f"{name}/mean": mean, f"{name}/max": flat.masked_fill(~kept, -torch.inf).amax(1)}


class PixelScores(LoaderScores):
    """The scores of one loader's positions, by name: a histogram ``<name>/pixel`` for each, for any number of positions."""

    def add(self, name: str, scores: Tensor, counted: Tensor | None = None) -> None:
        """Add the scores of a batch's positions; see :meth:`LoaderScores.add`."""
        if scores.ndim < 2:
            raise InputError(
                f"`level='pixel'` needs a map of scores [B, ...], but score {name!r} is {list(scores.shape)}, one number per input. "
                "Pass `level='image'`, or leave this score out of `scores`."
            )
        check_no_nan_score(name, scores, "the batch")
        counts = score_histogram(scores if counted is None else scores[counted.to(scores.device)])
        found = self._scores.setdefault(f"{name}/pixel", [torch.zeros_like(counts)])
        found[0] = found[0] + counts

    @staticmethod
    def metrics(inside: Tensor, outside: Tensor, fpr95_positive: Positive = "in") -> dict[str, Tensor]:
        """The four logged metrics, from two histograms."""
        return {
            "ood_auroc": histogram_auroc(inside, outside),
            "ood_auprc_out": histogram_average_precision(inside, outside, "out"),
            "ood_auprc_in": histogram_average_precision(inside, outside, "in"),
            "ood_fpr95": histogram_fpr95(inside, outside, fpr95_positive),
        }

    def _merged(self, name: str, trainer: Trainer | None, where: str) -> Tensor:
        counts = self._scores[name][0] if name in self._scores else torch.zeros(NUM_BINS, dtype=torch.long)
        if trainer is not None:
            counts = gather_rows(counts[None].to(trainer.strategy.root_device), trainer).sum(0)
        if not bool(counts.any()):
            raise InputError(f"{where[0].upper()}{where[1:]} must hold positions that count, but it holds none.")
        return counts


def check_score(name: str, value: Any, shape: list[int]) -> None:
    """Reject a value that is not a score of each input, or of each position of a map."""
    if not isinstance(value, Tensor) or list(value.shape) not in (shape, shape[:1]) or not value.is_floating_point():
        came = (
            f"{value.dtype} of shape {list(value.shape)}"
            if isinstance(value, Tensor)
            else f"of type {type(value).__name__}"
        )
        wanted = f"[B] = {shape}" if len(shape) == 1 else f"[B, ...] = {shape} or [B] = {shape[:1]}"
        raise InputError(f"Score {name!r} must be a floating-point tensor {wanted}, but it is {came}.")


def check_no_nan_score(name: str, scores: Tensor, where: str) -> None:
    """Reject scores that are NaN."""
    nan = int(scores.isnan().sum())
    if nan:
        raise InputError(
            f"Score {name!r} is NaN for {nan} of {scores.numel()} inputs of {where}. Check the inputs and the network's "
            "output for NaN."
        )


def detection_metrics(inside: Tensor, outside: Tensor, fpr95_positive: Positive = "in") -> dict[str, Tensor]:
    """The four logged metrics, from the scores of in- and out-of-distribution samples, [N] and [M].

    Example:
        >>> {k: v.item() for k, v in detection_metrics(torch.tensor([0.1, 0.2]), torch.tensor([0.3])).items()}
        {'ood_auroc': 1.0, 'ood_auprc_out': 1.0, 'ood_auprc_in': 1.0, 'ood_fpr95': 0.0}
    """
    score = torch.cat([inside, outside])
    is_ood = torch.arange(len(score), device=score.device) >= len(inside)
    return {
        "ood_auroc": auroc(score, is_ood),
        "ood_auprc_out": average_precision(score, is_ood, "out"),
        "ood_auprc_in": average_precision(score, is_ood, "in"),
        "ood_fpr95": fpr_at_tpr(score, is_ood, 0.95, fpr95_positive),
    }


def named_scores(scores: Any) -> dict[str, str | Score] | None:
    """Scores by name, from the argument ``scores``; None for the default ones.

    Raises:
        InputError: The argument holds something else, or functions with equal names.
    """
    if scores is None:
        return None
    if isinstance(scores, str) or callable(scores):
        scores = (scores,)
    if isinstance(scores, Mapping):
        named = dict(scores)
    elif isinstance(scores, Sequence):
        named = {one if isinstance(one, str) else getattr(one, "__name__", ""): one for one in scores}
        if len(named) < len(scores) or named.keys() & {"", "<lambda>"}:
            raise InputError(
                "The functions in argument `scores` must have different names. Pass a mapping from names to functions instead."
            )
    else:
        raise InputError(f"`scores` must be names or functions, but its type is {type(scores).__name__}.")
    wrong = [score for score in named.values() if not isinstance(score, str) and not callable(score)]
    if wrong or not named:
        came = f"it holds an object of type {type(wrong[0]).__name__}" if wrong else "it is empty"
        raise InputError(f"`scores` must hold names or functions, but {came}.")
    return named
