"""A method as ``lightning-uq compare`` sees it: how it is built, and which score detects out-of-distribution inputs.

A method's file ends with a constant, by which the comparison finds it::

    METHOD = Method(
        name="ensemble",
        about="5 networks from different initial weights, whose predictions are averaged",
        build=lambda setting: EnsembleModule(setting.network, num_members=5, **setting.training),
        ood_score="mutual_information",
    )

A file with several methods ends with a tuple of them, ``METHODS``.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.tasks import Regression, Task
from lightning_uq.tasks.names import TASKS
from lightning_uq.tasks.target_scale import TargetScale


def _no_callbacks(setting: "Setting") -> list[Callback]:
    return []


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The facts of a problem that a method may use. Test data and out-of-distribution data are not among them.

    Attributes:
        data: Name of the data.
        task: What the outputs of a plain network mean: ``Classification(num_classes=8)``, or ``Regression()`` in the units of the targets.
        input_shape: Shape of one input.
        num_targets: Number of classes, labels or target dimensions.
        num_train: Number of training samples n.
        backbone: Builds the network that all methods share: ``backbone(num_outputs, dropout=0.0)``.
        optimizer: Called with the parameters. All methods share it unless a method needs another one.
        tuned: The values that tuning has drawn for the settings in :meth:`choose`, by name; empty without tuning.
        choices: The settings that ``build`` has passed to :meth:`choose`: the possible values by name.

    Example:
        >>> import torch
        >>> from lightning_uq.networks import backbone
        >>> from lightning_uq.tasks import Regression
        >>> setting = Setting(
        ...     data="toy",
        ...     task=Regression(),
        ...     input_shape=(4,),
        ...     num_targets=1,
        ...     num_train=100,
        ...     backbone=backbone("mlp", (4,)),
        ...     optimizer=torch.optim.Adam,
        ... )
        >>> setting.network()[-1].out_features, setting.network_for(Regression(head="mean"))()[-1].out_features
        (2, 1)
    """

    data: str
    task: Task
    input_shape: Sequence[int]
    num_targets: int
    num_train: int
    backbone: Callable[..., nn.Module]
    optimizer: Callable[[Iterable[Any]], Optimizer]
    tuned: Mapping[str, Any] = field(default_factory=dict)
    choices: dict[str, tuple[Any, ...]] = field(default_factory=dict, compare=False, repr=False)

    def choose(self, name: str, *values: Any) -> Any:
        """A setting of the method itself that tuning may choose, beside learning rate and weight decay. Without tuning: the first value.

        Args:
            name: Name of the setting.
            values: The values to choose among: numbers, texts or booleans.

        Example:
            >>> # In the function `build` of a method:
            >>> # DropoutModule(setting.network_for(dropout=setting.choose("dropout", 0.1, 0.05, 0.2)), **setting.training)
        """
        self.choices[name] = values
        return self.tuned.get(name, values[0])

    @property
    def num_features(self) -> int:
        """Input dimension d: the number of values of one input."""
        return math.prod(self.input_shape)

    @property
    def network(self) -> Callable[[], nn.Module]:
        """Factory of the shared network, with the outputs that :attr:`task` reads."""
        return self.network_for(self.task)

    def network_for(self, task: Task | None = None, **options: Any) -> Callable[[], nn.Module]:
        """Factory of the shared network, with the outputs that a task reads.

        Args:
            task: The task; None for :attr:`task`.
            options: Further arguments of the backbone, such as ``dropout``.
        """
        outputs = (task or self.task).outputs_for(self.num_targets)
        return functools.partial(self.backbone, num_outputs=outputs, **options)

    @property
    def target_scale(self) -> TargetScale | None:
        """Mean and standard deviation of the training targets; None if the targets are not numbers."""
        return self.task.target_scale if isinstance(self.task, Regression) else None

    @property
    def training(self) -> dict[str, Any]:
        """Arguments that every module of this package takes: ``task`` and ``optimizer``."""
        return {"task": self.task, "optimizer": self.optimizer}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read the outputs of a module from outside this package: arguments that every post-training callback takes.

    Attributes:
        task: What the outputs mean.
        output: What the module returns: ``"logits"``, ``"probs"``, ``"log_probs"``, or a function (or its import path) that picks the outputs.
        predict_fn: ``predict_fn(module, x) -> outputs``, or its import path, if ``forward`` does not return them.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``, or its import path.

    Example:
        >>> from lightning_uq.tasks import Classification
        >>> sorted(Reading(task=Classification(num_classes=3)).arguments)
        ['output', 'predict_fn', 'task', 'unpack_batch']
    """

    task: Task
    output: Output = "logits"
    predict_fn: PredictFn | str | None = None
    unpack_batch: Callable[[Any], tuple[Any, Any]] | str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a callback."""
        return {name: getattr(self, name) for name in ("task", "output", "predict_fn", "unpack_batch")}


