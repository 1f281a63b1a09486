"""Writes the page of a user's own module at the end of a test."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_uq import batches
from lightning_uq.callbacks.calibrating import calibrating_callbacks, calibrating_transforms
from lightning_uq.callbacks.ood_scores import OODScorer
from lightning_uq.compare.directory.writing import write
from lightning_uq.compare.pages.drawing import draw
from lightning_uq.compare.records import FOLDER, Record
from lightning_uq.compare.training.evaluation import ood_score
from lightning_uq.compare.uncertainty_report.kept_rows import KeptRows
from lightning_uq.compare.uncertainty_report.results import make_own_results
from lightning_uq.errors import InputError, NotFiniteError, UnsupportedError
from lightning_uq.functional.validation import check_integer
from lightning_uq.lightning_trees import is_instance
from lightning_uq.loggers import LogFigures, log_figure, takes_figures
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.predictions import Prediction
from lightning_uq.report import jinja_environment, new_figure, writable_directory
from lightning_uq.running.batch_prediction import predict_batch
from lightning_uq.running.classes import labelled_batch
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.finite import check_numbers
from lightning_uq.running.loaders import check_loader, exact_loader, loader_list
from lightning_uq.running.logits import LogitReader, UnpackBatch
from lightning_uq.running.overriding import check_hooks
from lightning_uq.running.ranks import gather_objects, raise_on_all_ranks, raising_on_all_ranks
from lightning_uq.running.row_sample import MAX_ROWS
from lightning_uq.running.step_input import StepInput
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.strategies import check_strategy
from lightning_uq.tasks import Task, describe


class UncertaintyReport(Callback):
    """Writes the page of ``lightning-uq compare`` for your own module at the end of a test.

    The page says in words how good and how calibrated the predictions are, with intervals over the test rows. It has a table, a reliability diagram or
    the coverage of intervals, risk and coverage, and, with out-of-distribution loaders, the histogram of a score. The directory then contains
    ``report.html``, ``results.json``, the figures and ``records/``. ``lightning-uq report DIRECTORY`` makes the page again. For a folder with the
    directories of several modules tested on the same rows, it compares the modules. The numbers are also logged as ``report/<key>``, and the
    figures go to the Trainer's loggers (:func:`~lightning_uq.loggers.log_figure`) as ``test_<figure>``.

    Predictions of this package's modules include all calibrations that they carry. For any other LightningModule, predictions are made from its outputs and
    calibrated by the Trainer's fitted callbacks, such as ``TemperatureScaling``, with ``attach`` or without; the page names these. This costs one more forward pass per batch, in evaluation mode and with an isolated random state, on a copy of the batch. Each sample counts once on any
    number of ranks, and rank 0 writes. The scores of each row are kept, about 100 bytes per row, for at most ``max_rows`` rows, or else for a random sample.
    If the data have no targets or a task has no scores, no page is written, and one warning says why. Under ``fast_dev_run``, nothing is written.

    Args:
        directory: The directory of the page.
        name: Name of the module on the page. None: the name of its class.
        ood: Out-of-distribution loaders by name, or a function that returns them. None: the data module's ``ood_dataloaders()``, if it has any.
        ood_score: Name of the score that detects out-of-distribution inputs: one of the prediction, or of a callback such as ``FitGMM``. None: that of
            the Trainer's first callback with a score, or else the module's own ``ood_score``, or else the predictive entropy or the task's default.
        predict_fn: ``predict_fn(model, x)`` returns the input of ``output``, if ``forward`` does not return the outputs.
        unpack_batch: ``unpack_batch(batch) -> (x, target)``.
        output: What an unmodified module returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the outputs.
        task: What the outputs of an unmodified module mean: a Task or its name. None: one label per input, or the task that the targets imply.
        in_distribution: Index of the test loader for the page.
        max_rows: The largest number of rows to keep scores of.
        overwrite: Whether to replace the results of an earlier run in the directory.

    Raises:
        InputError: An argument is out of range, or the directory already holds results or cannot be written to.
        MissingExtraError: matplotlib or jinja2 is not installed; raised before anything runs.
        UnsupportedError: Under FSDP, DeepSpeed or model parallelism, or with ``test_step(dataloader_iter)``.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_uq import DeterministicModule
        >>> x, y = torch.randn(90, 4), torch.arange(90) % 3
        >>> directory = Path(tempfile.mkdtemp())
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        >>> trainer = Trainer(callbacks=[UncertaintyReport(directory)], enable_model_summary=False, **quiet)
        >>> _ = trainer.test(DeterministicModule(nn.Linear(4, 3)), DataLoader(TensorDataset(x, y), 30), verbose=False)
        >>> sorted(path.name for path in directory.iterdir())[:3]
        ['records', 'reliability_DeterministicModule.png', 'report.html']
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that hooks call ``super()``."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str | None = None,
        ood: Mapping[str, Any] | Callable[[], Any] | None = None,
        ood_score: str | None = None,
        predict_fn: PredictFn | str | None = None,
        unpack_batch: UnpackBatch | str | None = None,
        output: Output = "logits",
        task: Task | str | None = None,
        in_distribution: int = 0,
        max_rows: int = MAX_ROWS,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"`name` must be made of letters, digits, '_', '-' and '.', but it is {name!r}.")
        check_integer("in_distribution", in_distribution, 0)
        check_integer("max_rows", max_rows, 2)
        if isinstance(ood, Mapping):
            _checked_loaders(ood, "`ood`")
        self.directory = Path(directory)
        self.name = name
        self.ood = ood
        self.ood_score = ood_score
        self.read = LogitReader(predict_fn, unpack_batch, output, task)
        self.in_distribution = in_distribution
        self.max_rows = max_rows
        self.overwrite = overwrite
        self._step_input = StepInput()
        self._reset()

    def _reset(self) -> None:
        self._batch: Any = None
        self._rows = KeptRows(self.max_rows)
        self._num_indices: int | None = None
        self._calibrations: list[PredictionTransform] | None = None
        self._reason: str | None = None
        self._error: Exception | None = None

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject invalid settings before anything runs."""
        check_strategy(trainer, type(self).__name__)
        if stage != "test" or _is_trial(trainer):
            return
        new_figure(1, 1)
        jinja_environment()
        if is_param_in_hook_signature(pl_module.test_step, "dataloader_iter", explicit=True):
            raise UnsupportedError(
                "UncertaintyReport does not support `test_step(dataloader_iter)`, which hides batches from hooks."
            )
        self._step_input = StepInput()
        with raising_on_all_ranks(trainer):
            if trainer.is_global_zero:
                results = writable_directory(self.directory) / "results.json"
                if results.exists() and not self.overwrite:
                    raise InputError(
                        f"`directory` already holds results: {results}. Pass `overwrite=True` to replace them, or another directory."
                    )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the rows."""
        self._reset()
        self.read.inferred_task = None  # the test set may be a different one
        number = len(loader_list(trainer.test_dataloaders))
        if self.in_distribution >= number:
            raise InputError(
                f"`in_distribution` must be the index of one of the {number} test loaders, but it is {self.in_distribution}."
            )

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the batch."""
        if dataloader_idx == self.in_distribution and not _is_trial(trainer):
            self._batch = batches.own_batch(batch)
            self._step_input.start_reading(pl_module, batch, self.read)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch's rows."""
        copied, self._batch = self._batch, None
        if copied is None:
            return
        self._step_input.end(pl_module, "test_step")
        if self._reason is not None or self._error is not None:
            return
        try:
            with evaluating(pl_module, trainer):
                self._add(trainer, pl_module, copied, batch_idx)
        except NotFiniteError as error:
            self._fail(error, trainer)
        except InputError as error:
            self._reason = str(error)
        except Exception as error:
            self._fail(error, trainer)

    def _fail(self, error: Exception, trainer: Trainer) -> None:
        """Raise an error; with several ranks, raise it on all of them at the end, since the others would wait for this one."""
        if trainer.world_size == 1:
            raise error
        self._error = error

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the out-of-distribution loaders, and write the page."""
        if _is_trial(trainer):
            return
        raise_on_all_ranks(self._error, trainer)
        reason = next(filter(None, gather_objects(self._reason, trainer)), None)
        if reason is None:
            self.read.agree_on_task(pl_module, trainer, is_first=self._rows.num_seen == 0)
            self._finish(trainer, pl_module)
        else:
            rank_zero_warn(f"UncertaintyReport writes no page: {reason}")
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report an empty test set, for which Lightning calls no other hook."""
        if stage == "test":
            batches.check_not_empty(trainer, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Reset the rows."""
        self._step_input.drop()
        self._reset()

    # ------------------------------------------------------------------ rows

    def _add(self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> None:
        self.read.look_at_task(model, batch, trainer, is_first=self._rows.num_seen == 0)
        outputs, prediction, score = self._predict(trainer, model, batch, check=batch_idx == 0)
        check_numbers(outputs, self.read.task(model))
        target = labelled_batch(self.read, model, batch, outputs, "the test data")
        positions, keep = batches.distributed_rows(
            loader_list(trainer.test_dataloaders)[self.in_distribution], batch_idx, len(target)
        )
        if positions is None or keep is None:
            positions, keep = self._next_positions(trainer, self._rows, len(target)), torch.ones(len(target)).bool()
        index = batches.sample_index(batch)
        positions = positions if index is None else index.cpu().long()
        task = self.read.task(model)
        scores = task.row_scores(prediction.to("cpu"), target.cpu())
        if not scores:
            raise InputError(f"{describe(task)} has no `row_scores`, which the page needs.")
        scores = {**scores, "ood_score": score.cpu(), "target": _mark(target.cpu())}
        self._num_indices = getattr(prediction, "num_indices", None)
        if bool(keep.any()):
            self._rows.add(positions[keep], {name: one[keep] for name, one in scores.items()})

    def _predict(
        self, trainer: Trainer, model: LightningModule, batch: Any, *, check: bool
    ) -> tuple[Tensor, Prediction, Tensor]:
        """The outputs, the prediction and the score of a batch."""
        name = self._score_name(trainer, model)
        with ExitStack() as stack:
            provided = [
                stack.enter_context(one.ood_scores(model))
                for one in _scorers(trainer, model)
                if name in one.ood_score_names
            ]
            if self._calibrations is None:  # the callbacks verified their states at the first batch
                self._calibrations = calibrating_transforms(trainer, model, self.read)
            outputs, prediction = predict_batch(
                self.read, model, batch, trainer, check=check, further=self._calibrations
            )
            return outputs, prediction, ood_score(name, prediction, provided)

    def _score_name(self, trainer: Trainer, model: LightningModule) -> str:
        if self.ood_score is not None:
            return self.ood_score
        provided = [name for one in _scorers(trainer, model) for name in one.ood_score_names]
        task, own = self.read.task(model), getattr(model, "ood_score", None)
        usual = "predictive_entropy" if "predictive_entropy" in task.score_names else task.ood_score
        is_own = isinstance(own, str) and (self.read.predict_fn is None or own in task.score_names)
        return next(iter(provided), None) or (str(own) if is_own else usual)

    @staticmethod
    def _next_positions(trainer: Trainer, rows: KeptRows, size: int) -> Tensor:
        """Unique positions [size] of rows, numbered in turns over the ranks."""
        return (rows.num_seen + torch.arange(size)) * trainer.world_size + trainer.global_rank

    # ------------------------------------------------------------------ the end

    def _finish(self, trainer: Trainer, model: LightningModule) -> None:
        ids, rows, num_seen = self._rows.gather(trainer, "UncertaintyReport")
        outside, sizes = self._outside(trainer, model)
        num_indices = next((one for one in gather_objects(self._num_indices, trainer) if one is not None), None)
        numbers: dict[str, float] = {}
        with raising_on_all_ranks(trainer):
            if trainer.is_global_zero and len(ids):
                record = Record(self.name or type(model).__name__, 0, {}, rows, ids, outside, num_indices)
                results = make_own_results(
                    record,
                    data=_name_of_data(trainer, self.in_distribution),
                    task=self.read.task(model),
                    score=self._score_name(trainer, model),
                    sizes={"test": num_seen, **sizes},
                    calibrated_by=[type(one).__name__ for one in calibrating_callbacks(trainer, model, self.read)],
                )
                self._write(trainer, results, record)
                numbers = {key: value["mean"] for key, value in results["rows"][0].items() if key != "method"}
        for key, value in gather_objects(numbers, trainer)[0].items():
            if value is not None:  # every rank has the same value; `sync_dist` only avoids a warning of Lightning
                model.log(f"report/{key}", value, batch_size=1, sync_dist=True)

    def _outside(self, trainer: Trainer, model: LightningModule) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The scores of the out-of-distribution rows, and their number per loader. A collective."""
        kept, sizes = [], {}
        for name, loader in self._ood_loaders(trainer).items():
            rows = KeptRows(self.max_rows)
            own = exact_loader(loader, trainer, name=f"`ood[{name!r}]`", limit=trainer.limit_test_batches)
            with raising_on_all_ranks(trainer), evaluating(model, trainer):
                for batch in own:
                    *_, score = self._predict(trainer, model, to_device(batch, model, trainer), check=False)
                    rows.add(self._next_positions(trainer, rows, len(score)), {"ood_score": score.cpu()})
            _, scores, sizes[name] = rows.gather(trainer, f"UncertaintyReport's `ood[{name!r}]`")
            kept += [scores["ood_score"]] if scores else []
        return ({"ood_score": torch.cat(kept)} if kept else {}), sizes

    def _ood_loaders(self, trainer: Trainer) -> dict[str, Any]:
        provider = getattr(getattr(trainer, "datamodule", None), "ood_dataloaders", None)
        if self.ood is None:
            return {} if provider is None else _checked_loaders(provider(), "what `ood_dataloaders` returns")
        return _checked_loaders(self.ood() if callable(self.ood) else self.ood, "`ood`")

    def _write(self, trainer: Trainer, results: Mapping[str, Any], record: Record) -> None:
        for old in (self.directory / FOLDER).glob("*.npz"):  # left by the run that is overwritten
            old.unlink()
        record.save(self.directory)
        records = {record.method: [record]}
        write(results, records, self.directory)
        figures = draw(results, records) if takes_figures(trainer) else {}
        if any(is_instance(one, LogFigures) for one in trainer.callbacks):  # type: ignore[attr-defined]  # it logs these itself
            figures = {name: one for name, one in figures.items() if not name.startswith(("reliability_", "intervals"))}
        for name, figure in figures.items():
            log_figure(trainer, f"test_{name}", figure)
        rank_zero_info(f"UncertaintyReport wrote {self.directory / 'report.html'}.")


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by its connector


def _scorers(trainer: Trainer, model: LightningModule) -> list[OODScorer]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    return [one for one in (*callbacks, model) if isinstance(one, OODScorer)]


def _mark(target: Tensor) -> Tensor:
    """One number [B] per row, which shows whether two runs tested the same rows."""
    return target.double().nan_to_num().flatten(1).sum(1) if target.ndim > 1 else target.double().nan_to_num()


def _checked_loaders(loaders: Any, name: str) -> dict[str, Any]:
    if not isinstance(loaders, Mapping):
        raise InputError(f"{name} must be a mapping from names to data loaders, but it is {type(loaders).__name__}.")
    for key, loader in loaders.items():
        check_loader(loader, f"`ood[{key!r}]`")
    return dict(loaders)


def _name_of_data(trainer: Trainer, number: int) -> str:
    """The name of the test data: that of the data module, or the class of the data set."""
    data = getattr(trainer, "datamodule", None)
    if data is None:
        data = getattr(loader_list(trainer.test_dataloaders)[number], "dataset", None)
        data = getattr(data, "dataset", data)  # of a subset
    name = getattr(data, "name", None)
    if isinstance(name, str):
        return name
    kind = type(data)
    return "test data" if data is None or kind.__module__.startswith("torch.") else kind.__name__
