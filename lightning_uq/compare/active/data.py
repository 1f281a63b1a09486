"""The data of an active-learning experiment: a pool with labels, validation data and test data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_uq.data import DirtyMNISTDataModule, MNISTDataModule
from lightning_uq.data.opening import open_data
from lightning_uq.errors import InputError
from lightning_uq.networks import backbone, default_backbone
from lightning_uq.tasks import Classification, Task, task_for

NUM_CLEAN = 1000
"""Clean digits in the pool of Dirty-MNIST, as in the original experiment."""


@dataclass(frozen=True)
class PoolData:
    """The data of one seed.

    Attributes:
        name: Name of the data.
        pool: All samples that are or may be labelled.
        labels: Their labels [N].
        val: Validation data.
        test: Test data.
        task: Meaning of the outputs.
        input_shape: Shape of an input.
        network: Name of the backbone.
        backbone: Makes the network: ``backbone(num_outputs, dropout=0.0)``.
        is_ambiguous: Mask [N] of samples with an ambiguous label; None where that is unknown.
        notes: Sentences about the data for the reader of the results.
    """

    name: str
    pool: Dataset[Any]
    labels: Tensor
    val: Dataset[Any]
    test: Dataset[Any]
    task: Task
    input_shape: tuple[int, ...]
    network: str
    backbone: Any
    is_ambiguous: Tensor | None = None
    notes: tuple[str, ...] = ()


def open_pool(
    name: str, seed: int, *, root: str | None = None, target: Sequence[str] = (), network: str | None = None
) -> PoolData:
    """The data of a name or path.

    ``"mnist"`` and ``"dirty_mnist"`` follow the protocol of DDU's experiment: of the training samples a tenth validates, and the
    test data are the test digits of MNIST. The pool of ``"dirty_mnist"`` holds 1,000 digits, drawn by the seed, and all ambiguous samples; only
    digits can be among the first labels. All other names are those of :func:`~lightning_uq.data.open_data`.

    Args:
        name: Name or path.
        seed: Seed of the split.
        root: Folder of the files.
        target: Target column of a table.
        network: Name of the backbone; None: one that suits the inputs.

    Raises:
        InputError: There are no such data, or they have no classes.
    """
    if name in ("mnist", "dirty_mnist"):
        return _digit_images(name, seed, root or "data", network or "lenet")
    data = open_data(name, seed=seed, target=target, root=root, ood_classes=() if name == "digits" else None)
    if data.task != "classification":
        raise InputError(f"Active learning is measured by the accuracy of classes, but data={name!r} is a {data.task}.")
    train, val, test = (
        loader.dataset for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    network = network or default_backbone(data.task, data.input_shape)
    return PoolData(
        data.name,
        train,
        _labels(train),
        val,
        test,
        task_for(data),
        data.input_shape,
        network,
        backbone(network, data.input_shape),
        notes=tuple(data.notes),
    )


def _digit_images(name: str, seed: int, root: str, network: str) -> PoolData:
    clean = MNISTDataModule(root, seed=seed)
    pool: Dataset[Any] = clean.dataset("train")
    val: Dataset[Any] = clean.dataset("val")
    is_ambiguous: Tensor | None = None
    notes: tuple[str, ...] = ()
    if name == "dirty_mnist":
        dirty = DirtyMNISTDataModule(root, seed=seed)
        num_clean = len(clean.dataset("train")) + len(clean.dataset("val"))
        parts: Any = {part: dirty.dataset(part) for part in ("train", "val")}
        rows = torch.as_tensor(parts["train"].indices)
        digits = rows[rows < num_clean]
        chosen = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:NUM_CLEAN]]
        rows = torch.cat([chosen, rows[rows >= num_clean]])
        pool, val = Subset(parts["train"].dataset, rows.tolist()), parts["val"]
        is_ambiguous = rows >= num_clean
        notes = (f"The ambiguous samples are {dirty.ambiguous_source}.",)
    return PoolData(
        name,
        pool,
        _labels(pool),
        val,
        clean.dataset("test"),
        Classification(num_classes=clean.num_classes),
        clean.image_shape,
        network,
        backbone(network, clean.image_shape),
        is_ambiguous,
        notes,
    )


def _labels(dataset: Dataset[Any]) -> Tensor:
    return torch.cat([y for _, y in DataLoader(dataset, 1000)])
