"""Run the chosen command, and print errors in one line."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lightning_uq.cli.errors import UsageError, one_line, recoverable_errors
from lightning_uq.errors import is_interrupt
from lightning_uq.version import __version__

DEBUG = "LIGHTNING_UQ_DEBUG"

# Each is a function in a file of its name. The file is imported when the command runs, since importing torch and Lightning takes seconds.
_COMMANDS = ("compare", "report", "evaluate", "score", "active", "bandit")
_LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

_HELP = f"""\
usage: lightning-uq [-h] [--version] COMMAND ...

Uncertainty quantification for PyTorch Lightning.

commands:
  compare    train and evaluate uncertainty methods side by side on one data set
  report     write the page, the figures and the table of a run again: RUN_DIR
  evaluate   measure accuracy, calibration and OOD detection of checkpoints: --run FILE.ckpt --data digits --out FILE.json
  score      write predictions and scores for each row of a file: MODEL DATA --out FILE.parquet
  active     measure learning curves of strategies that choose which samples to label next
  bandit     measure the regret of methods that choose actions by Thompson sampling
  fit        train a module: --config FILE.yaml
  validate   run one validation epoch: --config FILE.yaml --ckpt_path FILE.ckpt
  test       run one test epoch: --config FILE.yaml --ckpt_path FILE.ckpt
  predict    predict with a trained module: --config FILE.yaml --ckpt_path FILE.ckpt

`lightning-uq COMMAND --help` lists the options of a command. The commands fit, validate, test and predict run LightningCLI
with the modules, callbacks and data modules of this package and of your own. Python imports also search the working directory.

Errors in the input are printed in one line. Set the environment variable {DEBUG}=1 to see the traceback.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit code: 0 for success, and, after one line on stderr, 2 for an error in the user's input and 130 for an interrupt.
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
        return 130  # the shell's convention: 128 + SIGINT


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
