"""A Gaussian per class over a trained network's features: density, Mahalanobis and relative Mahalanobis scores."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.gaussian import Covariance, Priors, Regularization, check_class_counts, fit_gaussian
from lightning_uq.functional.validation import check_choice
from lightning_uq.method import Method, Setting
from lightning_uq.networks.class_statistics import ClassStatistics
from lightning_uq.networks.density import DensityScore, GaussianDensity
from lightning_uq.networks.pooling import Pool
from lightning_uq.networks.positions import resized, score_positions
from lightning_uq.running.classes import check_targets, density_labels, labelled_batch
from lightning_uq.running.evaluation import to_device
from lightning_uq.running.features import LayerFeatures
from lightning_uq.running.ranks import gather_objects, raising_on_all_ranks
from lightning_uq.running.transforms import Change, PredictionTransform


class FitGMM(FeatureCallback):
    """Deep Deterministic Uncertainty after training: a Gaussian per class over the features, on any LightningModule.

    One pass over the training data, in float64 and in memory C D^2, with the network in evaluation mode and without the
    augmentation that transfer hooks add. (Augmentation inside a data set cannot be removed from outside: give the data
    module a ``uq_fit_dataloader()``, or pass ``dataloader``.) On any number of ranks the numbers are those of one.

    The predictions of this package's modules then carry ``log_density``; with :class:`OODDetection` the score is among
    those logged; :meth:`score` gives it for any loader. An ensemble has one density a member, pooled by log-mean-exp; a
    network with MC-dropout has one, of its features without masks.

    Of a segmentation, ``pool="positions"`` makes each position a row: the features before a 1x1 convolution or a token's linear
    layer, with the label of the nearest position where they have another grid. ``log_density`` is then a map [B, *P].

    Args:
        covariance: ``"full"`` (DDU), ``"tied"`` (one for all classes) or ``"diagonal"``.
        priors: ``"uniform"`` or ``"empirical"`` class priors in the density.
        regularization: ``"oas"``, an absolute value, or ``"ddu"``, the original's schedule: see
            :func:`~lightning_uq.functional.gaussian.fit_gaussian`.
        score: ``"log_density"``, ``"mahalanobis"`` or ``"relative_mahalanobis"``; the last is the most robust across
            architectures.
        scoring_dtype: ``"float32"`` runs the products of scoring in single precision, about three times as fast; the fit is
            in float64 in any case.
        memory_budget: Bytes that the scatter matrices may take.
        fitting: Arguments of :class:`FeatureCallback`: ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name``,
            ``attach`` and the like.

    Raises:
        InputError: At the start of the training for what can be known then; in fitting for a class with fewer than two
            rows, NaN features, a covariance that does not factor, or too little memory.

    Source: Mukhoti et al., CVPR 2023 (arXiv 2102.11582); Ren et al., arXiv 2106.09022.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> loader = [(x, (x[:, 0] > 0).long())]
        >>> gmm = FitGMM(regularization=1e-3).fit(network, loader)
        >>> gmm.score(network, [x, 100 * x]).shape
        torch.Size([80])
    """

    def __init__(
        self,
        *,
        covariance: Covariance = "full",
        priors: Priors = "uniform",
        regularization: Regularization = "oas",
        score: DensityScore = "log_density",
        scoring_dtype: Literal["float64", "float32"] = "float64",
        memory_budget: int = 4 * 2**30,
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        check_choice("scoring_dtype", scoring_dtype, ("float64", "float32"))
        GaussianDensity(score=score)  # checks the name
        self.scoring_dtype = scoring_dtype
        self.covariance = covariance
        self.priors = priors
        self.regularization = regularization
        self.score_name: DensityScore = score
        self.memory_budget = memory_budget
        self.densities: list[GaussianDensity] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on."""
        fit = {"covariance": self.covariance, "priors": self.priors, "regularization": self.regularization}
        return {**super().settings, **fit}

    # ------------------------------------------------------------------ fitting

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """One streaming pass; the sums of all ranks are merged at its end."""
        statistics: list[ClassStatistics] = []
        with raising_on_all_ranks(trainer):
            num_classes = self._stream(model, loader, trainer, statistics)
        D = statistics[0].num_features if statistics else 0
        members, classes, D = self.largest_shape((len(statistics), num_classes, D), trainer)
        if trainer is not None and trainer.world_size > 1:
            self._reduce(statistics, members, classes, D, trainer)
        return self._fit_statistics(statistics)

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Look for labels, logits and features."""
        self._labelled(model, batch, trainer)
        labels = density_labels(self.logits, model, batch, f"{type(self).__name__}'s fitting data")
        self._by_row(model, self.features(model, batch, trainer), labels)
        self.features.reset()

    def fits_targets(self, model: nn.Module) -> bool:
        """Where the task has classes, each has its own Gaussian; targets that showed a task of labels must go on to do so."""
        return self.logits.task(model).has_classes or self.logits.inferred_task == "multilabel"

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Every label must be one that the task knows, and every class needs two rows."""
        check_targets(self.logits, model, target, outputs, f"{type(self).__name__}'s fitting data")
        prediction: Any = self.logits.prediction(model, outputs[:, :1], to_members=False)
        counts = _class_counts(target, prediction.probs.shape[1])
        if counts is not None:
            check_class_counts(counts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the last training showed counts no more."""
        self._noted = torch.zeros(0, dtype=torch.long)
        super().on_fit_start(trainer, pl_module)

    def note_targets(self, target: Tensor) -> None:
        """Count the rows of each class."""
        counts = _class_counts(target, len(self._noted))
        if counts is not None:
            self._noted = torch.nn.functional.pad(self._noted, (0, len(counts) - len(self._noted))) + counts

    def review_noted_targets(self, trainer: Trainer) -> None:
        """Warn of a class with fewer than two rows, which may also be for rows that the epoch left out."""
        counts = self._noted
        if trainer.world_size > 1:
            counts = torch.nn.utils.rnn.pad_sequence(gather_objects(counts, trainer), batch_first=True).sum(0)
        if not bool(counts.any()):
            return
        try:
            check_class_counts(counts)
        except InputError as error:
            rank_zero_warn(
                f"{type(self).__name__} will fail after the training unless its fitting data has more rows than the first epoch. {error}"
            )

    def fit_features(self, features: Tensor, labels: Tensor, num_classes: int | None = None) -> "FitGMM":
        """Fit features [N, D], or [M, N, D] of an ensemble's members, with labels [N] that are in memory.

        Args:
            features: The features.
            labels: Class indices.
            num_classes: C; one more than the largest label by default.

        Example:
            >>> features = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
            >>> gmm = FitGMM(regularization=0.0).fit_features(features, torch.tensor([0, 0, 1, 1]))
            >>> gmm.log_prob(torch.tensor([[0.0]])).round(decimals=2)
            tensor([[ -1.2700, -26.2700]], dtype=torch.float64)
        """
        self._set(None, None)
        statistics = []
        for rows in _by_member(features):
            classes = int(labels.max()) + 1 if num_classes is None else num_classes
            statistics.append(ClassStatistics(classes, rows.shape[1], self.covariance, self.memory_budget))
            statistics[-1].update(rows.cpu(), labels.cpu())
        self._set(self._fit_statistics(statistics), None)
        return self

    def _fit_statistics(self, statistics: list[ClassStatistics]) -> dict[str, Any]:
        tensors: dict[str, Any] = {"feature_layer": self.features.resolved, "num_members": len(statistics)}
        for i, member in enumerate(statistics):
            fit = fit_gaussian(member, self.covariance, self.priors, self.regularization)
            tensors.update({f"{i}.{name}": value for name, value in fit._asdict().items()})
        return tensors

    def _stream(self, model: nn.Module, loader: Any, trainer: Trainer | None, statistics: list[ClassStatistics]) -> int:
        num_classes = 0
        for raw in loader:
            batch = to_device(raw, model, trainer)
            y = density_labels(self.logits, model, batch, f"{type(self).__name__}'s fitting data", trainer)
            if not statistics:
                num_classes = self._labelled(model, batch, trainer)
            features, y = self._by_row(model, self.features(model, batch, trainer), y)
            for i, rows in enumerate(features):
                if i == len(statistics):
                    statistics.append(
                        ClassStatistics(
                            num_classes, rows.shape[1], self.covariance, self.memory_budget // len(features)
                        )
                    )
                statistics[i].update(rows.cpu(), y.cpu())
        return num_classes

    def _by_row(self, model: nn.Module, features: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features [M, N, D] with labels [N]: one row per sample, or per position that counts of maps [M, B, D, *P].

        Raises:
            InputError: There is one label per position and one row of features per sample, or the other way round.
        """
        task = self.logits.task(model)
        if y is None:  # one class, at every position
            y = torch.zeros(features.shape[1], *features.shape[3:], dtype=torch.long)
        if (features.ndim > 3) != (y.ndim > 1):
            found = "one per position of a map" if y.ndim > 1 else "one per input"
            raise InputError(
                f"{type(self).__name__} needs one label per row of features, but the labels {list(y.shape)} are {found}, and the "
                f"features at layer {self.features.resolved!r} are {list(features.shape[1:])}. "
                + ("Pass `pool='positions'`." if y.ndim > 1 else "Pass another `pool` than 'positions'.")
            )
        if y.ndim == 1:
            return features, y
        y = resized(y, features.shape[3:])
        rows, positions = features.movedim(2, -1).flatten(1, -2), task.row_positions(y)
        if positions is None:
            return rows, y.reshape(-1)
        return rows[:, positions.to(rows.device)], y.reshape(-1)[positions]

    def _labelled(self, model: nn.Module, batch: Any, trainer: Trainer | None) -> int:
        """The number of classes, from a batch whose outputs and labels are checked; 1 if the task has none."""
        where = f"{type(self).__name__}'s fitting data"
        density_labels(self.logits, model, batch, where, trainer)
        if not self.logits.task(model).has_classes:
            return 1
        outputs = self.logits(model, batch, trainer)
        labelled_batch(self.logits, model, batch, outputs, where)
        prediction: Any = self.logits.prediction(model, outputs, to_members=False)
        return int(prediction.probs.shape[1])

    def _reduce(
        self, statistics: list[ClassStatistics], members: int, classes: int, num_features: int, trainer: Trainer
    ) -> None:
        while len(statistics) < members:  # a rank without a row takes part with zeros
            statistics.append(ClassStatistics(classes, num_features, self.covariance, self.memory_budget // members))
        device = trainer.strategy.root_device

        def all_sum(tensor: Tensor) -> Tensor:
            moved = tensor.to(device)
            torch.distributed.all_reduce(moved)
            return moved.to(tensor.device)

        for member in statistics:
            member.reduce(all_sum)

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Make the densities that the fitted tensors describe."""
        super().restore_tensors(tensors)
        self.densities = []
        if tensors is None:
            return
        for i in range(tensors["num_members"]):
            density = GaussianDensity(score=self.score_name, dtype=getattr(torch, self.scoring_dtype))
            prefix = f"{i}."
            density.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
            self.densities.append(density)

    # ------------------------------------------------------------------ scoring

    def feature_scores(self, features: Tensor) -> Tensor:
        """The score [B] of features [M, B, D] that the constructor chose."""
        return self._pooled(features, self.score_name)

    def log_prob(self, features: Tensor) -> Tensor:
        """Log p(f | c) without the prior, [N, C] in float64, of features [N, D], or [M, N, D] pooled by log-mean-exp."""
        self._check_densities()
        pairs = zip(self.densities, _by_member(features), strict=True)
        members = torch.stack([density.to(rows.device).log_prob(rows) for density, rows in pairs])
        return torch.logsumexp(members, 0) - math.log(len(members))

    def log_density(self, features: Tensor) -> Tensor:
        """Log-density [N] in float64 of features [N, D], or [M, N, D] pooled over members by log-mean-exp."""
        return -self._pooled(_by_member(features), "log_density")

    def _check_densities(self) -> None:
        if not self.densities:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: train with it, or call `fit(model, loader)` or `fit_features`."
            )

    def _pooled(self, features: Tensor, name: DensityScore) -> Tensor:
        self._check_densities()
        return pooled_scores(self.densities, features, name)

    def transform(self) -> "DensityTransform":
        """Predictions carry ``log_density``."""
        return DensityTransform(self.features.at_layer.layer, self.densities, self.features.pool)


class DensityTransform(PredictionTransform):
    """Adds the ``log_density`` of an input's features to its prediction.

    Args:
        layer: Name of the layer whose input holds the features.
        densities: The density of each member's features.
        pool: How the input is pooled.
    """

    kind = "density"

    def __init__(self, layer: str, densities: Sequence[GaussianDensity], pool: Pool | None = None) -> None:
        self.features = LayerFeatures(layer, pool)
        self.densities = list(densities)

    @contextmanager
    def observing(self, module: nn.Module) -> Iterator[Change]:
        """Records the features of the forward pass."""
        with self.features.recording(module) as features:
            yield lambda prediction: prediction.replace(log_density=self._log_density(features(), prediction.map_shape))

    def _log_density(self, features: Tensor, map_shape: Sequence[int]) -> Tensor:
        """[B] of features [M, B, D], or [B, *P] of features at positions, on the prediction's grid."""
        found = score_positions(lambda rows: -pooled_scores(self.densities, rows, "log_density"), features)
        return found if found.ndim == 1 else resized(found, map_shape)


def pooled_scores(densities: Sequence[GaussianDensity], features: Tensor, name: DensityScore) -> Tensor:
    """Scores [B] of features [M, B, D], pooled over members: a log-density by log-mean-exp, any other by the mean."""
    members = torch.stack([d.to(f.device).score(f, name) for d, f in zip(densities, features, strict=True)])
    if name == "log_density":
        return -(torch.logsumexp(-members, 0) - math.log(len(members)))
    return members.mean(0)


def _class_counts(target: Tensor, num_classes: int) -> Tensor | None:
    """The number of rows of each class; None for labels of positions, and for probabilities."""
    labels = target.squeeze(1) if target.shape[1:] == (1,) else target
    return None if labels.ndim != 1 or labels.is_floating_point() else labels.long().bincount(minlength=num_classes)


def _by_member(features: Tensor) -> Tensor:
    return features if features.ndim == 3 else features.unsqueeze(0)


def _fit_gmm(setting: Setting) -> list[Callback]:
    return [FitGMM()]


def _fit_relative_mahalanobis(setting: Setting) -> list[Callback]:
    return [FitGMM(covariance="tied", score="relative_mahalanobis", name="relative_mahalanobis")]


METHODS = (
    Method(name="ddu", trained_as="softmax", callbacks=_fit_gmm, ood_score="log_density"),
    Method(
        name="relative_mahalanobis",
        trained_as="softmax",
        callbacks=_fit_relative_mahalanobis,
        ood_score="relative_mahalanobis",
    ),
)
