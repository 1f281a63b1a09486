"""The configuration of a comparison, and its data."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_uq.compare.own_config import build_data_module, class_of, read_config
from lightning_uq.data import TestbedDataModule, open_data
from lightning_uq.data.interface import TaskData
from lightning_uq.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """The training of every method: Adam until the validation NLL stops falling. The weights of the best epoch are kept.

    The defaults were chosen by the validation NLL on the digits, mainly of softmax, with seeds from 100 on, which the
    comparison does not use. The candidates were learning rates of 3e-4 to 3e-3, batches of 32 to 128, a patience of 10 or 20, and weight
    decays up to 1. Batches of 32 were best. Learning rates of 1e-3 to 3e-3 did not differ, and neither did the patience. Weight decay
    gained less than half a standard error.

    For regression, no other learning rate or batch size was better by more than the error either, but training three times as long was:
    see :data:`REGRESSION_EPOCHS`.

    Attributes:
        max_epochs: Maximum number of epochs; None: 100, or 300 for regression.
        patience: Epochs without a better validation NLL before training stops; None: 10, or 30 for regression.
        learning_rate: Learning rate of Adam.
        batch_size: Samples per training batch.
        steps: A fixed number of steps, instead of epochs until the validation NLL stops falling. The last weights are kept.
        weight_decay: Weight decay of Adam.
        tune: Number of settings to try for each method and seed: see :mod:`~lightning_uq.compare.planning.tuning`.
    """

    max_epochs: int | None = None
    patience: int | None = None
    learning_rate: float = 2e-3
    batch_size: int = 32
    steps: int | None = None
    weight_decay: float = 0.0
    tune: int = 0

    def for_task(self, task: str) -> "Recipe":
        """The recipe with the default epochs for a task, if none are given.

        Example:
            >>> Recipe(max_epochs=50).for_task("regression").patience
            30
        """
        max_epochs, patience = REGRESSION_EPOCHS if task == "regression" else EPOCHS
        return replace(
            self,
            max_epochs=max_epochs if self.max_epochs is None else self.max_epochs,
            patience=patience if self.patience is None else self.patience,
        )


EPOCHS = (100, 10)
"""Largest number of epochs, and patience."""

REGRESSION_EPOCHS = (300, 30)
"""The same for regression. The validation NLL of a Gaussian network on UCI's yacht, energy and concrete (standardized targets, seeds 100 and 101) was
-1.86, -1.50 and 0.25 with these numbers, and -1.06, -1.17 and 0.25 with 100 epochs and a patience of 10: ``benchmarks/regression_defaults.md``."""

TESTBED_RECIPE = Recipe(learning_rate=1e-3, batch_size=100, steps=1000)
"""The training of the Neural Testbed's agents."""


