"""Record what each case logs, predicts and writes, to check that moving or renaming code changes no number.

A record is plain data. It keeps numbers apart from names:

- ``logged`` holds every value that the Trainer logged, by name.
- ``predicted`` and ``members`` hold the prediction for the test rows.
- ``scores`` holds a callback's scores, and ``written`` the columns that PredictionWriter wrote.
- ``weights`` and ``state`` hold the tensors of the checkpoint and of the fitted callback, in order and without their names.
- ``names`` holds names and settings: a checkpoint's keys, the hyper-parameters, the files.

For each tensor, a record holds the shape, the first rows, the sum over the rows and the root mean square. It contains no time, path,
version or random state. A rename changes lines under ``names`` or the name in front of a number; :func:`same_numbers` compares two
records without their names.
"""

import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks import FitGMM, OODDetection, PredictionWriter, TemperatureScaling, read_predictions
from lightning_uq.errors import InputError
from lightning_uq.networks import EpinetHead
from lightning_uq.predictions import Prediction
from tests.contract.cases import MODULES, CallbackCase, Measured, ModuleCase, UsersModule, loader
from tests.contract.running import TEST, TRAIN, VAL
from tests.contract.users import UserCase
from tests.metrics.cases import ROWS

FOLDER = Path(__file__).parent / "recorded"

RTOL = 1e-6
"""The largest difference that counts as rounding, relative to the number or to the root mean square of its tensor.

Weights, data and training are in float64 (see :func:`same_draws`), so processors and torch releases differ by about 1e-16 at first.
The largest difference measured in a record was 3e-9: between AVX-512, AVX2 and no vector instructions, one thread and two, torch 2.6
and 2.14. The tolerance is above one rounding step of float32 (6e-8), because TorchMetrics stores some means in float32. It is far
below a real change: ``test_recording.py`` shows that a learning rate or a metric that is off by 0.1 % is reported.
"""

FLOOR = 1e-4
"""The smallest scale of a comparison: a difference of two equal entropies is 0 on one processor and 1e-16 on another."""

DIGITS = 9
"""Significant digits of a recorded number."""

MakeTrainer = Callable[..., Trainer]
Record = dict[str, Any]


# ---------------------------------------------------------------------- the same random numbers everywhere


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the same random numbers on every processor and under every release of torch.

    Weights and data are drawn in float64, because the last bits of float32 normals depend on the processor's vector instructions.
    Torch releases use different algorithms for truncated normals, dropout masks and integers of 2^28 and more; this context replaces
    all three.
    """
    draw_integers, dtype = torch.randint, torch.get_default_dtype()

    def truncated_normal(
        tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0, generator: Any = None
    ) -> Tensor:
        low, high = (math.erf((bound - mean) / std / 2**0.5) for bound in (a, b))
        with torch.no_grad():
            return tensor.uniform_(low, high, generator=generator).erfinv_().mul_(std * 2**0.5).add_(mean).clamp_(a, b)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (torch.rand_like(x) >= p) / (1 - p) if training else x

    def randint(high: int, *args: Any, **kwargs: Any) -> Tensor:
        return draw_integers(min(high, 2**28 - 1), *args, **kwargs)

    with (
        patch.object(nn.init, "trunc_normal_", truncated_normal),
        patch.object(F, "dropout", dropout),
        patch.object(torch, "randint", randint),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


# ---------------------------------------------------------------------- one function per kind of case


@same_draws()
def record_module(case: ModuleCase, make_trainer: MakeTrainer, folder: Path) -> Record:
    """Fit, validate, test and predict one of the package's modules."""
    torch.manual_seed(0)
    steps, writer = Steps(), PredictionWriter(folder / "predictions", case.file_format)
    trainer = _float64(make_trainer, logger=steps, callbacks=[writer])
    module = case.build()
    trainer.fit(module, loader(case.task, TRAIN, shuffle=True), loader(case.task, VAL, 1))
    logged = {"fit": steps.values()}
    (logged["validate"],) = trainer.validate(module, loader(case.task, VAL, 1), verbose=False)
    (logged["test"],) = trainer.test(module, loader(case.task, TEST, 2), verbose=False)
    prediction = _cat(trainer.predict(module, loader(case.task, TEST, 2)))
    trainer.save_checkpoint(folder / "module.ckpt", weights_only=False)
    checkpoint = torch.load(folder / "module.ckpt", weights_only=True)
    written = read_predictions(folder / "predictions")
    return {
        "logged": logged,
        **_predicted(prediction),
        "written": {name: _summary(torch.as_tensor(column), first=3) for name, column in written.items()},
        "weights": [_summary(tensor) for tensor in checkpoint["state_dict"].values()],
        "names": {
            "prediction": type(prediction).__name__,
            "files": _files(folder / "predictions"),
            "checkpoint": sorted(set(checkpoint) - _lightning_keys()),
            "weights": list(checkpoint["state_dict"]),
            "hyper_parameters": checkpoint["hyper_parameters"],
        },
    }


