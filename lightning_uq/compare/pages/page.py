"""The page of a comparison: the texts around the table and the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.compare.pages import own_page
from lightning_uq.compare.planning.tuning import setting_text
from lightning_uq.compare.testbed import NUM_INDICES
from lightning_uq.compare.training.evaluation import TAU
from lightning_uq.report import DENSITY_TITLES, LABEL_TITLES, Report, Section, score_label, shown_columns
from lightning_uq.report.table import ALL_COLUMNS, MINUS
from lightning_uq.tasks.row_scores import NUM_BINS

_SECTIONS = {
    "differences_": (
        "Differences to the best",
        "Each method's difference to the best one, with its interval. If the interval contains 0, the two are statistically indistinguishable.",
    ),
    "reliability_": (
        "Reliability",
        f"Accuracy in {NUM_BINS} bins of confidence. On the dashed line, the accuracy equals the confidence. Below it, the method is overconfident.",
    ),
    "intervals": (
        "Coverage of intervals",
        "The share of test targets in central intervals of each level. Inside the band, the coverage agrees with the level. Below it, the intervals are too "
        "narrow, and above it too wide.",
    ),
    "scores_": (
        "Out-of-distribution scores",
        "A method's own score on test rows and on out-of-distribution rows. Less overlap is better. The outermost bins include all values "
        "beyond them.",
    ),
    "risk_coverage": (
        "Risk and coverage",
        "If a method answers only its most certain share of the test rows (coverage), how wrong are the answers (risk)? Lower is better. The "
        "last point of the curve is the risk of all rows.",
    ),
}
_POOLED = " The rows of all {seeds} seeds are pooled."
_TITLES = {column.key: column.title for column in ALL_COLUMNS}


def make_report(results: Mapping[str, Any], figures: Mapping[str, str]) -> Report:
    """The report's texts and tables around the figures.

    Args:
        results: The contents of ``results.json``.
        figures: The figures of :func:`~lightning_uq.compare.pages.drawing.draw` as SVG.
    """
    sections, seeds = [], _num_seeds(results["rows"])
    for prefix, (title, text) in _SECTIONS.items():
        found = {_caption(name): svg for name, svg in figures.items() if name.startswith(prefix)}
        if found:
            pooled = _POOLED.format(seeds=seeds) if seeds > 1 and prefix != "differences_" else ""
            sections.append(Section(title, text + pooled, found))
    rows = results["rows"]
    titles = {"regression": DENSITY_TITLES, "pixel_regression": DENSITY_TITLES, "multilabel": LABEL_TITLES}.get(
        results["task"]
    )
    columns = shown_columns(rows, titles)
    is_own = results.get("kind") == "test"
    facts = {} if is_own else {"Configuration": _configuration(results)}
    facts |= {
        heading: found
        for heading, found in (("Tuned settings", _tuned(results)), ("Methods left out", results.get("left_out")))
        if found
    }
    return Report(
        title=_title(results),
        verdict=results["verdict"],
        introduction=own_page.introduction(results) if is_own else _introduction(results),
        rows=rows,
        columns=columns,
        tied=ties(results),
        intervals={
            one.key: _notes_on_cells(results, one.key, one.text) or own_page.cell_notes(results, one) for one in columns
        },
        methods={name: (_about(results, name), one["link"]) for name, one in results["methods"].items()},
        notes=own_page.notes(results) if is_own else _notes(results),
        sections=sections,
        facts={**facts, "Versions": _versions(results)},
    )


def _title(results: Mapping[str, Any]) -> str:
    rows, name = results["rows"], results["problem"]["name"]
    if results.get("kind") != "test":
        return f"Uncertainty methods compared on {name}"
    return f"Uncertainty of {rows[0]['method']}" if len(rows) == 1 else f"Uncertainty of {len(rows)} modules on {name}"


def _num_seeds(rows: Sequence[Mapping[str, Any]]) -> int:
    return max((len(value["seeds"]) for row in rows for value in row.values() if isinstance(value, Mapping)), default=1)


def ties(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each key, the methods that cannot be distinguished from the best."""
    return {key: found["tied"] for key, found in results["differences"].items() if found["tied"]}


