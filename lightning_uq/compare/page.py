"""What a comparison leaves behind: results.json, the figures and the report."""

import json
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torchmetrics

import lightning_uq
from lightning_uq.compare.configuration import HIDDEN_SIZES, Recipe
from lightning_uq.compare.evaluation import NUM_BINS, TAU
from lightning_uq.compare.run import Comparison
from lightning_uq.compare.testbed import NUM_INDICES, AgentSetting
from lightning_uq.report import (
    Report,
    Section,
    reliability_diagram,
    render_html,
    risk_coverage_figure,
    score_histogram,
    score_label,
    to_png,
    to_svg,
    write_files,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEEDS = {
    False: "Each has a split of its own too; the splits are of one data set, so that the true uncertainty is larger than it says.",
    True: "The problem is the same, so that it says nothing of other problems.",
}
STALE = ("reliability_*.png", "scores_*.png", "risk_coverage.png")


def write(comparison: Comparison, directory: Path) -> list[str]:
    """Write ``results.json``, ``report.html`` and the PNG figures into a directory: all of them, or none.

    Figures of an earlier comparison there are replaced.

    Returns:
        The files' names.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = draw(comparison)
    results = json.dumps(comparison.results(), indent=2, allow_nan=False) + "\n"
    page = render_html(make_report(comparison, {name: to_svg(figure) for name, figure in figures.items()}))
    images = {name: to_png(figure) for name, figure in figures.items()}
    files = {"results.json": results.encode(), "report.html": page.encode(), **images}
    write_files(directory, files, stale=STALE)
    return list(files)


def draw(comparison: Comparison) -> dict[str, "Figure"]:
    """The figures by file name."""
    figures, curves = {}, {}
    repeats = comparison.configuration.seeds
    rows = {row["method"]: row for row in comparison.rows}
    for names in equal_predictions(comparison):
        pooled = comparison.pooled[names[0]]
        confidence, correct = torch.cat(pooled.confidence), torch.cat(pooled.correct)
        title, note = ", ".join(names), _mean("ECE", rows[names[0]], "ece")
        curves[title] = torch.cat(pooled.certainty), ~correct
        figures[f"reliability_{names[0]}.png"] = reliability_diagram(
            confidence, correct, title=title, note=note, num_bins=NUM_BINS, repeats=repeats
        )
    for name, pooled in comparison.pooled.items():
        if pooled.score_out:
            score_in, score_out = torch.cat(pooled.score_in), torch.cat(pooled.score_out)
            score, note = comparison.methods[name].ood_score, _mean("AUROC", rows[name], "ood_auroc")
            figures[f"scores_{name}.png"] = score_histogram(score_in, score_out, score=score, title=name, note=note)
    figures["risk_coverage.png"] = risk_coverage_figure(curves)
    return figures


def equal_predictions(comparison: Comparison) -> list[list[str]]:
    """The methods, those together that read the same networks and predict the same: one figure is enough for them."""
    groups: list[list[str]] = []
    for name, method in comparison.methods.items():
        trainee, pooled = method.trained_as or name, comparison.pooled[name]
        for group in groups:
            other = comparison.methods[group[0]]
            same = zip(pooled.confidence, comparison.pooled[other.name].confidence, strict=True)
            if (other.trained_as or other.name) == trainee and all(torch.equal(a, b) for a, b in same):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def make_report(comparison: Comparison, figures: Mapping[str, str]) -> Report:
    """The report's texts and tables around these figures."""
    setting, sizes, configuration = comparison.setting, comparison.sizes, comparison.configuration
    held_out = ", ".join(map(str, configuration.ood_classes or ()))
    counts = f"{sizes['train']:,} training, {sizes['val']:,} validation and {sizes['test']:,} test samples"
    if comparison.configuration.problem is not None:
        counts = f"{sizes['train']:,} training and {sizes['test']:,} test samples"
    introduction = [
        f"{len(comparison.rows)} methods on {setting.data}: {setting.num_classes} classes in distribution "
        + (
            f"and classes {held_out} held out as out-of-distribution (OOD) data; "
            if held_out
            else "and none held out; "
        )
        + f"{counts}{', ' + format(sizes['ood'], ',') + ' held-out ones' if held_out else ''}.",
    ]
    sections = [
        Section(
            "Reliability",
            f"Accuracy in {NUM_BINS} bins of confidence, test samples of all seeds together. On the dashed line a "
            "confidence means what it says; below it the method is overconfident. Bars are 95 % Wilson intervals.",
            _pick(figures, "reliability_", "Reliability diagram of "),
        ),
        Section(
            "Out-of-distribution scores",
            "Each method's own score on test samples and on held-out classes, all seeds together; the less the two "
            "overlap, the better. The outermost bins hold what lies beyond them.",
            _pick(figures, "scores_", "Out-of-distribution scores of "),
        ),
        Section(
            "Risk and coverage",
            "If a method answers only its most confident share of the test samples (coverage), how many of the answers are "
            "wrong (risk)? Lower is better. The axis starts before the first error; the curve's last point is the error rate of all.",
            {"Risk-coverage curves": figures["risk_coverage.png"]},
        ),
    ]
    return Report(
        title=f"Uncertainty methods compared on {setting.data}",
        introduction=introduction,
        rows=comparison.rows,
        notes=_notes(comparison),
        sections=[section for section in sections if section.figures],
        facts={
            "Methods": {name: _about(comparison, name) for name in comparison.methods},
            "Configuration": _configuration(comparison),
            "Versions": versions(),
        },
    )


def command_line(comparison: Comparison) -> str:
    """The command that repeats the comparison."""
    configuration = comparison.configuration
    arguments = ["--data", configuration.data]
    if configuration.problem is None:
        arguments += ["--ood-classes", ",".join(map(str, configuration.ood_classes or ()))]
    else:
        arguments += ["--problem", configuration.problem]
    arguments += ["--methods", ",".join(configuration.methods or ()), "--seeds", str(configuration.seeds)]
    arguments += ["--seed", str(configuration.seed)]
    if configuration.recipe.max_epochs != Recipe().max_epochs:
        arguments += ["--max-epochs", str(configuration.recipe.max_epochs)]
    if configuration.accelerator != "cpu":
        arguments += ["--accelerator", configuration.accelerator]
    return shlex.join(["lightning-uq", "compare", *arguments])


def versions() -> dict[str, str]:
    """What the numbers, and the times above all, were made with."""
    return {
        "lightning_uq": lightning_uq.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "Python": platform.python_version(),
        "System": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
    }


def _configuration(comparison: Comparison) -> dict[str, Any]:
    configuration, recipe = comparison.configuration, comparison.configuration.recipe
    if recipe.steps is not None:
        return _testbed_configuration(comparison, recipe.steps)
    widths = [comparison.setting.num_features, *HIDDEN_SIZES, comparison.setting.num_classes]
    return {
        "Command": command_line(comparison),
        "Seeds": ", ".join(map(str, configuration.all_seeds)),
        "Split": "60 % training, 20 % validation, 20 % test, stratified, drawn anew with every seed",
        "Backbone": "-".join(map(str, widths)) + " (ReLU), the same for all methods",
        "Training": f"Adam, learning rate {recipe.learning_rate:g}, batches of {recipe.batch_size}, at most "
        f"{recipe.max_epochs} epochs; stopped after {recipe.patience} without a better validation NLL, and the best "
        "epoch's weights are evaluated",
        "Accelerator": f"{configuration.accelerator}, one thread",
    }


def _testbed_configuration(comparison: Comparison, steps: int) -> dict[str, Any]:
    configuration, recipe, setting = comparison.configuration, comparison.configuration.recipe, comparison.setting
    assert isinstance(setting, AgentSetting)
    return {
        "Command": command_line(comparison),
        "Seeds": ", ".join(map(str, configuration.all_seeds)),
        "Problem": f"d = {setting.num_features}, n = {setting.num_train}, T = {setting.temperature:g}; training sees "
        "its training inputs and labels alone",
        "Networks": "the testbed's agents: two hidden layers of 50 (dropout's of 100), ReLU, Haiku's initial weights",
        "Training": f"Adam, learning rate {recipe.learning_rate:g}, batches of {recipe.batch_size}, {steps:,} steps, an L2 term "
        "as each agent has it; the last weights are evaluated",
        "Accelerator": f"{configuration.accelerator}, one thread",
    }


def _about(comparison: Comparison, name: str) -> str:
    method, hypotheses = comparison.methods[name], comparison.num_indices[name]
    parts = [f"OOD score: {score_label(method.ood_score).lower()}"]
    if hypotheses is not None:
        parts.append(f"Z = {hypotheses}")
    if method.trained_as is not None:
        parts.append(f"reads the networks trained as {method.trained_as}")
    return "; ".join(parts)


def _notes(comparison: Comparison) -> list[str]:
    seeds, sizes = comparison.configuration.seeds, comparison.sizes
    testbed = comparison.configuration.problem is not None
    notes = [
        f"The joint log-loss is that of {TAU} labels predicted together (not divided by {TAU}). It falls as the number of "
        "hypotheses Z grows, so compare it at equal Z; with Z = 1 it is the NLL times "
        f"{TAU}.",
        f"The calibration error is the plug-in estimate, which is above zero even for a perfect model: with {sizes['test']:,} "
        "test samples differences of a few thousandths mean nothing.",
        (
            "The standard error is over seeds, each with initial weights and an order of batches of its own. "
            + _SEEDS[testbed]
        )
        if seeds > 1
        else "There is one seed, hence no standard error: a difference between methods may be chance.",
        "Parameters counts all weights, frozen priors included; running statistics are none. Times are this machine's, with "
        "one thread; the training time of a method that reads another's networks includes theirs.",
    ]
    if testbed:
        notes.insert(
            0,
            "KL is the divergence of a method's prediction of 1 label, or of 10 labels together, from the environment that the "
            f"problem was drawn from, in nats: a mean over {sizes['test']:,} draws, with Monte-Carlo error of its own (the "
            f"methods share the draws); of methods with infinitely many hypotheses {NUM_INDICES:,} are drawn for it. /u: "
            "over that of equal probabilities. Inf.: draws of infinite divergence, each counted as the largest finite one.",
        )
    if any("kl_tau100" in row for row in comparison.rows):
        notes.insert(
            1,
            "KL 100 is the testbed's estimate for more than ten labels: hypotheses that predict alike are put together by random "
            "hyperplanes. With few distinct inputs in a draw it is mostly too high.",
        )
    if sizes["ood"]:
        notes.insert(
            2,
            "Out-of-distribution numbers hold for these held-out classes alone: on others the order of methods can change. "
            "Every score was fixed before any such data was seen, and nothing was chosen on it. Average precision depends on the "
            f"share of OOD samples, here {sizes['ood'] / (sizes['ood'] + sizes['test']):.0%}.",
        )
    if any(method.trained_as for method in comparison.methods.values()):
        notes.append(
            "Methods that read the same trained networks (see below) share a diagram where their predictions are equal."
        )
    return notes


def _pick(figures: Mapping[str, str], prefix: str, alt: str) -> dict[str, str]:
    return {
        alt + name.removeprefix(prefix).removesuffix(".png"): png
        for name, png in figures.items()
        if name.startswith(prefix)
    }


def _mean(label: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None or value["mean"] is None else f"{label} {value['mean']:.3f}"
