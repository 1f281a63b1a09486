"""Losses: Gaussian likelihood, categorical regression, evidence for classes, evidential regression."""

from lightning_uq.losses.categorical_regression import Cat2HotRegression, categorical_regression_loss
from lightning_uq.losses.elbo import categorical_log_likelihood, elbo_loss, gaussian_noise_log_likelihood
from lightning_uq.losses.evidential import (
    EvidenceLoss,
    EvidentialLoss,
    FisherEvidentialLoss,
    MaxNormLoss,
    RelaxedEvidentialLoss,
    clamped_exp,
    dirichlet_cross_entropy_loss,
    dirichlet_fisher_regularizer,
    dirichlet_mse_loss,
    dirichlet_nll_loss,
    dirichlet_pnorm_loss,
    evidential_loss,
    fisher_evidential_loss,
    maxnorm_loss,
    relaxed_evidential_loss,
    uniform_dirichlet_kl,
)
from lightning_uq.losses.evidential_regression import EvidentialRegressionLoss, evidential_regression_loss, split_nig
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian

__all__ = [
    "Cat2HotRegression",
    "EvidenceLoss",
    "EvidentialLoss",
    "EvidentialRegressionLoss",
    "FisherEvidentialLoss",
    "MaxNormLoss",
    "RelaxedEvidentialLoss",
    "categorical_log_likelihood",
    "categorical_regression_loss",
    "clamped_exp",
    "dirichlet_cross_entropy_loss",
    "dirichlet_fisher_regularizer",
    "dirichlet_mse_loss",
    "dirichlet_nll_loss",
    "dirichlet_pnorm_loss",
    "elbo_loss",
    "evidential_loss",
    "evidential_regression_loss",
    "fisher_evidential_loss",
    "gaussian_nll_loss",
    "gaussian_noise_log_likelihood",
    "maxnorm_loss",
    "relaxed_evidential_loss",
    "split_gaussian",
    "split_nig",
    "uniform_dirichlet_kl",
]
