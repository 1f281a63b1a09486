"""A method as ``lightning-uq compare`` sees it: how it is built, and which score detects out-of-distribution inputs.

The file of a method ends with a constant that the comparison finds by its name::

    METHOD = Method(
        name="ensemble",
        build=lambda setting: EnsembleModule(setting.network, num_members=5, optimizer=setting.optimizer),
        ood_score="mutual_information",
    )

A file that holds several methods names a tuple of them ``METHODS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.lightning_trees import is_instance


def _no_callbacks(setting: "Setting") -> list[Callback]:
    return []


@dataclass(frozen=True)
class Setting:
    """The facts of a problem that a method may use. Its test data and out-of-distribution data are not among them.

    Attributes:
        data: Name of the data.
        num_features: Input dimension d of flat data.
        num_classes: Number of classes C.
        num_train: Number of training samples n.
        network: Factory of the backbone that all methods share.
        optimizer: Called with the parameters. All methods share it unless a method needs another one.
    """

    data: str
    num_features: int
    num_classes: int
    num_train: int
    network: Callable[[], nn.Module]
    optimizer: OptimizerCallable


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: Name on the command line and in the tables.
        ood_score: Name of the out-of-distribution score, fixed here before any such data is seen: a score of the
            prediction, or one that a callback provides.
        build: Makes the untrained LightningModule. Needed unless ``trained_as`` is given.
        trained_as: Name of the method whose trained network this method reads in another way.
        callbacks: Makes the post-training callbacks.

    Raises:
        InputError: The name is not a Python identifier, or not exactly one of ``build`` and ``trained_as`` is given.

    Example:
        >>> energy = Method(name="energy", trained_as="softmax", ood_score="energy")
        >>> energy.trainee
        'softmax'
    """

    name: str
    ood_score: str
    build: Callable[[Setting], LightningModule] | None = None
    trained_as: str | None = None
    callbacks: Callable[[Setting], list[Callback]] = _no_callbacks

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

    @property
    def trainee(self) -> str:
        """Name of the method whose training this method reads: ``trained_as``, or its own name."""
        return self.trained_as or self.name

    def make_module(self, setting: Setting) -> LightningModule:
        """The untrained module for this setting.

        Raises:
            InputError: The method reads the network of another method, or ``build`` returns no LightningModule.
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
