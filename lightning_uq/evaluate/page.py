"""The page of an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_uq.evaluate.names import AFTER, SCORES
from lightning_uq.report import Report, score_label

_SCALED = "temperature-scaled"
_ON_DETECTION = (
    "OOD numbers hold only for these data. Average precision depends on the share of OOD samples. The better score here may not be the better one "
    "on other data."
)


def make_report(result: Mapping[str, Any]) -> Report:
    """The page's contents: one row per score, as trained and temperature-scaled.

    Args:
        result: What :func:`~lightning_uq.evaluate.evaluate` returned.
    """
    info, kind = result["info"], result["info"]["model_type"]
    detects = info["ood_name"] is not None
    scores = list(SCORES[kind].values()) if detects else [None]
    shown = [(score, suffix) for score in scores for suffix in ("", AFTER)]
    rows = [_row(result, score, suffix) for score, suffix in shown]
    runs = len(info["runs"])
    number = "1 run" if runs == 1 else f"{runs} runs"
    members = len(info["runs"][0])
    size = "" if members == 1 else f" of {members} checkpoints each"
    against = f" against {info['ood_name']} as out-of-distribution data" if detects else ""
    return Report(
        title=f"Checkpoints evaluated on {info['data']}",
        verdict=_verdict(result, scores[0]),
        introduction=[
            f"{number}{size}, tested on {info['data']}{against}. "
            + (
                "Each row is a score, for the networks as trained or with a temperature fitted to the validation data. Accuracy and calibration do "
                "not depend on the score."
                if detects
                else "The rows are the networks as trained, and with a temperature fitted to the validation data."
            )
        ],
        rows=rows,
        methods={_name(score, suffix): (_about(score, suffix), None) for score, suffix in shown if score is not None},
        notes=[
            "The standard error is over runs." if runs > 1 else "With only one run, there is no standard error.",
            f"The calibration error is the plug-in estimate with {info['num_bins']} bins, which is above zero even for a perfect model.",
            *([_ON_DETECTION] if detects else []),
        ],
        facts={"Temperatures": _temperatures(info), "Settings": _settings(info)},
    )


def _name(score: str | None, suffix: str) -> str:
    if score is None:
        return _SCALED if suffix else "as trained"
    return score + (f", {_SCALED}" if suffix else "")


def _about(score: str, suffix: str) -> str:
    return f"OOD score: {score_label(score).lower()}" + (f", {_SCALED}" if suffix else "")


def _row(result: Mapping[str, Any], score: str | None, suffix: str) -> dict[str, Any]:
    """A row with the keys of a comparison's table."""
    names = {"accuracy": "accuracy", "ece": f"ece{suffix}"}
    if score is not None:
        names |= {f"ood_{kind}": f"ood_{kind}_{score}{suffix}" for kind in ("auroc", "auprc_out", "auprc_in")}
    row: dict[str, Any] = {"method": _name(score, suffix)}
    for key, name in names.items():
        name = (
            name if name in result["mean"] else name.removesuffix(AFTER)
        )  # a density does not change with a temperature
        row[key] = {"mean": result["mean"][name], "se": result["se"][name]}
    return row


def _verdict(result: Mapping[str, Any], score: str | None) -> list[str]:
    mean, info = result["mean"], result["info"]
    sentences = [
        f"The accuracy is {mean['accuracy']:.3f} and the calibration error {mean['ece']:.3f}; with a temperature it is {mean[f'ece{AFTER}']:.3f}."
    ]
    if score is not None:
        sentences.append(
            f"The {score_label(score).lower().removeprefix('− ')} separates {info['ood_name']} from the test data with an AUROC of "
            f"{mean[f'ood_auroc_{score}']:.3f}, where 0.5 is chance and 1 is perfect."
        )
    return sentences


def _temperatures(info: Mapping[str, Any]) -> dict[str, str]:
    return {
        ", ".join(map(str, run)): ", ".join(f"{value:.3f}" for value in values)
        for run, values in zip(info["runs"], info["temperature"], strict=True)
    }


def _settings(info: Mapping[str, Any]) -> dict[str, Any]:
    left_out: Sequence[str] = ("runs", "temperature", "grid_temperature", "num_bins")
    return {
        name.replace("_", " "): value
        for name, value in info.items()
        if name not in left_out and value not in (None, {}, [])
    }
