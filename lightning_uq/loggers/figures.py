"""One figure, written to each of a Trainer's loggers in that logger's own way."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_uq.checkpoint_files import in_folder
from lightning_uq.lightning_trees import is_instance
from lightning_uq.report import to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(trainer: Trainer, name: str, figure: "Figure") -> None:
    """Write a figure to the Trainer's loggers, at its global step; only rank 0 writes.

    ==============  ====================================================================
    logger          where the figure is
    ==============  ====================================================================
    TensorBoard     images, under the name
    CSV             a file ``<name>-<step>.png`` beside ``metrics.csv``
    W&B             media, under the name
    MLflow          an artifact ``figures/<name>/<step>.png`` of the run
    ==============  ====================================================================

    Any other logger is left out, with a warning. The CSV logger's files have "-" for each "/" of the name.

    Args:
        trainer: The Trainer.
        name: Name of the figure, such as ``"val_reliability"``.
        figure: The figure.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from lightning_uq.report import new_figure
        >>> logger = CSVLogger(tempfile.mkdtemp())
        >>> log_figure(Trainer(logger=logger, accelerator="cpu"), "test_mine", new_figure(3, 2))
        >>> [path.name for path in Path(logger.log_dir).glob("*.png")]
        ['test_mine-0000000.png']
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by its connector
        return
    for logger in trainer.loggers:
        write = next((write for kind, write in _WRITERS.items() if is_instance(logger, kind)), None)
        if write is None:
            rank_zero_warn(f"{type(logger).__name__} gets no figures. Figures are written to {', '.join(_names())}.")
        else:
            write(logger, name, figure, trainer.global_step)


def takes_figures(trainer: Trainer) -> bool:
    """Whether :func:`log_figure` can write to all of the Trainer's loggers, and there is one.

    Example:
        >>> takes_figures(Trainer(logger=False, accelerator="cpu"))
        False
    """
    return bool(trainer.loggers) and all(
        any(is_instance(logger, kind) for kind in _WRITERS) for logger in trainer.loggers
    )


def _to_tensorboard(logger: Any, name: str, figure: "Figure", step: int) -> None:
    logger.experiment.add_figure(name, figure, step, close=False)


def _to_csv(logger: Any, name: str, figure: "Figure", step: int) -> None:
    _ = logger.experiment  # it makes the folder, and warns of one that is not empty
    path = in_folder(logger.log_dir, f"{name.replace('/', '-')}-{step:07d}.png")
    with get_filesystem(path).open(path, "wb") as file:
        file.write(to_png(figure))


def _to_wandb(logger: Any, name: str, figure: "Figure", step: int) -> None:
    logger.log_image(name, [figure], step)


def _to_mlflow(logger: Any, name: str, figure: "Figure", step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"figures/{name}/{step:07d}.png")


_WRITERS: dict[type, Callable[[Any, str, "Figure", int], None]] = {
    TensorBoardLogger: _to_tensorboard,
    CSVLogger: _to_csv,
    WandbLogger: _to_wandb,
    MLFlowLogger: _to_mlflow,
}


def _names() -> list[str]:
    return [kind.__name__ for kind in _WRITERS]
