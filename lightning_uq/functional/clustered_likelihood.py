"""Log-likelihood of many labels together, with hypotheses sorted into cells by random hyperplanes.

Source: Osband et al., "The Neural Testbed: Evaluating Joint Predictions", NeurIPS 2022 (arXiv 2110.04629), and their code
(``neural_testbed.likelihood``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import wide_dtype, widen
from lightning_uq.functional.validation import check_floating, check_integer, check_shape, check_target

_CLIP = 5.0  # bound of probits, as in the original
_MAX_PLANES = 16
_CHUNK = 1 << 21  # probits read at a time: 16 MB


class Projection(NamedTuple):
    """Hyperplanes that sort hypotheses into cells.

    Attributes:
        weight: Normal vectors [P, tau, C].
        offset: Offsets [P].
    """

    weight: Tensor
    offset: Tensor


def random_projection(
    tau: int, num_classes: int, num_planes: int = 7, *, generator: torch.Generator | None = None
) -> Projection:
    """Random hyperplanes for :func:`clustered_log_likelihood`, with standard normal normals and offsets.

    Args:
        tau: Number of labels predicted together.
        num_classes: C.
        num_planes: P; the testbed uses 7, which gives at most 128 cells.
        generator: Source of the random numbers; default: torch's global generator.

    Raises:
        InputError: A number is below 1, or there are more than 16 planes.

    Example:
        >>> random_projection(tau=100, num_classes=2).weight.shape
        torch.Size([7, 100, 2])
    """
    for name, value in (("tau", tau), ("num_classes", num_classes), ("num_planes", num_planes)):
        check_integer(name, value, 1)
    if num_planes > _MAX_PLANES:
        raise InputError(f"`num_planes` must be at most {_MAX_PLANES}, but it is {num_planes}.")
    weight = torch.randn(num_planes, tau, num_classes, generator=generator, dtype=torch.float64)
    return Projection(weight, torch.randn(num_planes, generator=generator, dtype=torch.float64))


def clustered_log_likelihood(
    logits: Tensor | Iterable[Tensor], target: Tensor, projection: Projection, position: Tensor | None = None
) -> Tensor:
    """The testbed's estimate of log mean_z prod_t p_z(y_t | x_t), for many labels together.

    With labels of a hundred different inputs, only a few of a thousand hypotheses contribute, and the mean of their products
    falls far below its limit. Similar hypotheses therefore share their probabilities: each is the point of its probits
    u_tc = Phi^-1(p_tc), clipped at +-5, and random hyperplanes sort the points into cells k. Then

        log sum_k (n_k / Z) prod_t q_kt,    q_kt = mean over z in cell k of p_z(y_t | x_t).

    Except for the clipping, it equals :func:`joint_log_likelihood` if tau is 1 or if the hypotheses of each cell agree (for
    example if each has its own cell). Otherwise it is biased, since labels count as independent within a cell. With few distinct
    inputs among many labels, as in polyadic draws, it is mostly too low, and :func:`joint_log_likelihood` is the better estimate.
    Probabilities are at least Phi(-5) = 2.9e-7, so no draw is infinite.

    Args:
        logits: [Z, N, C] at N inputs, whole or in parts along Z, which are read in order.
        target: [S, tau].
        projection: Hyperplanes, the same for all draws: :func:`random_projection`.
        position: For each label, the position of its input among the N inputs: [S, tau]. None: N = S tau inputs in the draws' order.

    Returns:
        [S], in float64.

    Raises:
        InputError: Shapes do not fit, or there is no index or draw.

    Source: ``RandomProjection`` of ``neural_testbed.likelihood``, used there for tau > 10; its additions of 1e-6 to sums and
    counts are omitted.

    Example:
        >>> logits = torch.tensor([[[2.0, -2.0]], [[-2.0, 2.0]]]).expand(2, 30, 2)  # a label at 30 inputs, or the other
        >>> target = torch.zeros(1, 30, dtype=torch.long)
        >>> planes = random_projection(30, 2, generator=torch.Generator().manual_seed(0))
        >>> clustered_log_likelihood(logits, target, planes)  # log 1/2 - 30 log(1 + exp(-4))
        tensor([-1.2376], dtype=torch.float64)
    """
    device, dtype = target.device, wide_dtype(target.device)
    weight, offset = (tensor.to(device, dtype) for tensor in projection)
    num_planes, tau, num_classes = weight.shape
    draws = len(target)
    check_target(target, torch.Size([draws, tau]))
    if not draws:
        raise InputError("`target` must hold at least one draw, but it holds none.")
    if position is None:
        position = torch.arange(target.numel(), device=device).reshape(target.shape)
    check_shape("position", position, target.shape)
    cells = 2**num_planes
    bits, first = 2 ** torch.arange(num_planes, device=device), cells * torch.arange(draws, device=device)
    counts = torch.zeros(draws * cells, dtype=dtype, device=device)
    sums = torch.zeros(draws * cells, tau, dtype=dtype, device=device)
    for part in [logits] if isinstance(logits, Tensor) else logits:
        check_floating("logits", part, 3, "[Z, N, C]")
        if part.shape[2] != num_classes or part.shape[1] <= int(position.max()):
            raise InputError(
                f"`logits` must be [Z, N, {num_classes}] with N of at least {int(position.max()) + 1}, but "
                f"its shape is {list(part.shape)}."
            )
        probits = torch.special.ndtri(widen(part).softmax(-1)).clamp(-_CLIP, _CLIP)
        for some in torch.split(probits, max(1, _CHUNK // (target.numel() * num_classes))):
            drawn = some[:, position]  # [z, S, tau, C]
            sides = torch.einsum("zstc,ptc->zsp", drawn, weight) + offset > 0
            row = ((sides * bits).sum(-1) + first).flatten()
            probs = torch.special.ndtr(drawn.gather(3, target.long().expand(len(some), -1, -1).unsqueeze(3)))
            counts += torch.bincount(row, minlength=len(counts))
            sums.index_add_(0, row, probs.reshape(-1, tau))
    counts = counts.reshape(draws, cells)
    if not bool(counts.any()):
        raise InputError("`logits` must hold at least one index z, but it holds none.")
    # An empty cell has weight 0: log 0 plus any product.
    log_means = (sums.reshape(draws, cells, tau) / counts.clamp(min=1).unsqueeze(2)).log().sum(2)
    return (counts.log() + log_means).logsumexp(1) - counts.sum(1).log()
