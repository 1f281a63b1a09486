"""Choosing the command, and telling errors."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lightning_uq.cli.errors import UsageError, one_line, recoverable_errors
from lightning_uq.errors import is_interrupt
from lightning_uq.version import __version__

DEBUG = "LIGHTNING_UQ_DEBUG"

# Each is a function in a file of its name, which is loaded when it is called: torch and Lightning take seconds.
_COMMANDS = ("compare", "report", "evaluate", "score", "active", "bandit")
_LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

_HELP = f"""\
usage: lightning-uq [-h] [--version] COMMAND ...

Uncertainty quantification for PyTorch Lightning.

commands:
  compare    train and evaluate uncertainty methods side by side on one data set
  report     the page, the figures and the table of a comparison again: RUN_DIR
  evaluate   accuracy, calibration and detection of trained checkpoints, over runs: --run FILE.ckpt --data digits --ood 8,9
  score      predictions and scores of a trained model for each row of a file: MODEL DATA --out FILE.parquet
  active     learning curves of strategies that choose which samples to label next
  bandit     regret of uncertainty methods that choose actions by Thompson sampling, on problems of the Neural Testbed
  fit        train a module: --config FILE.yaml
  validate   one validation epoch: --config FILE.yaml --ckpt_path FILE.ckpt
  test       one test epoch: --config FILE.yaml --ckpt_path FILE.ckpt
  predict    predict with a trained module: --config FILE.yaml --ckpt_path FILE.ckpt

`lightning-uq COMMAND --help` lists the options of a command. The commands fit, validate, test and predict are LightningCLI
with the modules, callbacks and data modules of this package and of your own; imports search the working directory as well.

An error in the input is one line. Set the environment variable {DEBUG}=1 to see its traceback.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or, after one line on stderr, 2 if the user's input is at fault and 130 after an interrupt.

    Args:
        argv: The arguments; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, from_process=argv is None)
    except recoverable_errors() as error:
        if _is_debugging():
            raise
        print(f"lightning-uq: error: {one_line(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if _is_debugging() or not is_interrupt(error):
            raise
        text = str(error) if isinstance(error, KeyboardInterrupt) else ""
        print(f"lightning-uq: {text or 'interrupted'}", file=sys.stderr)
        return 130  # as a shell has it: 128 + SIGINT


def _is_debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def _run(arguments: list[str], *, from_process: bool) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        print(f"lightning-uq {__version__}")
        return 0
    # The working directory is searched for a user's modules, as with `python -m`.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if command in _COMMANDS:
        from lightning_uq.cli.options import run

        run(getattr(import_module(f"lightning_uq.cli.{command}"), command), arguments[1:])
        return 0
    if command in _LIGHTNING_COMMANDS:
        from lightning_uq.cli.fit import run_lightning

        run_lightning(arguments, from_process=from_process)
        return 0
    raise UsageError(
        f"unknown command {command!r}: choose from {', '.join((*_COMMANDS, *_LIGHTNING_COMMANDS))} (see --help)"
    )