@dataclass(frozen=True)
class Configuration:
    """Data, methods, seeds and training of a comparison.

    Attributes:
        data: A name, or the path of a file or a folder: see :func:`~lightning_uq.data.open_data`; or ``"testbed"``.
        data_module: A user's LightningDataModule instead of ``data``, ``"my.module:MyDataModule"``.
        target: Target columns of a table.
        task: Name of the task, if it is not the one that the targets imply.
        root: Folder of the files of named data sets, such as UCI's.
        problem: Path of the testbed's problem (:class:`~lightning_uq.data.TestbedDataModule`).
        ood_classes: Labels held out as out-of-distribution data; None: 8 and 9 for the digits, and none for other data.
        ood: Path of a table with out-of-distribution rows, if the data are a table.
        network: Name of the backbone that all methods share (:func:`~lightning_uq.networks.backbone`); None: a default for the inputs.
        module: A user's LightningModule, ``"my.module:LitModel"``. Its rows are compared with the named methods, if any.
        config: A YAML or JSON file with the arguments of ``module``, and of ``data_module`` or ``data``:
            :func:`~lightning_uq.compare.own_config.read_config`.
        methods: Names of methods, or ``.py`` files or modules that define methods; None: all methods for the task, or the default agents of the
            testbed.
        method_file: ``.py`` files or modules whose methods are compared in addition to ``methods``.
        baseline: The method with which all others are compared; None: the plain network.
        seeds: Number of seeds n: ``seed`` ... ``seed + n - 1``.
        seed: The first seed.
        accelerator: Lightning's accelerator. Results are exactly reproducible only on ``"cpu"``.
        recipe: The training shared by all methods; by default, on the testbed, that of its agents.
        contents: The contents of ``config``, read from the file.

    Raises:
        InputError: A number is out of range, or two arguments contradict each other.
    """

    data: str = "digits"
    data_module: str | None = None
    target: Sequence[str] = ()
    task: str = "auto"
    root: str | None = None
    problem: str | None = None
    ood_classes: Sequence[int | str] | None = None
    ood: str | None = None
    network: str | None = None
    module: str | None = None
    config: str | None = None
    methods: Sequence[str] | None = None
    method_file: Sequence[str] = ()
    baseline: str | None = None
    seeds: int = 3
    seed: int = 0
    accelerator: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    contents: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe == Recipe():
            object.__setattr__(self, "recipe", self.default_recipe)  # the dataclass is frozen
        if self.config is not None and not self.contents:
            object.__setattr__(self, "contents", read_config(self.config))
        for name, part in (("module", "module"), ("data_module", "data")):
            object.__setattr__(self, name, class_of(getattr(self, name), self.contents, part, name))
        self._check_testbed()
        self._check_data_module()
        self._check_data_arguments()
        for name, value in (("seeds", self.seeds), ("max_epochs", self.recipe.max_epochs)):
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be at least 1, but it is {value}.")
        if self.recipe.tune < 0:
            raise InputError(f"`tune` must not be negative, but it is {self.recipe.tune}.")
        if self.seed < 0 or self.seed + self.seeds > 2**32:
            raise InputError(f"`seed` must lie in [0, 2^32 - {self.seeds}], but it is {self.seed}.")

    def _check_testbed(self) -> None:
        if self.data == "testbed" and self.recipe.tune:
            raise InputError("data='testbed' takes no `tune`, since the settings of its agents are fixed.")
        if self.data != "testbed":
            if self.problem is not None:
                raise InputError(f"`problem` needs data='testbed', but data is {self.data!r}.")
            if self.recipe.steps is not None:
                raise InputError(
                    f"`steps` of a recipe needs data='testbed', but data is {self.data!r}. Use `max_epochs`."
                )
            return
        if self.problem is None:
            raise InputError("data='testbed' needs `problem`, the path of an .npz file.")
        if self.recipe.steps is None or self.recipe.steps < 1:
            raise InputError(
                "data='testbed' takes no `max_epochs`, since all its methods train for the same number of steps."
            )
        for name in ("ood_classes", "ood", "target", "root", "network", "module", "data_module"):
            if getattr(self, name):
                raise InputError(f"data='testbed' takes no `{name}`, since the problem and its agents are fixed.")

    def _check_data_module(self) -> None:
        if self.data_module is None:
            return
        for name in ("ood_classes", "ood", "target", "root"):
            if getattr(self, name):
                raise InputError(
                    f"`data_module` takes no `{name}`, which is an argument of `data`. Pass the data module's own arguments in the file of `config`, under `data`."
                )
        if self.data not in (type(self).data, self.data_module):
            raise InputError(f"`data_module` replaces `data`, but `data` is {self.data!r}. Pass only one of them.")
        object.__setattr__(self, "data", self.data_module)

    def _check_data_arguments(self) -> None:
        """Reject arguments of ``data`` in the file that the comparison passes itself."""
        own = self._data_arguments
        if self.data == "testbed" and own:
            raise InputError("data='testbed' takes no data.init_args of `config`, since the problem is fixed.")
        taken = [name for name in ("path", *inspect.signature(open_data).parameters) if name in own]
        if taken and self.data_module is None:
            raise InputError(
                f"`config`: data.init_args must not hold {', '.join(taken)}, which the comparison passes itself. If they are arguments of your own data "
                "module, pass its class as `data_module`."
            )

    @property
    def _data_arguments(self) -> dict[str, Any]:
        return dict(self.contents.get("data", {}).get("init_args", {}))

    @property
    def default_recipe(self) -> Recipe:
        """The default recipe for these data."""
        return TESTBED_RECIPE if self.data == "testbed" else Recipe()

    @property
    def all_seeds(self) -> range:
        """seed, ..., seed + n - 1."""
        return range(self.seed, self.seed + self.seeds)

    def filled(self, data: TaskData, methods: Sequence[str]) -> "Configuration":
        """The configuration, with the facts of its data and methods filled in."""
        # Data that hold out their own classes, such as the drawn shapes, take none.
        is_chosen = "ood_classes" in inspect.signature(type(data)).parameters
        found = (tuple(getattr(data, "ood_classes", ())) or None) if is_chosen else None
        held_out = found if self.ood_classes is None else self.ood_classes
        return replace(self, ood_classes=held_out, methods=tuple(self.methods or methods))

    def as_plain(self) -> dict[str, Any]:
        """The configuration as plain data."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def make_data(self, seed: int) -> TaskData:
        """The data with this seed's split.

        Raises:
            InputError: The data do not exist or are invalid.
            MissingExtraError: A package for reading the data is not installed.
        """
        batch_size = self.recipe.batch_size
        if self.data_module is not None:
            return build_data_module(self.data_module, self.contents, self.task)
        if self.data == "testbed":
            assert self.problem is not None
            assert self.recipe.steps is not None
            testbed = TestbedDataModule(self.problem, num_steps=self.recipe.steps, seed=seed, batch_size=batch_size)
            testbed.setup()
            return testbed
        return open_data(
            self.data,
            target=self.target,
            task=self.task,
            ood_classes=self.ood_classes,
            ood=self.ood,
            root=self.root,
            seed=seed,
            batch_size=batch_size,
            **self._data_arguments,
        )
