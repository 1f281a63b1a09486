"""Losses on evidence for classes: a network predicts evidence for each class, which defines a Dirichlet distribution.

Evidence e >= 0 has shape [N, C, d1, ..., dk]. The concentration is alpha = e + 1, its sum is S = sum_c alpha_c, and the mean
probabilities are alpha / S. The functions of this file take evidence. Their module versions, in
:mod:`~lightning_uq.losses.evidential_modules`, take a network's raw outputs and replace ``nn.CrossEntropyLoss``.

The learned evidence is *relative*: it ranks inputs, but it does not vanish with more data, no proper scoring rule exists for
it, and the regularizer sets its level. It is not a calibrated epistemic uncertainty (Bengs et al., ICML 2023; Juergens et al.,
ICML 2024; Shen et al., NeurIPS 2024), so it is no default of this package.
"""

import torch
from torch import Tensor

from lightning_uq.functional.dirichlet import dirichlet_log_det_fisher
from lightning_uq.functional.validation import check_choice, check_positive
from lightning_uq.losses.evidence_formulas import (
    RISKS,
    Fisher,
    Risk,
    check_p_norm,
    fisher_information,
    misleading_kl,
    p_norm_bound,
    regularized,
    squared_error,
    variance,
)
from lightning_uq.losses.evidence_rows import EvidenceRows
from lightning_uq.losses.reduction import Reduction


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
    """A Bayes risk under Dir(alpha), plus ``reg_factor`` times the KL divergence of the misleading evidence from zero evidence.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices [N, d1, ..., dk], or one-hot or soft rows of the evidence's shape (``nll`` refuses soft rows).
        reg_factor: Weight of :func:`uniform_dirichlet_kl`; callers anneal it from 0.
        reduction: ``"none"`` for [N, d1, ..., dk], ``"sum"``, or ``"mean"``: the sum divided by the sum of the samples' weights.
        risk: ``"sse"`` (:func:`dirichlet_mse_loss`), ``"nll"`` (:func:`dirichlet_nll_loss`) or ``"cross_entropy"``
            (:func:`dirichlet_cross_entropy_loss`).
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count, for index targets. If no position counts, the mean is NaN, as in
            torch.
        validate_args: Whether to check the values: one pass over the data, and a synchronisation on a GPU. Shapes are always checked.

    Raises:
        InputError: Evidence is negative, shapes differ, indices lie outside [0, C), or rows are not probabilities.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 5 and section 4.

    Example:
        >>> evidential_loss(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([0.6667, 0.0364])
    """
    check_choice("risk", risk, tuple(RISKS))
    rows = EvidenceRows(evidence, target, ignore_index, soft=risk != "nll", validate=validate_args)
    return rows.reduce(regularized(RISKS[risk](rows), rows, reg_factor, misleading_kl), weight, reduction)


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
        reduction: See :func:`evidential_loss` for this and the arguments below.
        fisher: See :func:`dirichlet_fisher_regularizer`.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Whether to check the values.

    Raises:
        InputError: See :func:`evidential_loss`; soft targets are also refused.

    Source: Tsiligkaridis, "Information Aware Max-Norm Dirichlet Networks" (arXiv 1910.04819).

    Example:
        >>> maxnorm_loss(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([0.7953, 0.2300])
    """
    check_p_norm(p_norm)
    check_choice("fisher", fisher, ("original", "paper"))
    rows = EvidenceRows(evidence, target, ignore_index, soft=False, validate=validate_args)
    loss = regularized(p_norm_bound(rows, p_norm), rows, reg_factor, lambda r: fisher_information(r, fisher))
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
    """R-EDL and Re-EDL: sum_c (y_c - alpha_c / S)^2 with alpha = e + prior, without a variance term; R-EDL adds the KL.

    With a prior weight below 1, little evidence has more effect. Re-EDL also drops the KL (``reg_factor=0``).

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices [N, d1, ..., dk], or one-hot or soft rows of the evidence's shape.
        reg_factor: Weight of :func:`uniform_dirichlet_kl`.
        prior: lambda > 0, the prior weight of each class.
        reduction: See :func:`evidential_loss` for this and the arguments below.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Whether to check the values.

    Raises:
        InputError: See :func:`evidential_loss`; ``prior`` must also be positive.

    Source: Chen et al., R-EDL, ICLR 2024; Chen et al., Re-EDL (arXiv 2410.00393).

    Example:
        >>> relaxed_evidential_loss(torch.tensor([[0.8, 0.0]]), torch.tensor([0]))
        tensor(0.0200)
    """
    check_positive(prior=prior)
    rows = EvidenceRows(evidence, target, ignore_index, soft=True, validate=validate_args)
    loss = regularized(squared_error(rows, rows.evidence + prior).sum(1), rows, reg_factor, misleading_kl)
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
        reduction: See :func:`evidential_loss` for this and the arguments below.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Whether to check the values.

    Raises:
        InputError: See :func:`evidential_loss`.

    Source: Deng et al., ICML 2023 (arXiv 2303.02045).

    Example:
        >>> fisher_evidential_loss(torch.zeros(1, 2), torch.tensor([0]), fisher_factor=0.0)
        tensor(1.0966)
    """
    rows = EvidenceRows(evidence, target, ignore_index, soft=True, validate=validate_args)
    wide = rows.wide()
    alpha = wide.evidence + 1
    loss = ((squared_error(wide, alpha) + variance(wide, alpha)) * torch.polygamma(1, alpha)).sum(1)
    loss = loss - fisher_factor * dirichlet_log_det_fisher(alpha)
    return rows.reduce(regularized(loss.to(rows.evidence.dtype), rows, reg_factor, misleading_kl), weight, reduction)
