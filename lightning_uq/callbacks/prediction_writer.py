"""Writes predictions to files batch by batch, as tables with one row per input or as arrays."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_uq import batches
from lightning_uq._lightning import starts_processes, users_sampler
from lightning_uq.callbacks.prediction_files import (
    FILES,
    FORMATS,
    Block,
    Format,
    PredictionFile,
    import_pyarrow,
    named_files,
)
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.lightning_trees import is_instance
from lightning_uq.networks.sharding import GatheredStage
from lightning_uq.predictions import Prediction
from lightning_uq.running.loaders import loader_list
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.ranks import raising_on_all_ranks
from lightning_uq.strategies import check_strategy
from lightning_uq.writing import PARTIAL


class PredictionWriter(Callback):
    """Writes the predictions of ``trainer.predict`` to ``predictions-rank<r>.parquet`` (or ``.csv``), one file per rank.

    With several loaders, each has its own files, ``predictions-loader<i>-rank<r>.parquet``. Rows are written as they arrive, so
    ``trainer.predict(..., return_predictions=False)`` runs in constant memory. A file gets its name when all ranks are
    done, so an incomplete file is never visible, and after an exception there is none. Together, the files of all ranks hold each sample
    once: rows that a distributed sampler repeats as padding are skipped.

    A table (Parquet or CSV) has one row per input. It cannot hold maps, such as a segmentation's: ``format="npz"`` writes an
    array for each name, [N] or [N, ...], in blocks of about 16 MB. :func:`read_predictions` concatenates the arrays, and
    ``names=`` selects some of them. All maps must have the same size.

    Columns:
        - ``index``: the sample's position in the data set. It comes from the batch if the batch has it (a key ``index``,
          or :class:`~lightning_uq.data.Indexed`), or else from the sampler. For an iterable data set on one process, it is the
          number of the row; on several processes, each batch must contain ``index``.
        - all entries of :meth:`Prediction.to_dict`: for a classifier ``label``, ``confidence``, ``prob_0`` ... ``prob_{C-1}``,
          ``predictive_entropy``, ``expected_entropy`` and ``mutual_information`` (nats; ``uncalibrated_expected_entropy`` and
          ``uncalibrated_mutual_information`` under a pooled calibration of several hypotheses), for a Dirichlet also ``vacuity`` and
          ``differential_entropy``; for a regressor ``mean_0`` ... ``mean_{D-1}``, ``variance_0``, ``aleatoric_variance_0``,
          ``epistemic_variance_0``, for a Student-t also ``degrees_of_freedom_0`` and ``scale_0``, for a mean alone ``mean_0`` and
          the ``epistemic_variance_0`` of several networks, for quantiles ``quantile_0.1_0``; ``ood_score`` of
          :class:`FitGMM`, :class:`FitKNN` or :class:`FitViM`, and of the first ``log_density``; ``prediction_set_0`` ... and ``set_size`` of :class:`ConformalSets`, ``conformal_lower_0`` and
          ``conformal_upper_0`` of :class:`ConformalIntervals`. A score [B] is one column; D numbers per input are D columns, numbered from 0, and a horizon [B, H, D] is
                ``mean_0_0`` ... ``mean_{H-1}_{D-1}``. Predictions are calibrated. Half precision is written as float32. A row with
                NaN (with ``nonfinite="inf"``) has the ``label`` -1 and scores of plus infinity.
        - for a regressor ``lower_0`` and ``upper_0`` ...: the central ``interval``. A mean alone has none, and neither have quantiles
          whose levels do not reach it. It needs the members, which predictions keep for
          up to 32 indices, or with ``return_members=True``. Without members, a warning says that the columns are left out.

    Args:
        output_dir: Directory of the files; it is created if missing.
        format: ``"parquet"`` (the extra ``parquet``), ``"csv"``, or ``"npz"`` for arrays of any shape.
        probs: Whether to write a classifier's probabilities, C numbers per label.
        interval: Share of the predictive distribution between ``lower`` and ``upper``, in (0, 1); None leaves them out.
        overwrite: Whether to replace the files of an earlier run, and to remove those of its other ranks and loaders. Otherwise
            existing files raise before the first batch.

    Attributes:
        written: The files of this rank after ``predict``, with the number of rows in each.

    Raises:
        MissingExtraError: ``format="parquet"`` without pyarrow.
        InputError: An argument is invalid; the directory already holds predictions; ``predict_step`` returns no prediction
            of this package (for an unmodified module, add a callback with ``attach=True``); the predictions are maps and
            ``format`` is that of a table; the index of a row is unknown.
        UnsupportedError: With ``predict_step(dataloader_iter)``.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import DataLoader
        >>> from lightning_uq import DeterministicModule, read_predictions
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def __init__(
        self,
        output_dir: str | Path,
        format: Literal["parquet", "csv", "npz"] = "parquet",
        *,
        probs: bool = True,
        interval: float | None = 0.95,
        overwrite: bool = False,
    ) -> None:
        if format not in FORMATS:
            raise InputError(f"`format` must be 'parquet', 'csv' or 'npz', but it is {format!r}.")
        if interval is not None and not 0 < interval < 1:
            raise InputError(f"`interval` must be in (0, 1) or None, but it is {interval!r}.")
        if format == "parquet":
            import_pyarrow()
        self.output_dir = Path(output_dir)
        self.format: Format = format
        self.probs = probs
        self.interval = interval
        self.overwrite = overwrite
        self.written: dict[Path, int] = {}
        self._files: dict[int, PredictionFile] = {}
        self._counts: dict[int, int] = {}
        self._warned = False
        self._gathered = GatheredStage()

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise errors before the first batch that would otherwise come after the last."""
        if stage != "predict":
            return
        check_strategy(trainer, type(self).__name__, runs_sharded=True)
        if is_param_in_hook_signature(pl_module.predict_step, "dataloader_iter", explicit=True):
            raise UnsupportedError(
                "PredictionWriter does not support `predict_step(dataloader_iter)`, which hides batches from hooks."
            )
        self.written = {}
        self._warned = False
        self._discard()  # needed if another callback's `on_exception` failed before this one's
        with raising_on_all_ranks(trainer):
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"`output_dir` must be a directory, but {self.output_dir} cannot be one: {error.strerror}."
                ) from error
            found = sorted(named_files(self.output_dir, self.format))
            if found and not self.overwrite:
                raise InputError(
                    f"`output_dir` already holds predictions: {found[0]}. Pass `overwrite=True` to replace them, or another "
                    "directory."
                )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the parameters of a sharded model: for a prediction, Lightning may give a rank one batch less than another."""
        self._gathered.start(pl_module)

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
                f"PredictionWriter writes predictions of this package, but `predict_step` of {type(pl_module).__name__} returned "
                f"{'a ' if outputs is not None else ''}{type(outputs).__name__}. Use one of its modules, or pass `attach=True` to a callback, "
                "such as `FitGMM(attach=True)`, to replace the predictions of an unmodified module."
            )
        block = self._block(outputs)
        index, keep = self._rows(trainer, batch, batch_idx, dataloader_idx, len(outputs))
        block = {"index": index.numpy(), **block}
        if keep is not None:
            block = {name: values[keep.numpy()] for name, values in block.items()}
        if dataloader_idx not in self._files:
            loader = f"-loader{dataloader_idx}" if len(loader_list(trainer.predict_dataloaders)) > 1 else ""
            path = self.output_dir / f"predictions{loader}-rank{trainer.global_rank}.{self.format}"
            self._files[dataloader_idx] = FILES[self.format](path, block)
        self._files[dataloader_idx].add(block)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the files their names once all ranks are done, and remove those of an earlier run."""
        self._gathered.end()
        for file in self._files.values():
            file.close()
        trainer.strategy.barrier("lightning_uq_predictions")
        for file in self._files.values():
            file.partial.replace(file.path)
        self.written = {file.path: file.rows for file in self._files.values()}
        self._files = {}
        for path, (_, rank) in named_files(self.output_dir, self.format).items():
            mine = rank == trainer.global_rank or (trainer.is_global_zero and rank >= trainer.world_size)
            if mine and path not in self.written:
                path.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove incomplete files."""
        self._gathered.end()
        self._discard()
        if trainer.state.fn == TrainerFn.PREDICTING and starts_processes(trainer):
            for path in self.output_dir.glob(f".predictions*.{self.format}{PARTIAL}"):
                path.unlink()  # left by spawned ranks, which ended without notice

    def _discard(self) -> None:
        files, self._files, self._counts = self._files, {}, {}
        with ExitStack() as stack:  # discards all of them, even if one fails
            for file in files.values():
                stack.callback(file.discard)

    # ------------------------------------------------------------------ rows and columns

    def _block(self, prediction: Prediction) -> Block:
        """The columns of a prediction, without its index."""
        named = self._named(prediction)
        if not self.probs:
            named.pop("probs", None)
        block: Block = {}
        for name, values in named.items():
            if prediction.map_shape and not FILES[self.format].holds_maps:
                raise InputError(
                    f"A table needs numbers [B] or [B, D], but `{name}` of the {type(prediction).__name__} has shape "
                    f"{list(values.shape)}. Pass `format='npz'`, which holds arrays."
                )
            half = values.dtype in (torch.float16, torch.bfloat16)
            block[name] = (values.float() if half else values).cpu().numpy()
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
        """The index [B] of a batch's rows, and the mask of those that are not padding; None if all of them count."""
        loader = loader_list(trainer.predict_dataloaders)[dataloader_idx]
        carried = batches.sample_index(batch)
        sampler = _sampler(loader)
        if trainer.world_size > 1:
            _check_sharing(sampler, carried is not None)
        # For prediction, Lightning wraps the batch sampler and records the indices that it yields.
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
                f"The `index` of the rows is unknown: on several ranks, a {type(loader).__name__} without a batch sampler does not "
                "provide it. Make each batch a mapping with a key `index`."
            )
        keep = None
        if not is_instance(sampler, UnrepeatedDistributedSampler):
            keep = batches.unpadded_rows(loader, batch_idx, size if position is None else len(position))
        if index.shape != (size,) or (keep is not None and len(keep) != size):
            raise InputError(
                f"Each of the {size} predictions of batch {batch_idx} must have an index, but "
                + (
                    f"`index` of the batch has shape {list(index.shape)}."
                    if carried is not None
                    else f"the sampler yielded {len(index)}. Add a key `index` to the batch."
                )
            )
        return index.long(), keep


def _sampler(loader: Any) -> Any:
    return getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)


def _check_sharing(sampler: Any, carried: bool) -> None:
    """Reject loaders from which several ranks would predict the same samples."""
    # Lightning divides the indices of a custom sampler among the ranks, but each rank has its own copy of it.
    inner = users_sampler(sampler)
    if isinstance(inner, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise InputError(
            f"The data loader must not shuffle, but it has a {type(inner).__name__}. Each rank would draw its own order, so some samples would "
            "be predicted twice and others never. Pass `shuffle=False`."
        )
    if isinstance(sampler, SequentialSampler | RandomSampler) and not carried:
        raise InputError(
            "The data loader has no distributed sampler, so every rank would predict all samples. Keep `use_distributed_sampler` "
            "on. If each rank has its own data, give each batch a key `index`."
        )
