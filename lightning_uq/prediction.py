"""What every method returns: frozen, tensor-only predictions with the member axis explicit.

Shapes: Z index or member, B batch, C classes, D target dimensions. A class axis that has more axes behind it
(segmentation, logits [Z, B, C, H, W]) keeps its place; every score is then [B, H, W].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional import dirichlet, entropy, mixture, student_t
from lightning_uq.functional.vector_scaling import apply_vector_scaling

_P = TypeVar("_P", bound="Prediction")


class Prediction(ABC):
    """Base of all predictions: a frozen set of tensors that moves, concatenates and exports as one.

    Subclasses name their tensors and each one's batch axis in ``_batch_axis`` (None: shared by the batch) and pass
    them to :meth:`_set`; an absent optional tensor is None.
    """

    _batch_axis: ClassVar[dict[str, int | None]]

    def _set(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, Tensor):
                raise InputError(f"Expected argument `{name}` to be a tensor, but got {type(tensor).__name__}.")
        object.__setattr__(self, "_tensors", tensors)

    @classmethod
    def _from_tensors(cls: type[_P], tensors: dict[str, Tensor | None]) -> _P:
        """An instance from its raw tensors; they were checked when they were first given."""
        new = cls.__new__(cls)
        object.__setattr__(new, "_tensors", tensors)
        return new

    def _get(self, name: str) -> Tensor:
        tensor: Tensor | None = self.__dict__["_tensors"][name]
        if tensor is None:
            raise InputError(f"This prediction holds no `{name}`.")
        return tensor

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen; make a new one instead of setting `{name}`.")

    def __len__(self) -> int:
        return next(t.shape[a] for t, a in self._tensors_and_axes() if a is not None)

    def __repr__(self) -> str:
        shapes = {name: list(t.shape) for name, t in self.__dict__["_tensors"].items() if t is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={shape}' for name, shape in shapes.items())})"

    def __getstate__(self) -> dict[str, Tensor | None]:
        return dict(self.__dict__["_tensors"])

    def __setstate__(self, state: dict[str, Tensor | None]) -> None:
        object.__setattr__(self, "_tensors", state)

    def _tensors_and_axes(self) -> list[tuple[Tensor, int | None]]:
        tensors = self.__dict__["_tensors"]
        return [(tensors[name], axis) for name, axis in self._batch_axis.items() if tensors.get(name) is not None]

    def to(self: _P, *args: Any, **kwargs: Any) -> _P:
        """A copy on another device or in another dtype; takes what ``Tensor.to`` takes. Lightning moves predictions so."""
        tensors = self.__dict__["_tensors"]
        return self._from_tensors({k: None if t is None else t.to(*args, **kwargs) for k, t in tensors.items()})

    def replace(self: _P, **tensors: Tensor) -> _P:
        """A copy with other tensors in the place of those named, as ``temperature`` or ``log_density``."""
        unknown = set(tensors) - set(self._batch_axis)
        if unknown:
            raise InputError(f"Expected names among {sorted(self._batch_axis)}, but got {sorted(unknown)}.")
        return self._from_tensors({**self.__dict__["_tensors"], **tensors})

    @classmethod
    def cat(cls: type[_P], predictions: Sequence[_P]) -> _P:
        """Concatenate batches: what ``trainer.predict`` returned becomes one prediction.

        Raises:
            InputError: The list is empty, mixes types or holds no predictions, or its parts disagree on what they hold.
        """
        if not predictions:
            raise InputError("Expected argument `predictions` to hold at least one prediction, but got none.")
        kind = type(predictions[0])
        if not issubclass(kind, Prediction):
            raise InputError(
                f"Expected argument `predictions` to hold predictions, but it holds a {kind.__name__}. Of several loaders "
                "`trainer.predict` returns a list each: concatenate one of them."
            )
        if any(type(p) is not kind for p in predictions):
            names = sorted({type(p).__name__ for p in predictions})
            raise InputError(f"Expected argument `predictions` to be of one type, but got {', '.join(names)}.")
        joined: dict[str, Tensor | None] = {}
        for name, axis in kind._batch_axis.items():
            parts = [p.__dict__["_tensors"][name] for p in predictions]
            present = [part for part in parts if part is not None]
            if present and len(present) < len(parts):
                raise InputError(f"Expected all or none of `predictions` to hold `{name}`, but only some do.")
            if not present:
                joined[name] = None
            elif axis is None:
                if any(not torch.equal(part, present[0]) for part in present):
                    raise InputError(f"Expected `{name}` to be the same in all of `predictions`, but it differs.")
                joined[name] = present[0]
            else:
                joined[name] = torch.cat(present, axis)
        return kind._from_tensors(joined)

    @abstractmethod
    def to_dict(self) -> dict[str, Tensor]:
        """Named per-input results, the batch on axis 0: what a table or a file takes."""

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability, or log-density, of ``target`` under the prediction."""

    @property
    def log_density(self) -> Tensor:
        """Log-density [B] of the input's features under the density that was fitted after training.

        Raises:
            NotFittedError: No density was fitted.
        """
        tensor: Tensor | None = self.__dict__["_tensors"].get("log_density")
        if tensor is None:
            raise NotFittedError("This prediction carries no `log_density`: no feature density was fitted.")
        return tensor

    def _optional(self) -> dict[str, Tensor]:
        density = self.__dict__["_tensors"].get("log_density")
        return {} if density is None else {"log_density": density}


