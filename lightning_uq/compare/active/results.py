"""The results of an active-learning experiment: curves, areas, and what beats random acquisition."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_uq.compare.active.configuration import BASELINE, ActiveConfiguration
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.functional.student_t import student_t_cdf, student_t_quantile
from lightning_uq.report import learning_figure, to_png, write_files
from lightning_uq.report.table import Column

LEVEL = 0.95

COLUMNS = (
    Column("accuracy", "At end", "higher", "prediction", lambda value: f"{value:.3f}", "Accuracy after the last round"),
    Column("area", "Area", "higher", "prediction", lambda value: f"{value:.4f}", "Mean accuracy over the label range"),
    Column(
        "gain", "Gain", "higher", "prediction", lambda value: f"{value:.4f}", "Area minus that of random acquisition"
    ),
    Column("p", "p", None, "prediction", lambda value: f"{value:.3f}", "Of a paired t-test of the gain over seeds"),
    Column("ambiguous", "Ambig.", "lower", "prediction", lambda value: f"{value:.2f}", "Ambiguous share of the labels"),
)


@dataclass(frozen=True)
class ActiveResult:
    """The rounds of all runs.

    Attributes:
        configuration: What was run.
        rounds: For each score and each seed, the rounds as :func:`~lightning_uq.active_learning.read_rounds` reads them.
        notes: Sentences about the data.
    """

    configuration: ActiveConfiguration
    rounds: dict[str, list[list[dict[str, Any]]]]
    notes: tuple[str, ...]

    @property
    def labels(self) -> list[int]:
        """The number of labels of each round [K]."""
        runs = next(iter(self.rounds.values()))
        return [len(one["labelled"]) for one in runs[0]]

    def curve(self, score: str, metric: str = "accuracy") -> Tensor:
        """A metric of each seed and round [S, K], in float64."""
        return torch.tensor(
            [[one["metrics"][metric] for one in run] for run in self.rounds[score]], dtype=torch.float64
        )

    def area(self, score: str) -> Tensor:
        """Mean accuracy over the range of labels, by the trapezoidal rule, of each seed [S]."""
        labels = torch.tensor(self.labels, dtype=torch.float64)
        curve = self.curve(score)
        if len(labels) == 1:
            return curve[:, 0]
        return torch.trapezoid(curve, labels, dim=1) / (labels[-1] - labels[0])

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per score: mean and standard error over seeds of each of :data:`COLUMNS`."""
        rows = []
        for score in self.rounds:
            row: dict[str, Any] = {"method": score, "accuracy": _summary(self.curve(score)[:, -1])}
            row["area"] = _summary(self.area(score))
            if BASELINE in self.rounds and score != BASELINE:
                gain = self.area(score) - self.area(BASELINE)
                row["gain"] = _summary(gain)
                if len(gain) > 1:
                    row["p"] = {"mean": paired_t_test(gain)["p"], "se": None}
            if "ambiguous" in self.rounds[score][0][0]["metrics"]:
                row["ambiguous"] = _summary(self.curve(score, "ambiguous")[:, -1])
            rows.append(row)
        return rows

    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``."""
        tests = {}
        if BASELINE in self.rounds and self.configuration.seeds > 1:
            tests = {
                score: paired_t_test(self.area(score) - self.area(BASELINE))
                for score in self.rounds
                if score != BASELINE
            }
        return {
            "configuration": asdict(self.configuration),
            "notes": list(self.notes),
            "labels": self.labels,
            "rows": self.rows(),
            "gain_over_random": tests,
            "curves": {
                score: {metric: self.curve(score, metric).tolist() for metric in runs[0][0]["metrics"]}
                for score, runs in self.rounds.items()
            },
        }


def write(result: ActiveResult, directory: Path) -> None:
    """Write ``results.json`` and ``learning_curves.png`` into a directory that exists, both or none."""
    configuration = result.configuration
    figure = learning_figure(
        result.labels,
        {score: result.curve(score) for score in result.rounds},
        baseline=BASELINE,
        title=f"{configuration.data}, {configuration.method}, {configuration.seeds} seed{'s' * (configuration.seeds > 1)}",
    )
    text = json.dumps(result.results(), indent=1, allow_nan=False) + "\n"
    write_files(directory, {"results.json": text.encode(), "learning_curves.png": to_png(figure)})


def paired_t_test(differences: Tensor) -> dict[str, float]:
    """Mean of paired differences [S] of at least two seeds, its 95 % interval, and the two-sided p-value of Student's t-test.

    Example:
        >>> {name: round(value, 3) for name, value in paired_t_test(torch.tensor([0.1, 0.2, 0.3, 0.2])).items()}
        {'mean': 0.2, 'lower': 0.07, 'upper': 0.33, 'p': 0.016}
    """
    differences = differences.double()
    mean, error = differences.mean(), differences.std() / len(differences) ** 0.5
    df, zero, one = torch.tensor(len(differences) - 1.0), torch.zeros(()), torch.ones(())
    half = student_t_quantile((1 + LEVEL) / 2, df, zero, one) * error
    p = 1.0
    if float(error) > 0:
        p = 2 * float(student_t_cdf(-(mean / error).abs(), df, zero, one))
    elif float(mean) != 0:
        p = 0.0
    return {"mean": float(mean), "lower": float(mean - half), "upper": float(mean + half), "p": p}


def _summary(values: Tensor) -> Mapping[str, float | None]:
    return {"mean": float(values.mean()), "se": standard_error(values.tolist())}
