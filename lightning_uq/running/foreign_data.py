"""Wraps a user's data module in the interface that a comparison of methods needs."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_uq.batches import unpack_batch
from lightning_uq.errors import InputError, without_period
from lightning_uq.guessing import report_guess
from lightning_uq.importing import import_class
from lightning_uq.lightning_trees import both, is_instance
from lightning_uq.running.foreign_targets import NAMES, Rows, facts, read_rows, shown_task, with_target
from lightning_uq.running.loaders import exact_loader, loader_list
from lightning_uq.running.streams import RandomStream

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}
HOOKS = ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer")
"""The hooks of a data module that receive batches."""


class ForeignDataModule(LightningDataModule):
    """An unmodified LightningDataModule with the interface of :class:`~lightning_uq.data.TaskData`.

    One pass over its loaders determines the task, the number of classes, and the scale of the targets. It is set up once, always with the same
    global random state. A split drawn from that state is therefore the same for all seeds, and test samples keep their positions. A split drawn
    from another random state may differ between processes, which :attr:`marks` reveal. Batches do not change, except that integer and boolean targets
    of a regression become floats. Validation and test loaders yield each sample once, in order. Out-of-distribution data come from its method
    ``ood_dataloaders`` or ``ood_dataloader``, if it has one: a loader, or several by name.

    Args:
        data: The data module, or the import path of its class, ``"my.module:MyDataModule"``.
        arguments: Arguments of the class.
        task: Name of the task; ``"auto"`` infers it from the training targets.
        unpack_batch: A function that returns input and target of a batch, if :func:`~lightning_uq.batches.unpack_batch` cannot
            read it.

    Raises:
        InputError: The class does not exist, or does not take the arguments. From :meth:`setup` on: a loader is missing or empty, or the
            targets do not determine a task.

    Example:
        >>> from lightning_uq.data import ToyCurveDataModule
        >>> data = ForeignDataModule("lightning_uq.data:ToyCurveDataModule", {"num_train": 50})
        >>> data.name, data.task, data.input_shape, data.num_outputs, data.num_train, len(data.test_rows)
        ('ToyCurveDataModule', 'regression', (1,), 1, 50, 200)
    """

    name: str

    def __init__(
        self,
        data: LightningDataModule | str,
        arguments: Mapping[str, Any] | None = None,
        *,
        task: str = "auto",
        unpack_batch: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        if task not in ("auto", *NAMES):
            raise InputError(f"`task` must be one of auto, {', '.join(NAMES)}, but it is {task!r}.")
        self.inner: Any = _build(data, arguments or {})
        self.name = type(self.inner).__name__
        self.unpack_batch = unpack_batch
        self._given_task = task
        self._random = RandomStream(0)
        self._train: Rows | None = None
        self._task = ""
        self._task_arguments: dict[str, Any] = {}
        self._num_outputs = 0
        self._num_test = 0
        self._marks: dict[str, str] = {}
        # Hooks that the module overrides are overridden here too, since Lightning checks which are.
        for hook in HOOKS:
            if is_overridden(self.inner, hook):
                setattr(self, hook, self._forwarded(hook))

    def prepare_data(self) -> None:
        """Set the module up, once."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Set up the module for training and test, and read its loaders, once.

        Raises:
            InputError: See the class.
        """
        if self._train is not None:
            return
        with self._alone():
            self.inner.prepare_data()
            for one in ("fit", "test"):
                self.inner.setup(stage=one)
            loaders = {part: self._loader(part) for part in _LOADERS}
            rows = {part: read_rows(exact_loader(loader), self._unpack, part) for part, loader in loaders.items()}
        self._marks = {part: one.mark for part, one in rows.items()}
        train = rows.pop("train")
        self._task = shown_task(train, self.name) if self._given_task == "auto" else self._given_task
        self._task_arguments, self._num_outputs = facts(self._task, train, rows, self.name)
        self._num_test = rows["test"].num
        self._train = train
        if self._task == "regression" and not train.targets.is_floating_point():
            self._before_transfer = vars(self).get("on_before_batch_transfer")
            setattr(self, "on_before_batch_transfer", self._with_floats)  # noqa: B010  # a hook of this object alone
        if self._given_task == "auto":
            report_guess(
                f"{self.name} is read as a {self._task}, because of its training targets. Pass `task` to change that.",
                self,
            )

    # ------------------------------------------------------------------ the interface of TaskData

    @property
    def task(self) -> str:
        """Name of the task."""
        self.setup()
        return self._task

    @property
    def task_arguments(self) -> dict[str, Any]:
        """The arguments of the task that follow from the targets."""
        self.setup()
        return dict(self._task_arguments)

    @property
    def num_outputs(self) -> int:
        """The number of outputs of a network for the task."""
        self.setup()
        return self._num_outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input.

        Raises:
            InputError: Inputs are not tensors.
        """
        shape = self._rows.input_shape
        if shape is None:
            raise InputError(
                f"The inputs of {self.name} are not tensors, so no network can be chosen. Pass your own module."
            )
        return shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The module's own ``class_names`` or ``classes`` if their number is right, or else the numbers of the labels."""
        num = 2 if self.task == "binary" else 0 if self.task == "regression" else self.num_outputs
        for attribute in ("class_names", "classes"):
            found = getattr(self.inner, attribute, None)
            if isinstance(found, list | tuple) and len(found) == num:
                return tuple(map(str, found))
        return tuple(map(str, range(num)))

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return self._rows.num

    @property
    def test_rows(self) -> Tensor:
        """The positions of the test samples in the test part, which is the same for all seeds."""
        self.setup()
        return torch.arange(self._num_test)

    @property
    def marks(self) -> dict[str, str]:
        """Marks of the samples of ``train``, ``val`` and ``test``, from the pass over the loaders."""
        self.setup()
        return dict(self._marks)

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on the origin of the split."""
        return (f"Seeds affect only the training, since {self.name} has its own split.",)

    @property
    def _rows(self) -> Rows:
        self.setup()
        assert self._train is not None
        return self._train

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> Any:
        """The module's own training loader."""
        self.setup()
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """The validation samples, in order."""
        self.setup()
        return exact_loader(self._loader("val"))

    def test_dataloader(self) -> Any:
        """The test samples, in order."""
        self.setup()
        return exact_loader(self._loader("test"))

    def predict_dataloader(self) -> Any:
        """The module's own loader, or the test samples."""
        self.setup()
        if not is_overridden(self.inner, "predict_dataloader"):
            return self.test_dataloader()
        with self._alone():
            self.inner.setup(stage="predict")
        return self.inner.predict_dataloader()

    def ood_dataloaders(self) -> dict[str, Any]:
        """Out-of-distribution loaders by name; ``ood``, or ``ood_0``, ``ood_1``, ..., if the module gives no names."""
        self.setup()
        make = getattr(self.inner, "ood_dataloaders", None) or getattr(self.inner, "ood_dataloader", None)
        found = None if make is None else make()
        if found is None:
            return {}
        if isinstance(found, Mapping):
            return dict(found)
        if isinstance(found, list | tuple):
            return {f"ood_{i}": loader for i, loader in enumerate(found)}
        return {"ood": found}

    def _loader(self, part: str) -> Any:
        hook = _LOADERS[part]
        self.inner.trainer = self.trainer
        with self._alone():  # the hook may draw a split
            loaders = loader_list(getattr(self.inner, hook)()) if is_overridden(self.inner, hook) else []
        if len(loaders) != 1 or loaders[0] is None:
            what = f"returns {len(loaders)} loaders" if len(loaders) > 1 else "returns none" if loaders else "has none"
            raise InputError(
                f"{self.name} must have exactly one `{hook}`, but it {what}. All methods are compared on the same training, validation and test data."
            )
        return loaders[0]

    def _forwarded(self, hook: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inner.trainer = self.trainer  # it may use the Trainer's state
            return getattr(self.inner, hook)(*args, **kwargs)

        return call

    def _with_floats(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch with a floating-point target, which a regression needs."""
        if self._before_transfer is not None:
            batch = self._before_transfer(batch, dataloader_idx)
        _, target = self._unpack(batch)
        return with_target(batch, target, target.to(torch.get_default_dtype()))

    def _unpack(self, batch: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = (
            unpack_batch(batch, about=self) if self.unpack_batch is None else self.unpack_batch(batch)
        )
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context in which random numbers are the same in every process, and tensors can require gradients later."""
        with torch.inference_mode(False), self._random.active(advance=False):
            yield


def _build(data: LightningDataModule | str, arguments: Mapping[str, Any]) -> Any:
    if not isinstance(data, str):
        if not is_instance(data, LightningDataModule):
            raise InputError(
                f"`data` must be a LightningDataModule or the import path of one, but its type is {type(data).__name__}."
            )
        return data
    kind = import_class(data, LightningDataModule, "data_module")
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"{kind.__name__}({', '.join(inspect.signature(kind).parameters)}) does not accept {dict(arguments)}: {without_period(error)}."
        ) from error
    return kind(**arguments)


def is_overridden(data: Any, hook: str) -> bool:
    """Whether a data module of either tree of Lightning has its own method ``hook``."""
    found = getattr(type(data), hook, None)
    return hook in vars(data) or all(found is not getattr(base, hook, None) for base in both(LightningDataModule))
