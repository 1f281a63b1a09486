"""Conformal intervals as methods of the comparison."""

from lightning.pytorch import Callback

from lightning_uq.callbacks.conformal_intervals import ConformalIntervals
from lightning_uq.method import Method, Setting

ALPHA = 0.1


def _fit(setting: Setting) -> list[Callback]:
    return [ConformalIntervals(alpha=ALPHA)]


def _fit_quantiles(setting: Setting) -> list[Callback]:
    return [ConformalIntervals(alpha=ALPHA, method="cqr")]


METHODS = (
    Method(
        name="conformal",
        about="the gaussian network with intervals of one width that cover 90 % of the validation rows",
        trained_as="gaussian",
        callbacks=_fit,
        ood_score="variance",
        tasks=("regression",),
        link="https://arxiv.org/abs/1604.04173",
    ),
    Method(
        name="conformal_quantile",
        about="the quantile network with intervals that are widened until they cover 90 % of the validation rows",
        trained_as="quantile",
        callbacks=_fit_quantiles,
        ood_score="interval_width",
        tasks=("regression",),
        link="https://arxiv.org/abs/1905.03222",
    ),
)
