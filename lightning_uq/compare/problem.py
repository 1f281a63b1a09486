"""The data of a comparison for one seed, and the facts that methods may use."""

import functools
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_uq.batches import num_rows
from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.testbed import AgentSetting, agent_setting
from lightning_uq.data import TestbedDataModule
from lightning_uq.data.interface import TaskData
from lightning_uq.errors import InputError
from lightning_uq.method import Setting
from lightning_uq.networks import backbone, default_backbone
from lightning_uq.tasks import task_for


@dataclass(frozen=True)
class Problem:
    """The data of one seed: a data module with its split, and the setting for methods.

    Attributes:
        data: The data module.
        setting: The facts that methods may use.
        network: Name of the backbone.
    """

    data: TaskData
    setting: Setting
    network: str

    @property
    def is_testbed(self) -> bool:
        """Whether the data are a problem of the Neural Testbed."""
        return isinstance(self.data, TestbedDataModule)

    def facts(self) -> dict[str, Any]:
        """Facts about the data for readers of the results, as plain data."""
        data, setting = self.data, self.setting
        facts: dict[str, Any] = {
            "name": data.name,
            "task": data.task,
            "input_shape": list(setting.input_shape),
            "num_targets": setting.num_targets,
            "class_names": list(data.class_names),
            "network": self.network,
            "sizes": {
                "train": data.num_train,
                "val": num_samples(data.val_dataloader()),
                "test": len(data.test_rows),
                "ood": sum(num_samples(loader) for loader in data.ood_dataloaders().values()),
            },
            "ood_classes": list(getattr(data, "ood_classes", ())),
            "notes": list(data.notes),
        }
        if isinstance(setting, AgentSetting):
            facts["temperature"] = setting.temperature
        return facts


def make_problem(configuration: Configuration, seed: int) -> Problem:
    """The data with a seed's split.

    Raises:
        InputError: The data do not exist or are invalid.
        MissingExtraError: A package for reading the data is not installed.
    """
    data = configuration.make_data(seed)
    if isinstance(data, TestbedDataModule):
        return Problem(data, agent_setting(data, configuration.recipe.learning_rate), "agents of the testbed")
    name, shape, make = _network(configuration, data)
    setting = Setting(
        data=data.name,
        task=task_for(data),
        input_shape=shape,
        num_targets=data.num_outputs,
        num_train=data.num_train,
        backbone=make,
        optimizer=functools.partial(
            torch.optim.Adam, lr=configuration.recipe.learning_rate, weight_decay=configuration.recipe.weight_decay
        ),
    )
    return Problem(data, setting, name)


def _network(configuration: Configuration, data: TaskData) -> tuple[str, tuple[int, ...], Any]:
    """The name of the backbone, the shape of one input, and the backbone's factory.

    A user's own module does not need them, and may take inputs for which there is no backbone.
    """
    try:
        shape = data.input_shape
        name = configuration.network or default_backbone(data.task, shape)
        return name, shape, backbone(name, shape)
    except InputError as error:
        if configuration.module is None or configuration.network is not None:
            raise
        return "none", (), functools.partial(_no_backbone, str(error))


def _no_backbone(reason: str, *_: Any, **__: Any) -> nn.Module:
    raise InputError(reason)


def num_samples(loader: Iterable[Any]) -> int:
    """The number of samples of a loader, without reading them if the loader reads a data set in order.

    Example:
        >>> num_samples(DataLoader(range(5), batch_size=2)), num_samples([(torch.zeros(3, 1), torch.zeros(3))])
        (5, 3)
    """
    if isinstance(loader, DataLoader):
        data, sampler, whole = loader.dataset, loader.sampler, not loader.drop_last
        is_plain = type(loader.batch_sampler) is BatchSampler and type(sampler) is SequentialSampler
        if is_plain and whole and not isinstance(data, IterableDataset) and isinstance(data, Sized):
            return len(data)
    return sum(num_rows(batch) or 0 for batch in loader)