def _caption(name: str) -> str:
    for prefix in ("reliability_", "scores_"):
        name = name.removeprefix(prefix)
    return {"intervals": "Coverage of intervals", "risk_coverage": "Risk-coverage curves"}.get(
        name, _TITLES.get(name.removeprefix("differences_"), name)
    )


def _introduction(results: Mapping[str, Any]) -> list[str]:
    problem, sizes = results["problem"], results["problem"]["sizes"]
    count = problem["num_targets"]
    kind = {
        "classification": f"{count} classes",
        "segmentation": f"maps of {count} classes",
        "binary": "two classes, one of them positive",
        "multilabel": f"{count} labels",
        "regression": f"{count} numbers" if count > 1 else "one number",
    }.get(results["task"], results["task"])
    held_out = ", ".join(map(str, problem["ood_classes"]))
    parts = [f"{sizes['train']:,} training"]
    parts += [f"{sizes['val']:,} validation"] if sizes["val"] else []
    parts += [f"{sizes['test']:,} test"]
    parts += [f"{sizes['ood']:,} out-of-distribution (OOD)"] if sizes["ood"] else []
    counts = ", ".join(parts[:-1]) + f" and {parts[-1]} samples"
    text = f"{len(results['rows'])} methods that predict {kind} on {problem['name']}. There are {counts}."
    if held_out:
        is_one = len(problem["ood_classes"]) == 1
        text += f" {f'Class {held_out} is' if is_one else f'Classes {held_out} are'} held out as OOD data."
    left_out = results.get("left_out", {})
    missing = [f"Left out: {', '.join(left_out)}; the reasons are at the end of the page."] if left_out else []
    return [text, *problem["notes"], *missing]


def _notes_on_cells(results: Mapping[str, Any], key: str, text: Any) -> dict[str, str]:
    """For each method, its difference to the best, in words, with the decimals of the column; none if the predictions are the same."""
    found = results["differences"].get(key)
    if not found:
        return {}
    return {
        name: f"{_signed(one['difference'], text)} [{_signed(one['lower'], text)}, {_signed(one['upper'], text)}] to {found['best']}"
        for name, one in found["to_best"].items()
        if name not in found["same"]
    }


def _signed(value: float, text: Any) -> str:
    return ("+" if value >= 0 else MINUS) + str(text(abs(value)))


def _about(results: Mapping[str, Any], name: str) -> str:
    one = results["methods"][name]
    parts = [one["about"]] if one["about"] else []
    if one["ood_score"] is not None and results["problem"]["sizes"].get("ood"):
        parts.append(f"OOD score: {score_label(one['ood_score']).lower()}")
    if one["num_indices"] is not None:
        parts.append(f"Z = {one['num_indices']}")
    best_by = one.get("best_by")  # only a user's own module has it
    if best_by == "last":
        parts.append("the last weights, since it logs no validation metric")
    elif best_by is not None:
        parts.append(f"the weights of the epoch with the best {best_by}")
    if one["trained_as"] is not None:
        parts.append(f"uses the networks trained as {one['trained_as']}")
    return "; ".join(parts) or "no description"


def _configuration(results: Mapping[str, Any]) -> dict[str, Any]:
    configuration, problem = results["configuration"], results["problem"]
    recipe, seed = configuration["recipe"], configuration["seed"]
    training = f"Adam, learning rate {recipe['learning_rate']:g}, batches of {recipe['batch_size']}, "
    if recipe["steps"] is None:
        training += (
            f"at most {recipe['max_epochs']} epochs; stopped after {recipe['patience']} without a better validation NLL (or error, if there is no "
            "NLL), and the weights of the best epoch are evaluated"
        )
    else:
        training += f"{recipe['steps']:,} steps, each agent's L2 term; the last weights are evaluated"
    facts = {
        "Command": results["command"],
        "Seeds": ", ".join(map(str, range(seed, seed + configuration["seeds"]))),
        "Network": f"{problem['network']}, the same for all methods; inputs {problem['input_shape']}",
        "Training": training,
        "Accelerator": f"{configuration['accelerator']}, one thread",
    }
    if "temperature" in problem:
        facts["Problem"] = (
            f"d = {problem['input_shape'][0]}, n = {problem['sizes']['train']}, T = {problem['temperature']:g}; training uses only its training inputs "
            "and labels"
        )
    return facts


