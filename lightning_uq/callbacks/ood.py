"""Measures how well scores separate out-of-distribution inputs from the test set, for any classifier."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_uq import batches
from lightning_uq.callbacks.ood_positions import counted_positions
from lightning_uq.callbacks.ood_scores import AnyScore, LoaderScores, OODScorer, PixelScores, check_score, named_scores
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.scores import NEED_LOGITS
from lightning_uq.functional.validation import check_choice
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.networks.padding_mask import padding_mask_of
from lightning_uq.networks.sharding import GatheredStage
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.finite import unusable_rows
from lightning_uq.running.loaders import check_loader, exact_loader, loader_list
from lightning_uq.running.logits import LogitReader, UnpackBatch
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.ranks import raise_on_all_ranks, raising_on_all_ranks
from lightning_uq.running.step_input import StepInput
from lightning_uq.strategies import check_strategy
from lightning_uq.tasks import Task, describe

DEFAULT_SCORES = ("predictive_entropy", "max_softmax", "energy")
"""The default scores of a module without a score of its own, computed from one row of logits."""


class OODDetection(Callback):
    """Tests how well scores separate other data sets from the test set, for any LightningModule that classifies.

    Each in-distribution batch is scored during the test. After the last one, the loaders of ``ood`` are
    read; the module's ``test_step`` never gets their batches. For each loader and each score, these metrics are logged (and returned by
    ``trainer.test``). Higher scores mean more out of distribution.

    - ``ood_auroc/<name>/<score>``: area under the ROC curve;
    - ``ood_auprc_out/<name>/<score>`` and ``ood_auprc_in/...``: average precision with out- or in-distribution as the positive class;
    - ``ood_fpr95/...``: the share of out-of-distribution inputs that are accepted when 95 % of the test set is, or, with
      ``fpr95_positive="out"``, the share of the test set that is flagged when 95 % of the out-of-distribution inputs are.

    Scoring costs one more forward pass per batch, in evaluation mode and with an isolated random state, on a
    copy of the batch as the test step got it, so the user's metrics do not change. Every sample counts once on any
    number of ranks. Only the scores are stored, one number per sample. ``limit_test_batches`` also limits the batches per
    rank of the ``ood`` loaders.

    The out-of-distribution batches pass through the same transfer hooks as those of the test set, so they should have the same structure.
    Randomness is not averaged: a loader that augments is scored with its augmentation. (Under DDP, each rank
    draws a random sampler of the *test* set separately; give the ranks the same seed with ``seed_everything``.)

    Args:
        ood: The loaders by name, or a function that returns them, called when testing starts. None: the data module's
            ``ood_dataloaders()``. They are read in order, without shuffling or ``drop_last``, and divided among the ranks.
        scores: Names of the scores of the task's predictions (see ``Task.score_names``) or of an :class:`OODScorer`, functions
            ``logits [Z, B, C] -> [B]``, or a mapping from a name to either. None: the module's own ``ood_score`` (or
            :data:`DEFAULT_SCORES` for a module without one), and all scores of other callbacks of the Trainer.
        predict_fn: ``predict_fn(model, x)`` returns the input of ``output``: logits [B, C], or [Z, B, C] for an ensemble. Default ``forward``.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``; only the ``ignore_index`` of a map's target is used. Default ``(x, y)``, a bare ``x`` or
            a mapping with ``input``.
        output: What the module (or ``predict_fn``) returns: ``"logits"``, ``"probs"``, ``"log_probs"``, or a function
            that picks the logits. The first batch is checked. With probabilities or log-probabilities, ``energy`` and ``max_logit`` are unavailable.
        task: What the outputs of an unmodified module mean: a :class:`~lightning_uq.tasks.Task` or its name. None: one label per input.
        in_distribution: The index of the in-distribution test loader, if there are several (the others may be shifted versions of it); None pools all of them.
        level: For predictions that are maps, such as a segmentation's. "image": each input has two scores, the mean and
            the maximum over its positions, logged as ``<score>/mean`` and ``<score>/max``. "pixel": the positions of the test set
            are compared with those of an ``ood`` loader, logged as ``<score>/pixel``. Positions whose target is the task's
            ``ignore_index`` are skipped if a batch has targets in the map's shape. Tokens that an ``attention_mask`` or
            ``src_key_padding_mask`` of the network's input [B, T] marks as padding are skipped at both levels. "pixel" stores histograms
            with a bin width of 0.05 %, so memory does not grow with the number of pixels.
        masks: With ``level="pixel"``, whether the targets of the ``ood`` loaders are masks [B, *P]: positions with value 1 are out of
            distribution, and all others are skipped. Without masks, all counted positions are out of distribution.
        fpr95_positive: The class of which ``ood_fpr95`` accepts 95 %: "in" or "out": see :class:`~lightning_uq.metrics.OODFPR95`.

    Raises:
        InputError: An argument is invalid; there is no loader, or an empty one; the outputs are not a classifier's logits; a
            score is NaN. An error on one rank is raised on all.
        UnsupportedError: Under FSDP1, DeepSpeed or tensor parallelism, or with ``test_step(dataloader_iter)``.

    Example:
        >>> x = torch.tensor([[4.0, 0.0], [0.0, 3.0], [0.1, 0.0]])
        >>> OODDetection(scores="max_softmax").score(nn.Identity(), [x])
        {'max_softmax': tensor([0.0180, 0.0474, 0.4750])}
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def __init__(
        self,
        ood: Mapping[str, Any] | Callable[[], Any] | None = None,
        scores: Sequence[AnyScore] | Mapping[str, AnyScore] | AnyScore | None = None,
        *,
        predict_fn: PredictFn | str | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        output: Output = "logits",
        task: Task | str | None = None,
        in_distribution: int | None = 0,
        level: Literal["image", "pixel"] = "image",
        masks: bool = False,
        fpr95_positive: Literal["in", "out"] = "in",
    ) -> None:
        super().__init__()
        if ood is not None and not callable(ood):
            _check_loaders(ood, "argument `ood`")
        self.ood = ood
        self.scores = named_scores(scores)
        self.read = LogitReader(predict_fn, unpack_batch, output, task)
        self.in_distribution = in_distribution
        check_choice("level", level, ("image", "pixel"))
        if masks and level != "pixel":
            raise InputError("`masks=True` needs `level='pixel'`, but `level` is 'image'.")
        self.level = level
        self.masks = masks
        self._step_input = StepInput()
        self._gathered = GatheredStage()
        check_choice("fpr95_positive", fpr95_positive, ("in", "out"))
        self.fpr95_positive: Literal["in", "out"] = fpr95_positive
        self._reset()

    def _reset(self) -> None:
        self._loaders: dict[str, Any] = {}
        self._inside: LoaderScores | None = None
        self._batch: Any = None
        self._error: Exception | None = None

    # ------------------------------------------------------------------ without a Trainer

    def score(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, Tensor]:
        """The scores {name: [N]} of a loader's samples, on the CPU. Row i is sample i, even if the loader shuffles.

        Args:
            model: Any classifier; it runs on the device and in the precision of its parameters.
            loader: A DataLoader or an iterable of batches.
        """
        if self.level == "pixel":
            raise InputError(
                "`score` returns one number per input, so it needs `level='image'`, but `level` is 'pixel'."
            )
        scored = self._scored(model, None)
        with evaluating(model):
            exact, is_open = exact_loader(loader, name="argument `loader`"), self.read.is_task_open(model)
            self._score_loader(scored, model, exact, None, shows_task=is_open)
        return {name: scores.cpu() for name, scores in scored.merged(None, "`loader`").items()}

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject invalid settings before anything runs."""
        check_strategy(trainer, type(self).__name__, runs_sharded=True)
        self._step_input = StepInput()
        if is_param_in_hook_signature(pl_module.test_step, "dataloader_iter", explicit=True):
            raise UnsupportedError(
                "OODDetection does not support `test_step(dataloader_iter)`, which hides batches from hooks."
            )
        self._scored(pl_module, trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the loaders, and gather the parameters of a sharded model, since ranks may have different numbers of rows to score."""
        self._reset()
        self._gathered.start(pl_module)
        self.read.inferred_task = None  # the test set may be a different one
        number = len(loader_list(trainer.test_dataloaders))
        if self.in_distribution is not None and not 0 <= self.in_distribution < number:
            raise InputError(
                f"`in_distribution` must be the index of one of the {number} test loaders or None, but it is "
                f"{self.in_distribution}."
            )
        self._inside = self._scored(pl_module, trainer)
        self._loaders = self._find_loaders(trainer)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the batch, since the test step may change it in place."""
        if self.in_distribution in (None, dataloader_idx):
            self._batch = batches.own_batch(batch)
            self._step_input.start_reading(pl_module, batch, self.read)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch that was just tested."""
        self._step_input.end(pl_module, "test_step")
        if self.in_distribution not in (None, dataloader_idx) or self._error is not None or self._inside is None:
            return
        loader = loader_list(trainer.test_dataloaders)[dataloader_idx]
        try:
            with evaluating(pl_module, trainer):
                self._score_batch(
                    self._inside,
                    pl_module,
                    self._batch,
                    trainer,
                    lambda size: batches.unpadded_rows(loader, batch_idx, size),
                    inside=True,
                )
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._error = error  # raised on all ranks at the end; raised here, the other ranks would wait forever
        finally:
            self._batch = None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the out-of-distribution loaders, and log the metrics."""
        inside = self._inside
        if inside is None:
            return
        raise_on_all_ranks(self._error, trainer)
        self.read.agree_on_task(pl_module, trainer, is_first=inside.is_empty)
        reference = inside.merged(trainer, "the test set")
        for ood_name, loader in self._loaders.items():
            where = f"`ood[{ood_name!r}]`"
            outside = self._scored(pl_module, trainer)
            batches_of_rank = exact_loader(loader, trainer, name=where, limit=trainer.limit_test_batches)
            with raising_on_all_ranks(trainer), evaluating(pl_module, trainer):
                self._score_loader(outside, pl_module, batches_of_rank, trainer)
            for name, scores in outside.merged(trainer, where).items():
                for metric, value in outside.metrics(reference[name], scores, self.fpr95_positive).items():
                    # Every rank has the same value; `sync_dist` only avoids a warning of Lightning.
                    pl_module.log(f"{metric}/{ood_name}/{name}", value, batch_size=1, sync_dist=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the scores."""
        self._gathered.end()
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report an empty test set, for which Lightning calls no other hook."""
        if stage == "test":
            batches.check_not_empty(trainer, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Free the scores."""
        self._gathered.end()
        self._step_input.drop()
        self._reset()

    # ------------------------------------------------------------------ loaders

    def _find_loaders(self, trainer: Trainer) -> dict[str, Any]:
        if self.ood is not None:
            found, name = (self.ood(), "what `ood` returns") if callable(self.ood) else (self.ood, "argument `ood`")
            return _check_loaders(found, name)
        provider = getattr(getattr(trainer, "datamodule", None), "ood_dataloaders", None)
        if provider is None:
            raise InputError(
                "OODDetection has no loaders. Pass `ood={'name': loader}`, or give the data module a method "
                "`ood_dataloaders` that returns them."
            )
        return _check_loaders(provider(), "what `ood_dataloaders` returns")

    # ------------------------------------------------------------------ scoring

    def _scored(self, model: nn.Module, trainer: Trainer | None) -> LoaderScores:
        """The scores to compute for a model, still empty."""
        callbacks = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
        scorers = [one for one in (model, *callbacks) if isinstance(one, OODScorer)]
        provided = [name for scorer in scorers for name in scorer.ood_score_names]
        twice = {name for name in provided if provided.count(name) > 1}
        if twice:
            raise InputError(f"Several callbacks provide the scores {sorted(twice)}. Give each its own `name`.")
        task = self.read.task(model)
        void = NEED_LOGITS if self.read.lacks_logits(model) else ()
        known = [*(name for name in task.score_names if name not in void), *provided]
        wanted = self.scores
        if wanted is None:
            wanted = {name: name for name in dict.fromkeys([*self._default_scores(model, void), *provided])}
            if not wanted:
                raise InputError(
                    f"{describe(task)} has no score for a single network. Score an ensemble, or add a callback with a "
                    "score, such as FitKNN."
                )
        unknown = [score for score in wanted.values() if isinstance(score, str) and score not in known]
        if unknown:
            why = ", which needs logits: these outputs are log-probabilities" if unknown[0] in void else ""
            hint = " `FitGMM(feature_transform='raw')` provides it." if unknown[0] == "log_density" else ""
            raise InputError(
                f"`scores` must hold functions or, for {describe(task)}, names from {', '.join(known)}, but it holds "
                f"{unknown[0]!r}{why}.{hint}"
            )
        needed = [scorer for scorer in scorers if {*scorer.ood_score_names}.intersection(wanted.values())]
        return (PixelScores if self.level == "pixel" else LoaderScores)(wanted, needed)

    def _default_scores(self, model: nn.Module, void: Sequence[str]) -> list[str]:
        """The default scores of the predictions: the module's own, or those of its task."""
        task, own = self.read.task(model), getattr(model, "ood_score", None)
        # A `predict_fn` returns raw outputs, which may lack the module's own score.
        if isinstance(own, str) and (self.read.predict_fn is None or own in task.score_names):
            return [own]
        if task.needs_members and self.read.predict_fn is None:
            return []
        return [name for name in DEFAULT_SCORES if name in task.score_names and name not in void] or [task.ood_score]

    def _score_loader(
        self,
        scored: LoaderScores,
        model: nn.Module,
        loader: Iterable[Any],
        trainer: Trainer | None,
        *,
        shows_task: bool = False,
    ) -> None:
        for batch in loader:
            self._score_batch(scored, model, to_device(batch, model, trainer), trainer, shows_task=shows_task)

    def _score_batch(
        self,
        scored: LoaderScores,
        model: nn.Module,
        batch: Any,
        trainer: Trainer | None,
        rows: Callable[[int], Tensor | None] = lambda size: None,
        *,
        inside: bool = False,
        shows_task: bool = False,
    ) -> None:
        """Add a batch's scores to ``scored``.

        Args:
            scored: Collects the scores.
            model: The model.
            batch: The batch.
            trainer: The Trainer, if there is one.
            rows: ``rows(B)`` is the mask of the rows that count; None counts all.
            inside: Whether the batch is from the test set.
            shows_task: Whether its targets are of the model's task; an ``ood`` loader may have any targets.
        """
        all_provided = self.scores is not None and scored.all_provided
        if (
            not all_provided
            and (inside or shows_task)
            and self.read.look_at_task(model, batch, trainer, is_first=scored.is_empty)
        ):
            scored.restart(self._scored(model, trainer))  # the task determines the scores
        if inside and scored.is_empty and not scored.all_provided:
            self.read.check_default_task(model, batch)
        with ExitStack() as stack:
            mask = stack.enter_context(padding_mask_of(model))
            provided = [stack.enter_context(scorer.ood_scores(model)) for scorer in scored.scorers]
            if all_provided:
                found, _ = self.read.outputs_if_any(model, batch, trainer)
                if found is None:  # scores of features need no outputs
                    scored.add_provided({k: v for one in provided for k, v in one(None).items()}, rows)
                    return
                outputs = found
            else:
                outputs = self.read(model, batch, trainer, check=scored.is_empty)
            if scored.is_empty and self.read.lacks_logits(model):
                scored.restart(self._scored(model, trainer))
            prediction = self.read.prediction(model, outputs)
            logits = prediction.logits if prediction.has_logits else outputs
            values = {name: value for function in provided for name, value in function(logits).items()}
        keep = rows(logits.shape[1])
        counted = None
        if prediction.map_shape:
            shape, masked = [len(prediction), *prediction.map_shape], self.masks and not inside
            by_target = self.level == "pixel"
            counted = counted_positions(
                self.read, model, batch, shape, mask.tokens, by_target=by_target, is_mask=masked
            )
        if counted is not None and keep is not None:
            counted = counted[keep]
        for name, score in scored.wanted.items():
            if isinstance(score, str):
                value = (
                    values[score] if score in values else self._without_alarm(model, prediction.score(score), outputs)
                )
            else:
                value = score(logits)
            check_score(name, value, [len(prediction), *prediction.map_shape])
            value = value if keep is None else value[keep.to(value.device)]
            scored.add(name, value, None if counted is None or value.ndim == 1 else counted)

    def _without_alarm(self, model: nn.Module, score: Tensor, outputs: Tensor) -> Tensor:
        """A score [B, ...], NaN in rows whose outputs are not finite: here they are an error, not out of distribution."""
        bad = unusable_rows(outputs, self.read.task(model)).reshape(-1, *[1] * (score.ndim - 1))
        return score.masked_fill(bad, torch.nan)


def _check_loaders(loaders: Any, name: str) -> dict[str, Any]:
    if not isinstance(loaders, Mapping) or not loaders or not all(isinstance(key, str) for key in loaders):
        came = "empty" if isinstance(loaders, Mapping) and not loaders else f"of type {type(loaders).__name__}"
        raise InputError(f"{name[0].upper()}{name[1:]} must be a mapping from names to data loaders, but it is {came}.")
    for key, loader in loaders.items():
        check_loader(loader, f"`ood[{key!r}]`")
    return dict(loaders)
