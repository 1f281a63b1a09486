"""Terms of the evidential losses as separate losses: risks under a Dirichlet, and regularizers of evidence.

Evidence e >= 0 has shape [N, C, d1, ..., dk]. The concentration is alpha = e + 1, its sum is S = sum_c alpha_c, and the mean
probabilities are alpha / S.
"""

from torch import Tensor

from lightning_uq.functional.validation import check_choice
from lightning_uq.losses.evidence_formulas import (
    Fisher,
    check_p_norm,
    cross_entropy,
    fisher_information,
    misleading_kl,
    negative_log_likelihood,
    p_norm_bound,
    sum_of_squares,
)
from lightning_uq.losses.evidence_rows import EvidenceRows
from lightning_uq.losses.reduction import Reduction


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

    Arguments and errors: see :func:`~lightning_uq.losses.evidential_loss`.

    Example:
        >>> import torch
        >>> dirichlet_mse_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6667)
    """
    rows = EvidenceRows(evidence, target, ignore_index, soft=True, validate=validate_args)
    return rows.reduce(sum_of_squares(rows), weight, reduction)


def dirichlet_nll_loss(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Type-II maximum likelihood: -log E[p_y] = log S - log alpha_y, in nats. Soft targets are refused.

    Arguments and errors: see :func:`~lightning_uq.losses.evidential_loss`.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 3.

    Example:
        >>> import torch
        >>> dirichlet_nll_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6931)
    """
    rows = EvidenceRows(evidence, target, ignore_index, soft=False, validate=validate_args)
    return rows.reduce(negative_log_likelihood(rows), weight, reduction)


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

    Arguments and errors: see :func:`~lightning_uq.losses.evidential_loss`. Posterior networks call it the uncertain cross-entropy.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768), equation 4.

    Example:
        >>> import torch
        >>> dirichlet_cross_entropy_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(1.)
    """
    rows = EvidenceRows(evidence, target, ignore_index, soft=True, validate=validate_args)
    return rows.reduce(cross_entropy(rows), weight, reduction)


def uniform_dirichlet_kl(
    evidence: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """KL(Dir(y + (1 - y) alpha) || Dir(1)) in nats: the evidence for wrong classes.

    Arguments and errors: see :func:`~lightning_uq.losses.evidential_loss`. ``"sum"`` is the sum of the samples' values (in
    uncertainty-loss 0.1.2 it is N times that).

    Example:
        >>> import torch
        >>> uniform_dirichlet_kl(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), reduction="none")
        tensor([0.0000, 0.1931])
    """
    rows = EvidenceRows(evidence, target, ignore_index, soft=True, validate=validate_args)
    return rows.reduce(misleading_kl(rows), weight, reduction)


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
    """(E[(1 - p_y)^p] + sum_{j != y} E[p_j^p])^(1/p), an upper bound of the expected max-norm of y - p.

    E[p_j^p] = Gamma(S) Gamma(alpha_j + p) / (Gamma(S + p) Gamma(alpha_j)); the first term has S - alpha_y instead of alpha_j. An
    integer p uses rising factorials in log space.

    Soft targets are refused. For other arguments and errors see :func:`~lightning_uq.losses.evidential_loss`.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices, or one-hot rows.
        p_norm: p >= 1.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Whether to check the values.

    Source: Tsiligkaridis (arXiv 1910.04819).

    Example:
        >>> import torch
        >>> dirichlet_pnorm_loss(torch.zeros(1, 2), torch.tensor([0]), p_norm=1)
        tensor(1.)
    """
    check_p_norm(p_norm)
    rows = EvidenceRows(evidence, target, ignore_index, soft=False, validate=validate_args)
    return rows.reduce(p_norm_bound(rows, p_norm), weight, reduction)


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

    Soft targets are refused. For other arguments and errors see :func:`~lightning_uq.losses.evidential_loss`.

    Args:
        evidence: e >= 0 [N, C, d1, ..., dk].
        target: Class indices, or one-hot rows.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        fisher: ``"original"``: A = S, the sum over all classes, as in uncertainty-loss 0.1.2. ``"paper"``: A = 1 + sum_{j != y}
            alpha_j, so that the true class's evidence has no effect. The two differ by up to a half; the second form follows
            another implementation of the paper.
        weight: Weight of each class [C].
        ignore_index: Class index of positions that do not count.
        validate_args: Whether to check the values.

    Source: Tsiligkaridis (arXiv 1910.04819).

    Example:
        >>> import torch
        >>> dirichlet_fisher_regularizer(torch.tensor([[9.0, 1.0]]), torch.tensor([0]), fisher="paper")
        tensor(0.1250)
    """
    check_choice("fisher", fisher, ("original", "paper"))
    rows = EvidenceRows(evidence, target, ignore_index, soft=False, validate=validate_args)
    return rows.reduce(fisher_information(rows, fisher), weight, reduction)