def _tuned(results: Mapping[str, Any]) -> dict[str, str]:
    """For each tuned method, its settings in one line, with the values of all seeds if they differ."""
    found: dict[str, str] = {}
    for name, of_seeds in results.get("tuned", {}).items():
        if of_seeds and all(of_seeds):
            values = {key: [setting_text(one[key]) for one in of_seeds] for key in of_seeds[0]}
            found[name] = "; ".join(
                f"{key} = {', '.join(one if len(set(one)) > 1 else one[:1])}" for key, one in values.items()
            )
    return found


def _versions(results: Mapping[str, Any]) -> dict[str, Any]:
    git = results["git"]
    state = {} if git is None else {"git": git["commit"] + (" with changes" if git["has_changes"] else "")}
    return {**results["versions"], **state}


def _notes(results: Mapping[str, Any]) -> list[str]:
    rows, problem, seeds = results["rows"], results["problem"], results["configuration"]["seeds"]
    keys = {key for row in rows for key in row}
    sizes, notes = problem["sizes"], [*results["notes"]]
    if "kl_tau1" in keys:
        notes.append(
            "KL is the divergence of a method's prediction of 1 label, or of 10 labels together, from the environment that the "
            f"problem was drawn from, in nats. It is a mean over {sizes['test']:,} draws and has a Monte-Carlo error (the "
            f"methods share the draws). For methods with infinitely many hypotheses, {NUM_INDICES:,} are drawn. /u: "
            "divided by that of equal probabilities. Inf.: draws of infinite divergence, each counted as the largest finite one."
        )
    if "kl_tau100" in keys:
        notes.append(
            "KL 100 is the testbed's estimate for more than ten labels, which groups hypotheses with similar predictions by random "
            "hyperplanes. With few distinct inputs in a draw, it is mostly too high."
        )
    if "joint_log_loss" in keys:
        notes.append(
            f"The joint log-loss is that of {TAU} labels predicted together (not divided by {TAU}). It falls as the number of "
            "hypotheses Z grows, so compare it at equal Z; with Z = 1 it is the NLL times "
            f"{TAU}."
            + (
                ""
                if all("joint_log_loss" in row for row in rows)
                else " It is empty for methods without one: a Dirichlet distribution, and a calibration of the mean of several networks, "
                "do not define it."
            )
        )
    single = [
        f"{_TITLES[key].partition(',')[0]}: {', '.join(f'{name} (row {row})' for name, row in found.items())}"
        for key, found in results.get("single_rows", {}).items()
    ]
    if single:
        notes.append(
            f"A single test row contributes more than half of each of these means, so look at it first. {'; '.join(single)}. Rows count from 0."
        )
    if "ece" in keys:
        notes.append(
            f"The calibration error is the plug-in estimate, which is above zero even for a perfect model: with {sizes['test']:,} "
            "test samples, differences of a few thousandths are meaningless."
        )
    if sizes["ood"]:
        notes.append(
            "OOD numbers hold only for these data; on others, the order of methods can change. "
            "Every score was fixed before seeing any such data, and nothing was chosen on them. Average precision depends on the "
            f"share of OOD samples, here {100 * sizes['ood'] / (sizes['ood'] + sizes['test']):.0f} %."
        )
    if results["differences"]:
        notes.append(
            "A method is tied with the best one if the interval of their difference contains 0. The intervals account for the number of methods, so that, with a "
            "probability of 95 %, the truly best one is marked as the best or as tied. A tied method may still be worse."
            + (
                ""
                if seeds >= 5
                else " With fewer than 5 seeds, the intervals are over test rows only: they hold for these trained networks, not for other seeds."
            )
        )
    notes.append(
        "The standard error is over seeds. The intervals are more informative, since they compare methods on the same rows and seeds."
        if seeds > 1
        else "With only one seed, there is no standard error."
    )
    notes.append(
        "Params counts all weights, frozen priors included, without running statistics. Times are from this machine, with "
        "one thread. The training time of a method that uses another's networks includes theirs."
    )
    return notes
