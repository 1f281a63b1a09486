"""One pass of a fit over its batches, and the files from which an interrupted fit continues."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.serialization import safe_globals

from lightning_uq.batches import sample_index
from lightning_uq.checkpoint_files import plain_part, reading
from lightning_uq.errors import InputError
from lightning_uq.networks.class_halves import ClassHalves
from lightning_uq.networks.class_statistics import ClassStatistics
from lightning_uq.running.evaluation import to_device
from lightning_uq.running.loaders import Stream
from lightning_uq.running.logits import LogitReader
from lightning_uq.running.row_sample import Part, RowSample
from lightning_uq.writing import replacing

_SUMS: list[Any] = [ClassHalves, ClassStatistics, RowSample, Part]
"""The classes of this package whose objects a file may hold. Others are refused, so reading a file runs no code of it."""


class ProgressError(InputError):
    """The files belong to another fit, and are kept."""


class FitProgress:
    """The files from which an interrupted fit continues, one per rank and pass.

    A fit may read its data, and then held-out rows. Each of these passes has its own file, since the sums of the first one are used up
    before the second one ends.

    Args:
        folder: Where the files are.
        who: Name of the fit; it begins the names of the files.
        every: Number of batches between two files.
        head: What the sums depend on, as plain data, by names for the error message. A file with another head is refused.
        rank: This rank.
        world: Number of ranks.

    Raises:
        ProgressError: A file belongs to another fit.
        InputError: A file cannot be read.

    Example:
        >>> import tempfile
        >>> folder, head = tempfile.mkdtemp(), {"weights": torch.tensor([7])}
        >>> progress = FitProgress(folder, "FitGMM", every=100, head=head)
        >>> progress.next_pass() is None
        True
        >>> progress.write({"done": 100})
        >>> FitProgress(folder, "FitGMM", every=100, head=head).next_pass()["done"]
        100
        >>> [path.name for path in files_of(folder, "FitGMM")]
        ['FitGMM.pass0.rank0-of-1.pt']
    """

    def __init__(self, folder: str | Path, who: str, every: int, head: dict[str, Any], rank: int = 0, world: int = 1):
        self.folder = Path(folder)
        self.who = who
        self.every = every
        self.head = head
        self._pattern = f"{quote(who, safe='')}.pass{{}}.rank{rank}-of-{world}.pt"
        others = [path for path in files_of(folder, who) if not path.name.endswith(f"-of-{world}.pt")]
        if others:
            raise self.refusal(f"on another number of ranks than {world} ({others[0].name})")
        self._number = -1
        self._found: list[dict[str, Any]] = []
        while (path := self._path(len(self._found))).exists():
            self._found.append(self._read(path))

    def next_pass(self) -> dict[str, Any] | None:
        """Begin the next pass, and return what its file holds; None without a file."""
        self._number += 1
        return self._found[self._number] if self._number < len(self._found) else None

    def write(self, content: dict[str, Any]) -> None:
        """Replace the file of the current pass, as a whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(self._number)) as partial:
            torch.save({"head": self.head, **content}, partial)

    def remove(self) -> None:
        """Remove the files of this rank."""
        for number in range(max(self._number + 1, len(self._found))):
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / self._pattern.format(number)

    def _read(self, path: Path) -> dict[str, Any]:
        with reading(path, "`progress_dir` must hold files of an interrupted fit"), safe_globals(_SUMS):
            # Without `map_location`: some sums are on the CPU, and others on the device of the model.
            content: dict[str, Any] = torch.load(path, weights_only=True)
            head = content["head"]
        differing = [name for name in {**self.head, **head} if not _is_same(self.head.get(name), head.get(name))]
        if differing:
            named = [f"{name}={head.get(name)!r}" for name in differing if not isinstance(head.get(name), Tensor)]
            raise self.refusal(f"with other {'settings: ' + ', '.join(named) if named else 'weights'}")
        return content

    def refusal(self, reason: str) -> ProgressError:
        """The error for a fit or data that the files do not belong to."""
        return ProgressError(
            f"`progress_dir` ({self.folder}) holds an interrupted fit of {self.who} {reason}. Continue that fit, or pass another folder."
        )