class Monitor(NamedTuple):
    """A validation metric, and whether its smallest or largest value is the best."""

    name: str
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: Name on the command line and in the tables.
        ood_score: Name of the out-of-distribution score, fixed here before any such data is seen: a score of the prediction, or one
            that a callback provides. None if the method has none, such as a single network that predicts a mean.
        build: Builds the untrained LightningModule. Needed unless ``trained_as`` is given.
        trained_as: Name of the method whose trained network this method reads in another way.
        callbacks: Builds the post-training callbacks.
        tasks: Names of the tasks that the method supports. Another method may have the same name for other tasks.
        about: A short description of the method.
        link: Address of a description, such as a paper.
        detects_only: Whether its predictions equal those of the method whose network it reads, and only the out-of-distribution score
            differs. Without out-of-distribution data such a method is compared only if it is named.
        reading: How to read the outputs of a module from outside this package. None: its ``predict_step`` returns a prediction of this package.
        monitor: The validation metric that selects the epoch whose weights are kept. None: chosen by
            :func:`~lightning_uq.compare.training.monitor.find_monitor`.

    Raises:
        InputError: The name is not a Python identifier, a task is unknown, or not exactly one of ``build`` and ``trained_as`` is given.

    Example:
        >>> energy = Method(name="energy", trained_as="softmax", ood_score="energy")
        >>> energy.trainee
        'softmax'
    """

    name: str
    ood_score: str | None
    build: Callable[[Setting], LightningModule] | None = None
    trained_as: str | None = None
    callbacks: Callable[[Setting], list[Callback]] = _no_callbacks
    tasks: tuple[str, ...] = ("classification",)
    about: str = ""
    link: str | None = None
    detects_only: bool = False
    reading: Reading | None = None
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InputError(
                f"`name` of a Method must be a Python identifier such as 'my_method', but it is {self.name!r}."
            )
        if (self.build is None) == (self.trained_as is None):
            raise InputError(
                f"Method {self.name!r} needs either `build`, which makes its module, or `trained_as`, the name of the method "
                "whose network it reads."
            )
        tasks: Any = self.tasks
        if isinstance(tasks, str) or not tasks or not set(tasks) <= set(TASKS):
            raise InputError(
                f"`tasks` of method {self.name!r} must be a tuple with names among {', '.join(TASKS)}, but it is {tasks!r}."
            )

    @property
    def trainee(self) -> str:
        """Name of the method that is trained: ``trained_as``, or its own name."""
        return self.trained_as or self.name

    def make_module(self, setting: Setting) -> LightningModule:
        """The untrained module for this setting.

        Raises:
            InputError: The method reads the network of another method, or ``build`` does not return a LightningModule.
        """
        if self.build is None:
            raise InputError(
                f"Method {self.name!r} builds no module, since it reads the network of {self.trained_as!r}."
            )
        module = self.build(setting)
        if not is_instance(module, LightningModule):
            raise InputError(
                f"`build` of method {self.name!r} must return a LightningModule, but it returned an "
                f"object of type {type(module).__name__}. Return a module such as DeterministicModule(setting.network)."
            )
        return module

    def make_callbacks(self, setting: Setting) -> list[Callback]:
        """The unfitted post-training callbacks for this setting.

        Raises:
            InputError: The method's ``callbacks`` returned something other than a list of callbacks.
        """
        made = self.callbacks(setting)
        if not isinstance(made, list) or not all(is_instance(callback, Callback) for callback in made):
            raise InputError(
                f"`callbacks` of method {self.name!r} must return a list of Lightning callbacks, but it returned {made!r}."
            )
        return made
