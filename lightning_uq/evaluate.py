"""The numbers of the DDU experiments for trained checkpoints, in their JSON: ``lightning-uq evaluate``.

A run is one network, or the members of one ensemble; its accuracy, calibration error and two detection scores are
averaged over runs. The scores depend on the model type, and so does the kind that average precision takes as positive:

============  ==============================================  =======================================
model type    m1                                              m2
============  ==============================================  =======================================
``softmax``   logsumexp of the logits; positive: in           entropy of the softmax; positive: out
``ensemble``  mutual information; positive: out               entropy of the mean; positive: out
``gmm``       log sum_c p(f | c); positive: in                entropy of p(c | f); positive: out
============  ==============================================  =======================================

``t_`` stands for "after temperature scaling", each member's own on its validation data; a density does not change with
it. The two average precisions of one table row are therefore not always comparable; ``*_auprc_in`` and ``*_auprc_out``
give both for each. All is computed in float64, where the original has float32: entropies of a saturated posterior, which
tie at 0 there, are told apart here.

Source: Mukhoti et al. (arXiv 2102.11582), its evaluation script.
"""

import importlib
import inspect
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

import lightning_uq.data
from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.sibling import WRITTEN_BY
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.data import ArrayDataModule, ImageDataModule, NpzDataModule
from lightning_uq.errors import InputError, UQError
from lightning_uq.functional import (
    auroc,
    average_precision,
    energy,
    expected_calibration_error,
    mean_log_probs,
    mutual_information,
    predictive_entropy,
)
from lightning_uq.functional._validation import check_choice
from lightning_uq.functional.entropy import entropy, log_softmax
from lightning_uq.functional.gaussian import Regularization
from lightning_uq.functional.temperature import fit_ensemble_temperature
from lightning_uq.modules.checkpoints import load_member
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.report.files import writable_directory, write_files
from lightning_uq.running.classes import class_logits
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.logits import LogitReader, is_uncertainty_module
from lightning_uq.tasks import Classification

ModelType = Literal["softmax", "ensemble", "gmm"]

