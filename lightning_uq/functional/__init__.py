"""Pure tensor functions, one file per quantity, without state and without Lightning."""

from lightning_uq.functional.adaptive_conformal import AdaptiveConformal
from lightning_uq.functional.best_method import BestMethod, best_method
from lightning_uq.functional.bootstrap import (
    bootstrap_weights,
)
from lightning_uq.functional.calibration import (
    adaptive_bin_statistics,
    bin_statistics,
    calibration_error,
    expected_calibration_error,
)
from lightning_uq.functional.clustered_likelihood import Projection, clustered_log_likelihood, random_projection
from lightning_uq.functional.conformal import conformal_quantile, group_quantiles, weighted_conformal_quantile
from lightning_uq.functional.conformal_intervals import conformal_interval, interval_excess
from lightning_uq.functional.conformal_p_values import alarm_threshold, benjamini_hochberg, conformal_p_values
from lightning_uq.functional.conformal_sets import (
    aps_scores,
    lac_scores,
    prediction_sets,
    raps_scores,
    true_label_scores,
)
from lightning_uq.functional.data_noise import (
    gaussian_bootstrap_weights,
    gaussian_signatures,
    gaussian_target_noise,
    member_target_noise,
)
from lightning_uq.functional.dirichlet import (
    dirichlet_differential_entropy,
    dirichlet_expected_entropy,
    dirichlet_log_det_fisher,
    dirichlet_mutual_information,
    dirichlet_predictive_entropy,
    expected_squared_error,
    kl_to_uniform,
)
from lightning_uq.functional.divergence import categorical_kl, gaussian_kl
from lightning_uq.functional.drift import DriftTest, RankBins
from lightning_uq.functional.ensemble_crps import empirical_crps
from lightning_uq.functional.entropy import (
    expected_entropy,
    mean_log_probs,
    mutual_information,
    predictive_entropy,
)
from lightning_uq.functional.intersection_over_union import class_overlaps, intersection_over_union
from lightning_uq.functional.intervals import interval_score
from lightning_uq.functional.joint import (
    consecutive_joint_log_loss,
    dyadic_joint_log_loss,
    joint_log_loss,
    sampled_joint_log_loss,
)
from lightning_uq.functional.joint_likelihood import joint_log_likelihood, log_sum_product
from lightning_uq.functional.kl_estimate import KLEstimate, gaussian_sample_kl, kl_estimate, uniform_kl
from lightning_uq.functional.metric_difference import ResampledMetric, metric_difference, resample_metric
from lightning_uq.functional.mixture import (
    gaussian_log_prob,
    mixture_cdf,
    mixture_crps,
    mixture_log_prob,
    mixture_moments,
    mixture_quantile,
)
from lightning_uq.functional.normal import gaussian_log_likelihood
from lightning_uq.functional.ood import auroc, average_precision, fpr_at_tpr
from lightning_uq.functional.ood_features import VimFit, fit_vim, gen, knn_distance, vim_score
from lightning_uq.functional.paired_difference import DifferenceInterval, paired_difference, seed_difference
from lightning_uq.functional.pit import pit_counts, pit_distance
from lightning_uq.functional.quantiles import pinball, quantile_at
from lightning_uq.functional.regression import gaussian_nll, interval_covered, quantile_calibration_error
from lightning_uq.functional.risk_control import false_negative_threshold, risk_threshold
from lightning_uq.functional.scores import SCORES, energy, max_logit, max_softmax, variation_ratio
from lightning_uq.functional.scoring import brier_score, negative_log_likelihood
from lightning_uq.functional.seed_rows import SeedRows
from lightning_uq.functional.selective import augrc, aurc, certainty, generalized_risk_curve, risk_coverage_curve
from lightning_uq.functional.selective_threshold import selective_threshold
from lightning_uq.functional.smooth_calibration import smooth_calibration_error
from lightning_uq.functional.sparsification import ause, sparsification_curve
from lightning_uq.functional.student_t import (
    student_t_cdf,
    student_t_crps,
    student_t_log_prob,
    student_t_quantile,
)
from lightning_uq.functional.true_class import true_class_log_probs
from lightning_uq.functional.variational import (
    diagonal_gaussian_kl,
    linear_hypermodel_kl,
    sampled_kl,
    scale_mixture_log_prob,
)
from lightning_uq.functional.weighted_metrics import (
    weighted_auroc,
    weighted_average_precision,
    weighted_ece,
    weighted_fpr_at_tpr,
    weighted_mean,
    weighted_rmse,
)

__all__ = [
    "SCORES",
    "AdaptiveConformal",
    "BestMethod",
    "DifferenceInterval",
    "DriftTest",
    "KLEstimate",
    "Projection",
    "RankBins",
    "ResampledMetric",
    "SeedRows",
    "VimFit",
    "adaptive_bin_statistics",
    "alarm_threshold",
    "aps_scores",
    "augrc",
    "aurc",
    "auroc",
    "ause",
    "average_precision",
    "benjamini_hochberg",
    "best_method",
    "bin_statistics",
    "bootstrap_weights",
    "brier_score",
    "calibration_error",
    "categorical_kl",
    "certainty",
    "class_overlaps",
    "clustered_log_likelihood",
    "conformal_interval",
    "conformal_p_values",
    "conformal_quantile",
    "consecutive_joint_log_loss",
    "diagonal_gaussian_kl",
    "dirichlet_differential_entropy",
    "dirichlet_expected_entropy",
    "dirichlet_log_det_fisher",
    "dirichlet_mutual_information",
    "dirichlet_predictive_entropy",
    "dyadic_joint_log_loss",
    "empirical_crps",
    "energy",
    "expected_calibration_error",
    "expected_entropy",
    "expected_squared_error",
    "false_negative_threshold",
    "fit_vim",
    "fpr_at_tpr",
    "gaussian_bootstrap_weights",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "gaussian_log_prob",
    "gaussian_nll",
    "gaussian_sample_kl",
    "gaussian_signatures",
    "gaussian_target_noise",
    "gen",
    "generalized_risk_curve",
    "group_quantiles",
    "intersection_over_union",
    "interval_covered",
    "interval_excess",
    "interval_score",
    "joint_log_likelihood",
    "joint_log_loss",
    "kl_estimate",
    "kl_to_uniform",
    "knn_distance",
    "lac_scores",
    "linear_hypermodel_kl",
    "log_sum_product",
    "max_logit",
    "max_softmax",
    "mean_log_probs",
    "member_target_noise",
    "metric_difference",
    "mixture_cdf",
    "mixture_crps",
    "mixture_log_prob",
    "mixture_moments",
    "mixture_quantile",
    "mutual_information",
    "negative_log_likelihood",
    "paired_difference",
    "pinball",
    "pit_counts",
    "pit_distance",
    "prediction_sets",
    "predictive_entropy",
    "quantile_at",
    "quantile_calibration_error",
    "random_projection",
    "raps_scores",
    "resample_metric",
    "risk_coverage_curve",
    "risk_threshold",
    "sampled_joint_log_loss",
    "sampled_kl",
    "scale_mixture_log_prob",
    "seed_difference",
    "selective_threshold",
    "smooth_calibration_error",
    "sparsification_curve",
    "student_t_cdf",
    "student_t_crps",
    "student_t_log_prob",
    "student_t_quantile",
    "true_class_log_probs",
    "true_label_scores",
    "uniform_kl",
    "variation_ratio",
    "vim_score",
    "weighted_auroc",
    "weighted_average_precision",
    "weighted_conformal_quantile",
    "weighted_ece",
    "weighted_fpr_at_tpr",
    "weighted_mean",
    "weighted_rmse",
]
