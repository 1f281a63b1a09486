"""Calibration of real classifiers' saved predictions, before and after each of our four calibrations:

    python benchmarks/reproduce/calibration.py --root DATA/logits --out FOLDER [--splits 10] [--budget MINUTES] [--publish]

A half of each classifier's rows is fitted, the other half tested; split 0 of DenseNet-40 is the file's own. For each split: NLL in nats, the
expected calibration error of 15 bins (Guo et al., ICML 2017), the smooth calibration error (Blasiok & Nakkiran, ICLR 2024) and the accuracy.
SMS is the structured matrix scaling of probmetrics 1.3, which `pip install probmetrics` gives; without it, its column is left out. The
penalties of `MatrixScaling` were chosen with these files in view, so its comparison with SMS is in-sample.
"""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from results import mean_and_error, reproduce
from saved_predictions import Rows, classifiers, halves

from lightning_uq import (
    CategoricalPrediction,
    IsotonicScaling,
    MatrixScaling,
    TemperatureScaling,
    VectorScaling,
)
from lightning_uq.functional import expected_calibration_error, smooth_calibration_error

try:
    from probmetrics.calibrators import SMSCalibrator
except ImportError:
    SMSCalibrator = None

OURS = {"T": TemperatureScaling, "vector": VectorScaling, "matrix": MatrixScaling, "isotonic": IsotonicScaling}
METRICS = {"nll": ("NLL", 4), "ece": ("ECE", 4), "smooth_ece": ("smooth ECE", 4)}
KNOWN = {"before": {"nll": 0.43006, "ece": 0.05500}, "T": {"nll": 0.22509, "ece": 0.00946}, "temperature": 2.883}
"""What the implementation that belongs to the file gives for its own parts."""


def measures(prediction: CategoricalPrediction, target: torch.Tensor) -> dict[str, float]:
    """The metrics of calibrated probabilities [1, N, C]."""
    probs = prediction.probs
    return {
        "nll": -float(prediction.log_prob(target).mean()),
        "ece": float(expected_calibration_error(probs, target)),
        "smooth_ece": float(smooth_calibration_error(probs, target)),
        "accuracy": float((probs.argmax(1) == target).double().mean()),
    }


def run_split(rows: Rows, tests: Rows | None, split: int) -> dict[str, Any]:
    """The metrics before and after each calibration, and the temperature."""
    (logits, y), (new, expected) = halves(rows, tests, split)
    before = CategoricalPrediction(new.double().unsqueeze(0))
    found: dict[str, Any] = {"before": measures(before, expected)}
    for name, kind in OURS.items():
        fitted = kind().fit_logits(logits, y)
        found[name] = measures(fitted.calibrate(before), expected)
        if isinstance(fitted, TemperatureScaling):
            found["temperature"] = float(fitted.temperature)
    if SMSCalibrator:
        sms = SMSCalibrator()
        sms.fit(logits.double().softmax(1).numpy(), y.numpy())
        probs = np.asarray(sms.predict_proba(new.double().softmax(1).numpy()))
        tiny = float(np.finfo(np.float32).tiny)
        found["SMS"] = measures(CategoricalPrediction(torch.from_numpy(probs).clamp_min(tiny).log()[None]), expected)
    return found


def jobs(arguments: Namespace) -> dict[str, Any]:
    """One per classifier and split, the splits of all classifiers in turn."""
    held = list(classifiers(arguments.root))
    return {
        f"{name.replace('/', '.')}-{split}": partial(run_split, rows, tests, split)
        for split in range(arguments.splits)
        for name, rows, tests in held
    }


def table(results: dict[str, Any]) -> str:
    """A table per metric: a line per file, with the means over its classifiers and the splits, and the known answer."""
    files: dict[str, dict[str, list[Any]]] = {}
    for job, found in results.items():
        name, _, split = job.rpartition("-")
        files.setdefault(name.partition(".")[0], {}).setdefault(split, []).append(found)
    methods = ["before", *OURS, *(["SMS"] if all("SMS" in found for found in results.values()) else [])]
    lines = []
    for metric, (title, digits) in METRICS.items():
        lines += [f"| {title} | splits | " + " | ".join(methods) + " |", "|---|---:|" + "---:|" * len(methods)]
        for name, splits in sorted(files.items()):
            # A mean over a file's classifiers for each split, then the mean and its standard error over the splits.
            of_splits = [
                {method: mean(found[method][metric] for found in several) for method in methods}
                for several in splits.values()
            ]
            means = {method: mean(one[method] for one in of_splits) for method in methods}
            best = f"{min(means.values()):.{digits}f}"
            texts = []
            for method in methods:
                text, error = mean_and_error([one[method] for one in of_splits], digits)
                texts.append(f"**{text}**{error}" if text == best else f"{text}{error}")
            lines.append(f"| {name} | {len(of_splits)} | " + " | ".join(texts) + " |")
        lines.append("")
    if own := results.get("nncal_densenet40_cifar10-0"):
        lines += [
            "| DenseNet-40, CIFAR-10 | ECE before | NLL before | T | ECE after | NLL after |",
            "|---|" + "---:|" * 5,
        ]
        for name, one in (("known answer", KNOWN), ("lightning_uq", own)):
            numbers = [
                *(f"{one['before'][key]:.4f}" for key in ("ece", "nll")),
                f"{one['temperature']:.3f}",
                *(f"{one['T'][key]:.4f}" for key in ("ece", "nll")),
            ]
            lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the files of saved predictions")
    parser.add_argument("--splits", type=int, default=10, help="splits of each classifier")
    reproduce("calibration", parser, jobs, table, about=__doc__)
