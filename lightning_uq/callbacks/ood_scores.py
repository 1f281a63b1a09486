"""Out-of-distribution scores: who provides them, how a loader's are kept, and how well they tell two data sets apart."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.ood import auroc, average_precision, fpr_at_tpr

Score = Callable[[Tensor], Tensor]
AnyScore = Callable[[Any], Any] | str  # the command line takes the first that fits, and a function's path is also a str


@runtime_checkable
class OODScorer(Protocol):
    """What a callback of the same Trainer, or the module itself, has so that its scores are among those logged.

    The model runs once per batch, inside the context that :meth:`ood_scores` returns, so a scorer may hook a layer there;
    the function that the context yields is called after it. A name that the prediction also has is then this scorer's. Both
    must do without collectives: ranks may hold unequal numbers of batches.

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

    def ood_scores(self, model: Any) -> AbstractContextManager[Callable[[Tensor], Mapping[str, Tensor]]]:
        """A context around one call of the model; it yields ``f(logits [Z, B, C]) -> {name: [B]}``."""


class LoaderScores:
    """The scores of one loader's samples, by name."""

    def __init__(self, wanted: Mapping[str, str | Score], scorers: Sequence[OODScorer]) -> None:
        self.wanted = wanted
        self.scorers = scorers
        self._rows: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def restart(self, other: "LoaderScores") -> None:
        """Take the scores that another one computes, before any row was added."""
        self.wanted, self.scorers, self._rows = other.wanted, other.scorers, other._rows

    @property
    def is_empty(self) -> bool:
        """Whether no row was added yet."""
        return not any(self._rows.values())

    def add(self, name: str, rows: Tensor) -> None:
        """Add the scores of some rows."""
        self._rows[name].append(rows)

    def rows(self, name: str) -> Tensor:
        """All scores of that name so far."""
        return torch.cat(self._rows[name]) if self._rows[name] else torch.empty(0)


def detection_metrics(inside: Tensor, outside: Tensor) -> dict[str, Tensor]:
    """The four numbers that are logged, of the scores of in- and of out-of-distribution samples, [N] and [M].

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
        "ood_fpr95": fpr_at_tpr(score, is_ood, 0.95, "in"),
    }


def named_scores(scores: Any) -> dict[str, str | Score] | None:
    """Scores by name, from what argument ``scores`` accepts; None for the default ones.

    Raises:
        InputError: It holds something else, or functions that have no names of their own.
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
