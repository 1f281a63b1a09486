"""``lightning-uq fit``, ``validate``, ``test`` and ``predict``: LightningCLI with this package's error messages."""

import os
import warnings
from typing import Any, NoReturn

from lightning_uq.checkpoint_files import is_file, read_checkpoint
from lightning_uq.cli.errors import UsageError, missing_extra
from lightning_uq.errors import UQError

_EVALUATING = ("validate", "test", "predict")


def run_lightning(arguments: list[str], *, from_process: bool) -> None:
    """Run LightningCLI.

    Args:
        arguments: The command and its options.
        from_process: Whether these are the arguments of the process, which other ranks are started with.

    Raises:
        UsageError: The options or the configuration are invalid.
        MissingExtraError: jsonargparse is not installed.
    """
    try:
        import jsonargparse  # noqa: F401  # LightningCLI would fail without naming our extra
    except ImportError as error:
        raise missing_extra("jsonargparse") from error
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from lightning_uq.cli.help import ShortHelpFormatter, class_list

    if (option := _option_of_class_list(arguments)) is not None:
        print(class_list(option))
        return
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about how Lightning calls it

    class Parser(LightningArgumentParser):
        """Raises an error instead of printing it with the usage. Options cannot be abbreviated."""

        def __init__(self, *args: Any, needs_weights: bool = False, **kwargs: Any) -> None:
            kwargs.setdefault("formatter_class", ShortHelpFormatter)
            super().__init__(*args, **kwargs)
            self.allow_abbrev = False
            if needs_weights:
                text = "Without --ckpt_path, use the initial weights of the module."
                self.add_argument("--untrained", action="store_true", help=text)

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:  # jsonargparse tries one type after another
                super().error(message, ex)
            raise UsageError(message) from ex

    class CommandLine(LightningCLI):
        """Writes predictions, and turns errors of a constructor into errors of the configuration."""

        def _parse_ckpt_path(self) -> None:
            # Lightning would replace the given configuration with the one stored in the checkpoint.
            command = self.config.get("subcommand")
            path = self.config[command].get("ckpt_path") if command else None
            if path and is_file(path):
                read_checkpoint(path, "`ckpt_path` must be a checkpoint of plain data")

        def before_instantiate_classes(self) -> None:
            """Put folders below ``default_root_dir``, and raise an error if untrained weights would be evaluated."""
            command = self.config["subcommand"]
            options = self.config[command]
            options.trainer = _with_root_dir(options.trainer, str(options.trainer.default_root_dir or "."))
            if command in _EVALUATING and options.ckpt_path is None and not options.untrained:
                raise UsageError(
                    f"{command} needs trained weights: pass --ckpt_path FILE.ckpt, or --untrained to use the initial weights of the "
                    "module."
                )

        def before_predict(self) -> None:
            """Write the predictions of this package's modules and callbacks, unless a callback of the user writes them."""
            from lightning.pytorch.callbacks import BasePredictionWriter

            from lightning_uq import PredictionWriter, UncertaintyModule
            from lightning_uq.lightning_trees import is_instance

            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
            ours = isinstance(self.model, UncertaintyModule) or any(getattr(c, "attach", False) for c in callbacks)
            if ours and not any(is_instance(c, BasePredictionWriter, PredictionWriter) for c in callbacks):
                has_maps = getattr(getattr(self.model, "task", None), "has_positions", False)
                callbacks.append(
                    PredictionWriter(self.trainer.default_root_dir, "npz" if has_maps else "csv", overwrite=True)
                )
            # The Trainer would keep all predictions in memory to return them, but nothing reads them.
            self.config_init["predict"]["return_predictions"] = False

        def after_predict(self) -> None:
            """Print which files this process wrote."""
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # set by its connector
                for path, rows in getattr(callback, "written", {}).items():
                    print(f"Wrote {rows} predictions to {path}")

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                if isinstance(error, UQError):
                    raise
                raise UsageError(str(error)) from error

    with warnings.catch_warnings():
        # Lightning's own warnings about its torch version and about `args`.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
        warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended to run from within Python.*")
        try:
            CommandLine(
                parser_class=Parser,
                parser_kwargs={
                    "prog": "lightning-uq",
                    **{command: {"needs_weights": True} for command in _EVALUATING},
                },
                save_config_kwargs={"overwrite": True},
                # None: LightningCLI reads the arguments of the process.
                args=None if from_process else arguments,
            )
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise UsageError(f"the checkpoint does not fit the configured module: {str(error)[:400]} ...") from error


def _with_root_dir(value: Any, root: str) -> Any:
    """A value of the configuration with ``{default_root_dir}`` replaced in all of its texts.

    Example:
        >>> _with_root_dir([{"dirpath": "{default_root_dir}/checkpoints"}], "runs/mine")
        [{'dirpath': 'runs/mine/checkpoints'}]
    """
    from jsonargparse import Namespace

    if isinstance(value, str):
        return value.replace("{default_root_dir}", root)
    if isinstance(value, list):
        return [_with_root_dir(one, root) for one in value]
    if isinstance(value, dict):
        return {key: _with_root_dir(one, root) for key, one in value.items()}
    if isinstance(value, Namespace):
        kind: Any = type(value)
        return kind(**{key: _with_root_dir(one, root) for key, one in vars(value).items()})
    return value


def _option_of_class_list(arguments: list[str]) -> str | None:
    """``"model"`` or ``"data"`` for ``--model.help`` or ``--data.help`` without the name of a class, else None."""
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument in ("--model.help", "--data.help") and following.startswith("-"):
            return argument.removeprefix("--").removesuffix(".help")
    return None
