"""Draws the figures of a comparison from its records."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.compare.records import Record
from lightning_uq.compare.statistics.verdict import quality_key
from lightning_uq.report import (
    coverage_figure,
    difference_figure,
    reliability_diagram,
    risk_coverage_figure,
    score_histogram,
)
from lightning_uq.report.table import ALL_COLUMNS
from lightning_uq.tasks.row_scores import NUM_BINS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Mapping[str, Sequence[Record]]

_COLUMNS = {column.key: column for column in ALL_COLUMNS}
_LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
_MAX_LINES = 4


def draw(results: Mapping[str, Any], records: Records) -> dict[str, "Figure"]:
    """The figures by name: ``differences_*``, ``reliability_*``, ``intervals``, ``scores_*`` and ``risk_coverage``.

    Args:
        results: The contents of ``results.json``.
        records: The records of its methods.
    """
    rows = {row["method"]: row for row in results["rows"]}
    records = {name: found for name, found in records.items() if name in rows}
    main = highlighted(results)
    figures = {f"differences_{key}": one for key, one in _differences(results).items()}
    groups = equal_predictions(results, records)
    num_rows = max((int(found[0].row_ids.numel()) for found in records.values()), default=0)
    curves: dict[str, tuple[Tensor, Tensor]] = {}
    coverage: dict[str, Tensor] = {}
    for names in groups:
        scores, title = pooled(records[names[0]]), ", ".join(names)
        if "confidence" in scores:
            figures[f"reliability_{names[0]}"] = reliability_diagram(
                scores["confidence"],
                scores["correct"],
                title=title,
                note=_mean("ECE", rows[names[0]], "ece"),
                num_bins=NUM_BINS,
                repeats=len(records[names[0]]),
            )
        if "certainty" in scores:
            curves[title] = scores["certainty"], ~scores["correct"]
        elif "width_90" in scores:
            known = ~scores["absolute_error"].isnan()  # rows without a target have no error
            curves[title] = -scores["width_90"][known], scores["absolute_error"][known]
        if "pit" in scores:
            shares = central_coverage(scores["pit"])
            # Conformal intervals have no distribution.
            if not any(torch.equal(shares, other) for other in coverage.values()):
                coverage[title] = shares
    lines = [title for names in groups for title in [", ".join(names)] if set(names) & set(main)][:_MAX_LINES]
    if coverage:
        shown = [name for name in lines if name in coverage] or list(coverage)[:_MAX_LINES]
        figures["intervals"] = coverage_figure(coverage, _LEVELS, num_rows=num_rows, highlighted=shown)
    for name, found in records.items():
        if found[0].outside:
            figures[f"scores_{name}"] = score_histogram(
                pooled(found)["ood_score"],
                torch.cat([record.outside["ood_score"] for record in found]),
                score=results["methods"][name]["ood_score"],
                title=name,
                note=_mean("AUROC", rows[name], "ood_auroc"),
            )
    if curves:
        risk = None if next(iter(curves.values()))[1].dtype == torch.bool else "Mean absolute error (the target's unit)"
        shown = [name for name in lines if name in curves] or list(curves)[:_MAX_LINES]
        figures["risk_coverage"] = risk_coverage_figure(curves, highlighted=shown, risk=risk)
    return figures


def highlighted(results: Mapping[str, Any]) -> list[str]:
    """The methods with colored lines: the baseline, the best, and the next ones by the same number, at most four."""
    rows, key = results["rows"], quality_key(results["rows"])
    column = _COLUMNS[key] if key else None
    sign = -1 if column is not None and column.better == "higher" else 1
    with_value = [row for row in rows if key in row and row[key]["mean"] is not None]
    order = [row["method"] for row in sorted(with_value, key=lambda row: sign * row[key]["mean"])]
    return list(dict.fromkeys([*order[:1], results["baseline"], *order[1:]]))[:_MAX_LINES]


def pooled(records: Sequence[Record]) -> dict[str, Tensor]:
    """Scores of the pooled test rows of all seeds, by name."""
    return {name: torch.cat([record.rows[name] for record in records]) for name in records[0].rows}


def central_coverage(pit: Tensor) -> Tensor:
    """The share of targets in central intervals of the levels 5 %, 10 %, ..., 95 %, from P(Y <= y) [N, D].

    Example:
        >>> central_coverage(torch.tensor([[0.5], [0.96]]))[[0, 17, 18]]
        tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    distance = (2 * pit[~pit.isnan()] - 1).abs()
    return (distance.unsqueeze(1) <= _LEVELS).double().mean(0)


def equal_predictions(results: Mapping[str, Any], records: Records) -> list[list[str]]:
    """Groups of methods that use the same networks and make the same predictions, for which one figure is enough."""
    groups: list[list[str]] = []
    for name in records:
        for group in groups:
            same_network = _trainee(results, group[0]) == _trainee(results, name)
            if same_network and _same(records[name], records[group[0]]):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _trainee(results: Mapping[str, Any], name: str) -> str:
    return str(results["methods"][name]["trained_as"] or name)


def _same(a: Sequence[Record], b: Sequence[Record]) -> bool:
    return all(
        one.rows.keys() == other.rows.keys()
        and all(torch.equal(one.rows[key], other.rows[key]) for key in one.rows if key != "ood_score")
        for one, other in zip(a, b, strict=True)
    )


def _differences(results: Mapping[str, Any]) -> dict[str, "Figure"]:
    """One figure per deciding number, with the intervals of all differences to the best method."""
    figures = {}
    for key in dict.fromkeys([quality_key(results["rows"]), "ood_auroc"]):
        found = results["differences"].get(key)
        if key is None or not found or not found["to_best"]:
            continue
        column, over = _COLUMNS[key], next(iter(found["to_best"].values()))["over"]
        assert column.better is not None
        # Methods with the same networks and the same line share it; a method that equals the best has none.
        groups: dict[tuple[float, float, float, str], list[str]] = {}
        for name, one in found["to_best"].items():
            if name not in found["same"]:
                group = one["difference"], one["lower"], one["upper"], _trainee(results, name)
                groups.setdefault(group, []).append(name)
        if not groups:
            continue
        lines = {", ".join(names): group[:3] for group, names in groups.items()}
        figures[key] = difference_figure(
            lines,
            metric=column.label,
            reference=found["best"],
            better=column.better,
            tied=[names for names in lines if names.split(", ")[0] in found["tied"]],
            title=column.label,
            notes=[
                f"intervals over {'test rows only' if over == 'rows' else over}",
                f"the same values as {found['best']}: {', '.join(found['same'])}" if found["same"] else "",
            ],
        )
    return figures


def _mean(label: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None or value["mean"] is None else f"{label} {value['mean']:.3f}"
