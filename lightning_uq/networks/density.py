"""A fitted feature density as a module of buffers, without trainable parameters, that can be moved, saved and exported."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.finite import infinite_where_bad
from lightning_uq.functional.gaussian import (
    COVARIANCES,
    Covariance,
    GaussianFit,
    Priors,
    Regularization,
    check_regularization,
)
from lightning_uq.functional.mahalanobis import squared_distances
from lightning_uq.functional.normal import log_density
from lightning_uq.functional.precision import move_only, wide_dtype, widen
from lightning_uq.functional.validation import check_choice
from lightning_uq.networks.class_halves import ClassHalves

DensityScore = Literal["log_density", "mahalanobis", "relative_mahalanobis"]

_SCORES = ("log_density", "mahalanobis", "relative_mahalanobis")
_CHUNK_ELEMENTS = 2**20


class GaussianDensity(nn.Module):
    """One fitted Gaussian per class over features: log-densities and Mahalanobis distances.

    Whitening matrices are precomputed, so scoring needs one matrix product per class. Rows are processed in chunks, so memory
    does not grow with their number. Results are float64 for features of any dtype. The buffers keep their precision when a
    module around them is cast, since a log-density in bfloat16 would be useless.

    An instance without a fit is empty; ``load_state_dict`` gives it the shapes and the precision of the saved state.

    Args:
        fit: The result of :func:`~lightning_uq.functional.gaussian.fit_gaussian`.
        score: What ``forward`` returns: "log_density" (its negative), "mahalanobis" or "relative_mahalanobis".
        dtype: ``torch.float32`` computes the products in single precision, with a relative error of about 1e-6 and half the
            memory; avoid it if a covariance is nearly singular. By default the precision of the fit, float64.

    Raises:
        InputError: ``score`` is unknown, or ``dtype`` is neither float32 nor float64.

    Source: Mukhoti et al., CVPR 2023 (arXiv 2102.11582).

    Example:
        >>> features = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
        >>> density = GaussianDensity.fit_features(features, torch.tensor([0, 0, 1, 1]), regularization=0.0)
        >>> density.log_prob(torch.tensor([[0.0], [10.0]])).round(decimals=2)
        tensor([[ -1.2700, -26.2700],
                [-26.2700,  -1.2700]], dtype=torch.float64)
        >>> density(torch.tensor([[0.0], [5.0], [20.0]])).round(decimals=2)
        tensor([ 1.9600,  7.5200, 26.9600], dtype=torch.float64)
    """

    mean: Tensor
    whitening: Tensor
    log_det: Tensor
    log_prior: Tensor
    background_mean: Tensor
    background_whitening: Tensor
    shrinkage: Tensor
    target: Tensor
    ridge: Tensor

    def __init__(
        self,
        fit: GaussianFit | None = None,
        score: DensityScore = "log_density",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("score", score, _SCORES)
        if dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"`dtype` must be torch.float32 or torch.float64, but it is {dtype}.")
        self.score_name: DensityScore = score
        self.dtype = dtype
        for name in GaussianFit._fields:
            value = torch.empty(0, dtype=torch.float64) if fit is None else getattr(fit, name)
            self.register_buffer(name, value.to(self._dtype_of(name, value)))

    @classmethod
    def fit_features(
        cls,
        features: Tensor,
        labels: Tensor,
        num_classes: int | None = None,
        covariance: Covariance = "full",
        priors: Priors = "uniform",
        regularization: Regularization = "held_out",
        score: DensityScore = "log_density",
        dtype: torch.dtype | None = None,
        memory_budget: int = 4 * 2**30,
    ) -> "GaussianDensity":
        """Fit features [N, D] with class indices [N] from memory.

        Args:
            features: [N, D].
            labels: [N].
            num_classes: C; by default the largest label plus one.
            covariance: See :func:`~lightning_uq.functional.gaussian.fit_gaussian`, also for the next two.
            priors: "uniform" or "empirical".
            regularization: "held_out", "oas", "ddu" or a float.
            score: See the class.
            dtype: Precision of the products; see the class.
            memory_budget: The largest memory of the scatter matrices, in bytes.
        """
        if features.ndim != 2 or not len(features):
            raise InputError(
                f"`features` must be [N, D] with at least one row, but its shape is {list(features.shape)}."
            )
        classes = int(labels.max()) + 1 if num_classes is None else num_classes
        device = features.device if wide_dtype(features.device) == torch.float64 else "cpu"
        check_choice("covariance", covariance, COVARIANCES)
        check_regularization(regularization)
        halved = regularization == "held_out"
        statistics = ClassHalves(classes, features.shape[1], covariance, memory_budget, device, halved=halved)
        statistics.update(features, labels, torch.arange(len(features)))
        return cls(statistics.fit(covariance, priors, regularization), score, dtype)

    @property
    def is_fitted(self) -> bool:
        """Whether the density holds a fit."""
        return self.mean.ndim == 2

    def log_prob(self, features: Tensor) -> Tensor:
        """log p(f | c), without the prior: [..., D] -> [..., C] in float64.

            log p(f | c) = -1/2 (|A_c (f - mu_c)|^2 + log |Sigma_c| + D log 2 pi)

        It is minus infinity for features that are not finite, and for a class without a Gaussian, because its label is ignored.

        Raises:
            NotFittedError: The density is empty.
            InputError: ``features`` are not [..., D].
        """
        return self._by_rows(self._log_prob, features, -math.inf)

    def log_density(self, features: Tensor) -> Tensor:
        """log sum_c pi_c p(f | c): [..., D] -> [...] in float64.

        This is a normalized density. With uniform priors pi_c = 1 / C, it is the original's, which has no prior,
        minus log C. C counts the classes that have a Gaussian.
        """
        return self._by_rows(
            lambda rows: torch.logsumexp(self._log_prob(rows) + self.log_prior, 1), features, -math.inf
        )

    def mahalanobis(self, features: Tensor) -> Tensor:
        """min_c |A_c (f - mu_c)|^2: [..., D] -> [...] in float64; higher is further out."""
        return self._by_rows(lambda rows: self._distances(rows).amin(1), features)

    def relative_mahalanobis(self, features: Tensor) -> Tensor:
        """The least squared distance minus that to the background: [..., D] -> [...] in float64; higher is further out.

        The background is all training rows as one class. With a tied covariance this is Ren et al.'s score, and with any other
        covariance an extension of it.

        Source: Ren et al., arXiv 2106.09022.
        """
        return self._by_rows(self._relative, features)

    def score(self, features: Tensor, name: DensityScore | None = None) -> Tensor:
        """An out-of-distribution score: [..., D] -> [...] in float64; higher is further out.

        Args:
            features: [..., D].
            name: "log_density" for -log p(f), "mahalanobis" or "relative_mahalanobis"; the constructor's by default.
        """
        name = self.score_name if name is None else name
        check_choice("name", name, _SCORES)
        if name == "log_density":
            return -self.log_density(features)
        return self.mahalanobis(features) if name == "mahalanobis" else self.relative_mahalanobis(features)

    def forward(self, features: Tensor) -> Tensor:
        """The score chosen in the constructor: [..., D] -> [...]. It can be exported."""
        return self.score(features)

    def extra_repr(self) -> str:
        """The shapes and the score."""
        if not self.is_fitted:
            return f"not fitted, score={self.score_name!r}"
        classes, features = self.mean.shape
        kind = "diagonal" if self.whitening.ndim == 2 else "tied" if len(self.whitening) < classes else "full"
        return f"{classes} classes, {features} features, covariance={kind!r}, score={self.score_name!r}"

    def _by_rows(self, score: Callable[[Tensor], Tensor], features: Tensor, bad: float = math.inf) -> Tensor:
        """Scores in chunks; ``bad`` for rows that are not finite or overflow."""
        if not self.is_fitted:
            raise NotFittedError("This density is empty. Fit it, or load the state of a fitted one, before scoring.")
        D = self.mean.shape[1]
        if not features.is_floating_point() or features.ndim < 1 or features.shape[-1] != D:
            raise InputError(
                f"`features` must be a floating-point tensor [..., {D}], but it is {features.dtype} of shape "
                f"{list(features.shape)}."
            )
        rows = features.reshape(-1, D)
        if torch.compiler.is_compiling():  # a graph cannot loop over an unknown number of chunks
            result = infinite_where_bad(score(rows), rows, bad)
        else:
            result = torch.cat(
                [
                    infinite_where_bad(score(chunk), chunk, bad)
                    for chunk in torch.split(rows, max(64, _CHUNK_ELEMENTS // D))
                ]
            )
        return result.reshape(features.shape[:-1] + result.shape[1:])

    def _center(self, rows: Tensor) -> Tensor:
        """Rows relative to the background mean, subtracted in float64 before any rounding to the products' precision."""
        return (widen(rows) - self.background_mean).to(self.whitening.dtype)

    def _distances(self, rows: Tensor) -> Tensor:
        found = _full_precision(squared_distances, self._center(rows), self._center(self.mean), self.whitening)
        return found.masked_fill(self.log_prior == -math.inf, math.inf)  # classes without a Gaussian

    def _relative(self, rows: Tensor) -> Tensor:
        origin = torch.zeros_like(self.background_mean, dtype=self.whitening.dtype)[None]
        background = _full_precision(squared_distances, self._center(rows), origin, self.background_whitening)
        return self._distances(rows).amin(1) - background.squeeze(1)

    def _log_prob(self, rows: Tensor) -> Tensor:
        return log_density(self._distances(rows), self.log_det, self.mean.shape[1])

    def _dtype_of(self, name: str, value: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and name.endswith("whitening") else value.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GaussianDensity":
        super()._apply(functools.partial(move_only, fn), recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                dtype = self._dtype_of(name, value)
                if dtype == torch.float64:
                    dtype = wide_dtype(buffer.device)
                setattr(self, name, torch.empty_like(value, dtype=dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _full_precision(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function outside autocast, which would round float32 products to half precision."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return function(*tensors)
    with torch.autocast(device, enabled=False):
        return function(*tensors)
