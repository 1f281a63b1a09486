"""The settings of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_uq.errors import InputError
from lightning_uq.functional.gaussian import Regularization
from lightning_uq.functional.validation import check_choice

ModelType = Literal["softmax", "ensemble", "gmm"]


@dataclass(frozen=True)
class Settings:
    """The checkpoints, the data, and the options of an evaluation.

    Attributes:
        runs: The checkpoints of each run: one, or an ensemble's members.
        data: ``"digits"``, ``"mnist"``, ``"cifar10"`` and so on, the path of an ``.npz`` file, or the import path of a
            LightningDataModule.
        ood: The out-of-distribution data: held-out labels such as ``"8,9"`` (digits, ``.npz``), the name of another data
            set such as ``"svhn"`` (images), or a name among the data module's ``ood_dataloaders()``. None: there are no detection metrics.
        model_type: Determines the scores m1 and m2: see the table of :mod:`lightning_uq.evaluate`.
        module: Import path of the LightningModule that wrote the checkpoints, if they do not name it.
        network: Instead of ``module``: import path of a class or function that builds only the network, whose weights the
            checkpoints hold.
        init_args: Arguments of the module or the network.
        data_args: Further arguments of the data module.
        data_seeds: Seeds of the data module's split: none for its default, one for all, one per run, or one per checkpoint.
        feature_layer: See :class:`~lightning_uq.callbacks.gmm.FitGMM`.
        regularization: See :class:`~lightning_uq.callbacks.gmm.FitGMM`; ``"ddu"`` is the original's schedule.
        accelerator: ``"cpu"``, ``"cuda"`` (or ``"gpu"``), ``"mps"``, or ``"auto"``.

    Raises:
        InputError: An argument is invalid, or two arguments contradict each other.
    """

    runs: Sequence[Sequence[str]]
    data: str
    ood: str | None = None
    model_type: ModelType = "softmax"
    module: str | None = None
    network: str | None = None
    init_args: Mapping[str, Any] = field(default_factory=dict)
    data_args: Mapping[str, Any] = field(default_factory=dict)
    data_seeds: Sequence[int] = ()
    feature_layer: str = "auto"
    regularization: Regularization = "held_out"
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, ("softmax", "ensemble", "gmm"))
        check_choice("accelerator", self.accelerator, ("cpu", "cuda", "gpu", "mps", "auto"))
        if not self.runs or not all(self.runs):
            raise InputError("`runs` must hold at least one run of at least one checkpoint.")
        if self.module is not None and self.network is not None:
            raise InputError("Pass `module` or `network`, but not both.")
        if self.init_args and self.module is None and self.network is None:
            raise InputError("`init_args` are arguments of `module` or `network`, so pass one of these.")
        checkpoints = sum(len(run) for run in self.runs)
        if len(self.data_seeds) not in (0, 1, len(self.runs), checkpoints):
            raise InputError(
                f"`data_seeds` must hold one seed, one per run ({len(self.runs)}) or one per checkpoint ({checkpoints}), but it "
                f"holds {len(self.data_seeds)}."
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
