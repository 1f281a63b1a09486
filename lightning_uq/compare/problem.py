"""The data of a comparison for one seed, and what the methods may know of it."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from lightning_uq.compare.configuration import Configuration
from lightning_uq.compare.testbed import AgentSetting, agent_setting
from lightning_uq.data import ArrayDataModule, TestbedDataModule
from lightning_uq.method import Setting
from lightning_uq.networks import backbone, default_backbone
from lightning_uq.tasks import task_for


@dataclass(frozen=True)
class Problem:
    """The data of one seed: a data module with its split, and the setting that methods see.

    Attributes:
        data: The data module.
        setting: The facts that methods may use.
        network: Name of the backbone.
    """

    data: ArrayDataModule
    setting: Setting
    network: str

    @property
    def is_testbed(self) -> bool:
        """Whether the data are a problem of the Neural Testbed."""
        return isinstance(self.data, TestbedDataModule)

    def facts(self) -> dict[str, Any]:
        """What a reader of the results should know of the data, as plain data."""
        data, setting = self.data, self.setting
        facts: dict[str, Any] = {
            "name": data.name,
            "task": data.task,
            "input_shape": list(data.input_shape),
            "num_targets": setting.num_targets,
            "network": self.network,
            "sizes": {part: len(data.dataset(part)) for part in ("train", "val", "test", "ood")},
            "ood_classes": list(data.ood_classes),
            "notes": list(data.notes),
        }
        if isinstance(setting, AgentSetting):
            facts["temperature"] = setting.temperature
        return facts


def make_problem(configuration: Configuration, seed: int) -> Problem:
    """The data with a seed's split.

    Raises:
        InputError: There is no such data, or the data are unusable.
        MissingExtraError: A package that reads the data is not installed.
    """
    data = configuration.make_data(seed)
    if isinstance(data, TestbedDataModule):
        return Problem(data, agent_setting(data, configuration.recipe.learning_rate), "agents of the testbed")
    network = configuration.network or default_backbone(data.task, data.input_shape)
    setting = Setting(
        data=data.name,
        task=task_for(data),
        input_shape=data.input_shape,
        num_targets=data.num_outputs,
        num_train=data.num_train,
        backbone=backbone(network, data.input_shape),
        optimizer=functools.partial(torch.optim.Adam, lr=configuration.recipe.learning_rate),
    )
    return Problem(data, setting, network)
