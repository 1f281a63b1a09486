"""The information-theoretic decomposition of a categorical prediction, in nats and in log space.

With member logits l_z and p_z = softmax(l_z):

- predictive entropy  H[mean_z p_z]
- expected entropy    mean_z H[p_z]
- mutual information  H[mean_z p_z] - mean_z H[p_z]  >= 0

All take logits [Z, B, C, ...] with the class axis at 2 and return [B, ...]; half precision is upcast to float32.

Source: Houlsby et al., arXiv 1112.5745; Depeweg et al., ICML 2018.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_uq.functional.precision import upcast, widen

# Numbers converted to float64 at a time, so that maps need no float64 copy of all logits. On a CPU they stay in its cache (1 MB).
_CHUNK_CPU, _CHUNK = 1 << 17, 1 << 20


class Parts(NamedTuple):
    """The results of pooling logits [Z, B, C, ...]: log mean_z p_z [B, C, ...], and two moments [B, ...] in nats."""

    mean_log_probs: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """``log_softmax`` in at least float32."""
    logits = upcast(logits)
    if is_short_row(logits, dim):
        return torch.log_softmax(logits.transpose(-1, -2), -2).transpose(-1, -2)
    return torch.log_softmax(logits, dim)


def is_short_row(logits: Tensor, dim: int) -> bool:
    """Whether torch's softmax over ``dim`` is several times faster on a transposed copy.

    On a CPU, torch processes a last axis shorter than a vector register number by number, but any other axis in whole registers.

    Example:
        >>> is_short_row(torch.zeros(5, 100, 10), 2), is_short_row(torch.zeros(5, 100, 1000), 2)
        (True, False)
    """
    is_last = dim in (-1, logits.ndim - 1) and logits.ndim > 1
    return is_last and logits.shape[-1] < 16 and logits.device.type == "cpu" and not torch.compiler.is_compiling()


def entropy(log_probs: Tensor, dim: int) -> Tensor:
    """Shannon entropy -sum p log p of log-probabilities along ``dim``; a probability of exactly 0 contributes 0.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log(), 1)
        tensor([-0.0000, 0.6931])
    """
    probs = log_probs.exp()
    return -(probs * log_probs.where(probs > 0, 0.0)).sum(dim)


def log_mean_exp(values: Tensor) -> Tensor:
    """log mean_z exp(v_z) over axis 0; if all values are minus infinity, so is the result, with a gradient of 0.

    The gradient of torch's ``logsumexp`` is NaN in that case. The mean of equal values is exactly that value.

    Example:
        >>> log_mean_exp(torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]]))
        tensor([0., -inf])
    """
    largest = values.detach().amax(0)
    excluded = largest == -torch.inf
    if len(values) == 1:
        return values[0].masked_fill(excluded, -torch.inf)  # what follows would give these numbers in six passes
    largest = largest.masked_fill(excluded, 0.0)
    mean = (values - largest).exp_().mean(0)  # 0 where all are excluded; the gradient of its log would be NaN
    return (largest + mean.masked_fill(excluded, 1.0).log()).masked_fill(excluded, -torch.inf)


def mean_log_probs(logits: Tensor) -> Tensor:
    """Log of the mean probabilities, log mean_z softmax(l_z): [Z, B, C, ...] -> [B, C, ...]."""
    return log_mean_exp(log_softmax(logits, 2))


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction, H[mean_z p_z], in nats: [Z, B, C, ...] -> [B, ...].

    Example:
        >>> predictive_entropy(torch.tensor([[[0.0, 0.0]]]))
        tensor([0.6931])
    """
    return entropy(mean_log_probs(logits), 1)