class ClassProbabilities(Prediction):
    """What categorical predictions share: everything that follows from the pooled log-probabilities [B, C, ...]."""

    @property
    @abstractmethod
    def log_probs(self) -> Tensor:
        """Pooled (and, after a calibration, tempered) log-probabilities [B, C, ...]."""

    @property
    @abstractmethod
    def expected_entropy(self) -> Tensor:
        """Mean entropy of the hypotheses, in nats: [B, ...]."""

    @property
    @abstractmethod
    def mutual_information(self) -> Tensor:
        """Mutual information of label and index, in nats: [B, ...]; a pooled calibration leaves it as it is."""

    def _calibrated(self, log_probs: Tensor) -> Tensor:
        tensors = self.__dict__["_tensors"]
        if tensors["temperature"] is not None:
            return torch.log_softmax(log_probs / tensors["temperature"], 1)
        if tensors["class_scaling"] is not None:
            scale, bias = tensors["class_scaling"].to(log_probs.device)
            return torch.log_softmax(apply_vector_scaling(log_probs, scale, bias).to(log_probs.dtype), 1)
        return log_probs

    @property
    def probs(self) -> Tensor:
        """Pooled probabilities [B, C, ...]."""
        return self.log_probs.exp()

    @property
    def label(self) -> Tensor:
        """Most probable class [B, ...]."""
        return self.log_probs.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class: [B, ...]."""
        return self.log_probs.amax(1).exp()

    @property
    def predictive_entropy(self) -> Tensor:
        """Entropy of the pooled probabilities, in nats: [B, ...]."""
        return entropy.entropy(self.log_probs, 1)

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability [B, ...] of the class indices ``target`` [B, ...]."""
        if target.is_floating_point() or target.shape != self.label.shape:
            raise InputError(
                f"Expected argument `target` to be class indices of shape {list(self.label.shape)}, but got "
                f"{target.dtype} of shape {list(target.shape)}."
            )
        return self.log_probs.gather(1, target.long().unsqueeze(1)).squeeze(1)

    def to_dict(self) -> dict[str, Tensor]:
        """``label``, ``confidence``, ``probs``, the three entropies, and ``log_density`` where there is one."""
        return {
            "label": self.label,
            "confidence": self.confidence,
            "probs": self.probs,
            "predictive_entropy": self.predictive_entropy,
            "expected_entropy": self.expected_entropy,
            "mutual_information": self.mutual_information,
            **self._optional(),
        }