@same_draws()
def record_callback(case: CallbackCase, make_trainer: MakeTrainer, folder: Path) -> Record:
    """Train a user's module and an ensemble with the callback; validate, test and predict with the best weights."""
    record = _run_callback(case, UsersModule, "val_loss", make_trainer, folder / "user")
    ours = next(one for one in MODULES if one.name == case.ensemble)
    monitor = "val_nll" if ours.task == "classification" else "val_loss"
    ensemble = _run_callback(case, ours.build, monitor, make_trainer, folder / "ensemble", ours.task)
    names = ensemble.pop("names")
    return {**record, "ensemble": ensemble, "names": {**record["names"], "ensemble": names}}


def _run_callback(
    case: CallbackCase,
    build: Callable[[], LightningModule],
    monitor: str,
    make_trainer: MakeTrainer,
    folder: Path,
    kind: str = "classification",
) -> Record:
    torch.manual_seed(0)
    steps, callback, module = Steps(), case.build(), build()
    best = ModelCheckpoint(folder, filename="best", monitor=monitor, save_on_train_epoch_end=False)
    trainer = _float64(make_trainer, logger=steps, callbacks=[callback, best], enable_checkpointing=True)
    trainer.fit(module, loader(kind, TRAIN, shuffle=True), loader(kind, VAL, 1))
    weights = {"ckpt_path": best.best_model_path, "weights_only": True}
    logged = {"fit": steps.values()}
    (logged["validate"],) = trainer.validate(module, loader(kind, VAL, 1), verbose=False, **weights)
    (logged["test"],) = trainer.test(module, loader(kind, TEST, 2), verbose=False, **weights)
    record: Record = {"logged": logged, "names": {"files": _files(folder)}}
    if callable(getattr(callback, "score", None)):
        scores = callback.score(module, loader(kind, TEST, 2))
        record["scores"] = _summaries(scores if isinstance(scores, dict) else {"score": scores}, first=3)
    if not case.fits:
        return record
    checkpoint = torch.load(callback.uq_ckpt_path, weights_only=True)
    state = checkpoint["callbacks"][callback.state_key]
    tensors = {name: value for name, value in state["tensors"].items() if isinstance(value, Tensor)}
    record["state"] = [_summary(_comparable(name, value), first=3) for name, value in tensors.items()]
    callback.attach = True
    prediction = _cat(trainer.predict(module, loader(kind, TEST, 2), **weights))
    record.update(_predicted(prediction))
    record["names"].update(
        prediction=type(prediction).__name__,
        checkpoint=sorted(set(checkpoint) - _lightning_keys()),
        callbacks=[key for key in checkpoint["callbacks"] if not key.startswith("ModelCheckpoint")],
        callback=sorted(state),
        settings=state["settings"],
        state=list(tensors),
        plain={name: value for name, value in state["tensors"].items() if name not in tensors},
    )
    return record


@same_draws()
def record_metric(key: str, make_trainer: MakeTrainer) -> float:
    """The value of a metric of ``tests/metrics/cases.py`` that a user's module logs."""
    torch.manual_seed(0)
    rows = DataLoader(TensorDataset(torch.arange(ROWS)), batch_size=7)
    (tested,) = _float64(make_trainer).test(Measured(key), rows, verbose=False)
    return tested["value"]


