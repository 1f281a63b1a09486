"""Losses on evidence for classes: a network says how much it has seen for each class, and so draws a Dirichlet.

Evidence e >= 0 of shape [N, C, d1, ..., dk], alpha = e + 1, S = sum_c alpha_c, mean probabilities alpha / S. The functions
take evidence; the modules take a network's raw outputs and turn them into evidence, so that they stand where
``nn.CrossEntropyLoss`` stood.

What the evidence comes to measure is *relative*: it ranks inputs, but it does not vanish as data grow, no proper scoring
rule for it exists, and its level is set by the regularizer. It is no calibrated epistemic uncertainty (Bengs et al., ICML
2023; Juergens et al., ICML 2024; Shen et al., NeurIPS 2024), so that nothing here is the default of anything.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional._validation import check_bool, check_choice, check_floating, to_sum_dtype, upcast
from lightning_uq.functional.dirichlet import (
    dirichlet_log_det_fisher,
    expected_squared_error,
    kl_to_uniform,
    log_rising_factorial_ratio,
)

Reduction = Literal["none", "mean", "sum"]
Risk = Literal["sse", "nll", "cross_entropy"]
Fisher = Literal["original", "paper"]
Evidence = Literal["clamped_exp", "softplus", "relu"] | Callable[[Tensor], Tensor]

# ---------------------------------------------------------------------- evidence


def clamped_exp(x: Tensor, clamp: float = 10.0) -> Tensor:
    """exp(min(max(x, -clamp), clamp)): evidence that neither overflows nor reaches zero.

    The gradient is kept at the bounds and is zero beyond them. Half precision is upcast to float32.

    Args:
        x: Raw outputs of any shape.
        clamp: Bound of the exponent; 10 gives evidence between 4.5e-5 and 22026.

    Raises:
        InputError: ``clamp`` is not positive.

    Example:
        >>> clamped_exp(torch.tensor([0.0, 1e9]))
        tensor([1.0000e+00, 2.2026e+04])
    """
    if not clamp > 0:
        raise InputError(f"Expected argument `clamp` to be positive, but got {clamp}.")
    x = upcast(x)
    # What the gradient of torch's clamp is at a bound depends on its version.
    return torch.where(x.abs() <= clamp, x, x.detach().clamp(-clamp, clamp)).exp()


def evidence_function(name: Evidence) -> Callable[[Tensor], Tensor]:
    """The function that turns raw outputs into evidence: one of three names, or itself.

    ReLU has no gradient where all raw outputs of a row are negative: such samples are never learnt (Pandey & Yu, ICML 2023,
    arXiv 2306.11113).

    Raises:
        InputError: No such name.

    Example:
        >>> evidence_function("softplus")(torch.zeros(1))
        tensor([0.6931])
    """
    if callable(name):
        return name
    check_choice("evidence", name, tuple(_EVIDENCE))
    return _EVIDENCE[name]


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(upcast(x))


def _relu(x: Tensor) -> Tensor:
    return F.relu(upcast(x))


_EVIDENCE: dict[str, Callable[[Tensor], Tensor]] = {"clamped_exp": clamped_exp, "softplus": _softplus, "relu": _relu}

# ---------------------------------------------------------------------- losses of evidence


def evidential_loss(
    evidence: Tensor,
    target: Tensor,
    reg_factor: float = 0.0,
    reduction: Reduction = "mean",
    *,
    risk: Risk = "sse",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """A Bayes risk under Dir(alpha), plus ``reg_factor`` times the KL divergence of the misleading evidence from none.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices [N, d1, ..., dk], or one-hot or soft rows of the evidence's shape (soft ones not for ``nll``).
        reg_factor: Weight of :func:`uniform_dirichlet_kl`; a caller anneals it from 0.
        reduction: ``"none"`` for [N, d1, ..., dk], ``"sum"``, or ``"mean"``: the sum divided by the sum of the samples' weights.
        risk: ``"sse"`` (:func:`dirichlet_mse_loss`), ``"nll"`` (:func:`dirichlet_nll_loss`) or ``"cross_entropy"``
            (:func:`dirichlet_cross_entropy_loss`).
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count, where targets are indices. Where no position counts the
            mean is NaN, as torch's.
        validate_args: Check the values, which is a pass over the data and a synchronisation on a GPU. Shapes are always checked.

    Raises:
        InputError: Negative evidence, shapes that differ, indices outside [0, C), rows that are no probabilities.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 5 and section 4.

    Example:
        >>> evidential_loss(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([0.6667, 0.0364])
    """
    check_choice("risk", risk, tuple(_RISKS))
    rows = _Rows(evidence, target, ignore_index, soft=risk != "nll", validate=validate_args)
    return rows.reduce(_regularized(_RISKS[risk](rows), rows, reg_factor, _kl), weight, reduction)


def maxnorm_loss(
    evidence: Tensor,
    target: Tensor,
    reg_factor: float = 0.0,
    p_norm: float = 4,
    reduction: Reduction = "mean",
    fisher: Fisher = "original",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """A bound on the expected max-norm of the error, plus ``reg_factor`` times a Fisher information of the wrong classes.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices [N, d1, ..., dk], or one-hot rows of the evidence's shape.
        reg_factor: Weight of :func:`dirichlet_fisher_regularizer`.
        p_norm: The p of :func:`dirichlet_pnorm_loss`.
        reduction: See :func:`evidential_loss`, as for the arguments below.
        fisher: See :func:`dirichlet_fisher_regularizer`.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Check the values.

    Raises:
        InputError: As :func:`evidential_loss`, and for soft targets.

    Source: Tsiligkaridis, "Information Aware Max-Norm Dirichlet Networks" (arXiv 1910.04819).

    Example:
        >>> maxnorm_loss(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([0.7953, 0.2300])
    """
    _check_p_norm(p_norm)
    check_choice("fisher", fisher, ("original", "paper"))
    rows = _Rows(evidence, target, ignore_index, soft=False, validate=validate_args)
    loss = _regularized(_pnorm(rows, p_norm), rows, reg_factor, lambda r: _fisher(r, fisher))
    return rows.reduce(loss, weight, reduction)


def relaxed_evidential_loss(
    evidence: Tensor,
    target: Tensor,
    reg_factor: float = 0.0,
    prior: float = 0.1,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """R-EDL and Re-EDL: sum_c (y_c - alpha_c / S)^2 with alpha = e + prior, and no variance term; plus the KL for R-EDL.

    A smaller prior weight than 1 lets little evidence speak. Re-EDL also drops the KL (``reg_factor=0``).

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices [N, d1, ..., dk], or one-hot or soft rows of the evidence's shape.
        reg_factor: Weight of :func:`uniform_dirichlet_kl`.
        prior: lambda > 0, the prior weight of each class.
        reduction: See :func:`evidential_loss`, as for the arguments below.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Check the values.

    Raises:
        InputError: As :func:`evidential_loss`, and for a ``prior`` that is not positive.

    Source: Chen et al., R-EDL, ICLR 2024; Chen et al., Re-EDL (arXiv 2410.00393).

    Example:
        >>> relaxed_evidential_loss(torch.tensor([[0.8, 0.0]]), torch.tensor([0]))
        tensor(0.0200)
    """
    if not prior > 0:
        raise InputError(f"Expected argument `prior` to be positive, but got {prior}.")
    rows = _Rows(evidence, target, ignore_index, soft=True, validate=validate_args)
    loss = _regularized(_squared_error(rows, rows.evidence + prior).sum(1), rows, reg_factor, _kl)
    return rows.reduce(loss, weight, reduction)


def fisher_evidential_loss(
    evidence: Tensor,
    target: Tensor,
    reg_factor: float = 0.0,
    fisher_factor: float = 0.05,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """I-EDL: the squared error and variance of each class weighted by its Fisher information psi'(alpha_c).

    sum_c ((y_c - p_c)^2 + p_c (1 - p_c) / (S + 1)) psi'(alpha_c) - ``fisher_factor`` log det I(alpha) + ``reg_factor`` KL.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices [N, d1, ..., dk], or one-hot or soft rows of the evidence's shape.
        reg_factor: Weight of :func:`uniform_dirichlet_kl`.
        fisher_factor: Weight of the log-determinant; the authors choose it on validation data.
        reduction: See :func:`evidential_loss`, as for the arguments below.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Check the values.

    Raises:
        InputError: As :func:`evidential_loss`.

    Source: Deng et al., ICML 2023 (arXiv 2303.02045).

    Example:
        >>> fisher_evidential_loss(torch.zeros(1, 2), torch.tensor([0]), fisher_factor=0.0)
        tensor(1.0966)
    """
    rows = _Rows(evidence, target, ignore_index, soft=True, validate=validate_args)
    wide = rows.wide()
    alpha = wide.evidence + 1
    loss = ((_squared_error(wide, alpha) + _variance(wide, alpha)) * torch.polygamma(1, alpha)).sum(1)
    loss = loss - fisher_factor * dirichlet_log_det_fisher(alpha)
    return rows.reduce(_regularized(loss.to(rows.evidence.dtype), rows, reg_factor, _kl), weight, reduction)


# ---------------------------------------------------------------------- their parts


def dirichlet_mse_loss(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """E ||y - p||^2 under Dir(alpha): sum_c (y_c - alpha_c / S)^2 + (alpha_c / S) (1 - alpha_c / S) / (S + 1).

    Arguments and errors as of :func:`evidential_loss`.

    Example:
        >>> dirichlet_mse_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6667)
    """
    rows = _Rows(evidence, target, ignore_index, soft=True, validate=validate_args)
    return rows.reduce(_sse(rows), weight, reduction)


def dirichlet_nll_loss(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Type-II maximum likelihood: -log E[p_y] = log S - log alpha_y, in nats; soft targets are refused.

    Arguments and errors as of :func:`evidential_loss`.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 3.

    Example:
        >>> dirichlet_nll_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6931)
    """
    rows = _Rows(evidence, target, ignore_index, soft=False, validate=validate_args)
    return rows.reduce(_nll(rows), weight, reduction)


def dirichlet_cross_entropy_loss(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Bayes risk of the cross-entropy: E[-sum_c y_c log p_c] = sum_c y_c (psi(S) - psi(alpha_c)), in nats.

    Arguments and errors as of :func:`evidential_loss`. Posterior networks call it the uncertain cross-entropy.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 4.

    Example:
        >>> dirichlet_cross_entropy_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(1.)
    """
    rows = _Rows(evidence, target, ignore_index, soft=True, validate=validate_args)
    return rows.reduce(_cross_entropy(rows), weight, reduction)


def uniform_dirichlet_kl(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """KL(Dir(y + (1 - y) alpha) || Dir(1)) in nats: what the evidence says beside the true class.

    Arguments and errors as of :func:`evidential_loss`. Its ``"sum"`` is the sum of the samples' values (in uncertainty-loss
    0.1.2 it is N times that).

    Example:
        >>> uniform_dirichlet_kl(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([0.0000, 0.1931])
    """
    rows = _Rows(evidence, target, ignore_index, soft=True, validate=validate_args)
    return rows.reduce(_kl(rows), weight, reduction)


def dirichlet_pnorm_loss(
    evidence: Tensor,
    target: Tensor,
    p_norm: float = 4,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """(E[(1 - p_y)^p] + sum_{j != y} E[p_j^p])^(1/p), which bounds the expected max-norm of y - p.

    E[p_j^p] = Gamma(S) Gamma(alpha_j + p) / (Gamma(S + p) Gamma(alpha_j)), and the same with S - alpha_y in the place of
    alpha_j for the first term; by rising factorials in log space for an integer p.

    Other arguments and errors as of :func:`evidential_loss`; soft targets are refused.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices, or one-hot rows.
        p_norm: p >= 1.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Check the values.

    Source: Tsiligkaridis (arXiv 1910.04819).

    Example:
        >>> dirichlet_pnorm_loss(torch.zeros(1, 2), torch.tensor([0]), p_norm=1)
        tensor(1.)
    """
    _check_p_norm(p_norm)
    rows = _Rows(evidence, target, ignore_index, soft=False, validate=validate_args)
    return rows.reduce(_pnorm(rows, p_norm), weight, reduction)


def dirichlet_fisher_regularizer(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    fisher: Fisher = "original",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """1/2 sum_{j != y} (alpha_j - 1)^2 (psi'(alpha_j) - psi'(A)): information about the wrong classes.

    Other arguments and errors as of :func:`evidential_loss`; soft targets are refused.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices, or one-hot rows.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        fisher: ``"original"``: A = S, the sum over all classes, as in uncertainty-loss 0.1.2. ``"paper"``: A = 1 + sum_{j != y}
            alpha_j, the Dirichlet without the true class's evidence, so that this evidence does not matter. They differ by
            up to a half; the second form follows another implementation of the paper.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Check the values.

    Source: Tsiligkaridis (arXiv 1910.04819).

    Example:
        >>> dirichlet_fisher_regularizer(torch.tensor([[9.0, 1.0]]), torch.tensor([0]), fisher="paper")
        tensor(0.1250)
    """
    check_choice("fisher", fisher, ("original", "paper"))
    rows = _Rows(evidence, target, ignore_index, soft=False, validate=validate_args)
    return rows.reduce(_fisher(rows, fisher), weight, reduction)


# ---------------------------------------------------------------------- rows


class _Rows:
    """Checked evidence [N, C, ...] with its target as rows of the same shape."""

    def __init__(self, evidence: Tensor, target: Tensor, ignore_index: int, *, soft: bool, validate: bool) -> None:
        check_floating("evidence", evidence, 2, "[N, C, d1, ..., dk]")
        if not isinstance(target, Tensor):
            raise InputError(f"Expected argument `target` to be a tensor, but got {type(target).__name__}.")
        evidence = upcast(evidence)
        self.keep: Tensor | None = None
        self.soft = False
        if target.shape == evidence.shape:
            self.soft = target.is_floating_point()
            if validate:
                _check_one_hot(target, soft)
            self.hot = target.to(evidence.dtype) if self.soft else target.bool()
        elif target.shape == evidence.shape[:1] + evidence.shape[2:]:
            if target.is_floating_point() or target.dtype == torch.bool:
                raise InputError(
                    f"Expected argument `target` to hold class indices of an integer dtype, but got {target.dtype}."
                )
            keep = target != ignore_index
            if validate:
                _check_indices(target, keep, evidence.shape[1])
            if not validate or not bool(keep.all()):
                # Whatever stands at an ignored position, NaN included, must reach neither the loss nor the gradient.
                self.keep = keep
                evidence, target = torch.where(keep.unsqueeze(1), evidence, 0.0), torch.where(keep, target, 0)
            self.hot = torch.zeros_like(evidence, dtype=torch.bool).scatter_(1, target.long().unsqueeze(1), True)
        else:
            raise InputError(
                f"Expected argument `target` to be class indices of shape {list(evidence.shape[:1] + evidence.shape[2:])} or "
                f"one-hot rows of shape {list(evidence.shape)}, but got {list(target.shape)}."
            )
        if validate and not bool((evidence >= 0).all()):
            came = "NaN" if bool(evidence.isnan().any()) else f"{float(evidence.detach().min()):g}"
            raise InputError(
                f"Expected argument `evidence` to be non-negative, but got {came}: raw outputs go through `clamped_exp`, "
                "softplus or ReLU first."
            )
        self.evidence = evidence

    def wide(self) -> "_Rows":
        """The same in float64."""
        other = object.__new__(_Rows)
        other.__dict__ = {**self.__dict__, "evidence": to_sum_dtype(self.evidence)}
        return other

    def true(self, values: Tensor) -> Tensor:
        """Sum over the classes of y_c v_c: [N, ...]."""
        return (self.hot * values).sum(1)

    def others(self, values: Tensor) -> Tensor:
        """Values of the wrong classes, 0 at the true one (of which a soft target leaves a share): [N, C, ...]."""
        return values * (1 - self.hot) if self.soft else values.masked_fill(self.hot, 0.0)

    def reduce(self, loss: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
        """Weighted and reduced, ignored positions being 0."""
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        total: Tensor | None = None if self.keep is None else self.keep.sum()
        if weight is not None:
            classes = self.evidence.shape[1]
            if not isinstance(weight, Tensor) or weight.shape != (classes,):
                came = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                raise InputError(f"Expected argument `weight` to be a tensor [C] = [{classes}], but got {came}.")
            each = self.true(weight.to(loss).view(-1, *[1] * (loss.ndim - 1)))
            each = each if self.keep is None else each * self.keep
            loss, total = loss * each, each.sum()
        elif self.keep is not None:
            loss = loss * self.keep
        if reduction == "none":
            return loss
        return loss.sum() if reduction == "sum" else loss.sum() / (loss.numel() if total is None else total)


def _check_indices(target: Tensor, keep: Tensor, num_classes: int) -> None:
    wrong = keep & ((target < 0) | (target >= num_classes))
    if bool(wrong.any()):
        raise InputError(
            f"Expected argument `target` to hold class indices in [0, {num_classes}), but got {int(target[wrong][0])}."
        )


def _check_one_hot(target: Tensor, soft: bool) -> None:
    rows = target.float()
    if not bool(((rows.sum(1) - 1).abs() < 1e-3).all()) or not bool((rows >= 0).all()):
        raise InputError(
            "Expected the rows of argument `target` to be non-negative and to sum to one over the class axis, but they do not."
        )
    if not soft and not bool(((rows == 0) | (rows == 1)).all()):
        raise InputError(
            "Expected argument `target` to be class indices or one-hot rows, but got soft ones: this loss needs one true class."
        )


def _check_p_norm(p_norm: float) -> None:
    if isinstance(p_norm, bool) or not 1 <= p_norm < math.inf:
        raise InputError(f"Expected argument `p_norm` to be a finite number of at least 1, but got {p_norm!r}.")


# ---------------------------------------------------------------------- formulas, each [N, ...]


def _regularized(loss: Tensor, rows: _Rows, reg_factor: float, regularizer: Callable[[_Rows], Tensor]) -> Tensor:
    if not reg_factor >= 0:
        raise InputError(f"Expected argument `reg_factor` to be at least 0, but got {reg_factor}.")
    return loss + reg_factor * regularizer(rows) if reg_factor > 0 else loss


def _squared_error(rows: _Rows, alpha: Tensor) -> Tensor:
    total = alpha.sum(1, keepdim=True)
    if rows.soft:
        return (rows.hot - alpha / total).square()
    # 1 - p of the true class is what the others hold; the difference itself would lose its digits.
    rest = rows.others(alpha).sum(1, keepdim=True)
    return (torch.where(rows.hot, rest, alpha) / total).square()


def _variance(rows: _Rows, alpha: Tensor) -> Tensor:
    total = alpha.sum(1, keepdim=True)
    mean = alpha / total
    return mean * (1 - mean) / (total + 1)


def _sse(rows: _Rows) -> Tensor:
    if not rows.soft:
        return expected_squared_error(rows.evidence, rows.hot)
    alpha = rows.evidence + 1
    return (_squared_error(rows, alpha) + _variance(rows, alpha)).sum(1)


def _nll(rows: _Rows) -> Tensor:
    alpha = rows.evidence + 1
    return torch.log1p(rows.others(alpha).sum(1) / rows.true(alpha))


def _cross_entropy(rows: _Rows) -> Tensor:
    alpha = rows.wide().evidence + 1
    risk = rows.true(torch.digamma(alpha.sum(1, keepdim=True)) - torch.digamma(alpha))
    return risk.to(rows.evidence.dtype)


def _kl(rows: _Rows) -> Tensor:
    return kl_to_uniform(rows.others(rows.evidence))


def _pnorm(rows: _Rows, p_norm: float) -> Tensor:
    hot = rows.hot.bool()
    alpha = rows.evidence + 1
    rest = alpha.masked_fill(hot, 0.0).sum(1, keepdim=True)
    moments = log_rising_factorial_ratio(torch.where(hot, rest, alpha), alpha.sum(1, keepdim=True), p_norm)
    return torch.exp(torch.logsumexp(moments, 1) / p_norm)


def _fisher(rows: _Rows, fisher: Fisher) -> Tensor:
    hot = rows.hot.bool()
    wrong = to_sum_dtype(rows.evidence.masked_fill(hot, 0.0))
    total = (wrong if fisher == "paper" else to_sum_dtype(rows.evidence)).sum(1, keepdim=True) + wrong.shape[1]
    information = wrong.square() * (torch.polygamma(1, wrong + 1) - torch.polygamma(1, total))
    return (0.5 * information.sum(1)).to(rows.evidence.dtype)


_RISKS: dict[str, Callable[[_Rows], Tensor]] = {"sse": _sse, "nll": _nll, "cross_entropy": _cross_entropy}

# ---------------------------------------------------------------------- drop-ins for nn.CrossEntropyLoss


class EvidenceLoss(nn.Module):
    """Base of the losses that take a network's raw outputs: evidence, annealing factor, weights and reduction.

    Args:
        evidence: ``"clamped_exp"``, ``"softplus"``, ``"relu"``, or a function to non-negative evidence.
        reg_factor: Weight of the regularizer; :meth:`forward` takes another one, for annealing.
        weight: Weight of each class, C numbers.
        ignore_index: Class index of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        validate_args: Check the values: a pass over the data, and a synchronisation on a GPU.

    Attributes:
        prior: What is added to the evidence to make a concentration.

    Raises:
        InputError: An argument is not as above.
    """

    prior: float = 1.0
    weight: Tensor | None

    def __init__(
        self,
        evidence: Evidence = "clamped_exp",
        reg_factor: float = 0.0,
        *,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        check_bool("validate_args", validate_args)
        if not reg_factor >= 0:
            raise InputError(f"Expected argument `reg_factor` to be at least 0, but got {reg_factor}.")
        self.evidence = evidence_function(evidence)
        self.reg_factor = reg_factor
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight, dtype=torch.float32))
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.validate_args = validate_args

    def concentration(self, logits: Tensor) -> Tensor:
        """alpha = evidence + prior of raw outputs [N, C, ...], in at least float32."""
        return self.evidence(upcast(logits)) + self.prior

    def forward(self, logits: Tensor, target: Tensor, reg_factor: float | None = None) -> Tensor:
        """The loss of raw outputs [N, C, d1, ..., dk] and targets, under ``reg_factor`` instead of the module's own."""
        factor = self.reg_factor if reg_factor is None else reg_factor
        return self.of_evidence(self.evidence(upcast(logits)), target, factor)

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """The loss of evidence; a subclass says which."""
        raise NotImplementedError


class EvidentialLoss(EvidenceLoss):
    """:func:`evidential_loss` of raw outputs: a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        evidence: See :class:`EvidenceLoss`, as for the arguments not named here.
        reg_factor: Weight of the KL regularizer.
        risk: ``"sse"``, ``"nll"`` or ``"cross_entropy"``.
        weight: Weight of each class.
        ignore_index: Class index of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        validate_args: Check the values.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768).

    Example:
        >>> loss = EvidentialLoss(reg_factor=1.0)
        >>> loss(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
        tensor(0.0096)
    """

    def __init__(
        self,
        evidence: Evidence = "clamped_exp",
        reg_factor: float = 0.0,
        *,
        risk: Risk = "sse",
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        check_choice("risk", risk, tuple(_RISKS))
        super().__init__(
            evidence,
            reg_factor,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            validate_args=validate_args,
        )
        self.risk: Risk = risk

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`evidential_loss`."""
        return evidential_loss(
            evidence,
            target,
            reg_factor,
            self.reduction,
            risk=self.risk,
            weight=self.weight,
            ignore_index=self.ignore_index,
            validate_args=self.validate_args,
        )


class MaxNormLoss(EvidenceLoss):
    """:func:`maxnorm_loss` of raw outputs: a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        evidence: See :class:`EvidenceLoss`, as for the arguments not named here.
        reg_factor: Weight of the Fisher regularizer.
        p_norm: p >= 1 of the norm.
        fisher: ``"original"`` or ``"paper"``.
        weight: Weight of each class.
        ignore_index: Class index of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        validate_args: Check the values.

    Source: Tsiligkaridis (arXiv 1910.04819).

    Example:
        >>> MaxNormLoss()(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
        tensor(0.1144)
    """

    def __init__(
        self,
        evidence: Evidence = "clamped_exp",
        reg_factor: float = 0.0,
        *,
        p_norm: float = 4,
        fisher: Fisher = "original",
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        _check_p_norm(p_norm)
        check_choice("fisher", fisher, ("original", "paper"))
        super().__init__(
            evidence,
            reg_factor,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            validate_args=validate_args,
        )
        self.p_norm = p_norm
        self.fisher: Fisher = fisher

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`maxnorm_loss`."""
        return maxnorm_loss(
            evidence,
            target,
            reg_factor,
            self.p_norm,
            self.reduction,
            self.fisher,
            weight=self.weight,
            ignore_index=self.ignore_index,
            validate_args=self.validate_args,
        )


class RelaxedEvidentialLoss(EvidenceLoss):
    """:func:`relaxed_evidential_loss` of raw outputs: R-EDL, and with ``reg_factor=0`` Re-EDL.

    Args:
        evidence: See :class:`EvidenceLoss`, as for the arguments not named here.
        reg_factor: Weight of the KL regularizer.
        prior: lambda, the prior weight of each class.
        weight: Weight of each class.
        ignore_index: Class index of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        validate_args: Check the values.

    Source: Chen et al., R-EDL, ICLR 2024; Chen et al., Re-EDL (arXiv 2410.00393).

    Example:
        >>> RelaxedEvidentialLoss("softplus")(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
        tensor(0.0041)
    """

    def __init__(
        self,
        evidence: Evidence = "softplus",
        reg_factor: float = 0.0,
        *,
        prior: float = 0.1,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        if not prior > 0:
            raise InputError(f"Expected argument `prior` to be positive, but got {prior}.")
        super().__init__(
            evidence,
            reg_factor,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            validate_args=validate_args,
        )
        self.prior = prior

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`relaxed_evidential_loss`."""
        return relaxed_evidential_loss(
            evidence,
            target,
            reg_factor,
            self.prior,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
            validate_args=self.validate_args,
        )


class FisherEvidentialLoss(EvidenceLoss):
    """:func:`fisher_evidential_loss` of raw outputs: I-EDL.

    Args:
        evidence: See :class:`EvidenceLoss`, as for the arguments not named here.
        reg_factor: Weight of the KL regularizer.
        fisher_factor: Weight of the log-determinant of the Fisher information.
        weight: Weight of each class.
        ignore_index: Class index of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        validate_args: Check the values.

    Source: Deng et al., ICML 2023 (arXiv 2303.02045).

    Example:
        >>> FisherEvidentialLoss("softplus", fisher_factor=0.0)(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.4896)
    """

    def __init__(
        self,
        evidence: Evidence = "softplus",
        reg_factor: float = 0.0,
        *,
        fisher_factor: float = 0.05,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        super().__init__(
            evidence,
            reg_factor,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            validate_args=validate_args,
        )
        self.fisher_factor = fisher_factor

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`fisher_evidential_loss`."""
        return fisher_evidential_loss(
            evidence,
            target,
            reg_factor,
            self.fisher_factor,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
            validate_args=self.validate_args,
        )
