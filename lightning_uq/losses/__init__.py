"""Losses: likelihoods and quantiles of numbers, categorical regression, evidential classification and regression."""

from lightning_uq.losses.categorical_regression import Cat2HotRegression, categorical_regression_loss
from lightning_uq.losses.combined import CombinedLoss
from lightning_uq.losses.data_noise import (
    BootstrapNoise,
    DataNoise,
    GaussianTargetNoise,
)
from lightning_uq.losses.dirichlet import (
    dirichlet_cross_entropy_loss,
    dirichlet_fisher_regularizer,
    dirichlet_mse_loss,
    dirichlet_nll_loss,
    dirichlet_pnorm_loss,
    uniform_dirichlet_kl,
)
from lightning_uq.losses.elbo import categorical_log_likelihood, elbo_loss, gaussian_noise_log_likelihood
from lightning_uq.losses.evidence import clamped_exp
from lightning_uq.losses.evidential import (
    evidential_loss,
    fisher_evidential_loss,
    maxnorm_loss,
    relaxed_evidential_loss,
)
from lightning_uq.losses.evidential_modules import (
    EvidenceLoss,
    EvidentialLoss,
    FisherEvidentialLoss,
    MaxNormLoss,
    RelaxedEvidentialLoss,
)
from lightning_uq.losses.evidential_regression import EvidentialRegressionLoss, evidential_regression_loss, split_nig
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.losses.heteroscedastic import (
    beta_nll_loss,
    faithful_gaussian_loss,
    gaussian_crps_loss,
    split_log_gaussian,
)
from lightning_uq.losses.index import (
    IndexLoss,
    accuracy_error,
    average_over_indices,
    cross_entropy_loss,
    l2_loss,
)
from lightning_uq.losses.joint import (
    JointLoss,
    joint_nll_loss,
)
from lightning_uq.losses.labels import label_losses
from lightning_uq.losses.mixture_density import mixture_nll_loss, split_mixture
from lightning_uq.losses.penalty import L2WeightDecay, Penalty, l2_weight_decay
from lightning_uq.losses.point import point_loss
from lightning_uq.losses.prior import (
    PriorLoss,
    distill_mean_classification,
    distill_mean_regression,
    distill_var_classification,
    distill_var_regression,
    l2_training_penalty,
    variance_kl,
)
from lightning_uq.losses.quantiles import pinball_loss, split_quantiles
from lightning_uq.losses.student_t import split_student_t, student_t_nll_loss
from lightning_uq.losses.vae import (
    binary_log_likelihood,
    gaussian_vae_log_likelihood,
    latent_kl,
)

__all__ = [
    "BootstrapNoise",
    "Cat2HotRegression",
    "CombinedLoss",
    "DataNoise",
    "EvidenceLoss",
    "EvidentialLoss",
    "EvidentialRegressionLoss",
    "FisherEvidentialLoss",
    "GaussianTargetNoise",
    "IndexLoss",
    "JointLoss",
    "L2WeightDecay",
    "MaxNormLoss",
    "Penalty",
    "PriorLoss",
    "RelaxedEvidentialLoss",
    "accuracy_error",
    "average_over_indices",
    "beta_nll_loss",
    "binary_log_likelihood",
    "categorical_log_likelihood",
    "categorical_regression_loss",
    "clamped_exp",
    "cross_entropy_loss",
    "dirichlet_cross_entropy_loss",
    "dirichlet_fisher_regularizer",
    "dirichlet_mse_loss",
    "dirichlet_nll_loss",
    "dirichlet_pnorm_loss",
    "distill_mean_classification",
    "distill_mean_regression",
    "distill_var_classification",
    "distill_var_regression",
    "elbo_loss",
    "evidential_loss",
    "evidential_regression_loss",
    "faithful_gaussian_loss",
    "fisher_evidential_loss",
    "gaussian_crps_loss",
    "gaussian_nll_loss",
    "gaussian_noise_log_likelihood",
    "gaussian_vae_log_likelihood",
    "joint_nll_loss",
    "l2_loss",
    "l2_training_penalty",
    "l2_weight_decay",
    "label_losses",
    "latent_kl",
    "maxnorm_loss",
    "mixture_nll_loss",
    "pinball_loss",
    "point_loss",
    "relaxed_evidential_loss",
    "split_gaussian",
    "split_log_gaussian",
    "split_mixture",
    "split_nig",
    "split_quantiles",
    "split_student_t",
    "student_t_nll_loss",
    "uniform_dirichlet_kl",
    "variance_kl",
]