class CategoricalPrediction(ClassProbabilities):
    """A classifier's prediction: one row of logits per hypothesis.

    Args:
        logits: Raw logits [Z, B, C] (or [Z, B, C, ...]).
        temperature: Scalar T of a pooled calibration: probabilities are softmax(log(mean_z p_z) / T). The members, hence
            ``expected_entropy`` and ``mutual_information``, stay as they are.
        class_scaling: Scale and bias [2, C] of a pooled calibration by vector scaling, in the place of T.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Raises:
        InputError: ``logits`` has fewer than three axes.

    Example:
        >>> prediction = CategoricalPrediction(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
        >>> prediction.probs
        tensor([[0.5000, 0.5000]])
        >>> prediction.mutual_information
        tensor([0.3278])
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {
        "logits": 1,
        "temperature": None,
        "class_scaling": None,
        "log_density": 0,
        "pooled_log_probs": 0,
        "member_entropy": 0,
    }

    def __init__(
        self,
        logits: Tensor,
        temperature: Tensor | None = None,
        log_density: Tensor | None = None,
        class_scaling: Tensor | None = None,
    ) -> None:
        if isinstance(logits, Tensor) and logits.ndim < 3:
            raise InputError(f"Expected argument `logits` to be [Z, B, C], but got shape {list(logits.shape)}.")
        self._set(
            logits=logits,
            temperature=temperature,
            class_scaling=class_scaling,
            log_density=log_density,
            pooled_log_probs=None,
            member_entropy=None,
        )

    def pool(self) -> "CategoricalPrediction":
        """The same prediction without its members: log-probabilities and moments alone, Z times smaller."""
        tensors = dict(self.__dict__["_tensors"])
        if tensors["logits"] is not None:
            tensors.update(logits=None, pooled_log_probs=self._mean_log_probs, member_entropy=self.expected_entropy)
        return self._from_tensors(tensors)

    @property
    def logits(self) -> Tensor:
        """Raw member logits [Z, B, C, ...].

        Raises:
            InputError: The members were pooled away.
        """
        if self.__dict__["_tensors"]["logits"] is None:
            raise InputError(
                "The members' `logits` were pooled when this prediction was made; set `module.return_members = True` to "
                "keep them."
            )
        return self._get("logits")

    @property
    def _mean_log_probs(self) -> Tensor:
        pooled: Tensor | None = self.__dict__["_tensors"]["pooled_log_probs"]
        return entropy.mean_log_probs(self.logits) if pooled is None else pooled

    @property
    def log_probs(self) -> Tensor:
        """Pooled log-probabilities [B, C, ...], after the calibration where there is one."""
        return self._calibrated(self._mean_log_probs)

    @property
    def expected_entropy(self) -> Tensor:
        """mean_z H[p_z] in nats: [B, ...]."""
        stored: Tensor | None = self.__dict__["_tensors"]["member_entropy"]
        return entropy.expected_entropy(self.logits) if stored is None else stored

    @property
    def mutual_information(self) -> Tensor:
        """H[mean_z p_z] - mean_z H[p_z] in nats: [B, ...], from the untempered members."""
        if self.__dict__["_tensors"]["logits"] is not None:
            return entropy.mutual_information(self.logits)
        return (entropy.entropy(self._mean_log_probs, 1) - self.expected_entropy).clamp_min(0)


class DirichletPrediction(ClassProbabilities):
    """An evidential classifier's prediction: a Dirichlet over class probabilities.

    Args:
        concentration: alpha [B, C] (or [B, C, ...]), positive.
        temperature: Scalar T that tempers the mean probabilities alone.
        class_scaling: Scale and bias [2, C] of a vector scaling of the mean probabilities alone.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Example:
        >>> prediction = DirichletPrediction(torch.tensor([[3.0, 1.0]]))
        >>> prediction.probs, prediction.vacuity
        (tensor([[0.7500, 0.2500]], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {
        "concentration": 0,
        "temperature": None,
        "class_scaling": None,
        "log_density": 0,
    }

    def __init__(
        self,
        concentration: Tensor,
        temperature: Tensor | None = None,
        log_density: Tensor | None = None,
        class_scaling: Tensor | None = None,
    ) -> None:
        look = isinstance(concentration, Tensor) and not torch.compiler.is_compiling()  # a graph holds no values
        if look and (concentration.ndim < 2 or not bool((concentration > 0).all())):
            raise InputError(
                "Expected argument `concentration` to be positive and of shape [B, C], but got shape "
                f"{list(concentration.shape)}"
                + ("." if concentration.ndim < 2 else " with values that are not positive.")
            )
        self._set(
            concentration=concentration, temperature=temperature, class_scaling=class_scaling, log_density=log_density
        )

    @property
    def concentration(self) -> Tensor:
        """alpha [B, C, ...]."""
        return self._get("concentration")

    @property
    def log_probs(self) -> Tensor:
        """log(alpha / S) [B, C, ...] in float64, after the temperature where there is one."""
        alpha = self.concentration.double()
        return self._calibrated(alpha.log() - alpha.sum(1, keepdim=True).log())

    @property
    def expected_entropy(self) -> Tensor:
        """E[H[p]] in nats: [B, ...]."""
        return dirichlet.dirichlet_expected_entropy(self.concentration)

    @property
    def mutual_information(self) -> Tensor:
        """H[E[p]] - E[H[p]] in nats: [B, ...]."""
        return dirichlet.dirichlet_mutual_information(self.concentration)

    @property
    def differential_entropy(self) -> Tensor:
        """Differential entropy of the Dirichlet in nats: [B, ...]."""
        return dirichlet.dirichlet_differential_entropy(self.concentration)

    @property
    def vacuity(self) -> Tensor:
        """C / S: 1 without any evidence, towards 0 as it grows: [B, ...]."""
        alpha = self.concentration.double()
        return alpha.shape[1] / alpha.sum(1)

    def to_dict(self) -> dict[str, Tensor]:
        """As for any classifier, with ``vacuity`` and ``differential_entropy``."""
        return {**super().to_dict(), "vacuity": self.vacuity, "differential_entropy": self.differential_entropy}


class GaussianMixturePrediction(Prediction):
    """A regressor's prediction: an equal-weight mixture of one Gaussian per hypothesis.

    Args:
        mean: Component means [Z, B, D], kept as ``member_mean``.
        variance: Component variances [Z, B, D], positive, kept as ``member_variance``.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Raises:
        InputError: The shapes differ or have not three axes.

    Example:
        >>> prediction = GaussianMixturePrediction(torch.tensor([[[0.0]], [[2.0]]]), torch.ones(2, 1, 1))
        >>> prediction.mean, prediction.variance, prediction.epistemic_variance
        (tensor([[1.]]), tensor([[2.]]), tensor([[1.]]))
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {"member_mean": 1, "member_variance": 1, "log_density": 0}

    def __init__(self, mean: Tensor, variance: Tensor, log_density: Tensor | None = None) -> None:
        self._set(member_mean=mean, member_variance=variance, log_density=log_density)
        if mean.ndim != 3 or mean.shape != variance.shape:
            raise InputError(
                f"Expected arguments `mean` and `variance` to be of one shape [Z, B, D], but got {list(mean.shape)} and "
                f"{list(variance.shape)}."
            )

    @property
    def member_mean(self) -> Tensor:
        """Component means [Z, B, D]."""
        return self._get("member_mean")

    @property
    def member_variance(self) -> Tensor:
        """Component variances [Z, B, D]."""
        return self._get("member_variance")

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture [B, D]."""
        return mixture.mixture_moments(self.member_mean, self.member_variance)[0]

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture [B, D]: the sum of the next two."""
        return mixture.mixture_moments(self.member_mean, self.member_variance)[1]

    @property
    def aleatoric_variance(self) -> Tensor:
        """mean_z sigma_z^2 [B, D]."""
        return mixture.mixture_moments(torch.zeros_like(self.member_mean), self.member_variance)[1]

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over z of the means [B, D]."""
        return mixture.mixture_moments(self.member_mean, torch.zeros_like(self.member_variance))[1]

    def log_prob(self, target: Tensor) -> Tensor:
        """log mean_z prod_d N(target_d; mu_zd, sigma_zd^2): [B] for ``target`` [B, D].

        The dimensions are independent given the index, not under the mixture.
        """
        self._check(target)
        members = mixture.gaussian_log_prob(self.member_mean, self.member_variance, target).sum(-1)
        return torch.logsumexp(members, 0) - math.log(len(members))

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] of the mixture's marginals at a ``level`` in (0, 1)."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        return mixture.mixture_quantile(self.member_mean, self.member_variance, level)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] under the mixture's marginals."""
        self._check(target)
        return mixture.mixture_cdf(self.member_mean, self.member_variance, target)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] of the mixture's marginals, in the target's units."""
        self._check(target)
        return mixture.mixture_crps(self.member_mean, self.member_variance, target)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that holds a share ``level`` of the mixture."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def to_dict(self) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, and ``log_density`` where there is one."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "aleatoric_variance": self.aleatoric_variance,
            "epistemic_variance": self.epistemic_variance,
            **self._optional(),
        }

    def _check(self, target: Tensor) -> None:
        expected = self.member_mean.shape[1:]
        if target.shape != expected:
            raise InputError(
                f"Expected argument `target` to be of shape {list(expected)}, but got {list(target.shape)}; an array of "
                "another shape would broadcast."
            )


