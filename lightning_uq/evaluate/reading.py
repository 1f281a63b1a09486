"""Reads the outputs of one checkpoint, and joins those of an ensemble's members."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.errors import InputError
from lightning_uq.evaluate.data import EvaluationData
from lightning_uq.evaluate.errors import naming_argument
from lightning_uq.evaluate.numbers import Outputs
from lightning_uq.evaluate.settings import ModelType, Settings
from lightning_uq.functional.precision import to_float64, widen
from lightning_uq.functional.temperature import fit_ensemble_temperature
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.logits import LogitReader
from lightning_uq.tasks import Classification, describe


@dataclass(frozen=True)
class Reading:
    """The outputs of one checkpoint.

    Attributes:
        outputs: The outputs.
        grid_temperature: The temperature [Z] of each member by the original's method.
        marks: Numbers that differ if the test data of two checkpoints differ.
    """

    outputs: Outputs
    grid_temperature: Tensor
    marks: Tensor


def read(model: nn.Module, data: EvaluationData, settings: Settings, path: str) -> Reading:
    """Run a model over the validation, test and out-of-distribution data.

    Raises:
        InputError: The model is not a classifier, or the data are empty or lack labels.
    """
    task = LogitReader().task(model)
    if not task.has_classes or task.has_positions:
        raise InputError(f"{path!r} must hold a classifier with one label per input, but its task is {describe(task)}.")
    gmm = None
    if settings.model_type == "gmm":
        gmm = FitGMM(
            feature_transform="raw", feature_layer=settings.feature_layer, regularization=settings.regularization
        )
        gmm.fit(model, data.fit)
    val, test, ood = (
        None if loader is None else _Pass(model, loader, part, gmm if part != "validation" else None)
        for part, loader in (("validation", data.val), ("test", data.test), ("out-of-distribution", data.ood))
    )
    assert val is not None
    assert test is not None
    temperature, grid = (
        fit_ensemble_temperature(val.logits, val.labels, "member", method=method) for method in ("newton", "grid")
    )
    outputs = Outputs(test.logits, test.labels, None, temperature, test.log_prob)
    marks = [to_float64(test.labels), test.marks]
    if ood is not None:
        outputs = replace(outputs, ood_logits=ood.logits, ood_log_prob=ood.log_prob)
        marks.append(ood.marks)
    return Reading(outputs, grid, torch.cat(marks))


class _Pass:
    """One pass over a loader, in order: logits [Z, N, C] in float64 on the CPU, labels [N], log p(f | c) [N, C]."""

    def __init__(self, model: nn.Module, loader: Any, part: str, gmm: FitGMM | None) -> None:
        self.part = part
        rows = list(self._batches(model, loader, gmm))
        if not rows:
            raise InputError(f"`data` has no {part} data.")
        logits, labels, log_probs, marks = zip(*rows, strict=True)
        self.logits = torch.cat(logits, 1)
        self.log_prob = torch.cat(log_probs) if gmm is not None else None
        self.marks = torch.stack(marks)
        self._labels = labels

    @property
    def labels(self) -> Tensor:
        if any(y is None or y.is_floating_point() for y in self._labels):
            raise InputError(f"`data`: The {self.part} data have no class labels. Each batch must be `(x, y)`.")
        labels = torch.cat(self._labels)
        with naming_argument("data"):
            Classification().check_target(labels, self.logits)
        return labels

    def _batches(self, model: nn.Module, loader: Any, gmm: FitGMM | None) -> Iterator[tuple[Any, ...]]:
        reader = LogitReader()
        with evaluating(model):
            for raw in exact_loader(loader, name=f"the {self.part} loader"):
                batch = to_device(raw, model)
                x, y = reader.unpack(model, batch)
                log_prob = None
                if gmm is None:
                    logits = _logits(reader, model, batch)
                else:
                    with gmm.features.recording(model) as features:
                        logits = _logits(reader, model, batch)
                    log_prob = gmm.densities[0].cpu().log_prob(features()[0].cpu())
                mark = widen(x).sum().cpu() if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64)
                yield to_float64(logits).cpu(), None if y is None else y.cpu(), log_prob, mark


def _logits(reader: LogitReader, model: nn.Module, batch: Any) -> Tensor:
    """Logits [Z, B, C]; for a Dirichlet, the log of its mean."""
    prediction: Any = reader.prediction(model, reader(model, batch), to_members=False)
    logits: Tensor = prediction.calibration_logits
    return logits


def join(members: Sequence[Reading], run: Sequence[str], model_type: ModelType) -> Outputs:
    """The outputs of a run's checkpoints as those of one model, with members first.

    Raises:
        InputError: The number of members does not match the model type, or their test data differ.
    """
    outputs = [member.outputs for member in members]
    size = sum(len(one.logits) for one in outputs)
    if (size > 1) != (model_type == "ensemble"):
        wanted = "several members, in one checkpoint or in several" if model_type == "ensemble" else "one network"
        raise InputError(
            f"With `model_type` {model_type} a run must hold {wanted}, but the run of {run[0]!r} holds {size}."
        )
    for path, member in zip(run[1:], members[1:], strict=True):
        if member.outputs.logits.shape[1:] != outputs[0].logits.shape[1:] or not torch.equal(
            member.marks, members[0].marks
        ):
            raise InputError(
                f"The members of a run must be tested on the same data and classes, but those of {path!r} and {run[0]!r} "
                "differ. With this `data`, the test set depends on the seed of the split."
            )
    outside = [one.ood_logits for one in outputs if one.ood_logits is not None]
    return Outputs(
        torch.cat([one.logits for one in outputs]),
        outputs[0].labels,
        torch.cat(outside) if outside else None,
        torch.cat([one.temperature for one in outputs]),
        outputs[0].log_prob,
        outputs[0].ood_log_prob,
    )
