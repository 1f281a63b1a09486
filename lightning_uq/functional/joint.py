"""Joint log-loss: how well a method predicts the labels of several inputs together.

A marginal score judges each input alone and cannot distinguish knowledge from guessing: only joint predictions show whether the
members agree on *which* labels occur together. With log p_zt = log p_z(y_t | x_t) and tau inputs, the loss of a joint prediction is

    - log mean_z exp( sum_t log p_zt ),

in nats and not divided by tau. By Jensen's inequality the value falls as the number of hypotheses Z grows, so compare
methods only at equal Z.

Source: Osband et al., The Neural Testbed (arXiv 2110.04629); dyadic sampling: Osband et al., arXiv 2202.13509.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.hashing import mix
from lightning_uq.functional.true_class import true_class_log_probs
from lightning_uq.functional.validation import (
    check_choice,
    check_floating,
    check_integer,
)

Sampling = Literal["dyadic", "sampled", "consecutive"]


def joint_log_probs(logits: Tensor, target: Tensor, *, validate: bool = True) -> Tensor:
    """log p_z(y_b | x_b) [Z, B] in float64, from member logits [Z, B, C] and class indices [B].

    Raises:
        InputError: Shapes or dtypes differ from these; with ``validate``, also if a target is out of range or a logit is NaN.

    Example:
        >>> joint_log_probs(torch.tensor([[[0.0, 0.0]]]), torch.tensor([1]))
        tensor([[-0.6931]], dtype=torch.float64)
    """
    check_floating("logits", logits, 3, "[Z, B, C]")
    if logits.ndim != 3 or len(logits) == 0:
        raise InputError(f"`logits` must be [Z, B, C] with Z > 0, but its shape is {list(logits.shape)}.")
    return true_class_log_probs(logits, target, validate=validate)


def _log_mean(members: Tensor) -> Tensor:
    return members.logsumexp(0) - math.log(len(members))


def dyadic_joint_log_loss(log_probs: Tensor, tau: int = 10) -> Tensor:
    """Joint log-loss of tau draws, with replacement, from each pair of consecutive rows: its exact expectation.

    If k of the tau draws fall on the first row of a pair, the joint likelihood depends only on k, which is binomial. The
    expectation over the draws is thus a sum of tau + 1 terms,

        sum_k binom(tau, k) 2^-tau ( - log mean_z exp( k log p_z0 + (tau - k) log p_z1 ) ),

    without sampling noise.

    Args:
        log_probs: Log-probabilities of the true classes [Z, 2 G]; rows 2 g and 2 g + 1 are a pair.
        tau: Number of draws.

    Returns:
        [G] in nats.

    Example:
        >>> dyadic_joint_log_loss(torch.log(torch.tensor([[0.5, 0.5]])).double(), tau=2)
        tensor([1.3863], dtype=torch.float64)
    """
    first, second = log_probs[:, 0::2], log_probs[:, 1::2]
    loss = first.new_zeros(first.shape[1])
    for k in range(tau + 1):
        # The first and last term leave one row out, because 0 * -inf would be NaN.
        parts = [count * row for count, row in ((k, first), (tau - k, second)) if count]
        weight = math.comb(tau, k) / 2**tau  # integers: floats would overflow from tau = 1030 on
        loss = loss - weight * _log_mean(sum(parts[1:], start=parts[0]))
    return loss


def sampled_joint_log_loss(log_probs: Tensor, selected: Tensor) -> Tensor:
    """Joint log-loss of given draws from each block of kappa consecutive rows, as in ENN's polyadic metric.

    Args:
        log_probs: Log-probabilities of the true classes [Z, kappa G].
        selected: Drawn rows [G, tau], each in [0, kappa) within its block.

    Returns:
        [G] in nats.

    Raises:
        InputError: The number of rows is not a multiple of the number of blocks, or a draw is out of range.

    Example:
        >>> log_probs = torch.log(torch.tensor([[0.5, 0.25]]))
        >>> sampled_joint_log_loss(log_probs, torch.tensor([[0, 0, 1]]))
        tensor([2.7726])
    """
    groups = len(selected)
    if selected.ndim != 2 or (groups == 0) != (log_probs.shape[1] == 0) or (groups and log_probs.shape[1] % groups):
        raise InputError(
            f"`selected` must be [G, tau] with G blocks in {log_probs.shape[1]} rows, but its shape is "
            f"{list(selected.shape)}."
        )
    if groups == 0:
        return log_probs.new_zeros(0)
    kappa = log_probs.shape[1] // groups
    if bool(((selected < 0) | (selected >= kappa)).any()):
        raise InputError(f"`selected` must hold rows in [0, {kappa}), but it holds other values.")
    blocks = log_probs.reshape(len(log_probs), groups, kappa)
    return -_log_mean(blocks.gather(2, selected.long().expand(len(log_probs), -1, -1)).sum(2))


def consecutive_joint_log_loss(log_probs: Tensor, tau: int = 10) -> Tensor:
    """Joint log-loss of each block of tau consecutive rows.

    Args:
        log_probs: Log-probabilities of the true classes [Z, tau G].
        tau: Number of rows per block.

    Returns:
        [G] in nats.

    Example:
        >>> consecutive_joint_log_loss(torch.log(torch.tensor([[0.5, 0.25]])), tau=2)
        tensor([2.0794])
    """
    return -_log_mean(log_probs.reshape(len(log_probs), -1, tau).sum(2))


def hashed_draws(first: int, groups: int, tau: int, kappa: int, seed: int, device: torch.device) -> Tensor:
    """Draws [groups, tau] in [0, kappa) for groups ``first``, ``first + 1``, ...: a hash of (seed, group, draw).

    A draw does not depend on earlier draws, and hence not on how a data set is split into batches. The hash is SplitMix64's
    finalizer over a counter.
    """
    group = torch.arange(first, first + groups, device=device)[:, None]
    counter = group * tau + torch.arange(tau, device=device)
    state = mix(counter + mix(torch.full((), seed, device=device)))
    return (state & 0x7FFFFFFFFFFFFFFF) % kappa


def check_joint(tau: int, kappa: int, sampling: str) -> None:
    """Refuse undefined settings of a joint log-loss."""
    check_integer("tau", tau, 1)
    check_integer("kappa", kappa, 1)
    check_choice("sampling", sampling, ("dyadic", "sampled", "consecutive"))
    if sampling == "dyadic" and kappa != 2:
        raise InputError(
            f"`kappa` must be 2 with sampling='dyadic', whose expectation is exact only for pairs, but "
            f"it is {kappa}. Use sampling='sampled' for kappa anchors."
        )


def joint_log_loss(
    logits: Tensor,
    target: Tensor,
    tau: int = 10,
    kappa: int = 2,
    sampling: Sampling = "dyadic",
    *,
    generator: torch.Generator | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Mean joint log-loss over a data set that fits in memory; rows at its end that do not fill a block are left out.

    Args:
        logits: Member logits [Z, B, C].
        target: Class indices [B].
        tau: Number of labels predicted together.
        kappa: Number of distinct inputs (anchors) among them; "consecutive" has tau distinct inputs and ignores it.
        sampling: "dyadic": the expectation over tau draws from each pair of consecutive rows. "sampled": one such draw
            from each kappa consecutive rows. "consecutive": each tau consecutive rows, every one once.
        generator: Source of the random numbers for "sampled"; default: torch's global generator.
        selected: The draws for "sampled", [B // kappa, tau], instead of random ones.

    Returns:
        A scalar in nats, not divided by tau; NaN without a full block. It falls as Z grows, so compare only at equal Z.

    Raises:
        InputError: Shapes or values do not fit, or "dyadic" has a kappa other than 2.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0], [9.0, -9.0]], [[-9.0, 9.0], [-9.0, 9.0]]])
        >>> joint_log_loss(logits, torch.tensor([1, 1]), tau=10)  # the members agree that the labels occur together
        tensor(0.6931, dtype=torch.float64)
    """
    check_joint(tau, kappa, sampling)
    if selected is not None and sampling != "sampled":
        raise InputError(f"`selected` requires sampling='sampled', but sampling is {sampling!r}. Leave it out.")
    log_probs = joint_log_probs(logits, target)
    groups = log_probs.shape[1] // block_size(tau, kappa, sampling)
    if sampling == "sampled" and selected is None:
        device = None if generator is None else generator.device
        selected = torch.randint(kappa, (groups, tau), generator=generator, device=device).to(logits.device)
    return block_losses(log_probs, tau, kappa, sampling, selected).mean()


def block_size(tau: int, kappa: int, sampling: Sampling) -> int:
    """Number of consecutive rows in one joint prediction."""
    return tau if sampling == "consecutive" else kappa


def block_losses(log_probs: Tensor, tau: int, kappa: int, sampling: Sampling, selected: Tensor | None) -> Tensor:
    """Joint log-loss [G] of each full block of rows [Z, N], with any of the three samplings."""
    size = block_size(tau, kappa, sampling)
    log_probs = log_probs[:, : log_probs.shape[1] // size * size]
    if sampling == "dyadic":
        return dyadic_joint_log_loss(log_probs, tau)
    if sampling == "consecutive":
        return consecutive_joint_log_loss(log_probs, tau)
    if selected is None:
        raise InputError("sampling='sampled' needs `selected`, but it is None.")
    return sampled_joint_log_loss(log_probs, selected)
