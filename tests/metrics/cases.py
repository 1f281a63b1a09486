"""Every metric with data to feed it, and, run as a script, one of several processes that compute them together."""

import json
import os
import sys
from pathlib import Path

import torch

from lightning_uq import metrics
from lightning_uq.predictions import BernoulliPrediction, CategoricalPrediction, PointPrediction

ROWS, MEMBERS, CLASSES, DIMS = 41, 5, 3, 2


class Data:
    """A seeded data set of ROWS rows; ties and saturated rows included.

    It is in float64, because the tests compare batches of several sizes, orders and processes: see tests/tolerance.py.
    """

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(MEMBERS, ROWS, CLASSES, generator=generator)
        self.logits[:, 5] = torch.tensor([60.0, 0.0, 0.0])
        self.target = torch.randint(CLASSES, (ROWS,), generator=generator)
        self.target[5] = 0
        # Multiples of 2^-10 that sum to one: exact, so equal confidences are equal on every processor.
        shares = 16 * (self.logits.double().softmax(2).mean(0) * 64).round().clamp_min(1 / 16)
        shares[:, 2] += 1024 - shares.sum(1)
        self.probs = shares / 1024
        self.probs[5] = torch.tensor([1.0, 0.0, 0.0])
        self.score = (8 * torch.rand(ROWS, generator=generator)).floor()
        self.is_ood = torch.rand(ROWS, generator=generator) < 0.5
        self.mean = torch.randn(MEMBERS, ROWS, DIMS, generator=generator)
        self.variance = 0.1 + torch.rand(MEMBERS, ROWS, DIMS, generator=generator)
        self.value = torch.randn(ROWS, DIMS, generator=generator)
        self.index = torch.randperm(ROWS, generator=generator) * 3
        self.label_logits = 2 * torch.randn(ROWS, CLASSES, generator=generator)
        self.labels = (torch.rand(ROWS, CLASSES, generator=generator) < 0.4).float()
        self.labels[::4, 1] = torch.nan
        for name, values in vars(self).items():
            setattr(self, name, values.double() if values.is_floating_point() else values)


def classify(d, i):
    return d.probs[i], d.target[i]


def label(d, i):
    return torch.sigmoid(d.label_logits[i]), d.labels[i]


def detect(d, i):
    return d.score[i], d.is_ood[i]


def regress(d, i):
    return (d.mean[:, i], d.variance[:, i]), d.value[i]


def sets(d, i):
    prediction = CategoricalPrediction(d.logits[:, i])
    return prediction.replace(prediction_set=prediction.probs > 0.2), d.target[i]


def bounds(d, i):
    prediction = PointPrediction(d.mean[:, i])
    mean = d.mean[:, i].double()
    bounds = {"conformal_lower": mean.amin(0), "conformal_upper": mean.amax(0) - 1}  # some are empty
    return prediction.replace(**bounds), d.value[i]


def joint(d, i):
    return d.logits[:, i], d.target[i]


def joint_indexed(d, i):
    return d.logits[:, i], d.target[i], d.index[i]


def in_label_sets(d, i):
    logits = d.label_logits[i]
    return BernoulliPrediction(logits[None]).replace(prediction_set=logits > 1), d.labels[i]


def alarmed(d, i):
    prediction = CategoricalPrediction(d.logits[:, i])
    return prediction.replace(ood_alarm=prediction.confidence < 0.5), d.target[i]


def answered(d, i):
    prediction = CategoricalPrediction(d.logits[:, i])
    return prediction.replace(answered=prediction.confidence > 0.5), d.target[i]


