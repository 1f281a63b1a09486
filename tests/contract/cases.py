"""The contract's one list: a method or callback that stands here is run through everything that this folder tests.

Modules are built from importable factories, so that their checkpoints load bare; networks, data and epochs are tiny. Rows
are uneven in number: no split divides by two ranks.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import callbacks as c
from lightning_uq import modules as m
from lightning_uq.batches import unpadded_rows
from lightning_uq.compare import UncertaintyReport
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.method import Setting
from lightning_uq.networks import Factory
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.tasks import Classification, Regression, Segmentation, Task
from tests.metrics import cases as measured

FEATURES, CLASSES, TARGETS = 4, 3, 2

AXES = {
    "32-true": "fit, validate, test and predict in float32",
    "bf16-mixed": "the same under autocast to bfloat16",
    "bf16-true": "the same with bfloat16 weights",
    "64-true": "the same with float64 weights",
    "options": "accumulated gradients, clipping, limited batches",
    "loaders": "several loaders to validate, test and predict",
    "iterable": "an iterable data set without a length",
    "fast_dev_run": "`fast_dev_run` and `barebones`",
    "ddp": "two gloo processes give what one gives, at uneven numbers of rows",
    "ddp_spawn": "the same, started by `spawn`",
    "fsdp2": "`ModelParallelStrategy`: two gloo processes, each with a part of the weights, give what one gives",
    "reload": "save, load bare under `weights_only=True`, the same numbers; `best` and `last`",
    "resume": "resuming at an epoch's end gives the numbers of the uninterrupted run",
    "mid-epoch": "resuming in mid-epoch, with a loader that keeps its state",
    "kill": "a process killed while it writes a checkpoint leaves the previous one whole",
    "ema": "`EMAWeightAveraging`, before and after",
    "swa": "`StochasticWeightAveraging`, before and after",
    "stopping": "`EarlyStopping`",
    "compile": "`torch.compile` of the inner network",
    "export": "`torch.export`",
    "onnx": "ONNX, run by onnxruntime, gives PyTorch's numbers",
    "predict": "tensor, tuple and mapping batches, uneven ones: one prediction type",
    "bad input": "NaN, infinity, wrong labels, nothing at all: one clear error, nothing half-written",
    "memory": "ten rounds of train, test and predict: memory and open files stay flat",
    "unsupported": "FSDP and DeepSpeed are refused by name",
    "gpu": "16-mixed and bf16-mixed on a CUDA device",
    "EnsembleModule": "a user's modules as members: trained, tested, read as one prediction, reloaded bare",
    "EpinetModule": "an epinet around a user's module, or around the trained network inside it",
    "FitGMM": "fitted on a user's module, and on an ensemble of them; its outputs are left alone",
    "TemperatureScaling": "the same",
    "OODDetection": "the same",
}
"""What is tested, in the order of the published grid's columns."""


# ---------------------------------------------------------------------- data and networks


def rows(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three blobs in four dimensions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % CLASSES
    centres = 2 * torch.eye(CLASSES, FEATURES)
    return centres[y] + torch.randn(num, FEATURES, generator=generator), y


def dataset(task: str, num: int, seed: int = 0) -> TensorDataset:
    """Inputs with targets of a task: class labels, labels that are on or off, two numbers each, or maps of labels or numbers.

    "tokens" are four labels, of which one is -100; "horizon" is three steps of two numbers, of which one is missing.
    """
    x, y = rows(num, seed)
    targets = {
        "classification": lambda: y,
        "binary": lambda: (y > 0).float().unsqueeze(1),
        "multilabel": lambda: torch.stack([y > 0, y == 1, x[:, 0] > 0], 1).float(),
        "regression": lambda: torch.stack([x.sum(1), x[:, 0].sin()], 1),
        "tokens": lambda: (x > 0.3).long().add(x > 1.5).masked_fill(one_of(num, FEATURES), -100),
        "horizon": lambda: torch.stack([x[:, :3].cos(), x[:, 1:].masked_fill(one_of(num, 3), math.nan)], 2),
        "segmentation": lambda: (x > 0.3).long().add(x > 1.5).reshape(num, 2, 2),
        "pixel_regression": lambda: x.sin().reshape(num, 1, 2, 2),
    }
    return TensorDataset(x, targets[task]())


def one_of(num: int, size: int) -> Tensor:
    """A mask [num, size] that holds one place a row, so that batches lack equally many targets."""
    return torch.arange(size) == torch.arange(num)[:, None] % size


def loader(task: str, num: int, seed: int = 0, **kwargs: Any) -> DataLoader:
    """A data set in batches of eight, in order unless told otherwise."""
    return DataLoader(dataset(task, num, seed), batch_size=8, **kwargs)


def network(out: int = CLASSES, dropout: float = 0.0) -> nn.Module:
    """A small MLP as a user writes it."""
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, out))