NUM_BINS = 15


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how.

    Attributes:
        runs: The checkpoints of each run: one, or an ensemble's members.
        data: ``"digits"``, ``"mnist"``, ``"cifar10"`` and so on, the path of an ``.npz`` file, or the import path of a
            LightningDataModule.
        ood: The out-of-distribution data: held-out labels such as ``"8,9"`` (digits, ``.npz``), the name of another data
            set such as ``"svhn"`` (images), or a name among the data module's ``ood_dataloaders()``.
        model_type: See the table above.
        module: Import path of the LightningModule that wrote the checkpoints, for those that do not name theirs.
        network: Instead: import path of what builds the network, whose weights are then taken from the checkpoints.
        init_args: Arguments of either.
        data_args: Further arguments of the data module.
        data_seeds: Seeds of the data module's split: none for its default, one for all, one a run, or one a checkpoint.
        feature_layer: As of :class:`~lightning_uq.callbacks.gmm.FitGMM`.
        regularization: Likewise; ``"ddu"`` is the original's schedule.
        accelerator: ``"cpu"``, ``"cuda"`` (or ``"gpu"``), ``"mps"``, or ``"auto"``.

    Raises:
        InputError: An argument is not as above, or arguments do not go together.
    """

    runs: Sequence[Sequence[str]]
    data: str
    ood: str
    model_type: ModelType = "softmax"
    module: str | None = None
    network: str | None = None
    init_args: Mapping[str, Any] = field(default_factory=dict)
    data_args: Mapping[str, Any] = field(default_factory=dict)
    data_seeds: Sequence[int] = ()
    feature_layer: str = "auto"
    regularization: Regularization = "oas"
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, ("softmax", "ensemble", "gmm"))
        check_choice("accelerator", self.accelerator, ("cpu", "cuda", "gpu", "mps", "auto"))
        if not self.runs or not all(self.runs):
            raise InputError("Expected argument `runs` to hold at least one run of at least one checkpoint.")
        if self.module is not None and self.network is not None:
            raise InputError("Expected argument `module` or argument `network`, but got both.")
        if self.init_args and self.module is None and self.network is None:
            raise InputError("Expected argument `init_args` with `module` or `network`, whose arguments they are.")
        checkpoints = sum(len(run) for run in self.runs)
        if len(self.data_seeds) not in (0, 1, len(self.runs), checkpoints):
            raise InputError(
                f"Expected argument `data_seeds` to hold one seed, one for each of {len(self.runs)} runs, or one for each of "
                f"{checkpoints} checkpoints, but got {len(self.data_seeds)}."
            )

    def seeds(self) -> list[list[int | None]]:
        """The seed of the data for each checkpoint of each run."""
        given, sizes = list(self.data_seeds), [len(run) for run in self.runs]
        if len(given) == len(sizes) and len(given) != 1:
            return [[seed] * size for seed, size in zip(given, sizes, strict=True)]
        if len(given) <= 1:
            return [[given[0] if given else None] * size for size in sizes]
        rest = iter(given)
        return [[next(rest) for _ in range(size)] for size in sizes]


def evaluate(settings: Settings, progress: Callable[[str], None] = lambda path: None) -> dict[str, Any]:
    """Evaluate every run; gives what the JSON file holds.

    Args:
        settings: What is evaluated.
        progress: Called with the path of each checkpoint before it is read.

    Returns:
        ``mean``, ``std`` (the standard error over runs, as the original has it: None for one run) and ``values`` (one a
        run) by key, and ``info``.

    Raises:
        InputError: A checkpoint, the data, or an argument is not as expected.
    """
    data: dict[int | None, _Data] = {}
    values, temperatures = [], []
    for run, seeds in zip(settings.runs, settings.seeds(), strict=True):
        members = []
        for path, seed in zip(run, seeds, strict=True):
            progress(path)
            if seed not in data:
                data[seed] = _make_data(settings, seed)
            model = load_model(path, settings.module, settings.network, settings.init_args)
            members.append(_read(model.to(_device(settings.accelerator)), data[seed], settings, path))
        joined = _join(members, run, settings.model_type)
        values.append(metrics(settings.model_type, joined))
        temperatures.append(joined.temperature.tolist())
    keys = list(values[0])
    columns = {key: [one[key] for one in values] for key in keys}
    first = next(iter(data.values()))
    return {
        "mean": {key: statistics.mean(column) for key, column in columns.items()},
        "std": {key: _standard_error(column) for key, column in columns.items()},
        "values": columns,
        "info": {
            **{name: value for name, value in vars(settings).items() if name != "runs"},
            "runs": [list(map(str, run)) for run in settings.runs],
            "data_seeds": settings.seeds(),
            "ood_name": first.ood_name,
            "temperature": temperatures,
            "num_bins": NUM_BINS,
            "lightning_uq": lightning_uq.__version__,
        },
    }


def write(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the JSON file, whole or not at all."""
    path = Path(path)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_files(writable_directory(path.parent), {path.name: text.encode()})


def _standard_error(column: Sequence[float]) -> float | None:
    return statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else None


# ---------------------------------------------------------------------- the numbers


@dataclass(frozen=True)
class Outputs:
    """What a run's members say of the test and the out-of-distribution data, in float64.

    Attributes:
        logits: Logits [Z, N, C] of the test inputs.
        labels: Their labels [N].
        ood_logits: Logits [Z, M, C] of the out-of-distribution inputs.
        temperature: Each member's temperature [Z].
        log_prob: For ``gmm``, log p(f | c) [N, C] of the test inputs' features.
        ood_log_prob: The same [M, C] of the others.
    """

    logits: Tensor
    labels: Tensor
    ood_logits: Tensor
    temperature: Tensor
    log_prob: Tensor | None = None
    ood_log_prob: Tensor | None = None