class StudentTPrediction(Prediction):
    """An evidential regressor's prediction: a normal-inverse-gamma over mean and variance, a Student-t over the target.

    mu ~ N(location, sigma^2 / nu), sigma^2 ~ Inverse-Gamma(alpha, beta), so that the target is Student-t with 2 alpha degrees
    of freedom, this location and the squared scale beta (1 + nu) / (nu alpha).

    Args:
        location: gamma [B, D].
        nu: [B, D], positive.
        alpha: [B, D], above 1.
        beta: [B, D], positive.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Raises:
        InputError: The shapes differ, have not two axes, or a value is out of range.

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600); Meinert et al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> one = torch.ones(1, 1)
        >>> prediction = StudentTPrediction(0 * one, 2 * one, 3 * one, 4 * one)
        >>> prediction.aleatoric_variance, prediction.epistemic_variance, prediction.variance
        (tensor([[2.]]), tensor([[1.]]), tensor([[3.]]))
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {"location": 0, "nu": 0, "alpha": 0, "beta": 0, "log_density": 0}

    def __init__(
        self, location: Tensor, nu: Tensor, alpha: Tensor, beta: Tensor, log_density: Tensor | None = None
    ) -> None:
        self._set(location=location, nu=nu, alpha=alpha, beta=beta, log_density=log_density)
        shapes = [list(x.shape) for x in (location, nu, alpha, beta)]
        if location.ndim != 2 or any(shape != shapes[0] for shape in shapes):
            raise InputError(
                "Expected arguments `location`, `nu`, `alpha` and `beta` to be of one shape [B, D], but got "
                f"{', '.join(map(str, shapes))}."
            )
        if not bool(((nu > 0) & (alpha > 1) & (beta > 0)).all()):
            raise InputError("Expected arguments `nu` and `beta` to be positive and `alpha` above 1, but they are not.")

    @property
    def mean(self) -> Tensor:
        """E[y] = location [B, D]."""
        return self._get("location")

    @property
    def degrees_of_freedom(self) -> Tensor:
        """2 alpha [B, D]."""
        return 2 * self._get("alpha")

    @property
    def scale(self) -> Tensor:
        """Scale of the Student-t [B, D]: sqrt(beta (1 + nu) / (nu alpha))."""
        # Divided first: products of large parameters would overflow.
        return (self._get("beta") / self._get("alpha") * (1 + 1 / self._get("nu"))).sqrt()

    @property
    def variance(self) -> Tensor:
        """Var[y] = beta (1 + nu) / (nu (alpha - 1)) [B, D]: the sum of the next two."""
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def aleatoric_variance(self) -> Tensor:
        """E[sigma^2] = beta / (alpha - 1) [B, D]: Amini's reading."""
        return self._get("beta") / (self._get("alpha") - 1)

    @property
    def epistemic_variance(self) -> Tensor:
        """Var[mu] = beta / (nu (alpha - 1)) [B, D]: Amini's reading."""
        return self.aleatoric_variance / self._get("nu")

    def uncertainties(self, reading: Literal["amini", "meinert"] = "amini") -> tuple[Tensor, Tensor]:
        """Aleatoric and epistemic uncertainty, each [B, D], as one of two papers reads them.

        - ``"amini"``: the standard deviations sqrt(beta / (alpha - 1)) and sqrt(beta / (nu (alpha - 1))), in the target's units;
        - ``"meinert"``: the Student-t's scale, in the target's units, and 1 / sqrt(nu), relative to it and without unit.

        Raises:
            InputError: ``reading`` is neither.
        """
        if reading == "amini":
            return self.aleatoric_variance.sqrt(), self.epistemic_variance.sqrt()
        if reading == "meinert":
            return self.scale, self._get("nu").rsqrt()
        raise InputError(f"Expected argument `reading` to be 'amini' or 'meinert', but got {reading!r}.")

    def log_prob(self, target: Tensor) -> Tensor:
        """sum_d log St(target_d): [B] in float64 for ``target`` [B, D]."""
        return student_t.student_t_log_prob(self._checked(target), *self._student_t).sum(-1)

    def cdf(self, target: Tensor) -> Tensor:
        """P(Y_d <= target_d) [B, D] in float64."""
        return student_t.student_t_cdf(self._checked(target), *self._student_t)

    def crps(self, target: Tensor) -> Tensor:
        """Continuous ranked probability score [B, D] in float64, in the target's units; lower is better."""
        return student_t.student_t_crps(self._checked(target), *self._student_t)

    def quantile(self, level: float) -> Tensor:
        """Quantile [B, D] at a ``level`` in (0, 1), in float64."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        return student_t.student_t_quantile(level, *self._student_t)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower, upper), each [B, D], that holds a share ``level`` of the Student-t."""
        if not 0 < level < 1:
            raise InputError(f"Expected argument `level` to be in (0, 1), but got {level}.")
        upper = self.quantile((1 + level) / 2)
        return 2 * self.mean - upper, upper

    def to_dict(self) -> dict[str, Tensor]:
        """``mean``, ``variance`` and its two parts, ``degrees_of_freedom``, ``scale``, and ``log_density`` if there is one."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "aleatoric_variance": self.aleatoric_variance,
            "epistemic_variance": self.epistemic_variance,
            "degrees_of_freedom": self.degrees_of_freedom,
            "scale": self.scale,
            **self._optional(),
        }

    @property
    def _student_t(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.degrees_of_freedom, self.mean, self.scale

    def _checked(self, target: Tensor) -> Tensor:
        if target.shape != self.mean.shape:
            raise InputError(
                f"Expected argument `target` to be of shape {list(self.mean.shape)}, but got {list(target.shape)}; an array "
                "of another shape would broadcast."
            )
        return target