class FitPass:
    """One pass of a fit over its batches, which gives each row a number and can be continued after an interruption.

    Args:
        loader: The result of :func:`~lightning_uq.running.loaders.exact_loader`.
        model: The model.
        trainer: The Trainer, if there is one.
        logits: The reader of the model's outputs, whose inferred task is part of the progress.
        progress: The files; None keeps none.

    Attributes:
        num_read: Number of rows read.

    Example:
        >>> from types import SimpleNamespace
        >>> sums = SimpleNamespace(total=torch.zeros(()))
        >>> data = FitPass([torch.ones(2), torch.ones(3)], nn.Linear(1, 1), None, LogitReader())
        >>> for batch in data.batches(sums):
        ...     numbers = data.numbers(len(batch))
        ...     sums.total += batch.sum()
        >>> sums.total, numbers
        (tensor(5.), tensor([2, 3, 4]))
    """

    def __init__(
        self,
        loader: Iterable[Any],
        model: nn.Module,
        trainer: Trainer | None,
        logits: LogitReader,
        progress: FitProgress | None = None,
    ) -> None:
        self.loader = loader
        self.model = model
        self.trainer = trainer
        self.logits = logits
        self.progress = progress
        self.num_read = 0
        self._index: Tensor | None = None

    def batches(self, sums: object, without: tuple[str, ...] = ()) -> Iterator[Any]:
        """The batches on the model's device, except those that an interrupted fit has read.

        Args:
            sums: An object whose attributes hold all that the batches add up to. An interrupted fit's attributes are put back.
            without: Names of attributes that are not saved.

        Raises:
            InputError: The data are not those of the interrupted fit, or the state of the loader cannot be saved.
        """
        done = 0
        found = None if self.progress is None else self.progress.next_pass()
        source: Iterable[Any] = self.loader
        if found is not None:
            before, now = (
                "an unknown number of" if num is None else num for num in (found["num_batches"], self._num_batches())
            )
            if before != now:
                raise self.progress.refusal(f"to {before} batches, not {now}")  # type: ignore[union-attr]
            vars(sums).update(found["sums"])
            done, self.num_read, self.logits.inferred_task = found["done"], found["num_read"], found["inferred_task"]
            source = () if found["is_finished"] else self._after(done, found["loader"])
        for raw in source:
            self._index = sample_index(raw) if isinstance(self.loader, Stream) else None
            yield to_device(raw, self.model, self.trainer)
            done += 1
            if self.progress is not None and done % self.progress.every == 0:
                self._save(done, sums, without)
        if self.progress is not None and (found is None or not found["is_finished"]):
            self._save(done, sums, without, is_finished=True)

    def numbers(self, size: int) -> Tensor:
        """The numbers [B] of a batch's rows, on which it depends which rows are sampled or set apart; call it once per batch.

        They are the positions in the data set. For a stream, the position is the ``index`` that its batch carries; without it, the rows of
        rank r of R have the numbers r, r + R, r + 2R, ...

        Raises:
            InputError: The batch has an ``index``, but not a different one for each row.
        """
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        read = torch.arange(self.num_read, self.num_read + size)
        self.num_read += size
        if self._index is None:
            return rank + world * read
        index = self._index.cpu().long()
        if index.shape != (size,) or index.sort().values.diff().eq(0).any():
            raise InputError(
                f"`index` of a batch must be the positions of its {size} rows in the data, each a different one, but it is {index.tolist()[:5]}..."
            )
        return index

    def _save(self, done: int, sums: object, without: tuple[str, ...], *, is_finished: bool = False) -> None:
        assert self.progress is not None
        content = {
            "sums": {name: value for name, value in vars(sums).items() if name not in without},
            "done": done,
            "num_batches": self._num_batches(),
            "num_read": self.num_read,
            "inferred_task": self.logits.inferred_task,
            "loader": None if is_finished else self._loader_state(),
            "is_finished": is_finished,
        }
        self.progress.write(content)

    def _num_batches(self) -> int | None:
        """The number of batches, if known before they are read."""
        return self.loader.stop if isinstance(self.loader, Stream) else len(self.loader)  # type: ignore[arg-type]

    def _after(self, done: int, state: Any) -> Iterator[Any]:
        """The batches after the first ``done`` ones."""
        if state is not None:
            assert isinstance(self.loader, Stream)
            self.loader.loader.load_state_dict(state)  # type: ignore[attr-defined]
            yield from self.loader if self.loader.stop is None else islice(self.loader, self.loader.stop - done)
            return
        batches = iter(self.loader)
        read = sum(1 for _ in islice(batches, done))
        if read < done:
            assert self.progress is not None
            raise self.progress.refusal(f"to at least {done} batches, but the data end after {read}")
        yield from batches

    def _loader_state(self) -> Any:
        """The state of a loader that can continue by itself; None for any other, whose first batches are skipped."""
        source: Any = self.loader.loader if isinstance(self.loader, Stream) else None
        if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
            return None
        state, left_out = plain_part({"state": source.state_dict()})
        if left_out:
            raise InputError(
                f"`progress_dir` needs a loader whose `state_dict()` is plain data, but {left_out[0]!r} is not. Change it in the data set."
            )
        return state["state"]


def files_of(folder: str | Path, who: str) -> list[Path]:
    """The files of an interrupted fit, of all ranks."""
    return sorted(Path(folder).glob(f"{quote(who, safe='')}.pass*.rank*-of-*.pt"))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