@same_draws()
def record_user(case: UserCase, make_trainer: MakeTrainer, folder: Path) -> Record:
    """Train an ensemble and an epinet of a user's modules, and one such module with three callbacks."""
    train, val, test = case.loader(TRAIN, shuffle=True), case.loader(VAL, 1), case.loader(TEST, 2)

    def run(module: LightningModule, *, fit: bool = True, **kwargs: Any) -> Record:
        steps, logged = Steps(), {}
        trainer = _float64(make_trainer, logger=steps, **kwargs)
        torch.manual_seed(0)
        if fit:
            trainer.fit(module, train, val)
            logged["fit"] = steps.values()
        (logged["test"],) = trainer.test(module, test, verbose=False)
        return {"logged": logged, **_predicted(_cat(trainer.predict(module, test)))}

    torch.manual_seed(0)
    if case.by_hand:
        paths = []
        for i in range(2):
            alone = _float64(make_trainer)
            alone.fit(case.module(), train, val)
            paths.append(folder / f"member_{i}.ckpt")
            alone.save_checkpoint(paths[-1], weights_only=False)
        ensemble = case.ensemble.from_checkpoints(paths, module_class=case.module, **case.model_arguments)
    else:
        ensemble = case.ensemble(case.module, num_members=2, seed=1, **case.model_arguments)
        for i in range(2):
            _start(case, ensemble.network.members[i], i)
    small = {"head": EpinetHead(hidden_sizes=(6,)), "num_eval_samples": 5, "optimizer": torch.optim.SGD}
    torch.manual_seed(0)
    epinet = case.epinet(case.module, **small, **case.model_arguments)
    _start(case, epinet.network.base, 0)
    given = case.callback_arguments
    callbacks = [
        FitGMM(attach=True, **given),
        TemperatureScaling(attach=True, **given),
        OODDetection({"far": case.loader(13, 3, shift=1.0)}, **given),
    ]
    record = {"ensemble": run(ensemble, fit=not case.by_hand), "epinet": run(epinet)}
    torch.manual_seed(0)
    module = case.module()
    _start(case, module, 0)
    record["callbacks"] = run(module, callbacks=callbacks)
    return record


# ---------------------------------------------------------------------- parts of a record


