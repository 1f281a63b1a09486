"""Out-of-distribution scores that need more than logits: generalised entropy, nearest neighbours, virtual-logit matching.

For all of them, higher means further out, as in :mod:`lightning_uq.functional.scores`. They are fitted only to the training
distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.entropy import log_mean_exp, mean_log_probs
from lightning_uq.functional.finite import infinite_where_bad
from lightning_uq.functional.precision import to_float64, upcast, wide_dtype
from lightning_uq.functional.validation import check_floating, check_integer, check_open_unit

_CHUNK_ELEMENTS = 2**24


def gen(logits: Tensor, gamma: float = 0.1, top: int = 100) -> Tensor:
    """Generalised entropy sum_m p_m^gamma (1 - p_m)^gamma over the ``top`` largest of the mean probabilities.

    A small gamma responds to small deviations from certainty. Leaving out the tail reduces the noise of many classes.

    Args:
        logits: Member logits [Z, B, C] (or [Z, B, C, ...]).
        gamma: Exponent in (0, 1).
        top: Number of classes in the sum; all if there are fewer.

    Returns:
        [B] (or [B, ...]).

    Raises:
        InputError: ``logits`` have another shape, or an argument is out of range.

    Source: Liu et al., CVPR 2023.

    Example:
        >>> gen(torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]]), gamma=0.5)
        tensor([1.])
    """
    check_floating("logits", logits, 3, "[Z, B, C, ...]")
    check_open_unit("gamma", gamma)
    check_integer("top", top, 1)
    log_probs = mean_log_probs(logits)
    # For the most probable class, 1 - p is the sum of the others: a difference would round to 0 for different confident rows.
    others = log_probs.scatter(1, log_probs.argmax(1, keepdim=True), -torch.inf)
    log_probs = log_probs.topk(min(top, log_probs.shape[1]), 1).values
    first = log_mean_exp(others.movedim(1, 0)) + math.log(others.shape[1])
    rest = torch.cat([first.unsqueeze(1), torch.log1p(-log_probs[:, 1:].exp())], 1)
    return torch.exp(gamma * (log_probs + rest)).sum(1)


class NeighborBank(NamedTuple):
    """Training features among which neighbours are searched, in float64.

    Attributes:
        rows: The features [M, D] minus ``center``; of length 1 with ``normalize``.
        squares: Their squared lengths [M].
        center: The features' mean [D].
        normalize: Whether features are scaled to length 1.
    """

    rows: Tensor
    squares: Tensor
    center: Tensor
    normalize: bool


def neighbor_bank(features: Tensor, normalize: bool = True) -> NeighborBank:
    """Prepare training features [M, D] for :func:`neighbor_distance`, on the CPU if their device has no float64.

    Example:
        >>> neighbor_bank(torch.tensor([[2.0, 0.0], [0.0, 2.0]])).center
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    check_floating("bank", features, 2, "[M, D]")
    rows = to_float64(features)
    if normalize:
        rows = unit_rows(rows)
    center = rows.nan_to_num(0.0, 0.0, 0.0).mean(0)  # any point works; it removes what the rows have in common
    rows = rows - center
    return NeighborBank(rows, rows.square().sum(1), center, normalize)


