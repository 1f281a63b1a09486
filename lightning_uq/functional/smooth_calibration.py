"""The smooth calibration error, a consistent measure of calibration without bins.

Residuals are summed onto a grid (:func:`residual_grid`), grids of batches are added, and :func:`smooth_bandwidth` computes the error
from the sum.

Source: Blasiok & Nakkiran, ICLR 2024 (arXiv 2309.12236).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uq.functional.calibration import scatter_sum, top_label
from lightning_uq.functional.precision import widen
from lightning_uq.functional.validation import classification_rows

NUM_CELLS = 8192


def residual_grid(confidence: Tensor, correct: Tensor) -> Tensor:
    """Sum residuals and rows onto a fine grid over [0, 1], for streaming :func:`smooth_calibration_error`.

    Each row is split between the two grid nodes around its confidence, linearly in the distance. This preserves the first moment, and
    the error of smoothing with bandwidth s is O((h / s)^2), h = 1 / 8192.

    Args:
        confidence: Probabilities [N].
        correct: Whether each prediction was correct, [N].

    Returns:
        [2, 8193] in float64: the sum of (correct - confidence), and the number of rows.

    Example:
        >>> residual_grid(torch.tensor([1.0]), torch.tensor([False]))[:, -1]
        tensor([-1.,  1.], dtype=torch.float64)
    """
    confidence = widen(confidence)
    residual = widen(correct) - confidence
    position = confidence.clamp(0, 1) * NUM_CELLS
    left = position.floor().clamp_max(NUM_CELLS - 1)
    share = position - left
    left = left.long()
    rows = (residual, torch.ones_like(residual))
    size = NUM_CELLS + 1
    return torch.stack(
        [scatter_sum(left, row * (1 - share), size) + scatter_sum(left + 1, row * share, size) for row in rows]
    )


def smooth_residual(grid: Tensor, bandwidth: Tensor | float) -> Tensor:
    """Smooth node masses [..., M + 1] over [0, 1] into a density, with a Gaussian reflected at both ends.

    Reflection makes the masses an even function with period 2. Convolution with a Gaussian is then multiplication by exp(-(k pi s)^2 / 2)
    in the cosine basis, which is exact at the nodes and takes O(M log M).

    Args:
        grid: Node masses [..., M + 1].
        bandwidth: Standard deviation s of the Gaussian, in units of probability.

    Returns:
        The density at the nodes, [..., M + 1].
    """
    cells = grid.shape[-1] - 1
    # An end node is its own mirror image, so it counts twice.
    ends = grid[..., [0, -1]] * 2
    even = torch.cat([ends[..., :1], grid[..., 1:-1], ends[..., 1:], grid[..., 1:-1].flip(-1)], -1)
    frequency = torch.arange(cells + 1, dtype=grid.dtype, device=grid.device) * torch.pi
    spectrum = torch.fft.rfft(even) * torch.exp(-0.5 * (frequency * bandwidth).square())
    density: Tensor = torch.fft.irfft(spectrum, n=2 * cells)[..., : cells + 1] * cells
    return density


def smooth_bandwidth(grid: Tensor) -> Tensor:
    """The fixed point s of s = smECE_s, which is the smECE, by bisection of a function that decreases in s.

    Args:
        grid: The result of :func:`residual_grid`, or a sum of such results.

    Returns:
        A scalar in [0, 1]; NaN without rows.
    """
    residual = grid[0] / grid[1].sum()
    low, high = torch.zeros_like(residual[0]), torch.ones_like(residual[0])
    for _ in range(50):
        middle = (low + high) / 2
        above = _integral(smooth_residual(residual, middle).abs()) > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(grid[1].sum() > 0, (low + high) / 2, torch.nan)


def smooth_calibration_error(probs: Tensor, target: Tensor) -> Tensor:
    r"""Smooth calibration error (smECE) of the top label, a consistent measure of calibration without bins.

    With confidence f_i and correctness y_i, and K_s the Gaussian of standard deviation s reflected at 0 and 1,

        smECE_s = \int_0^1 | 1/N sum_i K_s(t, f_i) (y_i - f_i) | dt,

    and smECE is the unique s with smECE_s = s, so the data determine the bandwidth. It is computed on a grid of 8,193 nodes (see
    :func:`residual_grid`), with an absolute error below about 1e-4.

    Args:
        probs: Probabilities [B, C], or [B, C, ...] with each position as a row.
        target: Class indices [B] (or [B, ...]).

    Returns:
        A scalar in [0, 1].

    Raises:
        InputError: ``probs`` are not probabilities, shapes differ, or a target is out of range.

    Source: Blasiok & Nakkiran, ICLR 2024 (arXiv 2309.12236).

    Example:
        >>> probs = torch.tensor([[0.25, 0.75]]).expand(100, 2)
        >>> smooth_calibration_error(probs, torch.zeros(100, dtype=torch.long)).round(decimals=3)
        tensor(0.7500, dtype=torch.float64)
    """
    return smooth_bandwidth(residual_grid(*top_label(*classification_rows(probs, target))))


def _integral(values: Tensor) -> Tensor:
    return torch.trapezoid(values, dx=1 / (values.shape[-1] - 1))
