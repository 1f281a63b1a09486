"""The results of one method with one seed, in one file: the source of all tables, statistics and figures."""

import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from lightning_uq.errors import InputError, without_period
from lightning_uq.writing import replacing

FOLDER = "records"
"""The folder of the records in a run's directory."""

_FORMAT = 2


@dataclass(frozen=True)
class Record:
    """One method's results for one seed.

    Attributes:
        method: Name of the method.
        seed: The seed.
        values: Numbers that do not belong to single test rows, by result key: times, sizes, a joint log-loss.
        rows: Scores of the test rows by name [N, ...]: see :meth:`~lightning_uq.tasks.Task.row_scores`. ``ood_score`` is the method's own score.
        row_ids: Positions of the test rows in the whole data [N], so that rows of several seeds can be matched.
        outside: Scores of the out-of-distribution rows by name [N_ood].
        num_indices: Z of the predictions; None if they have no members.
        stopped: When and why the training stopped, if its validation metric was not finite: ``"after 1 epoch, as val_nll was nan"``.
    """

    method: str
    seed: int
    values: dict[str, float]
    rows: dict[str, Tensor]
    row_ids: Tensor
    outside: dict[str, Tensor] = field(default_factory=dict)
    num_indices: int | None = None
    stopped: str | None = None

    def save(self, directory: Path) -> None:
        """Write the record into a run's directory, atomically."""
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        facts = {
            "format": _FORMAT,
            "method": self.method,
            "seed": self.seed,
            "values": self.values,
            "num_indices": self.num_indices,
            "stopped": self.stopped,
        }
        arrays = {f"rows/{name}": scores.cpu().numpy() for name, scores in self.rows.items()}
        arrays |= {f"outside/{name}": scores.cpu().numpy() for name, scores in self.outside.items()}
        content = io.BytesIO()
        np.savez_compressed(content, facts=np.array(json.dumps(facts)), row_ids=self.row_ids.numpy(), **arrays)  # type: ignore[arg-type]  # names with a slash
        with replacing(record_path(directory, self.method, self.seed)) as path:
            path.write_bytes(content.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read a record.

        Raises:
            InputError: The file is not a record, or one of another version.
        """
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                facts: dict[str, Any] = json.loads(str(file["facts"]))
                if facts["format"] != _FORMAT:
                    raise InputError(f"{path} has format {facts['format']}, but this version reads format {_FORMAT}.")
                arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "facts"}
        except (OSError, KeyError, ValueError, EOFError, BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path} is not a record of a comparison: {without_period(error)}. Delete it, or run again with --overwrite."
            ) from error
        parts: dict[str, dict[str, Tensor]] = {"rows": {}, "outside": {}}
        for name, array in arrays.items():
            part, _, key = name.partition("/")
            if key:
                parts[part][key] = array
        return cls(
            facts["method"],
            facts["seed"],
            facts["values"],
            parts["rows"],
            arrays["row_ids"],
            parts["outside"],
            facts["num_indices"],
            facts["stopped"],
        )


def record_path(directory: Path, method: str, seed: int) -> Path:
    """The file of a method's record for one seed.

    Example:
        >>> record_path(Path("runs"), "softmax", 3).as_posix()
        'runs/records/softmax-3.npz'
    """
    return directory / FOLDER / f"{method}-{seed}.npz"
