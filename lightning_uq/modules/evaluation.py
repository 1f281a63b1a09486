"""Metrics of a validation or test: one set per loader, updated with each batch and logged on every rank."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_uq import batches
from lightning_uq.functional.waiting import is_free
from lightning_uq.metrics.base import MeanLoss
from lightning_uq.modules.targets import Targets
from lightning_uq.running.finite import check_numbers, refuse_outputs, unusable_rows
from lightning_uq.running.loaders import loader_list
from lightning_uq.running.metrics import update_all
from lightning_uq.running.overriding import reaches_package
from lightning_uq.tasks import Stage, Task

if TYPE_CHECKING:
    from lightning_uq.modules.base import UncertaintyModule


class CheckedLoss(MeanLoss):
    """The mean loss of a loader, with an error if an output was not finite.

    Rows with such outputs are counted on their device. The count is read with the loss when the loader ends, because reading it
    after every batch would wait for the device. On the CPU nothing waits, so the first such batch raises.
    """

    unusable: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("unusable", "rows"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def checked(self, output: Tensor, task: Task) -> Tensor:
        """Outputs [Z, B, ...], with 0 in place of rows that are not finite, so that no metric fails on them first."""
        if is_free(output):
            check_numbers(output, task)
            return output
        bad = unusable_rows(output, task)
        self.unusable += bad.sum()
        self.rows += len(bad)
        return output.masked_fill(bad.reshape(-1, *[1] * (output.ndim - 2)), 0)

    def compute(self) -> Tensor:
        """The mean loss.

        Raises:
            NotFiniteError: Some outputs were not finite.
        """
        if self.unusable:
            refuse_outputs(int(self.unusable), int(self.rows))
        return super().compute()


def make_metrics(task: Task, loaders: Any, stage: Stage) -> nn.ModuleList:
    """A new set of metrics per loader: metrics shared by several loaders would mix their samples."""
    return nn.ModuleList(nn.ModuleDict({"loss": CheckedLoss(), **task.metrics(stage)}) for _ in loader_list(loaders))


def metrics_of(metric_sets: nn.ModuleList, loader_idx: int) -> dict[str, Metric]:
    """The metrics of a loader, by name."""
    return dict(metric_sets[loader_idx].items())  # type: ignore[operator]  # a ModuleList yields bare Modules


def log_metrics(module: "UncertaintyModule", stage: str, metrics: dict[str, Metric], loader_idx: int) -> None:
    """Log the metrics of a loader as ``{stage}_{name}``; Lightning computes them when the loader ends."""
    for name, metric in metrics.items():
        module.log(
            f"{stage}_{name}",
            metric,
            prog_bar=stage == "val" and name in ("loss", module.task.metric_on_bar),
            batch_size=1,  # a metric counts its samples itself
            metric_attribute=f"{stage}_metrics.{loader_idx}.{name}",
        )


def log_before_batches(module: "UncertaintyModule", stage: str, metric_sets: nn.ModuleList) -> set[int]:
    """Log the metrics of a single loader on every rank, so that ranks without a batch compute them too.

    At a loader's end Lightning computes what its steps logged, and the ranks wait for each other. With several loaders, every
    rank needs a batch of each. If a subclass replaces the step, its metrics are not updated here.

    Returns:
        The numbers of the loaders whose metrics were logged.
    """
    is_used = reaches_package(type(module), "validation_step" if stage == "val" else "test_step")
    if module.trainer.world_size == 1 or len(metric_sets) > 1 or not is_used:
        return set()
    log_metrics(module, stage, metrics_of(metric_sets, 0), 0)
    return {0}


def update_metrics(
    module: "UncertaintyModule", metrics: dict[str, Metric], loader: Any, batch: Any, batch_idx: int
) -> None:
    """Update the metrics of a loader with a batch, without the rows that a distributed sampler repeats as padding."""
    x, y = module.labelled(batch, batch_idx)
    with module.prediction_transforms.observing(module, x, for_metrics=True) as transformed:
        output = module(x)
    loss_metric = metrics["loss"]
    assert isinstance(loss_metric, CheckedLoss)
    output = loss_metric.checked(output, module.task)
    prediction = transformed(module.prediction(output))  # before rows are selected: transforms observe all rows
    index = batches.sample_index(batch)
    position, keep = batches.distributed_rows(loader, batch_idx, len(y))
    if position is not None and keep is not None:
        # With positions, the joint log-loss is the same on any number of ranks.
        index = (position if index is None else index.cpu())[keep]
        output, y = output[:, keep.to(output.device)], y[keep.to(y.device)]
        prediction = prediction[keep.to(output.device)]
    if not len(y):
        return
    losses, count = module.losses_and_count(output, Targets(y))
    loss_metric.update(losses.mean(), count)
    rest = {name: metric for name, metric in metrics.items() if name != "loss"}
    update_all(rest, module.task, prediction, y, index)
