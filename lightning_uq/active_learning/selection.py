"""Choosing a batch of inputs by their scores: the highest ones, or a random draw that prefers high ones."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_choice, check_floating, check_integer

Selection = Literal["top", "power", "softmax", "softrank"]


def select(scores: Tensor, num: int) -> Tensor:
    """Positions [num] of the highest scores, highest first; equal scores are taken in their order.

    Args:
        scores: [B].
        num: Number of positions.

    Raises:
        InputError: There are fewer scores, or one is NaN.

    Example:
        >>> select(torch.tensor([0.1, 0.7, 0.2, 0.7]), 3)
        tensor([1, 3, 2])
    """
    check_floating("scores", scores, 1, "[B]")
    check_integer("num", num, 1)
    if scores.ndim > 1 or len(scores) < num:
        raise InputError(f"`scores` must hold at least {num} numbers [B], but its shape is {list(scores.shape)}.")
    if bool(scores.isnan().any()):
        raise InputError(f"`scores` must hold numbers, but {int(scores.isnan().sum())} are NaN.")
    return scores.argsort(descending=True, stable=True)[:num]


def select_randomly(
    scores: Tensor,
    num: int,
    selection: Selection = "power",
    beta: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions [num] drawn without replacement, where inputs with high scores are more likely.

    The highest scores often belong to inputs that resemble one another, and labelling all of them teaches little more than labelling
    one. A draw costs no more than :func:`select` and spreads the batch. With score s_i, the first position is i with probability
    proportional to

    - ``"power"``: s_i^beta, for scores that are not negative; inputs with score 0 come last;
    - ``"softmax"``: exp(beta s_i);
    - ``"softrank"``: rank_i^-beta, where the highest score has rank 1.

    The others are drawn likewise from what is left, which adding Gumbel noise to the logarithms and taking the highest does. beta = 0 draws
    uniformly, and a large beta is :func:`select`.

    Args:
        scores: [B].
        num: Number of positions.
        selection: The distribution; ``"top"`` is :func:`select`.
        beta: Its sharpness, at least 0.
        generator: Source of the noise; None: torch's global generator.

    Raises:
        InputError: There are fewer scores; one is NaN, or negative with ``"power"``; or an argument is out of range.

    Source: Kirsch et al., "Stochastic Batch Acquisition", TMLR 2023.

    Example:
        >>> select_randomly(torch.tensor([0.0, 5.0, 0.1]), 2, "power", 50.0, generator=torch.Generator().manual_seed(0))
        tensor([1, 2])
    """
    check_choice("selection", selection, get_args(Selection))
    if not 0 <= beta < torch.inf:
        raise InputError(f"`beta` must be finite and at least 0, but it is {beta}.")
    highest = select(scores, num)
    if selection == "top":
        return highest
    values = scores.double()
    if selection == "power":
        if bool((values < 0).any()):
            raise InputError(
                f"`selection='power'` needs scores that are not negative, but the lowest is {float(values.min()):g}. Use "
                "'softmax' or 'softrank'."
            )
        log_weights = beta * values.log()
        log_weights[values == 0] = -torch.inf  # also where beta is 0
    elif selection == "softmax":
        log_weights = beta * values
    else:
        ranks = torch.empty_like(values)
        ranks[values.argsort(descending=True, stable=True)] = torch.arange(
            1, len(values) + 1, dtype=values.dtype, device=values.device
        )
        log_weights = -beta * ranks.log()
    uniform = torch.rand(len(values), dtype=torch.float64, generator=generator).to(values.device)
    noise = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
    return (log_weights + noise).argsort(descending=True, stable=True)[:num]