def metrics(model_type: ModelType, outputs: Outputs) -> dict[str, float]:
    """Accuracy, calibration and detection of one run, before and after its temperatures; fractions, not per cent.

    Example:
        >>> outputs = Outputs(
        ...     logits=torch.tensor([[[4.0, 0.0], [0.0, 4.0]]]),
        ...     labels=torch.tensor([0, 1]),
        ...     ood_logits=torch.tensor([[[0.5, 0.0]]]),
        ...     temperature=torch.ones(1),
        ... )
        >>> values = metrics("softmax", outputs)
        >>> values["accuracy"], values["m1_auroc"], values["m2_auprc"]
        (1.0, 1.0, 1.0)
    """
    scale = outputs.temperature.view(-1, 1, 1)
    values: dict[str, float] = {}
    for prefix, logits, ood_logits in (
        ("", outputs.logits, outputs.ood_logits),
        ("t_", outputs.logits / scale, outputs.ood_logits / scale),
    ):
        probs = mean_log_probs(logits).exp()
        if not prefix:
            values["accuracy"] = float((probs.argmax(1) == outputs.labels).double().mean())
        values[f"{prefix}ece"] = float(expected_calibration_error(probs, outputs.labels, NUM_BINS))
        inside, outside = logits, ood_logits
        if model_type == "gmm":
            assert outputs.log_prob is not None
            assert outputs.ood_log_prob is not None
            inside, outside = outputs.log_prob[None], outputs.ood_log_prob[None]
        for name, (score, positive) in _SCORES[model_type].items():
            values.update({f"{prefix}{name}_{key}": v for key, v in _detect(score, positive, inside, outside).items()})
    return values


def _posterior_entropy(log_prob: Tensor) -> Tensor:
    """Entropy of p(c | f) under equal priors."""
    return entropy(log_softmax(log_prob, 2), 2)[0]


Positive = Literal["in", "out"]

# The original ranks a confidence, whose positives are in distribution, or an uncertainty, whose positives are out.
_SCORES: dict[ModelType, dict[str, tuple[Callable[[Tensor], Tensor], Positive]]] = {
    "softmax": {"m1": (energy, "in"), "m2": (predictive_entropy, "out")},
    "ensemble": {"m1": (mutual_information, "out"), "m2": (predictive_entropy, "out")},
    "gmm": {"m1": (energy, "in"), "m2": (_posterior_entropy, "out")},
}


def _detect(score: Callable[[Tensor], Tensor], positive: Positive, inside: Tensor, outside: Tensor) -> dict[str, float]:
    scores = torch.cat([score(inside), score(outside)])
    is_ood = torch.arange(len(scores)) >= inside.shape[1]
    found = {f"auprc_{kind}": float(average_precision(scores, is_ood, kind)) for kind in ("in", "out")}
    return {"auroc": float(auroc(scores, is_ood)), "auprc": found[f"auprc_{positive}"], **found}


# ---------------------------------------------------------------------- models


def load_model(
    path: str | Path, module: str | None = None, network: str | None = None, init_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """A trained model from a Lightning checkpoint, read with ``weights_only=True``.

    Args:
        path: The file.
        module: Import path of the LightningModule that wrote it; needed unless the file names it, as those of the command
            line and of our post-training callbacks do.
        network: Instead: import path of what builds the network alone, whose weights the file holds, perhaps below an
            attribute's name.
        init_args: Arguments of either.

    Raises:
        InputError: The file cannot be read, does not say what it belongs to, or does not fit that.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "linear.ckpt"
        >>> torch.save({"state_dict": {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}}, path)
        >>> load_model(path, network="torch.nn.Linear", init_args={"in_features": 2, "out_features": 1}).weight.tolist()
        [[1.0, 1.0]]
    """
    arguments = dict(init_args or {})
    checkpoint = read_checkpoint(path)
    if network is not None:
        with _told(f"Expected argument `network` to build a network, but {network!r} says"):
            built = build_network(Factory(network, arguments), "network")
        load_member(built, checkpoint["state_dict"], path)
        return built
    of_command_line = checkpoint.get("hyper_parameters", {}).get("_class_path")
    name = module or of_command_line or checkpoint.get(WRITTEN_BY, {}).get("class_path")
    if name is None:
        raise InputError(
            f"{str(path)!r} does not name the LightningModule that wrote it: pass argument `module`, its import path "
            "(lightning_uq.DeterministicModule, say), or `network`, the import path of what builds the network alone."
        )
    kind = _import_class(name, "module", LightningModule)
    with _told(f"Expected {str(path)!r} to be a checkpoint of {name}, but it says"):
        loaded: nn.Module = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **arguments)
    return loaded


