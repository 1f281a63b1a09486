"""The keys of ``results.json`` that a comparison of classifiers has, without those of other tasks."""

from lightning_uq.report import RESULT_KEYS

OTHER_TASKS = {
    *("subset_accuracy", "hamming", "auroc", "average_precision", "iou"),
    *("rmse", "mae", "crps", "coverage_90", "width_90", "interval_score"),
}
CLASSIFICATION_KEYS = [key for key in RESULT_KEYS if key not in OTHER_TASKS]