def binary_network() -> nn.Module:
    """The same with one logit."""
    return network(1)


def dropout_network() -> nn.Module:
    """The same with a dropout layer that drops."""
    return network(dropout=0.3)


def gaussian_network() -> nn.Module:
    """The same with a mean and a raw variance a target."""
    return network(2 * TARGETS)


def mean_network() -> nn.Module:
    """The same with a mean a target."""
    return network(TARGETS)


def quantile_network() -> nn.Module:
    """The same with three quantiles a target."""
    return network(3 * TARGETS)


def student_t_network() -> nn.Module:
    """The same with a location, a raw scale and raw degrees of freedom a target."""
    return network(3 * TARGETS)


def mixture_network() -> nn.Module:
    """The same with the logits, means and raw variances of two components a target."""
    return network(6 * TARGETS)


def map_network(out: int = CLASSES) -> nn.Module:
    """Four numbers as an image of 2 x 2 pixels, and the logits of each pixel."""
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, out, 1))


def gaussian_map_network() -> nn.Module:
    """The same with a mean and a raw variance per pixel."""
    return map_network(2)


def token_network() -> nn.Module:
    """Four numbers as tokens of one feature, and the logits of each token, with the classes in the last axis."""
    return nn.Sequential(nn.Unflatten(1, (FEATURES, 1)), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def horizon_network() -> nn.Module:
    """A mean and a raw variance for each of two targets at three steps."""
    return nn.Sequential(network(12), nn.Unflatten(1, (3, 2 * TARGETS)))


def evidential_network() -> nn.Module:
    """The same with the four parameters a target of evidential regression."""
    return network(4 * TARGETS)


def far_loader() -> DataLoader:
    """Rows far from all others, an odd number."""
    return DataLoader(TensorDataset(20 + rows(13, seed=9)[0]), batch_size=8)


def as_numbers(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch of labels as three numbers each, 0 or 1, which make a regressor of a classifier."""
    x, y = batch
    return x, y if y.is_floating_point() else (y[:, None] == torch.arange(CLASSES, device=y.device)).to(x.dtype)


def as_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch of labels as three labels each, of which one is on."""
    x, y = batch
    return x, y if y.ndim == 2 else (y[:, None] == torch.arange(CLASSES, device=y.device)).long()


def as_one_number(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch of labels as one number each."""
    x, y = batch
    return x, y if y.is_floating_point() else y[:, None].to(x.dtype)


class UsersModule(LightningModule):
    """A classifier of somebody who has never heard of this package: what the callbacks and ensembles are given."""

    def __init__(self, batchnorm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        norm = nn.BatchNorm1d(8) if batchnorm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class _UsersOther(UsersModule):
    """What other modules of such a somebody share: a loss of their own."""

    loss = staticmethod(F.mse_loss)
    lr = 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.loss(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class UsersRegressor(_UsersOther):
    """Two means, and the squared error."""

    lr = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(8, TARGETS)


class UsersBinary(_UsersOther):
    """One logit, and the sigmoid's cross-entropy."""

    loss = staticmethod(F.binary_cross_entropy_with_logits)

    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(8, 1)


class UsersMultilabel(_UsersOther):
    """One logit per label, and the same loss."""

    loss = staticmethod(F.binary_cross_entropy_with_logits)


class UsersSegmenter(_UsersOther):
    """Logits of each pixel."""

    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.net = map_network()


class UsersTokens(_UsersOther):
    """Logits of each token, with the classes in the last axis, and labels of -100 that do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.net = token_network()

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of the tokens that count."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Measured(LightningModule):
    """Logs one metric as a user would, fed with the rows whose numbers are in the batch, the padded ones left out."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key, self.rows = key, measured.Data()
        self.layer = nn.Linear(1, 1)  # what a precision is about
        self.metric = measured.make(key)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        (numbers,) = batch
        keep = unpadded_rows(self.trainer.test_dataloaders, batch_idx, len(numbers))
        numbers = numbers if keep is None else numbers[keep]
        if len(numbers):
            self.metric.update(*measured.CASES[self.key][2](self.rows, numbers))
        self.log("value", self.metric)


# ---------------------------------------------------------------------- the list


@dataclass(frozen=True)
class ModuleCase:
    """A LightningModule of the package.

    Attributes:
        name: Its row in the grid.
        build: Makes it.
        task: What its batches hold.
        unsupported: Axes that it does not support, with the reason; the grid prints it.
        method: Name of the method that it stands for, if any. A method that no case stands for is run as `compare` builds it.
        is_discovered: Whether it is such a method.
    """

    name: str
    build: Callable[[], m.UncertaintyModule]
    task: str = "classification"
    unsupported: Mapping[str, str] = field(default_factory=dict)
    method: str | None = None
    is_discovered: bool = False

    @property
    def file_format(self) -> Literal["csv", "npz"]:
        """What PredictionWriter writes: a table, or the arrays of maps."""
        return "npz" if self.task in ("segmentation", "pixel_regression", "tokens", "horizon") else "csv"


@dataclass(frozen=True)
class CallbackCase:
    """A callback of the package, put on :class:`UsersModule`.

    Attributes:
        name: Its row in the grid.
        build: Makes it; takes keyword arguments that all constructors share.
        fits_on: Whether it fits a state after training, and to which data by default.
        ensemble: The case of several hypotheses that it is recorded with, too.
        unsupported: Axes that it does not support, with the reason.
        method: Name of the method that it stands for, if any.
        is_discovered: Whether it is the callback of a method that no listed case stands for.
    """

    name: str
    build: Callable[..., Callback]
    fits_on: Literal["train", "val"] | None = "train"
    ensemble: str = "Ensemble, loop"
    unsupported: Mapping[str, str] = field(default_factory=dict)
    method: str | None = None
    is_discovered: bool = False

    @property
    def is_of_numbers(self) -> bool:
        """Whether it reads the outputs of :class:`UsersModule` as numbers."""
        return self.name in ("ConformalIntervals", "VarianceScaling", "QuantileRecalibration")

    @property
    def is_threshold(self) -> bool:
        """Whether it fits a threshold, which is infinite where too few rows, or all, will do."""
        return self.name in ("SelectiveThreshold", "ConformalRiskControl", "OODAlarm")

    def is_sound(self, tensor: Tensor) -> bool:
        """Whether a fitted tensor holds numbers, and finite ones, but for thresholds."""
        return not bool(tensor.isnan().any()) if self.is_threshold else bool(tensor.isfinite().all())

    @property
    def fits(self) -> bool:
        """Whether there is a state to save."""
        return self.fits_on is not None


@dataclass(frozen=True)
class MetricCase:
    """A metric of the package.

    Attributes:
        name: Its class, its row in the grid.
        key: Its entry in ``tests/metrics/cases.py``, which holds its data.
        unsupported: Axes that it does not support, with the reason.
    """

    name: str
    key: str
    unsupported: Mapping[str, str] = field(default_factory=dict)


_SGD = Factory("torch.optim.SGD", {"lr": 0.05, "momentum": 0.9})
OPTIMIZERS = {
    "classification": _SGD,
    "binary": _SGD,
    "multilabel": _SGD,
    "segmentation": _SGD,
    "tokens": _SGD,
    "horizon": Factory("torch.optim.Adam", {"lr": 0.01}),
    "regression": Factory("torch.optim.Adam", {"lr": 0.01}),  # a likelihood with a free variance is steep
    "pixel_regression": Factory("torch.optim.Adam", {"lr": 0.01}),
}


def _module(
    name: str,
    cls: type,
    *args: Any,
    unsupported: Mapping[str, str] | None = None,
    method: str | None = None,
    **kwargs: Any,
) -> ModuleCase:
    task = kwargs.get("task", "classification")
    return ModuleCase(name, partial(cls, *args, optimizer=OPTIMIZERS[task], **kwargs), task, unsupported or {}, method)


HYPER_PRIOR = Factory(
    "lightning_uq.networks.PriorIndependentLayers", {"in_features": FEATURES, "out_features": CLASSES, "index_dim": 3}
)
ATOMS = Factory(
    "lightning_uq.networks.CatMLPEnsemble",
    {
        "in_features": FEATURES,
        "atoms": [float(atom) for atom in range(-12, 13)],
        "num_outputs": TARGETS,
        "num_members": 3,
        "hidden_sizes": [6],
        "seed": 0,
    },
)


def _of(target: str, out_features: int, **kwargs: Any) -> Factory:
    """A small network of the package by its name."""
    sizes = {"in_features": FEATURES, "out_features": out_features, "hidden_sizes": [8]}
    return Factory(f"lightning_uq.networks.{target}", {**sizes, **kwargs})


REGRESSION: dict[str, Any] = {"task": "regression"}
SEGMENTATION: dict[str, Any] = {"task": "segmentation"}


def _of_head(
    name: str, cls: Callable[..., Any], *args: Any, head: str, fields: Mapping[str, Any] | None = None, **kwargs: Any
) -> ModuleCase:
    """A module of a regression head."""
    task = Regression(head=head, **fields or {})
    return ModuleCase(name, partial(cls, *args, task=task, optimizer=OPTIMIZERS["regression"], **kwargs), "regression")


TOKENS = Segmentation(class_axis=-1, ignore_index=-100)
HORIZON = Regression(target_scale=((0.5, 0.0), (0.6, 1.4)))


def _on(
    name: str, cls: Callable[..., Any], net: Callable[[], nn.Module], data: str, task: Task, **kwargs: Any
) -> ModuleCase:
    """A module of a task whose data no name stands for."""
    return ModuleCase(name, partial(cls, net, task=task, optimizer=OPTIMIZERS[data], **kwargs), data)


def _of_users(kind: str, cls: type[LightningModule], data: str, task: Task | str) -> ModuleCase:
    """An ensemble of a user's own modules."""
    return ModuleCase(
        f"Ensemble of a user's {kind}",
        partial(m.EnsembleModule, cls, num_members=3, seed=1, task=task),
        data,
        unsupported={
            "bad input": "the losses of torch take whole numbers, missing ones and labels outside [0, 1] as they are"
        },
    )


PRIOR: dict[str, Any] = {"prior_network": network, "prior_scale": 1.0}

LISTED_MODULES = [
    _module("Deterministic", m.DeterministicModule, network, method="softmax"),
    _module("Deterministic, regression", m.DeterministicModule, gaussian_network, **REGRESSION),
    _module("Deterministic, binary", m.DeterministicModule, binary_network, task="binary"),
    _module("Deterministic, multilabel", m.DeterministicModule, network, task="multilabel"),
    _module("Ensemble, binary", m.EnsembleModule, binary_network, num_members=3, seed=1, task="binary"),
    _module("Ensemble, multilabel", m.EnsembleModule, network, num_members=3, seed=1, task="multilabel"),
    _module(
        "Epinet, multilabel",
        m.EpinetModule,
        network,
        head=EpinetHead(hidden_sizes=(6,)),
        num_eval_samples=5,
        task="multilabel",
    ),
    _module("Ensemble, loop", m.EnsembleModule, network, num_members=3, seed=1, execution="loop", method="ensemble"),
    _module("Ensemble, stacked", m.EnsembleModule, network, num_members=3, seed=1, execution="stacked"),
    _module("Ensemble, vmap", m.EnsembleModule, network, num_members=3, seed=1, execution="vmap"),
    _module("Ensemble, priors", m.EnsembleModule, network, num_members=3, seed=1, method="ensemble_prior", **PRIOR),
    _module("Ensemble, regression", m.EnsembleModule, gaussian_network, num_members=3, seed=1, **REGRESSION),
    _module(
        "Epinet",
        m.EpinetModule,
        network,
        head=EpinetHead(hidden_sizes=(6,), index_dim=3),
        num_eval_samples=5,
        method="epinet",
    ),
    _module(
        "Epinet, frozen base",
        m.EpinetModule,
        network,
        freeze_base=True,
        head=EpinetHead(hidden_sizes=(6,)),
        num_eval_samples=5,
    ),
    _module(
        "Epinet, regression",
        m.EpinetModule,
        gaussian_network,
        head=EpinetHead(hidden_sizes=(6,)),
        num_eval_samples=5,
        **REGRESSION,
    ),
    _module("Dropout, shared masks", m.DropoutModule, dropout_network, num_eval_samples=5, method="dropout"),
    _module(
        "Dropout, a mask an example",
        m.DropoutModule,
        dropout_network,
        mask="per_example",
        num_eval_samples=5,
        unsupported={"ddp": "a row's mask depends on its place in the batch; shared masks do not"},
    ),
    _module("Evidential", m.EvidentialModule, network, method="evidential"),
    _module("Evidential, max-norm", m.EvidentialModule, network, loss="maxnorm", method="maxnorm"),
    ModuleCase(
        "Evidential, regression",
        partial(m.EvidentialRegressionModule, evidential_network, optimizer=OPTIMIZERS["regression"]),
        "regression",
    ),
    _module("Hypermodel", m.HypermodelModule, network, index_dim=3, num_eval_samples=5),
    _module(
        "Hypermodel, prior",
        m.HypermodelModule,
        network,
        index_dim=3,
        prior=HYPER_PRIOR,
        num_eval_samples=5,
        method="hypermodel",
    ),
    _module(
        "Bayes by backprop",
        m.BayesByBackpropModule,
        network,
        num_train=40,
        num_eval_samples=5,
        method="bayes_by_backprop",
    ),
    _module(
        "Bayes by backprop, regression",
        m.BayesByBackpropModule,
        gaussian_network,
        num_train=40,
        return_members=True,  # beyond 32 they are pooled, and a pooled prediction has no bounds to write
        **REGRESSION,
    ),
    ModuleCase(
        "Categorical regression",
        partial(m.CategoricalRegressionModule, ATOMS, optimizer=OPTIMIZERS["regression"]),
        "regression",
    ),
    _module("Segmentation", m.DeterministicModule, map_network, **SEGMENTATION),
    _module("Segmentation, ensemble", m.EnsembleModule, map_network, num_members=3, seed=1, **SEGMENTATION),
    _module(
        "Segmentation, epinet",
        m.EpinetModule,
        map_network,
        head=EpinetHead(hidden_sizes=(6,), index_dim=3),
        num_eval_samples=5,
        **SEGMENTATION,
    ),
    _module("Pixel regression", m.DeterministicModule, gaussian_map_network, task="pixel_regression"),
    _module(
        "Pixel regression, ensemble",
        m.EnsembleModule,
        gaussian_map_network,
        num_members=3,
        seed=1,
        task="pixel_regression",
    ),
    # Networks without a module of their own, under the base class.
    _module("Index MLP", m.UncertaintyModule, _of("IndexMLP", CLASSES, index_dim=3), num_eval_samples=5),
    _module(
        "Index MLP, process prior, regression",
        m.UncertaintyModule,
        _of("index_mlp_with_gp_prior", TARGETS, num_priors=3, num_features=8, heads="gaussian", seed=0),
        num_eval_samples=5,
        **REGRESSION,
    ),
    _module(
        "Gaussian noise MLP", m.UncertaintyModule, _of("GaussianNoiseMLP", CLASSES, init_scale=0.1), num_eval_samples=5
    ),
    ModuleCase("Ensemble of a user's modules", partial(m.EnsembleModule, UsersModule, num_members=3, seed=1)),
    # The other heads of a regression.
    _of_head("Deterministic, mean", m.DeterministicModule, mean_network, head="mean"),
    _of_head(
        "Deterministic, quantiles",
        m.DeterministicModule,
        quantile_network,
        head="quantiles",
        fields={"target_scale": ((0.5, 0.0), (4.0, 0.5))},
    ),
    _of_head("Ensemble, mean", m.EnsembleModule, mean_network, head="mean", num_members=3, seed=1),
    _of_head(
        "Ensemble, log-variance",
        m.EnsembleModule,
        gaussian_network,
        head="mean_log_variance",
        fields={"loss": "beta_nll"},
        num_members=3,
        seed=1,
    ),
    _of_head("Ensemble, quantiles", m.EnsembleModule, quantile_network, head="quantiles", num_members=3, seed=1),
    _of_head(
        "Epinet, Student-t",
        partial(m.EpinetModule, head=EpinetHead(hidden_sizes=(6,))),
        student_t_network,
        head="student_t",
        num_eval_samples=3,
    ),
    _of_head(
        "Hypermodel, mixture",
        m.HypermodelModule,
        mixture_network,
        head="mixture",
        fields={"components": 2},
        index_dim=3,
        num_eval_samples=3,
    ),
    _of_users("regressors", UsersRegressor, "regression", Regression(head="mean")),
    _of_users("binary classifiers", UsersBinary, "binary", "binary"),
    _of_users("multilabel classifiers", UsersMultilabel, "multilabel", "multilabel"),
    _of_users("segmenters", UsersSegmenter, "segmentation", "segmentation"),
    _of_users("token classifiers", UsersTokens, "tokens", TOKENS),
    # Tokens whose classes are the last axis, some without a label; steps of a horizon, some missing, in units of the user's own.
    _on("Tokens", m.DeterministicModule, token_network, "tokens", TOKENS),
    _on("Tokens, ensemble", m.EnsembleModule, token_network, "tokens", TOKENS, num_members=3, seed=1),
    _on("Horizon", m.DeterministicModule, horizon_network, "horizon", HORIZON),
    _on("Horizon, ensemble", m.EnsembleModule, horizon_network, "horizon", HORIZON, num_members=3, seed=1),
]

LISTED_CALLBACKS = [
    CallbackCase("FitGMM", partial(c.FitGMM, held_out=loader("classification", 61, 1)), method="density"),
    CallbackCase("FitGMM, raw features", partial(c.FitGMM, feature_transform="raw"), method="ddu"),
    CallbackCase(
        "FitGMM, tied covariance",
        partial(c.FitGMM, covariance="tied", score="relative_mahalanobis"),
        method="relative_mahalanobis",
    ),
    CallbackCase("FitKNN", partial(c.FitKNN, k=3), method="knn"),
    CallbackCase(
        "FitKNN, combined",
        partial(c.FitKNN, k=3, feature_transform="combined", held_out=loader("classification", 61, 1)),
    ),
    CallbackCase("FitViM", partial(c.FitViM, dim=2), method="vim"),
    CallbackCase(
        "FitLaplace",
        partial(c.FitLaplace, num_samples=8, held_out=loader("classification", 61, 1)),
        method="laplace",
    ),
    CallbackCase("TemperatureScaling", partial(c.TemperatureScaling), fits_on="val", method="temperature"),
    CallbackCase("VectorScaling", partial(c.VectorScaling), fits_on="val"),
    CallbackCase("MatrixScaling", partial(c.MatrixScaling), fits_on="val"),
    CallbackCase("IsotonicScaling", partial(c.IsotonicScaling), fits_on="val"),
    CallbackCase("ConformalSets", partial(c.ConformalSets), fits_on="val"),
    CallbackCase(
        "ConformalIntervals",
        partial(c.ConformalIntervals, unpack_batch=as_numbers, task=Regression(head="mean")),
        fits_on="val",
        ensemble="Ensemble, mean",
    ),
    CallbackCase(
        "ConformalRiskControl",
        partial(c.ConformalRiskControl, unpack_batch=as_labels, task="multilabel"),
        fits_on="val",
        ensemble="Ensemble, multilabel",
    ),
    CallbackCase(
        "SelectiveThreshold",
        partial(c.SelectiveThreshold, risk=0.8),
        fits_on="val",
    ),
    CallbackCase("OODAlarm", partial(c.OODAlarm, false_alarm_rate=0.2), fits_on="val"),
    CallbackCase(
        "VarianceScaling",
        partial(c.VarianceScaling, unpack_batch=as_numbers, task=Regression(head="mean")),
        fits_on="val",
        ensemble="Ensemble, mean",
    ),
    CallbackCase(
        "QuantileRecalibration",
        partial(c.QuantileRecalibration, unpack_batch=as_one_number, task=Regression(head="student_t")),
        fits_on="val",
        ensemble="Epinet, Student-t",
        unsupported=dict.fromkeys(("export", "onnx"), "a graph of a map's mean and variance takes minutes"),
    ),
    CallbackCase("CalibratedNLL", partial(c.CalibratedNLL), fits_on=None),
    CallbackCase("OODDetection", lambda **kwargs: c.OODDetection({"far": far_loader()}, **kwargs), fits_on=None),
    CallbackCase(
        "UncertaintyReport",
        partial(UncertaintyReport, tempfile.mkdtemp(), ood={"far": far_loader()}, overwrite=True),
        fits_on=None,
    ),
]


def network_with(num_outputs: int, dropout: float = 0.0) -> nn.Module:
    """The network as a backbone of a comparison."""
    return network(num_outputs, dropout)


SETTING = Setting(
    data="blobs",
    task=Classification(),
    input_shape=(FEATURES,),
    num_targets=CLASSES,
    num_train=40,
    backbone=network_with,
    optimizer=OPTIMIZERS["classification"],
)


def discovered_cases() -> tuple[list[ModuleCase], list[CallbackCase]]:
    """A case for each method that `compare` finds and no case above stands for: its module, or the callbacks that it adds.

    The class of such a callback is built from the keyword arguments that all constructors share.
    """
    listed = {case.method for case in [*LISTED_MODULES, *LISTED_CALLBACKS]}
    modules, callbacks = [], []
    for method in methods().values():
        if method.name in listed:
            continue
        if method.build is not None:
            modules.append(ModuleCase(method.name, partial(method.build, SETTING), is_discovered=True))
        for callback in method.callbacks(SETTING):
            name = f"{method.name}, {type(callback).__name__}"
            callbacks.append(CallbackCase(name, partial(type(callback)), is_discovered=True))
    return modules, callbacks


_discovered = discovered_cases()
MODULES = [*LISTED_MODULES, *_discovered[0]]
CALLBACKS = [*LISTED_CALLBACKS, *_discovered[1]]

# One entry for each class; where blocks are made of rows in order of arrival, the one that is given the rows' positions.
_KEYS: dict[type, str] = {}
for _key, (_cls, *_) in measured.CASES.items():
    if _key not in measured.ORDERED:
        _KEYS.setdefault(_cls, _key)
METRICS = [MetricCase(cls.__name__, key) for cls, key in _KEYS.items()]

REPRESENTATIVES = {
    # A network with one index, with logits and with variances; and evidence in their place.
    "Deterministic",
    "Deterministic, regression",
    "Deterministic, binary",
    "Ensemble, multilabel",
    "Evidential",
    "Evidential, regression",
    # One number per target, and quantiles.
    "Deterministic, mean",
    "Ensemble, quantiles",
    # One label per pixel: a plain network, and a head at each position.
    "Segmentation",
    "Segmentation, epinet",
    "Pixel regression, ensemble",
    "Tokens",
    "Horizon, ensemble",
    # Members in a loop, members that run at once, members that are LightningModules.
    "Ensemble, loop",
    "Ensemble, stacked",
    "Ensemble of a user's modules",
    # Indices that are drawn: vectors beside a base, masks, generated weights, weights with a spread, atoms.
    "Epinet",
    "Dropout, shared masks",
    "Hypermodel, prior",
    "Bayes by backprop",
    "Categorical regression",
    # A density, distances to stored rows, a calibration; callbacks that only measure.
    "FitGMM",
    "FitKNN",
    "TemperatureScaling",
    "ConformalSets",
    "ConformalIntervals",
    "VarianceScaling",
    "QuantileRecalibration",
    "CalibratedNLL",
    "OODDetection",
    # A mean, bins, rows that are kept, blocks of rows, a score of two data sets, a mixture.
    "NegativeLogLikelihood",
    "ExpectedCalibrationError",
    "AURC",
    "JointLogLoss",
    "OODAUROC",
    "RegressionNLL",
    # Users' modules: pairs, mappings, several inputs with an output object.
    "Tuple batches",
    "Dict batches",
    "Two optimizers",
    "Hugging Face backbone",
}
"""One case for each code path: `make test` runs these cases of the lists, and methods without a listed case. `make test-slow` and
`make contract` run all cases."""

CLASSIFIERS = [case for case in MODULES if case.task == "classification"]
FITTING = [case for case in CALLBACKS if case.fits]