def _device(accelerator: str) -> torch.device:
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = "cuda" if accelerator == "gpu" else accelerator
    if kind == "auto":
        kind = next(name for name, there in kinds.items() if there)
    if not kinds[kind]:
        raise InputError(f"Expected argument `accelerator` to be of this machine, but there is no {kind} device.")
    return torch.device(kind)


class _told:  # noqa: N801  # reads as a sentence where it is used
    """Errors about what the user gave, in one line after ``before``; ours go through as they are."""

    def __init__(self, before: str) -> None:
        self.before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        from argparse import ArgumentError

        wanted = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArgumentError)
        if isinstance(error, wanted) and not isinstance(error, UQError):
            text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
            raise InputError(f"{self.before}: {text[:400] or type(error).__name__}") from error


def _import_class(name: str, argument: str, base: type) -> Any:
    owner, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(owner), last, None) if owner else None
    except ModuleNotFoundError as error:
        if error.name is None or not owner.startswith(error.name):
            raise  # the module is there, and one of its own imports is not
        found = None
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise InputError(
            f"Expected argument `{argument}` to be the import path of a {base.__name__}, but got {name!r}."
        )
    return found


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class _Data:
    fit: Any
    val: Any
    test: Any
    ood: Any
    ood_name: str


_OOD_ARGUMENTS = {"ood_classes", "ood_datasets"}


def data_names() -> dict[str, type[LightningDataModule]]:
    """Data modules by the names that ``--data`` takes.

    Example:
        >>> sorted(data_names())
        ['cifar10', 'cifar100', 'digits', 'dirty_mnist', 'fashion_mnist', 'kmnist', 'mnist', 'svhn']
    """
    kinds = [getattr(lightning_uq.data, name) for name in lightning_uq.data.__all__]
    return {
        kind.name: kind
        for kind in kinds
        if inspect.isclass(kind)
        and issubclass(kind, ArrayDataModule | ImageDataModule)
        and getattr(kind, "name", None)
        and not _OOD_ARGUMENTS.isdisjoint(inspect.signature(kind).parameters)
    }


def _make_data(settings: Settings, seed: int | None) -> _Data:
    named = data_names()
    kind: Any = named.get(settings.data) or (NpzDataModule if settings.data.endswith(".npz") else None)
    if kind is None:
        if "." not in settings.data:
            raise InputError(
                f"Expected argument `data` to be one of {', '.join(named)}, the path of an .npz file, or the import path of a "
                f"LightningDataModule, but got {settings.data!r}."
            )
        kind = _import_class(settings.data, "data", LightningDataModule)
    parameters = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"path": settings.data} if kind is NpzDataModule else {}
    chosen = True
    if "ood_classes" in parameters:
        arguments["ood_classes"] = _labels(settings.ood)
    elif "ood_datasets" in parameters:
        arguments["ood_datasets"] = [settings.ood]
    else:
        chosen = False
    if seed is not None:
        if "seed" not in parameters:
            raise InputError(f"Expected no `data_seeds`, since {kind.__name__} takes no `seed`, but got {seed}.")
        arguments["seed"] = seed
    with _told(f"Expected `data_args` to be arguments of {kind.__name__}, but it says"):
        bound = inspect.signature(kind).bind(**{**arguments, **settings.data_args})
    data: Any = kind(*bound.args, **bound.kwargs)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    if not hasattr(data, "ood_dataloaders"):
        raise InputError(f"Expected {kind.__name__} to have `ood_dataloaders()`, a mapping from names to loaders.")
    outside = data.ood_dataloaders()
    if not chosen and settings.ood not in outside:
        raise InputError(
            f"Expected argument `ood` to be one of {', '.join(outside) or 'none'}, the `ood_dataloaders()` of "
            f"{kind.__name__}, but got {settings.ood!r}."
        )
    name = next(iter(outside)) if chosen else settings.ood
    fit = data.uq_fit_dataloader if hasattr(data, "uq_fit_dataloader") else data.train_dataloader
    return _Data(fit(), data.val_dataloader(), data.test_dataloader(), outside[name], name)


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"Expected argument `ood` to be labels held out of the data, such as 8,9, but got {text!r}."
        ) from None


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Read:
    """One checkpoint's outputs, and marks by which the test data of two can be told apart."""

    outputs: Outputs
    marks: Tensor


