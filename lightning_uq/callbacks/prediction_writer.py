"""Predictions as files: one row an input, one column a number, streamed batch by batch."""

import csv
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_uq import batches
from lightning_uq.callbacks._running import together
from lightning_uq.errors import InputError, MissingExtraError, UnsupportedError
from lightning_uq.predictions import Prediction
from lightning_uq.writing import PARTIAL, partial_path

Format = Literal["parquet", "csv"]
FORMATS: tuple[Format, ...] = ("parquet", "csv")
Block = dict[str, "np.ndarray[Any, Any]"]
"""Some rows: each name's numbers [B], or [B, D] where an input has several."""

FLUSH_BYTES = 2**24
"""A block of rows goes to the file when it has grown to this size: memory does not follow the data, nor do blocks get tiny."""

_NAME = re.compile(r"predictions(?:-loader(?P<loader>\d+))?-rank(?P<rank>\d+)\.(?P<format>parquet|csv)")


class PredictionWriter(Callback):
    """Writes what ``trainer.predict`` makes to ``predictions-rank<r>.parquet`` (or ``.csv``), one file a rank.

    With several loaders each has its own, ``predictions-loader<i>-rank<r>.parquet``. Rows are written as they come, so
    that ``trainer.predict(..., return_predictions=False)`` runs in constant memory. A file appears whole, when all ranks
    are done: until then it has another name, and after an exception there is none. The files of all ranks together hold
    each sample once: rows that a distributed sampler repeats as padding are left out.

    Columns:
        - ``index``: the sample's position in the data set, as the sampler named it; what the batch carries goes first (a key
          ``index``, or :class:`~lightning_uq.data.Indexed`). Of a stream on one process: the number of the row. Of a stream on
          several nobody knows it, so there the batch has to carry it.
        - all of :meth:`Prediction.to_dict`: of a classifier ``label``, ``confidence``, ``prob_0`` ... ``prob_{C-1}``,
          ``predictive_entropy``, ``expected_entropy`` and ``mutual_information`` (nats), of a Dirichlet also ``vacuity`` and
          ``differential_entropy``; of a regressor ``mean_0`` ... ``mean_{D-1}``, ``variance_0``, ``aleatoric_variance_0``,
          ``epistemic_variance_0``, of a Student-t also ``degrees_of_freedom_0`` and ``scale_0``; ``log_density`` where
          :class:`FitGMM` fitted one. A score [B] is one column; what has D numbers an input has D, numbered from 0, also
          where D = 1. Calibrations are in. Half precision is written as float32.
        - of a regressor ``lower_0`` and ``upper_0`` ...: the central ``interval``. It needs the members, which predictions keep
          up to 32 indices, or with ``return_members=True``; without them a warning says that the columns are left out.

    Args:
        output_dir: Directory of the files; it is made where there is none.
        format: ``"parquet"`` (the extra ``parquet``) or ``"csv"``.
        probs: Whether a classifier's probabilities are written.
        interval: Share of the predictive distribution in (0, 1) between ``lower`` and ``upper``; None leaves them out.
        overwrite: Whether files of an earlier run are replaced, those of its further ranks and loaders removed; otherwise
            they are an error before the first batch.

    Attributes:
        written: This rank's files, with the number of rows in each, after ``predict``.

    Raises:
        MissingExtraError: ``format="parquet"`` without pyarrow.
        InputError: An argument is not as above; there are files already; a ``predict_step`` returns no prediction of this
            package (an unmodified module: add a callback with ``attach=True``); maps such as a segmentation's, which are
            no rows; a batch whose rows have no known index.
        UnsupportedError: With ``predict_step(dataloader_iter)``.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import DataLoader
        >>> from lightning_uq import DeterministicModule
        >>> model = DeterministicModule(torch.nn.Linear(2, 3))
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     writer = PredictionWriter(directory, format="csv", probs=False)
        ...     trainer = Trainer(callbacks=[writer], enable_checkpointing=False, **quiet)
        ...     trainer.predict(model, DataLoader(torch.zeros(5, 2), batch_size=2), return_predictions=False)
        ...     table = read_predictions(directory)
        >>> table["index"].tolist(), list(table)[:4]
        ([0, 1, 2, 3, 4], ['index', 'label', 'confidence', 'predictive_entropy'])
    """

    def __init__(
        self,
        output_dir: str | Path,
        format: Literal["parquet", "csv"] = "parquet",
        *,
        probs: bool = True,
        interval: float | None = 0.95,
        overwrite: bool = False,
    ) -> None:
        if format not in FORMATS:
            raise InputError(f"Expected argument `format` to be 'parquet' or 'csv', but got {format!r}.")
        if interval is not None and not 0 < interval < 1:
            raise InputError(f"Expected argument `interval` to be in (0, 1) or None, but got {interval!r}.")
        if format == "parquet":
            _pyarrow()
        self.output_dir = Path(output_dir)
        self.format: Format = format
        self.probs = probs
        self.interval = interval
        self.overwrite = overwrite
        self.written: dict[Path, int] = {}
        self._files: dict[int, _File] = {}
        self._counts: dict[int, int] = {}
        self._warned = False

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the first batch what would fail after the last."""
        if stage != "predict":
            return
        if is_param_in_hook_signature(pl_module.predict_step, "dataloader_iter", explicit=True):
            raise UnsupportedError(
                "PredictionWriter does not support `predict_step(dataloader_iter)`, under which hooks do not know their batch."
            )
        self.written = {}
        self._warned = False
        self._discard()  # where another callback's `on_exception` failed before this one's
        with together(trainer):
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"Expected argument `output_dir` to be a directory, but {self.output_dir} cannot be one: {error.strerror}"
                ) from error
            found = sorted(_named(self.output_dir, self.format))
            if found and not self.overwrite:
                raise InputError(
                    f"Expected argument `output_dir` to hold no predictions yet, but {found[0]} exists. Pass "
                    "`overwrite=True` to replace them, or another directory."
                )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch's rows to the file."""
        if not isinstance(outputs, Prediction):
            raise InputError(
                f"Expected a prediction of this package to write, but `predict_step` of {type(pl_module).__name__} returned "
                f"{'a ' if outputs is not None else ''}{type(outputs).__name__}. Use one of its modules, or let a callback "
                "replace what an unmodified module predicts: `TemperatureScaling(attach=True)`, `FitGMM(attach=True)`."
            )
        block = self._block(outputs)
        index, keep = self._rows(trainer, batch, batch_idx, dataloader_idx, len(outputs))
        block = {"index": index.numpy(), **block}
        if keep is not None:
            block = {name: values[keep.numpy()] for name, values in block.items()}
        if dataloader_idx not in self._files:
            loader = f"-loader{dataloader_idx}" if len(_loaders(trainer)) > 1 else ""
            path = self.output_dir / f"predictions{loader}-rank{trainer.global_rank}.{self.format}"
            self._files[dataloader_idx] = _FILES[self.format](path, block)
        self._files[dataloader_idx].add(block)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the files their names, once every rank has come so far; remove those of an earlier run."""
        for file in self._files.values():
            file.close()
        trainer.strategy.barrier("lightning_uq_predictions")
        for file in self._files.values():
            file.partial.replace(file.path)
        self.written = {file.path: file.rows for file in self._files.values()}
        self._files = {}
        for path, (_, rank) in _named(self.output_dir, self.format).items():
            mine = rank == trainer.global_rank or (trainer.is_global_zero and rank >= trainer.world_size)
            if mine and path not in self.written:
                path.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written."""
        self._discard()
        if trainer.state.fn == TrainerFn.PREDICTING and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            for path in self.output_dir.glob(f".predictions*.{self.format}{PARTIAL}"):
                path.unlink()  # of the ranks that were spawned, which ended without being told

    def _discard(self) -> None:
        files, self._files, self._counts = self._files, {}, {}
        with ExitStack() as stack:  # all of them, even where one fails
            for file in files.values():
                stack.callback(file.discard)

    # ------------------------------------------------------------------ rows and columns

    def _block(self, prediction: Prediction) -> Block:
        """What is written of a prediction, without its index."""
        if prediction.map_shape:
            shape = [len(prediction), *prediction.map_shape]
            raise InputError(
                f"A table needs one label per input, but the prediction's labels are {shape}: maps are no rows of a table. "
                "Write them with a callback of your own."
            )
        named = self._named(prediction)
        if not self.probs:
            named.pop("probs", None)
        block: Block = {}
        for name, values in named.items():
            if values.ndim not in (1, 2):
                raise InputError(
                    f"Expected `{name}` of {type(prediction).__name__} to be [B] or [B, D], but got {list(values.shape)}: "
                    "maps are no rows of a table."
                )
            half = values.dtype in (torch.float16, torch.bfloat16)
            block["prob" if name == "probs" else name] = (values.float() if half else values).cpu().numpy()
        return block

    def _named(self, prediction: Prediction) -> dict[str, Tensor]:
        try:
            return prediction.to_dict(self.interval)
        except InputError as error:  # the members are gone
            if not self._warned:
                rank_zero_warn(f"PredictionWriter leaves out `lower` and `upper`. {error}")
            self._warned = True
            return prediction.to_dict()

    def _rows(
        self, trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int, size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Index [B] of a batch's rows, and the mask of those that are not padding; None where all of them count."""
        loader = _loaders(trainer)[dataloader_idx]
        carried = batches.sample_index(batch)
        sampler = _sampler(loader)
        if trainer.world_size > 1:
            _check_sharing(sampler, carried is not None)
        # Lightning wraps the batch sampler of what it predicts from, and keeps what it yielded.
        yielded = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
        position = None if yielded is None else torch.as_tensor(yielded[batch_idx])
        if carried is not None:
            index = carried.cpu()
        elif position is not None:
            index = position
        elif trainer.world_size == 1:
            start = self._counts.get(dataloader_idx, 0)
            self._counts[dataloader_idx] = start + size
            index = torch.arange(start, start + size)
        else:
            raise InputError(
                f"Expected batches that carry the `index` of their rows, since on several ranks a {type(loader).__name__} "
                "without a batch sampler does not tell which they are: yield mappings with a key `index`."
            )
        keep = None
        if not isinstance(sampler, UnrepeatedDistributedSampler):
            keep = batches.unpadded_rows(loader, batch_idx, size if position is None else len(position))
        if index.shape != (size,) or (keep is not None and len(keep) != size):
            raise InputError(
                f"Expected the index of each of the {size} predictions of batch {batch_idx}, but got "
                + (
                    f"`index` of shape {list(index.shape)} in the batch."
                    if carried is not None
                    else f"{len(index)} from "
                )
                + ("" if carried is not None else "the sampler: let the batch carry a key `index`.")
            )
        return index.long(), keep


def read_predictions(output_dir: str | Path, dataloader_idx: int = 0, format: Format | None = None) -> Block:
    """One table from the files of all ranks that :class:`PredictionWriter` wrote, sorted by ``index``.

    Args:
        output_dir: Their directory.
        dataloader_idx: Which loader's, where there were several.
        format: ``"parquet"`` or ``"csv"``, where the directory holds both.

    Returns:
        A column [N] for each name, in the order of the file.

    Raises:
        InputError: The directory holds no such file, both formats, or files with different columns.
    """
    found = {
        path: one
        for one in FORMATS
        for path, (loader, _) in _named(Path(output_dir), one).items()
        if format in (None, one) and loader == dataloader_idx
    }
    if len(set(found.values())) != 1:
        came = "both formats; pass `format`" if found else "none"
        raise InputError(
            f"Expected argument `output_dir` to hold predictions of loader {dataloader_idx}, but {output_dir} holds {came}."
        )
    tables = [_FILES[one].read(path) for path, one in sorted(found.items())]
    if any(list(table) != list(tables[0]) for table in tables):
        raise InputError(f"Expected the files in {output_dir} to have the same columns, but they differ.")
    whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    order = np.argsort(whole["index"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


# ---------------------------------------------------------------------- files


class _File(ABC):
    """A table that grows under another name, hidden beside its own."""

    def __init__(self, path: Path, first: Block) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.rows = 0
        self._blocks: list[Block] = []
        self._kind = _kind(first)
        self.open(_columns({name: values[:0] for name, values in first.items()}))

    def add(self, block: Block) -> None:
        """Keep some rows, and write what was kept once it is large."""
        kind = _kind(block)
        if kind != self._kind:
            changed = sorted(n for n in {*kind, *self._kind} if kind.get(n) != self._kind.get(n))
            raise InputError(
                f"Expected all batches to have the same columns, but {', '.join(changed)} differ from the first batch's."
            )
        self._blocks.append(block)
        self.rows += len(block["index"])
        if sum(values.nbytes for one in self._blocks for values in one.values()) >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._blocks:
            self.write(_columns({n: np.concatenate([one[n] for one in self._blocks]) for n in self._blocks[0]}))
            self._blocks = []

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self.end()

    def discard(self) -> None:
        """Remove what was written."""
        self._blocks = []
        try:
            self.end()
        finally:
            self.partial.unlink(missing_ok=True)

    @abstractmethod
    def open(self, empty: Block) -> None:
        """Begin the file; ``empty`` has its columns and no rows."""

    @abstractmethod
    def write(self, columns: Block) -> None:
        """Write some rows."""

    @abstractmethod
    def end(self) -> None:
        """Close the file; a second time does nothing."""

    @staticmethod
    @abstractmethod
    def read(path: Path) -> Block:
        """The columns of a file."""


class _Csv(_File):
    _stream: TextIO

    def open(self, empty: Block) -> None:
        self._stream = self.partial.open("w", newline="")
        csv.writer(self._stream).writerow(empty)

    def write(self, columns: Block) -> None:
        # A float's shortest text that reads back as the same number of its own precision.
        texts = [values.astype(str).tolist() for values in columns.values()]
        csv.writer(self._stream).writerows(zip(*texts, strict=True))

    def end(self) -> None:
        self._stream.close()

    @staticmethod
    def read(path: Path) -> Block:
        with path.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        columns = zip(*rows, strict=True) if rows else [()] * len(header)
        whole = {"index": np.int64, "label": np.int64}
        return {n: np.asarray(v, whole.get(n, np.float64)) for n, v in zip(header, columns, strict=True)}


class _Parquet(_File):
    _writer: Any

    def open(self, empty: Block) -> None:
        pyarrow, parquet = _pyarrow()
        self._writer = parquet.ParquetWriter(self.partial, pyarrow.table(empty).schema)

    def write(self, columns: Block) -> None:
        pyarrow, _ = _pyarrow()
        self._writer.write_table(pyarrow.table(columns))

    def end(self) -> None:
        self._writer.close()

    @staticmethod
    def read(path: Path) -> Block:
        _, parquet = _pyarrow()
        table = parquet.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}


_FILES: Mapping[str, type[_File]] = {"parquet": _Parquet, "csv": _Csv}


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(
            "Parquet files need pyarrow, which the extra `parquet` brings: pip install 'lightning-uq[parquet]'. Or write "
            "`format='csv'`."
        ) from error


def _kind(block: Block) -> dict[str, tuple[Any, ...]]:
    return {name: (values.dtype, values.shape[1:]) for name, values in block.items()}


def _columns(block: Block) -> Block:
    """One column [B] for each number."""
    columns: Block = {}
    for name, values in block.items():
        if values.ndim == 1:
            columns[name] = values
        else:
            columns.update({f"{name}_{i}": values[:, i] for i in range(values.shape[1])})
    return columns


def _named(directory: Path, format: str) -> dict[Path, tuple[int, int]]:
    """The files in a directory that have a writer's name, with loader and rank."""
    found = {}
    for path in directory.glob(f"predictions*.{format}"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found[path] = int(match["loader"] or 0), int(match["rank"])
    return found


def _loaders(trainer: Trainer) -> list[Any]:
    loaders: list[Any] = torch.utils._pytree.tree_leaves(trainer.predict_dataloaders)
    return loaders


def _sampler(loader: Any) -> Any:
    return getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)


def _check_sharing(sampler: Any, carried: bool) -> None:
    """Refuse loaders of which several ranks predict the same samples."""
    # Lightning shares out what the user's own sampler yields, and each rank asks its own copy.
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if isinstance(inner, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise InputError(
            f"Expected a data loader that does not shuffle, but it has a {type(inner).__name__}, of which every rank draws "
            "an order of its own: samples would be predicted twice, or never. Pass `shuffle=False`."
        )
    if isinstance(sampler, SequentialSampler | RandomSampler) and not carried:
        raise InputError(
            "Expected a data loader with a distributed sampler, since without one every rank predicts all samples. Leave "
            "`use_distributed_sampler` on, or let batches of what each rank holds for itself carry a key `index`."
        )
