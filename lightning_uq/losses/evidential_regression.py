"""Evidential regression: a network predicts a normal-inverse-gamma, hence a Student-t over the target.

mu ~ N(gamma, sigma^2 / nu), sigma^2 ~ Inverse-Gamma(alpha, beta), y ~ N(mu, sigma^2). The target does not determine nu: a
Student-t has three parameters and the normal-inverse-gamma has four, so nu follows from the regularizer and the course of the
training. Scores computed from it rank inputs, but are not a calibrated epistemic uncertainty (Meinert et al., AAAI 2023, arXiv
2205.10060).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast, widen
from lightning_uq.functional.student_t import student_t_log_prob
from lightning_uq.functional.validation import check_at_least, check_choice, check_shape
from lightning_uq.losses.gaussian import MIN_VARIANCE
from lightning_uq.losses.reduction import Reduction, check_reduction, reduce

RegressionLoss = Literal["amini", "scaled", "meinert"]
NUM_BLOCKS = {"amini": 4, "scaled": 4, "meinert": 3}
"""Number of outputs per target dimension, by loss."""


def split_nig(output: Tensor, loss: RegressionLoss = "amini") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Location gamma, nu, alpha and beta, each [..., D], from raw outputs.

    nu and beta are softplus(raw) + 1e-6, and alpha is 1 + softplus(raw) + 1e-6, from outputs [..., 4 D] in that order. Under
    ``"meinert"`` alpha = nu + 1, and the outputs are [..., 3 D]: location, nu, beta. Half precision is upcast to float32.

    Raises:
        InputError: The last axis is not a multiple of 4 (3 for ``"meinert"``).

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600); Meinert et al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> import torch
        >>> [x.item() for x in split_nig(torch.zeros(4))][0]
        0.0
    """
    check_choice("loss", loss, tuple(NUM_BLOCKS))
    blocks = NUM_BLOCKS[loss]
    if output.ndim < 1 or output.shape[-1] == 0 or output.shape[-1] % blocks:
        raise InputError(
            f"`output` must have shape [..., {blocks} D] for loss={loss!r}, but its shape is {list(output.shape)}."
        )
    location, *raw = upcast(output).chunk(blocks, dim=-1)
    nu, *alpha, beta = (F.softplus(x) + MIN_VARIANCE for x in raw)
    return location, nu, (alpha[0] if alpha else nu) + 1, beta


def student_t_scale(nu: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Scale of the predictive Student-t, whose degrees of freedom are 2 alpha: sqrt(beta (1 + nu) / (nu alpha)).

    Example:
        >>> import torch
        >>> student_t_scale(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0))
        tensor(2.)
    """
    return (beta / alpha * (1 + 1 / nu)).sqrt()  # products of large parameters would overflow


def evidential_regression_loss(
    location: Tensor,
    nu: Tensor,
    alpha: Tensor,
    beta: Tensor,
    target: Tensor,
    reg_factor: float = 0.01,
    loss: RegressionLoss = "amini",
    reduction: Reduction = "mean",
) -> Tensor:
    """Loss of a normal-inverse-gamma, computed in float64; each argument is [B, D].

    - ``"amini"``: -log St(y) + reg_factor |y - gamma| (2 nu + alpha), St the Student-t with 2 alpha degrees of freedom, location
      gamma and scale :func:`student_t_scale`;
    - ``"scaled"``: the same, with |y - gamma| measured in that scale, because the first form depends on the target's units;
    - ``"meinert"``: log(beta / nu) + (1 + reg_factor nu) (y - gamma)^2 nu / beta, with alpha = nu + 1 by construction. This is the
      Gaussian likelihood with variance beta / nu; the authors find that the first form behaves like it.

    Args:
        location: gamma.
        nu: Virtual observations of the mean, > 0.
        alpha: > 1.
        beta: > 0.
        target: y; it is not broadcast.
        reg_factor: Weight of the regularizer.
        loss: Name of the form.
        reduction: ``"none"`` for [B, D], ``"mean"`` over elements or ``"sum"``.

    Raises:
        InputError: Shapes differ, or an argument is unknown or out of range.

    Source: Amini et al., NeurIPS 2020 (arXiv 1910.02600), equations 8 to 10; Meinert & Lavin (arXiv 2104.06135); Meinert et
    al., AAAI 2023 (arXiv 2205.10060).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> evidential_regression_loss(0 * one, one, 2 * one, one, one, reg_factor=0.0)
        tensor(1.5387)
    """
    check_choice("loss", loss, tuple(NUM_BLOCKS))
    check_reduction(reduction)
    check_at_least("reg_factor", reg_factor, 0)
    for name, value in (("nu", nu), ("alpha", alpha), ("beta", beta), ("target", target)):
        check_shape(name, value, location.shape)
    dtype = upcast(location).dtype
    location, nu, alpha, beta, target = (widen(x) for x in (location, nu, alpha, beta, target))
    error = target - location
    if loss == "meinert":
        value = (beta / nu).log() + (1 + reg_factor * nu) * error.square() * nu / beta
    else:
        scale = student_t_scale(nu, alpha, beta)
        residual = error.abs() / scale if loss == "scaled" else error.abs()
        value = reg_factor * residual * (2 * nu + alpha) - student_t_log_prob(target, 2 * alpha, location, scale)
    value = value.to(dtype)
    return reduce(value, reduction)


class EvidentialRegressionLoss(nn.Module):
    """:func:`evidential_regression_loss` of raw outputs [B, 4 D] (``"meinert"``: [B, 3 D]) and targets [B, D].

    Args:
        loss: ``"amini"``, ``"scaled"`` or ``"meinert"``.
        reg_factor: Weight of the regularizer.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        InputError: ``loss`` or ``reduction`` is unknown, or ``reg_factor`` is negative.

    Example:
        >>> import torch
        >>> EvidentialRegressionLoss("meinert", reg_factor=0.0)(torch.zeros(1, 3), torch.ones(1, 1))
        tensor(1.)
    """

    def __init__(
        self,
        loss: RegressionLoss = "amini",
        reg_factor: float = 0.01,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("loss", loss, tuple(NUM_BLOCKS))
        check_reduction(reduction)
        check_at_least("reg_factor", reg_factor, 0)
        self.loss: RegressionLoss = loss
        self.reg_factor = reg_factor
        self.reduction: Reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of raw outputs."""
        parameters = split_nig(output, self.loss)
        return evidential_regression_loss(
            *parameters, target, reg_factor=self.reg_factor, loss=self.loss, reduction=self.reduction
        )