def _read(model: nn.Module, data: _Data, settings: Settings, path: str) -> _Read:
    if is_uncertainty_module(model) and getattr(model, "task", None) == "regression":
        raise InputError(f"Expected a classifier in {path!r}, but it holds a regressor.")
    gmm = None
    if settings.model_type == "gmm":
        gmm = FitGMM(feature_layer=settings.feature_layer, regularization=settings.regularization)
        gmm.fit(model, data.fit)
    val, test, ood = (
        _Pass(model, loader, part, gmm if part != "validation" else None)
        for part, loader in (("validation", data.val), ("test", data.test), ("out-of-distribution", data.ood))
    )
    temperature = fit_ensemble_temperature(val.logits, val.labels, "member", method="grid")
    outputs = Outputs(test.logits, test.labels, ood.logits, temperature, test.log_prob, ood.log_prob)
    return _Read(outputs, torch.cat([test.labels.double(), test.marks, ood.marks]))


class _Pass:
    """One pass over a loader, in order: logits [Z, N, C] in float64 on the CPU, labels [N], log p(f | c) [N, C]."""

    def __init__(self, model: nn.Module, loader: Any, part: str, gmm: FitGMM | None) -> None:
        self.part = part
        rows = list(self._batches(model, loader, gmm))
        if not rows:
            raise InputError(f"Expected the {part} data to hold samples, but it is empty.")
        logits, labels, log_probs, marks = zip(*rows, strict=True)
        self.logits = torch.cat(logits, 1)
        self.log_prob = torch.cat(log_probs) if gmm is not None else None
        self.marks = torch.stack(marks)
        self._labels = labels

    @property
    def labels(self) -> Tensor:
        if any(y is None or y.is_floating_point() for y in self._labels):
            raise InputError(f"Expected the {self.part} data to hold class labels, `(x, y)`.")
        labels = torch.cat(self._labels)
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
                    logits = class_logits(reader, model, batch)
                else:
                    with gmm.features.recording(model) as features:
                        logits = class_logits(reader, model, batch)
                    log_prob = gmm.densities[0].cpu().log_prob(features()[0].cpu())
                mark = x.double().sum().cpu() if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64)
                yield logits.cpu().double(), None if y is None else y.cpu(), log_prob, mark


def _join(members: Sequence[_Read], run: Sequence[str], model_type: ModelType) -> Outputs:
    outputs = [member.outputs for member in members]
    size = sum(len(one.logits) for one in outputs)
    if (size > 1) != (model_type == "ensemble"):
        wanted = "several members, in one checkpoint or in several" if model_type == "ensemble" else "one network"
        raise InputError(
            f"Expected a run to hold {wanted} with model_type={model_type!r}, but the run of {run[0]!r} holds {size}."
        )
    for path, member in zip(run[1:], members[1:], strict=True):
        if member.outputs.logits.shape[1:] != outputs[0].logits.shape[1:] or not torch.equal(
            member.marks, members[0].marks
        ):
            raise InputError(
                f"Expected the members of a run to be tested on the same data and classes, but {path!r} is not tested as "
                f"{run[0]!r} is: with this data the test set depends on the seed of the split."
            )
    return Outputs(
        torch.cat([one.logits for one in outputs]),
        outputs[0].labels,
        torch.cat([one.ood_logits for one in outputs]),
        torch.cat([one.temperature for one in outputs]),
        outputs[0].log_prob,
        outputs[0].ood_log_prob,
    )