def expected_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the members, mean_z H[p_z], in nats: [Z, B, C, ...] -> [B, ...]."""
    return entropy(log_softmax(logits, 2), 2).mean(0)


def mutual_information(logits: Tensor) -> Tensor:
    """Mutual information between label and index in nats: [Z, B, C, ...] -> [B, ...].

    It is the mean Kullback-Leibler divergence mean_z KL(p_z || m) from the mean probabilities m, which equals H[m] - mean_z H[p_z]. It
    keeps its digits even if the members nearly agree (see :func:`mean_divergence`), and is computed in float64 if the device
    supports it.

    Example:
        >>> members = torch.tensor([[[20.0, -20.0]], [[-20.0, 20.0]]])  # two members that disagree
        >>> mutual_information(members)
        tensor([0.6931])
        >>> mutual_information(torch.tensor([[[1e-4, 0.0]], [[-1e-4, 0.0]]]))  # two members that nearly agree
        tensor([1.2500e-09])
    """
    return decompose(logits).mutual_information


def decompose(logits: Tensor) -> Parts:
    """Mean log-probabilities, expected entropy and mutual information from one log-softmax in float64.

    It is several times faster than three separate calls, and exact to the last digits of the logits' dtype.

    Example:
        >>> decompose(torch.tensor([[[20.0, -20.0]], [[-20.0, 20.0]]])).mutual_information
        tensor([0.6931])
    """
    chunk = _CHUNK_CPU if logits.device.type == "cpu" else _CHUNK
    step = max(1, chunk // max(1, logits[:, :1].numel()))
    whole = torch.compiler.is_compiling() or len(logits[0]) <= step
    found = [_decompose(part) for part in ([logits] if whole else torch.split(logits, step, 1))]
    dtype = upcast(logits).dtype
    return Parts(*(torch.cat(parts).to(dtype) for parts in zip(*found, strict=True)))


def _decompose(logits: Tensor) -> Parts:
    """:func:`decompose` of a few rows, in float64."""
    logits = widen(logits)
    # torch's log_softmax over a short axis takes a CPU four times as long.
    logits = logits - logits.detach().amax(2, keepdim=True)
    pooled = _pool(logits - logits.exp().sum(2, keepdim=True).log())
    return Parts(pooled.log_mean, -pooled.mean_p_log_p.sum(1), pooled.divergence.sum(1))


def mean_divergence(log_probs: Tensor) -> Tensor:
    """The contribution of each outcome to mean_z KL(p_z || m), m = mean_z p_z: [Z, ...] -> [...]. All are non-negative.

    With t = max_z p_z and v = log(p_z / t), the contribution of an outcome is

        t (mean_z[exp(v) v] - r log r),    r = mean_z exp(v) = m / t.

    If the members agree, v is small. Both terms are then as small as v, because exp(v) - 1 is computed directly, and their
    difference, of order v^2, keeps its digits: an error in a member's log-probability enters only multiplied by v.

    Args:
        log_probs: Log-probabilities of outcomes, for every z. Sum the result over all outcomes.

    Example:
        >>> mean_divergence(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()).sum()
        tensor(0.6931)
    """
    return _pool(log_probs).divergence


class _Pooled(NamedTuple):
    """For probabilities p_z [Z, ...] with the mean m: log m, mean_z p_z log p_z and mean_z p_z log(p_z / m), each [...]."""

    log_mean: Tensor
    mean_p_log_p: Tensor
    divergence: Tensor


def _pool(log_probs: Tensor) -> _Pooled:
    """Compute everything that is pooled over axis 0 with one exponential per number; see :func:`mean_divergence` for the formula."""
    top = log_probs.detach().amax(0)
    excluded = top == -torch.inf
    top = top.masked_fill(excluded, 0.0)
    # exp(-800) is 0. If one member excludes an outcome, v would be infinite, and 0 times it NaN.
    v = (log_probs - top).clamp_min(-800.0)
    ratio = torch.expm1(v)  # p / t - 1
    mean_ratio = ratio.mean(0).masked_fill(excluded, 0.0)  # log 0 has no finite gradient
    log_r = mean_ratio.log1p()
    r = mean_ratio + 1
    weighted = torch.addcmul(v, ratio, v).mean(0)  # exp(v) v
    t = top.exp()
    return _Pooled(
        (top + log_r).masked_fill(excluded, -torch.inf),
        t * (weighted + top * r),
        t * (weighted - r * log_r).clamp_min(0.0),
    )