# name: (constructor, arguments of `update` for the rows i of the data d)
CASES = {
    "ece": (metrics.ExpectedCalibrationError, {}, classify),
    "ece_l2": (metrics.ExpectedCalibrationError, {"norm": "l2", "debiased": True, "num_bins": 4}, classify),
    "ece_max": (metrics.ExpectedCalibrationError, {"norm": "max"}, classify),
    "ece_classwise": (metrics.ExpectedCalibrationError, {"classwise": True}, classify),
    "ece_adaptive": (metrics.ExpectedCalibrationError, {"binning": "adaptive"}, classify),
    "ece_both": (metrics.ExpectedCalibrationError, {"binning": "adaptive", "classwise": True}, classify),
    "smece": (metrics.SmoothCalibrationError, {}, classify),
    "nll": (metrics.NegativeLogLikelihood, {}, classify),
    "brier": (metrics.BrierScore, {}, classify),
    "accuracy": (metrics.Accuracy, {}, classify),
    "miou": (metrics.MeanIoU, {}, classify),
    "label_nll": (metrics.LabelNLL, {}, label),
    "label_brier": (metrics.LabelBrierScore, {}, label),
    "label_accuracy": (metrics.LabelAccuracy, {}, label),
    "label_ece": (metrics.LabelCalibrationError, {}, label),
    "label_auroc": (metrics.LabelAUROC, {}, label),
    "label_average_precision": (metrics.LabelAveragePrecision, {}, label),
    "unpredicted": (metrics.UnpredictedClasses, {}, classify),
    "entropy": (metrics.PredictiveEntropy, {}, classify),
    "mutual_information": (metrics.MutualInformation, {"from_logits": True}, joint),
    "aurc": (metrics.AURC, {}, classify),
    "augrc": (metrics.AUGRC, {}, classify),
    "auroc": (metrics.OODAUROC, {}, detect),
    "auprc_out": (metrics.OODAUPRC, {}, detect),
    "auprc_in": (metrics.OODAUPRC, {"positive": "in"}, detect),
    "fpr95": (metrics.OODFPR95, {}, detect),
    "fpr95_out": (metrics.OODFPR95, {"positive": "out"}, detect),
    "gaussian_nll": (metrics.RegressionNLL, {}, regress),
    "gaussian_nll_matched": (metrics.RegressionNLL, {"moment_matched": True}, regress),
    "crps": (metrics.CRPS, {}, regress),
    "rmse": (metrics.RMSE, {}, regress),
    "coverage": (metrics.IntervalCoverage, {"level": 0.8}, regress),
    "quantiles": (metrics.QuantileCalibrationError, {"num_levels": 9}, regress),
    "quantiles_levels": (metrics.QuantileCalibrationError, {"levels": (0.2, 0.7)}, regress),
    "mae": (metrics.MAE, {}, regress),
    "interval_score": (metrics.IntervalScore, {"level": 0.8}, regress),
    "sharpness": (metrics.Sharpness, {}, regress),
    "sharpness_width": (metrics.Sharpness, {"level": 0.8}, regress),
    "pinball": (metrics.PinballLoss, {"levels": (0.2, 0.7)}, regress),
    "pit": (metrics.PITHistogram, {"num_bins": 5}, regress),
    "ause": (metrics.AUSE, {}, regress),
    "ause_mae": (metrics.AUSE, {"error": "mae", "uncertainty": "epistemic_variance"}, regress),
    "answered": (metrics.AnsweredShare, {}, answered),
    "ood_alarm_rate": (metrics.OODAlarmRate, {}, alarmed),
    "selective_error": (metrics.SelectiveError, {}, answered),
    "missed": (metrics.FalseNegativeRate, {}, in_label_sets),
    "missed_by_class": (metrics.FalseNegativeRate, {"by_class": True}, in_label_sets),
    "conformal_coverage": (metrics.ConformalCoverage, {}, bounds),
    "conformal_coverage_sets": (metrics.ConformalCoverage, {}, sets),
    "conformal_size": (metrics.ConformalSize, {}, bounds),
    "conformal_size_sets": (metrics.ConformalSize, {}, sets),
    "joint": (metrics.JointLogLoss, {}, joint),
    "joint_sampled": (metrics.JointLogLoss, {"sampling": "sampled", "kappa": 3, "tau": 5}, joint),
    "joint_consecutive": (metrics.JointLogLoss, {"sampling": "consecutive", "tau": 4}, joint),
    "joint_indexed": (metrics.JointLogLoss, {}, joint_indexed),
    "joint_sampled_indexed": (metrics.JointLogLoss, {"sampling": "sampled", "kappa": 3}, joint_indexed),
}
# Blocks are made of the rows in order of arrival, so ranks and batches must cut between blocks to agree.
ORDERED = {"joint", "joint_sampled", "joint_consecutive"}


def make(name):
    constructor, options, _ = CASES[name]
    return constructor(**options)


def feed(metric, name, data, rows, batch=7):
    for part in rows.split(batch):
        metric.update(*CASES[name][2](data, part))
    return metric


def share(name, rank, world, layout):
    """The rows that a rank sees: interleaved with uneven ends, or all on rank 0."""
    rows = torch.arange(ROWS)
    if layout == "one_rank":
        return rows if rank == 0 else rows[:0]
    if name in {"joint", "joint_consecutive"}:  # a block is 2 or 4 rows
        return rows[: 4 * 4] if rank == 0 else rows[4 * 4 :]
    own = rows[rank::world]
    if "indexed" in name and rank == 1:
        own = torch.cat([own, rows[:1]])  # a padded sampler's repetition
    return own


def main(rank, world, init_file, out_file):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{init_file}", rank=rank, world_size=world)
    data, found = Data(), {}
    for layout in ("spread", "one_rank"):
        for name in CASES:
            if name == "joint_sampled" and layout == "spread":
                continue  # its draws are numbered per rank
            metric = make(name).to(torch.bfloat16)  # as a bf16-true module would; no state may follow
            rows = share(name, rank, world, layout)
            feed(metric, name, data, rows, batch=5)
            value = metric.compute().item()
            # After compute a rank holds its own rows again, and goes on: twice the rows once more, alone.
            metric.reset()
            feed(metric, name, data, torch.arange(ROWS))
            metric.sync_on_compute = metric._to_sync = False
            found[f"{layout}/{name}"] = [value, metric.compute().item()]
    Path(out_file).write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # at once: see tests/conftest.py


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
