"""A Gaussian per class over a trained network's features, with density, Mahalanobis and relative Mahalanobis scores."""

from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.coordinates import FeatureCoordinates
from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.callbacks.label_checks import ClassCounts
from lightning_uq.errors import InputError
from lightning_uq.functional.feature_transforms import FeatureTransform, transform_features
from lightning_uq.functional.gaussian import Covariance, Priors, Regularization
from lightning_uq.functional.validation import check_choice, check_integer
from lightning_uq.networks.class_halves import ClassHalves
from lightning_uq.networks.density import DensityScore, GaussianDensity
from lightning_uq.networks.feature_density import FeatureDensity
from lightning_uq.networks.feature_score import FeatureScore
from lightning_uq.networks.gaussian_mixture import MAX_MIXTURE_ROWS, fit_mixture, in_order
from lightning_uq.networks.positions import resized
from lightning_uq.running.classes import check_targets, density_labels, labelled_batch
from lightning_uq.running.ranks import raising_on_all_ranks, sum_of_ranks

Statistics = dict[FeatureTransform, list[ClassHalves]]
"""Statistics of each member's features, by coordinates."""


class FitGMM(FeatureCallback):
    """Deep Deterministic Uncertainty after training: a Gaussian per class over the features, for any LightningModule.

    The fit takes one pass over the training data, in float64 and with C D^2 numbers in memory. The network is in evaluation mode, without the
    augmentation that transfer hooks add. (Augmentation inside a data set cannot be removed from outside: give the data
    module a ``uq_fit_dataloader()``, or pass ``dataloader``.) The result is the same on any number of ranks.

    The predictions of this package's modules then carry ``log_density`` and ``ood_score``. :class:`OODDetection` logs the score,
    and :meth:`score` returns it for any loader. An ensemble has one density per member, pooled by log-mean-exp. A
    network with MC-dropout has one density, of its features without masks.

    A model without classes has one Gaussian. ``num_components`` ignores labels: it fits one Gaussian to all rows, or a mixture of K,
    by EM on at most 2^14 rows, sampled identically on any number of ranks.

    For a segmentation, ``pool="positions"`` makes each position a row. Its features are the input of a 1x1 convolution or of a token's linear
    layer. If their grid differs from the labels', the label is that of the nearest position. ``log_density`` is then a map [B, *P].
    Positions whose label is the task's ``ignore_index`` are left out. If that label is also the index of a class, as that of a padding tag
    may be, this class has no Gaussian: its prior is 0, and its :meth:`log_prob` minus infinity.

    Args:
        covariance: ``"full"`` (DDU), ``"tied"`` (one for all classes) or ``"diagonal"``.
        priors: ``"uniform"`` or ``"empirical"`` class priors in the density.
        num_components: K, for a mixture whose components are found without labels; None fits one Gaussian per class.
        regularization: ``"held_out"`` chooses the strength and the target of the shrinkage of the covariances by the likelihood of the held-out
            half of the rows. Also ``"oas"``, an absolute value, or ``"ddu"``, the original's schedule: see
            :func:`~lightning_uq.functional.gaussian.fit_gaussian`.
        score: ``"log_density"``, ``"mahalanobis"`` or ``"relative_mahalanobis"``; the last one is the most robust across
            architectures.
        feature_transform: ``"raw"`` fits the features as they are, ``"polar"`` their direction and the log of their length, and ``"direction"``
            only the direction. ``"combined"`` fits raw and polar features, and the score is the larger -log p of the two, with p from the
            held-out rows. ``"auto"`` is "combined" if there are held-out rows, and otherwise "polar", which a message reports.
            For "relative_mahalanobis", which already removes what all classes share, "auto" is "raw". ``log_density`` is that of the
            raw features if they are fitted. docs/density.md has the evidence.
        held_out: Rows that the network was not trained on; by default the only validation loader.
        scoring_dtype: ``"float32"`` computes the matrix products of scoring in single precision, about three times as fast; the fit is always
                in float64.
        memory_budget: The largest memory of the scatter matrices, in bytes.
        fitting: Arguments of :class:`FeatureCallback`: ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name``,
            ``attach`` and others.

    Raises:
        InputError: At the start of the training, if the problem is visible then. In the fit, for a class with fewer than two
            rows (unless its label is the task's ``ignore_index``), NaN features, a covariance that cannot be factored, or too little memory.

    Source: Mukhoti et al., CVPR 2023 (arXiv 2102.11582); Ren et al., arXiv 2106.09022.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> loader = [(x, (x[:, 0] > 0).long())]
        >>> gmm = FitGMM(regularization=1e-3).fit(network, loader)
        >>> gmm.score(network, [x, 100 * x]).shape
        torch.Size([80])
    """

    runs_sharded = True
    can_continue = True

    def __init__(
        self,
        *,
        covariance: Covariance = "full",
        priors: Priors = "uniform",
        num_components: int | None = None,
        regularization: Regularization = "held_out",
        score: DensityScore = "log_density",
        feature_transform: FeatureTransform = "auto",
        held_out: Any = None,
        scoring_dtype: Literal["float64", "float32"] = "float64",
        memory_budget: int = 4 * 2**30,
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        is_relative = feature_transform == "auto" and score == "relative_mahalanobis" and held_out is None
        self.coordinates = FeatureCoordinates("raw" if is_relative else feature_transform, held_out)
        check_choice("scoring_dtype", scoring_dtype, ("float64", "float32"))
        GaussianDensity(score=score)  # checks the name
        self.scoring_dtype = scoring_dtype
        self.covariance = covariance
        self.priors = priors
        if num_components is not None:
            check_integer("num_components", num_components, 1)
        self.num_components = num_components
        self._counts = ClassCounts()
        self.regularization = regularization
        self.density_score: DensityScore = score
        self.score_name = score
        if len(self.coordinates.names) > 1:
            self.score_name = "density" if score == "log_density" else f"combined_{score}"
        self.memory_budget = memory_budget

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on. ``score`` is one of them, since a file stores one score."""
        return {
            **super().settings,
            "covariance": self.covariance,
            "priors": self.priors,
            "regularization": self.regularization,
            "num_components": self.num_components,
            "feature_transform": self.coordinates.transform,
            "score": self.density_score,
        }

    @property
    def densities(self) -> list[GaussianDensity]:
        """The density of each member's features, of the raw features if they are fitted; empty before a fit."""
        return [] if self.scorer is None else _as_density(self.scorer).densities

    # ------------------------------------------------------------------ fitting

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """One streaming pass, whose sums are merged over the ranks at its end, and a pass over the held-out rows if a tail needs them."""
        if self.num_components not in (None, 1):
            rows = in_order(self.gather_features(model, loader, trainer, MAX_MIXTURE_ROWS))
            return self._with_tails(self._fit_mixture(rows), model, trainer)
        with raising_on_all_ranks(trainer):
            statistics, num_classes = self._stream(model, loader, trainer)
        first = statistics[self.coordinates.names[0]]
        D = first[0].num_features if first else 0
        members, classes, D = self.largest_shape((len(first), num_classes, D), trainer)
        if trainer is not None and trainer.world_size > 1:
            for name, found in statistics.items():
                more = int(name == "polar") - int(self.coordinates.names[0] == "polar")
                self._reduce(found, members, classes, D + more, trainer)
        return self._with_tails(self._fit_statistics(statistics, self._absent(model)), model, trainer)

    def _with_tails(self, density: FeatureDensity, model: nn.Module, trainer: Trainer | None) -> dict[str, Any]:
        """The tensors of a density, with the tails of its scores if there are two."""
        tails = self.coordinates.tails(self, model, trainer, density.part_score)
        return self._to_tensors(FeatureDensity(density.members, tails, self.density_score))

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Check that the batch has labels, and that logits and features can be read."""
        labels, num_classes = None, self._labelled(model, batch, trainer)
        if self.num_components is None:
            labels = density_labels(self.logits, model, batch, f"{type(self).__name__}'s fitting data")
        features = self.features(model, batch, trainer)
        rows, *_ = self._by_row(model, batch, features, labels, torch.arange(features.shape[1]))
        self._counts.see(labels, features)
        for name in self.coordinates.names:  # raises if the statistics do not fit into memory
            self._statistics(num_classes, transform_features(rows[0, :1], name).shape[1], len(rows))
        self.features.reset()

    def fits_targets(self, model: nn.Module) -> bool:
        """True if the task has classes, each with its own Gaussian. Targets that implied a task with labels must keep implying it."""
        has_labels = self.logits.task(model).has_classes or self.logits.inferred_task == "multilabel"
        return has_labels and self.num_components is None

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Check that the task accepts every label, and that every class has two rows."""
        check_targets(self.logits, model, target, outputs, f"{type(self).__name__}'s fitting data")
        counts = ClassCounts(self._counts.grids)
        counts.note(self.logits.task(model), target, self._num_classes(model, outputs[:, :1]))
        counts.check()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the findings of the last training."""
        self._counts = ClassCounts()
        super().on_fit_start(trainer, pl_module)
        self.coordinates.check(self, pl_module, trainer)

    def note_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Count the rows of each class."""
        self._counts.note(self.logits.task(model), target, self._num_classes(model, outputs))

    def review_noted_targets(self, trainer: Trainer) -> None:
        """Warn about a class with fewer than two rows. The epoch may have skipped rows that the fit will see."""
        self._counts.review(trainer, type(self).__name__)

    def fit_features(self, features: Tensor, labels: Tensor | None = None, num_classes: int | None = None) -> "FitGMM":
        """Fit features [N, D], or [M, N, D] of an ensemble's members, with labels [N] from memory.

        Args:
            features: The features.
            labels: Class indices; not used with ``num_components``.
            num_classes: C; by default the largest label plus one.

        Example:
            >>> features = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
            >>> gmm = FitGMM(feature_transform="raw", regularization=0.0).fit_features(features, torch.tensor([0, 0, 1, 1]))
            >>> gmm.log_prob(torch.tensor([[0.0]])).round(decimals=2)
            tensor([[ -1.2700, -26.2700]], dtype=torch.float64)
        """
        if self.coordinates.transform == "combined":
            raise InputError(
                "feature_transform='combined' needs held-out rows, which `fit_features` does not take. Call `fit(model, loader)`."
            )
        if (labels is None) != (self.num_components is not None):
            raise InputError("`fit_features` needs `labels`, or `num_components` of the callback, but not both.")
        self._set(None, None)
        if labels is None:
            self._set(self._to_tensors(self._fit_mixture(_by_member(features))), None)
            return self
        statistics: Statistics = {name: [] for name in self.coordinates.names}
        classes = int(labels.max()) + 1 if num_classes is None else num_classes
        self._update(statistics, _by_member(features), labels, torch.arange(len(labels)), classes)
        self._set(self._to_tensors(self._fit_statistics(statistics)), None)
        return self

    def _fit_mixture(self, features: Tensor) -> FeatureDensity:
        """A mixture for each member's features [M, N, D], in all coordinates."""
        K, parts = self.num_components or 1, {}
        for name in self.coordinates.names:
            fits = [
                fit_mixture(rows, K, self.covariance, self.regularization)
                for rows in transform_features(features, name)
            ]
            parts[name] = [GaussianDensity(fit) for fit in fits]
        return FeatureDensity(parts, score=self.density_score)

    def _fit_statistics(self, statistics: Statistics, absent: int | None = None) -> FeatureDensity:
        """The densities; the class ``absent`` has none."""
        how = self.covariance, self.priors, self.regularization, absent
        parts = {name: [GaussianDensity(one.fit(*how)) for one in found] for name, found in statistics.items()}
        return FeatureDensity(parts, score=self.density_score)

    def _absent(self, model: nn.Module) -> int | None:
        """The class that no row can have, because its label is ignored."""
        return self.logits.task(model).ignored_label if self.num_components is None else None

    def _to_tensors(self, density: FeatureDensity) -> dict[str, Any]:
        return {"feature_layer": self.features.resolved, **density.tensors()}

    def _update(
        self, statistics: Statistics, features: Tensor, labels: Tensor, samples: Tensor, num_classes: int
    ) -> None:
        """Add rows [M, N, D] of M members, in all coordinates, with labels [N] and samples [N]."""
        for name, members in statistics.items():
            for i, rows in enumerate(transform_features(features, name)):
                if i == len(members):
                    members.append(self._statistics(num_classes, rows.shape[1], len(features)))
                members[i].update(rows.cpu(), labels.cpu(), samples)

    def _stream(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> tuple[Statistics, int]:
        """The statistics of this rank's rows, and the number of classes."""
        held = SimpleNamespace(statistics={name: [] for name in self.coordinates.names}, num_classes=0, layer=None)
        reading = self.reading(model, loader, trainer)
        for batch in reading.batches(held):
            y = None
            if self.num_components is None:
                y = density_labels(self.logits, model, batch, f"{type(self).__name__}'s fitting data", trainer)
            if not held.num_classes:
                held.num_classes = self._labelled(model, batch, trainer)
            features = self.features(model, batch, trainer)
            held.layer = self.features.resolved
            features, y, samples = self._by_row(model, batch, features, y, reading.numbers(features.shape[1]))
            self._update(held.statistics, features, y, samples, held.num_classes)
        self.features.reset(held.layer)
        return held.statistics, held.num_classes

    def _statistics(self, num_classes: int, num_features: int, members: int = 1) -> ClassHalves:
        copies, halved = members * len(self.coordinates.names), self.regularization == "held_out"
        return ClassHalves(num_classes, num_features, self.covariance, self.memory_budget, copies=copies, halved=halved)

    def _by_row(
        self, model: nn.Module, batch: Any, features: Tensor, y: Tensor | None, samples: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features [M, N, D] with labels [N] and samples [N]: one row per counted sample, or per counted position of maps [M, B, D, *P].

        Raises:
            InputError: The labels are per position and the features per sample, or the reverse.
        """
        if y is None:  # one class
            positions = self.counted_positions(model, batch, features)
            y = torch.zeros(features.shape[1], *features.shape[3:], dtype=torch.long)
        elif (features.ndim > 3) != (y.ndim > 1):
            found = "one per position of a map" if y.ndim > 1 else "one per input"
            raise InputError(
                f"{type(self).__name__} needs one label per row of features, but the labels {list(y.shape)} are {found}, and the "
                f"features at layer {self.features.resolved!r} are {list(features.shape[1:])}. "
                + ("Pass `pool='positions'`." if y.ndim > 1 else "Pass another `pool` than 'positions'.")
            )
        else:
            y = resized(y, features.shape[3:])
            positions = self.logits.task(model).row_positions(y)
        rows = features.movedim(2, -1).flatten(1, -2)
        labels, samples = y.reshape(-1), samples.repeat_interleave(y.shape[1:].numel())
        if positions is None:
            return rows, labels, samples
        return rows[:, positions.to(rows.device)], labels[positions], samples[positions.cpu()]

    def _labelled(self, model: nn.Module, batch: Any, trainer: Trainer | None) -> int:
        """The number of classes, from a batch whose outputs and labels are checked; 1 if the task has no classes."""
        if self.num_components is not None:
            return 1
        where = f"{type(self).__name__}'s fitting data"
        density_labels(self.logits, model, batch, where, trainer)
        if not self.logits.task(model).has_classes:
            return 1
        outputs = self.logits(model, batch, trainer)
        labelled_batch(self.logits, model, batch, outputs, where)
        return self._num_classes(model, outputs)

    def _num_classes(self, model: nn.Module, outputs: Tensor) -> int:
        """C, from the outputs [Z, B, ...] of a classifier."""
        prediction: Any = self.logits.prediction(model, outputs, to_members=False)
        return int(prediction.probs.shape[1])

    def _reduce(
        self, statistics: list[ClassHalves], members: int, classes: int, num_features: int, trainer: Trainer
    ) -> None:
        while len(statistics) < members:  # a rank without rows contributes zeros
            statistics.append(self._statistics(classes, num_features, members))
        for member in statistics:
            member.reduce(partial(sum_of_ranks, trainer=trainer))

    def make_scorer(self, tensors: dict[str, Any]) -> FeatureDensity:
        """The densities from the fitted tensors."""
        return FeatureDensity.from_tensors(tensors, getattr(torch, self.scoring_dtype))

    # ------------------------------------------------------------------ scoring

    def log_prob(self, features: Tensor) -> Tensor:
        """Log p(f | c) [N, C] in float64, without the prior, of features [N, D], or of [M, N, D] pooled by log-mean-exp."""
        return _as_density(self._fitted_scorer(features)).log_prob(_by_member(features))

    def log_density(self, features: Tensor) -> Tensor:
        """Log-density [N] in float64 of features [N, D], or of [M, N, D] pooled over members by log-mean-exp."""
        return _as_density(self._fitted_scorer(features)).log_density(_by_member(features))


def _as_density(scorer: FeatureScore) -> FeatureDensity:
    assert isinstance(scorer, FeatureDensity)
    return scorer


def _by_member(features: Tensor) -> Tensor:
    return features if features.ndim == 3 else features.unsqueeze(0)