def neighbor_distance(features: Tensor, bank: NeighborBank, k: int) -> Tensor:
    """:func:`knn_distance` to prepared features: [N, D] -> [N] in float64, on the bank's device."""
    _check_features(features, len(bank.center))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(bank.rows):
        raise InputError(f"`k` must be an integer from 1 to the {len(bank.rows)} rows of `bank`, but it is {k!r}.")
    rows = (features if wide_dtype(features.device) == torch.float64 else features.cpu()).to(bank.rows)
    rows = (unit_rows(rows) if bank.normalize else rows) - bank.center
    distances = [rows.new_empty(0)]
    # A graph cannot hold a loop over an unknown number of parts.
    in_graph = torch.compiler.is_compiling()
    for part in (rows,) if in_graph else torch.split(rows, max(1, _CHUNK_ELEMENTS // len(bank.rows))):
        # The expanded square |b|^2 - 2 a.b ranks at the speed of a matrix product, in less than twice the time of float32. It cancels to
        # eps |a|^2 of float64, which is smaller than the features' own rounding to float32, however far apart they are. The distance
        # itself is computed without it.
        ranked = torch.addmm(bank.squares, part.detach(), bank.rows.T, alpha=-2).topk(k, 1, largest=False)
        distances.append((part - bank.rows[ranked.indices[:, -1]]).norm(dim=1))
    # A length that overflows the features' own dtype must raise the alarm, even though float64 can hold it.
    return infinite_where_bad(torch.cat(distances), unit_rows(upcast(features)).to(rows.device))


def knn_distance(features: Tensor, bank: Tensor, k: int = 50, normalize: bool = True) -> Tensor:
    """Euclidean distance to the ``k``-th nearest training feature.

    Neighbours are ranked in float64, so that float32 features with a large common part keep their digits. Float64 features closer than
    1e-7 of their distance from the mean of ``bank`` are not distinguished.

    Args:
        features: [N, D].
        bank: Training features [M, D].
        k: Rank of the neighbour; a row that is itself in ``bank`` is its own first neighbour.
        normalize: Whether to scale every feature vector to length 1 first, as in the paper; a zero vector stays zero.

    Returns:
        [N], in at least float32; plus infinity for a row whose length is not finite.

    Raises:
        InputError: Shapes do not fit, or ``k`` is not in [1, M].

    Source: Sun et al., ICML 2022 (arXiv 2204.06507); its k is 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_distance(torch.tensor([[2.0, 0.0]]), bank, k=1), knn_distance(torch.tensor([[2.0, 0.0]]), bank, k=2)
        (tensor([0.]), tensor([1.4142]))
    """
    distance = neighbor_distance(features, neighbor_bank(bank, normalize), k)
    return distance.to(torch.promote_types(upcast(features).dtype, upcast(bank).dtype)).to(features.device)


def unit_rows(features: Tensor) -> Tensor:
    """Features [..., D] scaled to length 1. A zero vector stays zero, and a vector whose length overflows becomes NaN.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e38, 3e38]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000],
                [   nan,    nan]])
    """
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return torch.where(length.isfinite(), features / length.clamp_min(1e-12), torch.nan)


class VimFit(NamedTuple):
    """A fitted virtual logit, in float64.

    Attributes:
        origin: The point [D] at which the logits of the last layer are as equal as possible.
        residual: An orthonormal basis [D, D - dim] of the directions in which training features hardly vary.
        alpha: Factor that scales residual norms to the size of logits, a scalar.
    """

    origin: Tensor
    residual: Tensor
    alpha: Tensor


def fit_vim(features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None, dim: int | None = None) -> VimFit:
    """Fit the principal subspace of training features, and the scale of a logit computed from the part outside of it.

    With the origin o = -W^+ b and R the eigenvectors of mean (f - o)(f - o)^T with the D - ``dim`` smallest eigenvalues,

        alpha = mean max_c l_c / mean |R^T (f - o)|.

    Args:
        features: Training features [N, D], the inputs of the last linear layer.
        logits: Its outputs [N, C].
        weight: Its weight [C, D].
        bias: Its bias [C], or None.
        dim: Dimension of the principal subspace, from 1 to D - 1. Default, as in the paper: 1000 for D >= 2048, 512 for D >= 768,
            otherwise D / 2.

    Returns:
        The fit, for :func:`vim_score`.

    Raises:
        InputError: Shapes do not fit, or the features do not vary outside the subspace.

    Source: Wang et al., CVPR 2022 (arXiv 2203.10807).

    Example:
        >>> features = torch.tensor([[2.0, 0.1], [-2.0, -0.1], [2.0, -0.1], [-2.0, 0.1]])
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fit = fit_vim(features, features @ weight.T, weight, None, dim=1)
        >>> fit.alpha.round(decimals=3)
        tensor(20., dtype=torch.float64)
        >>> vim_score(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]]), fit).round(decimals=3)
        tensor([59.3070], dtype=torch.float64)
    """
    check_floating("weight", weight, 2, "[C, D]")
    C, D = weight.shape
    _check_features(features, D)
    if logits.shape != (len(features), C) or len(features) == 0:
        raise InputError(
            f"`logits` must have shape [{max(1, len(features))}, {C}], one row per row of `features`, but its shape is "
            f"{list(logits.shape)}."
        )
    if dim is None:
        dim = 1000 if D >= 2048 else 512 if D >= 768 else D // 2
    if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim < D:
        raise InputError(f"`dim` must be an integer from 1 to {D - 1}, but it is {dim!r}.")
    weight = to_float64(weight)
    shift = weight.new_zeros(C) if bias is None else to_float64(bias)
    origin = -torch.linalg.pinv(weight) @ shift
    moment = weight.new_zeros(D, D)
    parts = torch.split(features.detach(), 4096)
    for part in parts:
        centered = to_float64(part) - origin
        moment.addmm_(centered.T, centered)
    residual = torch.linalg.eigh(moment).eigenvectors[:, : D - dim]  # in ascending order
    norm = torch.cat([((to_float64(part) - origin) @ residual).norm(dim=1) for part in parts]).mean()
    if not norm > 1e-6 * (moment.trace() / len(features)).sqrt():
        raise InputError(
            f"`features` must vary outside a principal subspace of `dim` = {dim} dimensions, but their rank is at most that. "
            "Choose a smaller `dim`."
        )
    return VimFit(origin, residual, to_float64(logits).amax(1).mean() / norm)


def vim_score(features: Tensor, logits: Tensor, fit: VimFit) -> Tensor:
    """alpha |R^T (f - o)| - logsumexp_c l_c: the virtual logit plus the free energy of the real logits.

    Args:
        features: [N, D].
        logits: [N, C].
        fit: The result of :func:`fit_vim`.

    Returns:
        [N] in float64; plus infinity for a non-finite row.
    """
    _check_features(features, len(fit.origin))
    virtual: Tensor = fit.alpha * ((to_float64(features) - fit.origin) @ fit.residual).norm(dim=1)
    score = virtual - torch.logsumexp(to_float64(logits), 1)
    return infinite_where_bad(score, torch.cat([features, logits.clamp_min(-1.0)], 1).to(score.device))


def _check_features(features: Tensor, D: int) -> None:
    check_floating("features", features, 2, "[N, D]")
    if features.ndim != 2 or features.shape[1] != D:
        raise InputError(f"`features` must have shape [N, {D}], but its shape is {list(features.shape)}.")
