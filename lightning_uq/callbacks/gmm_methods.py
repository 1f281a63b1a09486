"""Densities of features as methods of the comparison."""

from lightning.pytorch import Callback

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.method import Method, Setting


def _fit_gmm(setting: Setting) -> list[Callback]:
    return [FitGMM(name="density")]


def _fit_ddu(setting: Setting) -> list[Callback]:
    return [FitGMM(feature_transform="raw")]


def _fit_relative_mahalanobis(setting: Setting) -> list[Callback]:
    return [FitGMM(covariance="tied", score="relative_mahalanobis", name="relative_mahalanobis")]


METHODS = (
    Method(
        name="density",
        about="the softmax network and a Gaussian per class over its features",
        trained_as="softmax",
        callbacks=_fit_gmm,
        ood_score="density",
        link="https://arxiv.org/abs/2102.11582",
        detects_only=True,
    ),
    Method(
        name="ddu",
        about="the same density on raw features, as in the DDU paper",
        trained_as="softmax",
        callbacks=_fit_ddu,
        ood_score="log_density",
        link="https://arxiv.org/abs/2102.11582",
        detects_only=True,
    ),
    Method(
        name="relative_mahalanobis",
        about="the softmax network; distance of features to the nearest class, less that to all data",
        link="https://arxiv.org/abs/2106.09022",
        trained_as="softmax",
        callbacks=_fit_relative_mahalanobis,
        ood_score="relative_mahalanobis",
        detects_only=True,
    ),
)
