"""The interface of data modules for a comparison of methods."""

from typing import Any, Literal, Protocol

from torch import Tensor

TaskName = Literal["classification", "binary", "multilabel", "segmentation", "regression"]


class TaskData(Protocol):
    """A data module that describes its targets, so that networks and tasks can be built for it.

    :class:`~lightning_uq.data.ArrayDataModule` and its subclasses have this interface, and
    :class:`~lightning_uq.running.foreign_data.ForeignDataModule` gives it to a user's data module.
    :func:`lightning_uq.tasks.task_for` makes the task. The loaders yield batches for :func:`lightning_uq.batches.unpack_batch`,
    mostly ``(x [B, *input_shape], y [B, ...])``.
    """

    name: str

    @property
    def task(self) -> str:
        """Name of the task, among :data:`lightning_uq.tasks.TASKS`."""

    @property
    def task_arguments(self) -> dict[str, Any]:
        """Arguments of the task: ``num_classes``, ``num_labels``, ``ignore_index``, ``target_scale``."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""

    @property
    def num_outputs(self) -> int:
        """The number of outputs of a network for the task with its plain head: classes C, labels L, target dimensions D, or 1 for binary."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes or labels, in the order of the outputs; empty for a regression."""

    @property
    def num_train(self) -> int:
        """Number of training samples."""

    @property
    def test_rows(self) -> Tensor:
        """Positions [N] of the test samples in the whole data, in the order of the test loader.

        They match the rows of two seeds' splits, and are equal for all seeds if the test part is fixed.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the data for readers of the results."""

    def setup(self, stage: str) -> None:
        """Read and split the data."""

    def train_dataloader(self) -> Any:
        """Training batches."""

    def val_dataloader(self) -> Any:
        """Validation batches."""

    def test_dataloader(self) -> Any:
        """Test batches."""

    def ood_dataloaders(self) -> dict[str, Any]:
        """Batches of out-of-distribution data, by name."""
