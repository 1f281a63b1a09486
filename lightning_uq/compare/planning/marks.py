"""Marks of the data, which show whether the samples are those of an earlier run, and whether all methods are tested on the same ones."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import TensorDataset

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.problem import Problem
from lightning_uq.compare.training.training import seeded
from lightning_uq.data.image_dataset import ImageDataset
from lightning_uq.data.image_folder_files import FolderImages
from lightning_uq.data.interface import TaskData
from lightning_uq.errors import InputError
from lightning_uq.running.foreign_data import ForeignDataModule
from lightning_uq.running.loaders import exact_loader
from lightning_uq.running.marks import mark

Marks = dict[str, str]
"""A hash of the samples of each part: ``train``, ``val``, ``test``, and out-of-distribution data by name."""


def marks_of_seeds(configuration: Configuration, problem: Problem) -> dict[int, Marks]:
    """The marks of each seed's data. They depend on the values, rather than on a file's name or date.

    Args:
        configuration: The configuration.
        problem: The data of the first seed.
    """
    first = marks_of(problem.data)
    if isinstance(problem.data, ForeignDataModule):  # the seeds share its split, which each training checks
        return dict.fromkeys(configuration.all_seeds, first)
    others = list(configuration.all_seeds)[1:]
    return {configuration.seed: first, **{seed: marks_of(configuration.make_data(seed)) for seed in others}}


def marks_of(data: TaskData) -> Marks:
    """The marks of the data of one seed.

    Example:
        >>> digits = Configuration().make_data(0)
        >>> marks = marks_of(digits)
        >>> list(marks), marks == marks_of(Configuration().make_data(0))
        (['test', 'train', 'val', 'digits_8_9'], True)
    """
    outside = data.ood_dataloaders()
    if isinstance(data, ForeignDataModule):
        with seeded(0):  # for random transforms
            return {**data.marks, **{name: mark(exact_loader(loader)) for name, loader in outside.items()}}
    parts = {"train": data.train_dataloader(), "val": data.val_dataloader(), **outside}
    return {"test": mark_of_test(data), **{part: mark(_samples(loader)) for part, loader in parts.items()}}


def mark_of_test(data: TaskData) -> str:
    """The mark of the inputs and targets of the test samples.

    Example:
        >>> mark_of_test(Configuration().make_data(0)) == mark_of_test(Configuration().make_data(1))
        False
    """
    if isinstance(data, ForeignDataModule):
        return data.marks["test"]
    return mark([data.test_rows, *_samples(data.test_dataloader())])


def check_test_samples(data: TaskData, expected: str) -> None:
    """Reject data whose test samples differ from those of the plan, on which the other methods are tested.

    Args:
        data: The data of a seed, built again.
        expected: The mark of the test samples in the plan.

    Raises:
        InputError: The test samples differ.
    """
    if mark_of_test(data) == expected:
        return
    if isinstance(data, ForeignDataModule):
        raise InputError(
            f"{data.name} has different test rows each time it is built, so methods would be compared on different rows. Seed its split."
        )
    raise InputError(
        f"`data`: The test rows of {data.name} have changed since the start of the comparison. Start again."
    )


def _samples(loader: Any) -> Iterable[Any]:
    """The samples of a loader of this package, in the order of its data set."""
    data_set = getattr(loader, "dataset", None)
    if isinstance(data_set, ImageDataset):
        return _of_images(data_set)
    return data_set.tensors if isinstance(data_set, TensorDataset) else exact_loader(loader)


def _of_images(data_set: ImageDataset) -> Iterator[Any]:
    """The labels, and the pixels, or the bytes of files that are too large for the memory."""
    yield data_set.labels
    for rows in torch.split(data_set.rows, 256):
        images = data_set.images
        if isinstance(images, FolderImages):
            yield from (images.paths[row].read_bytes() for row in rows.tolist())
        else:
            yield images[rows]