class Steps(Logger):
    """A logger that keeps every value in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, list[float]] = defaultdict(list)

    @property
    def name(self) -> str:
        return "steps"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name != "epoch":  # Lightning adds it
                self._values[name].append(value)

    def values(self) -> dict[str, list[float]]:
        """The values so far by name, in logged order."""
        return {name: list(values) for name, values in self._values.items()}


def _float64(make_trainer: MakeTrainer, **kwargs: Any) -> Trainer:
    options = {"precision": "64-true", "max_epochs": 2, "log_every_n_steps": 1}
    return make_trainer(**{**options, **kwargs})


def _cat(predictions: list[Any]) -> Prediction:
    return type(predictions[0]).cat(predictions)


_MEMBERS = {
    "logits": 1,
    "member_mean": 1,
    "member_variance": 1,
    "member_quantiles": 1,
    "member_logits": 1,
    "concentration": 0,
    "nu": 0,
}
"""Tensors of the members by name, and the axis of their rows."""


def _predicted(prediction: Prediction) -> Record:
    """The fields of a prediction, and its members where it has any."""
    members = {}
    for name, axis in _MEMBERS.items():
        try:
            members[name] = _summary(getattr(prediction, name).movedim(axis, 0))
        except (AttributeError, InputError):  # another kind of prediction, or its members were pooled
            continue
    return {"predicted": _summaries(prediction.to_dict(), first=2), "members": members}


def _summaries(tensors: Mapping[str, Tensor], first: int) -> Record:
    return {name: _summary(tensor, first) for name, tensor in tensors.items()}


def _summary(tensor: Tensor, first: int = 0) -> Record:
    """Shape, root mean square, first rows, and the sum over the rows: per column if there are at most 16, else in total."""
    values = tensor.detach().cpu().double()
    columns = values.flatten(1) if values.ndim > 1 else values.unsqueeze(-1)
    sums = columns.sum(0) if columns.shape[-1] <= 16 else columns.sum()
    summary = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "rms": values.square().sum().div(max(1, values.numel())).sqrt().item(),
        "sum": sums.squeeze().tolist() if values.numel() else 0.0,
    }
    if first:
        summary["first"] = (columns[:first, :8] if values.ndim else values).squeeze(-1).tolist()
    return summary


def _comparable(name: str, tensor: Tensor) -> Tensor:
    """The tensor with finite numbers, as JSON has; eigenvectors, whose signs depend on the linear algebra library, as the projection on their span."""
    return (tensor @ tensor.T if name.endswith("residual") else tensor).nan_to_num(0.0, 1e9, -1e9)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@cache
def _lightning_keys() -> set[str]:
    """The keys that Lightning itself writes to a checkpoint."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(UsersModule())
    return set(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


def _start(case: UserCase, module: nn.Module, seed: int) -> None:
    """Replace the initial weights of another package's backbone, because they depend on that package's version."""
    if case.needs == "torch":
        return
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0


# ---------------------------------------------------------------------- comparing


def differences(found: Any, recorded: Any, path: str = "") -> list[str]:
    """One line for each field that differs from the record by more than rounding."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        is_array = "rms" in found and found.get("shape") == recorded.get("shape")
        scales = _scales(recorded) if is_array else {}
        inside = f"{path}/" if path else ""
        lines = [f"{inside}{name} is not in the record" for name in found if name not in recorded]
        lines += [f"{inside}{name} is in the record, but is missing now" for name in recorded if name not in found]
        for name in found:
            if name in scales and name in recorded:
                lines += _number_differences(found[name], recorded[name], inside + name, scales[name])
            elif name in recorded:
                lines += differences(found[name], recorded[name], inside + name)
        return lines
    if _is_numeric(found) and _is_numeric(recorded) and len(_flat(found)) == len(_flat(recorded)):
        return _number_differences(found, recorded, path)
    if isinstance(found, list) and isinstance(recorded, list) and len(found) == len(recorded):
        pairs = enumerate(zip(found, recorded, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{path}[{i}]")]
    return [] if found == recorded else [f"{path}: recorded {json.dumps(recorded)}, found {json.dumps(found)}"]


def _scales(summary: Record) -> dict[str, float]:
    """The scale of each number in a tensor's summary: the root mean square, times the number of terms for a sum."""
    rms, entries = max(summary["rms"], FLOOR), max(1, math.prod(summary["shape"]))
    return {"rms": rms, "first": rms, "sum": rms * entries / len(_flat(summary["sum"]))}


def _number_differences(found: Any, recorded: Any, path: str, scale: float | None = None) -> list[str]:
    """One line with the largest difference between two numbers or lists of numbers, if it is more than rounding."""
    one, other = _flat(found), _flat(recorded)
    if len(one) != len(other):
        return [f"{path}: recorded {json.dumps(recorded)}, found {json.dumps(found)}"]
    if scale is None:
        scale = max(FLOOR, *map(abs, other)) if other else FLOOR
    off = [abs(a - b) / max(scale, abs(b)) for a, b in zip(one, other, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__, default=0)
    if not off or off[worst] <= RTOL:
        return []
    place = f"{path}[{worst}]" if len(off) > 1 else path
    return [
        f"{place}: recorded {other[worst]:.9g}, found {one[worst]:.9g} (off by {off[worst]:.1e}, {RTOL:.0e} is allowed)"
    ]


def _flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, list) else [value]


def _is_numeric(value: Any) -> bool:
    return all(isinstance(leaf, int | float) for leaf in _flat(value))


def same_numbers(found: Record, recorded: Record) -> bool:
    """Whether two records hold the same numbers, whatever their names are."""
    one, other = sorted(_numbers(found)), sorted(_numbers(recorded))
    return len(one) == len(other) and not _number_differences(one, other, "", FLOOR)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for name, part in value.items() if name != "names" for number in _numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def kept(found: Any, recorded: Any) -> Any:
    """The found record, with the old numbers where only rounding differs, so that a new record's diff shows real changes alone."""
    if isinstance(found, dict) and isinstance(recorded, dict) and "rms" not in found:
        return {name: kept(part, recorded[name]) if name in recorded else part for name, part in found.items()}
    if (
        isinstance(found, list)
        and isinstance(recorded, list)
        and not _is_numeric(found)
        and len(found) == len(recorded)
    ):
        return [kept(*pair) for pair in zip(found, recorded, strict=True)]
    return found if differences(found, recorded) else recorded


# ---------------------------------------------------------------------- files


def path_of(kind: str, name: str) -> Path:
    """The file of a case's record."""
    return FOLDER / kind / (re.sub(r"\W+", "_", name).lower() + ".json")


def write(path: Path, found: Any) -> str:
    """Write a record; return how it differs from the previous one."""
    recorded = json.loads(path.read_text()) if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(kept(found, recorded)) + "\n")
    if recorded is None:
        return "new"
    if not differences(found, recorded):
        return "unchanged"
    return "names changed, numbers did not" if same_numbers(found, recorded) else "NUMBERS CHANGED"


def plain(value: Any) -> Any:
    """The value as plain JSON data, with numbers rounded to :data:`DIGITS`."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return 0.0 if abs(value) < 1e-12 else float(f"{value:.{DIGITS}g}")
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def dumps(value: Any, indent: str = "") -> str:
    """JSON with sorted keys and one line per metric, tensor or name, so that a diff can be read line by line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value and "rms" not in value:
        parts = [f"{json.dumps(name)}: {dumps(value[name], deeper)}" for name in sorted(value)]
        opening, closing = "{", "}"
    elif isinstance(value, list) and not _is_numeric(value):
        parts = [dumps(part, deeper) for part in value]
        opening, closing = "[", "]"
    else:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    lines = ",\n".join(f"{deeper}{part}" for part in parts)
    return f"{opening}\n{lines}\n{indent}{closing}"
