"""The acquisition loop: train on what is labelled, pick from what is not, and so on."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_uq._lightning import trainer_of
from lightning_uq.active_learning.pool import PoolDataModule
from lightning_uq.active_learning.strategies import Strategy, as_strategy
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer
from lightning_uq.lightning_trees import is_instance
from lightning_uq.writing import replacing


@dataclass(frozen=True)
class Round:
    """One round of an acquisition.

    Attributes:
        number: Its number, from 0.
        labelled: Positions in the data set that the module was trained on [L], in the order of their acquisition.
        module: The trained module.
        acquired: Positions that are labelled next, in their order; they follow ``labelled`` in the next round. Empty in the last.
        metrics: What ``measure`` returned.
    """

    number: int
    labelled: Tensor
    module: LightningModule
    acquired: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


def acquisition_rounds(
    train: Callable[[PoolDataModule], LightningModule],
    data: PoolDataModule,
    num: int,
    strategy: str | Strategy = "mutual_information",
    *,
    measure: Callable[[LightningModule], Mapping[str, float]] | None = None,
    folder: str | Path | None = None,
    batch_size: int = 256,
) -> Iterator[Round]:
    """Rounds of training and acquisition, as many as are asked for, until the pool is empty.

    Each trains a new module from its start. Take a fixed number of rounds with ``itertools.islice(acquisition_rounds(...), 5)``.

    Args:
        train: Makes a module and trains it with a Trainer of your own, as in ``trainer.fit(module, data)``. Give it seeds, so
            that a round can be repeated.
        data: The labelled samples and the pool; its ``labelled`` grows.
        num: Number of positions acquired after each round; the last takes what is left.
        strategy: A strategy or its name; see :meth:`PoolDataModule.acquire`.
        measure: Measures each trained module, before it acquires: metrics by name, such as its accuracy on test data.
        folder: Where ``round-<k>.json`` is written after each round. If it holds rounds, they are not repeated: the loop goes on with the next
            one, on the labels that they acquired. None: nothing is written.
        batch_size: Inputs of the pool read at a time.

    Yields:
        One :class:`Round` after another.

    Raises:
        InputError: An argument is out of range, the strategy is unknown, or the folder holds rounds of other data or another ``num``.

    Example:
        >>> from lightning_uq import EnsembleModule
        >>> data = PoolDataModule(torch.utils.data.TensorDataset(torch.linspace(-1, 1, 20).unsqueeze(1), torch.arange(20) // 10), [0, 19])
        >>> def train(data):
        ...     return EnsembleModule(lambda: torch.nn.Linear(1, 2), num_members=3, seed=0)  # and trainer.fit(module, data)
        >>> [len(done.labelled) for done in acquisition_rounds(train, data, num=8)]
        [2, 10, 18, 20]
    """
    check_integer("num", num, 1)
    check_integer("batch_size", batch_size, 1)
    strategy = as_strategy(strategy)
    records = None if folder is None else _Records(Path(folder), data, num)
    return _rounds(train, data, num, strategy, measure, records, batch_size)


def _rounds(
    train: Callable[[PoolDataModule], LightningModule],
    data: PoolDataModule,
    num: int,
    strategy: Strategy,
    measure: Callable[[LightningModule], Mapping[str, float]] | None,
    records: "_Records | None",
    batch_size: int,
) -> Iterator[Round]:
    number, is_done = (0, False) if records is None else records.resume()
    while not is_done:
        labelled = data.labelled
        module = train(data)
        if not is_instance(module, LightningModule):
            raise InputError(f"`train` must return a LightningModule, but it returned a {type(module).__name__}.")
        metrics = {} if measure is None else dict(measure(module))
        is_done = not len(data.pool)
        acquired = labelled[:0] if is_done else data.acquire(module, num, strategy, batch_size=batch_size)
        done = Round(number, labelled, module, acquired, metrics)
        if records is not None:
            records.write(done)
        yield done
        number += 1


def read_rounds(folder: str | Path) -> list[dict[str, Any]]:
    """The rounds in a folder of :func:`acquisition_rounds`, in order: their ``labelled``, ``acquired`` and ``metrics``."""
    found: list[dict[str, Any]] = []
    while (path := Path(folder) / f"round-{len(found)}.json").exists():
        found.append(json.loads(path.read_text()))
    return found


class _Records:
    """The files of finished rounds."""

    def __init__(self, folder: Path, data: PoolDataModule, num: int) -> None:
        self.folder, self.data = folder, data
        self.settings = {"num": num, "size": data.size, "seed": data.seed}
        self._start = data.labelled

    def resume(self) -> tuple[int, bool]:
        """Label what finished rounds have acquired; the number of the next round, and whether nothing is left to do."""
        labelled, acquired = self._start, None
        rounds = read_rounds(self.folder)
        for number, found in enumerate(rounds):
            same = found["settings"] == self.settings and found["labelled"] == labelled.tolist()
            if not same:
                raise InputError(
                    f"`folder` holds rounds of another experiment: {self._path(number)} has {found['settings']} and {len(found['labelled'])} labels, "
                    f"but this one has {self.settings} and {len(labelled)}, or other positions. Choose another folder."
                )
            acquired = found["acquired"]
            labelled = torch.cat([labelled, torch.tensor(acquired, dtype=torch.long)])
        if acquired:
            self.data.labelled = labelled
        return len(rounds), acquired == []

    def write(self, done: Round) -> None:
        """Write the file of a round, on the first process."""
        trainer = trainer_of(done.module)
        if trainer is not None and not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "round": done.number,
            "settings": self.settings,
            "labelled": done.labelled.tolist(),
            "acquired": done.acquired.tolist(),
            "metrics": done.metrics,
        }
        with replacing(self._path(done.number)) as partial:
            partial.write_text(json.dumps(content) + "\n")

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number}.json"
