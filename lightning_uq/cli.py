"""The command line: ``lightning-uq compare``, ``evaluate`` and ``bandit``, and LightningCLI's ``fit``, ``validate``, ``test`` and ``predict``."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning_uq
from lightning_uq.errors import MissingExtraError, UQError

if TYPE_CHECKING:
    from rich.console import Console

DEBUG = "LIGHTNING_UQ_DEBUG"

_HELP = f"""\
usage: lightning-uq [-h] [--version] COMMAND ...

Uncertainty quantification for PyTorch Lightning.

commands:
  compare    train and evaluate uncertainty methods side by side on one data set
  evaluate   accuracy, calibration and detection of trained checkpoints, over runs: --run FILE.ckpt --data digits --ood 8,9
  bandit     regret of uncertainty methods that act on what they know: Thompson sampling, on problems of the testbed
  fit        train a module: --config FILE.yaml
  validate   one validation epoch: --config FILE.yaml --ckpt_path FILE.ckpt
  test       one test epoch: --config FILE.yaml --ckpt_path FILE.ckpt
  predict    predict with a trained module: --config FILE.yaml --ckpt_path FILE.ckpt

`lightning-uq COMMAND --help` lists the options of one. fit, validate, test and predict are LightningCLI over every
module, callback and data module of this package and of your own (the working directory is searched for imports).

A mistake in the input is told in one line; with the environment variable {DEBUG}=1 it comes with its traceback.
"""


class UsageError(UQError):
    """The command line, or a configuration file, cannot be understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code: 0, or 2 after one line on stderr for whatever the user can mend.

    Args:
        argv: The arguments; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, from_process=argv is None)
    except _mendable() as error:
        if os.environ.get(DEBUG):
            raise
        print(f"lightning-uq: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(arguments: list[str], *, from_process: bool) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        print(f"lightning-uq {lightning_uq.__version__}")
        return 0
    # What a user's configuration names may lie where the command is run, as with `python -m`.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if command == "compare":
        return _compare(arguments[1:])
    if command == "evaluate":
        return _evaluate(arguments[1:])
    if command == "bandit":
        return _bandit(arguments[1:])
    if command in ("fit", "validate", "test", "predict"):
        return _lightning(arguments, from_process=from_process)
    raise UsageError(
        f"unknown command {command!r}: choose from compare, evaluate, bandit, fit, validate, test, predict (see --help)"
    )


def _mendable() -> tuple[type[BaseException], ...]:
    """Errors that say what the user can do: ours, Lightning's about its configuration, and files that cannot be opened."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return UQError, MisconfigurationException, FileNotFoundError, PermissionError, IsADirectoryError


_UNION = "Does not validate against any of the Union subtypes"
_NOISE = (_UNION, "Subtypes:", "Errors:", "Given value type:", "- Expected a <class 'NoneType'>", f"- {_UNION}")


def _one_line(error: BaseException) -> str:
    """An error's message without line breaks, and without what jsonargparse says around the one reason that helps."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if _UNION in text:
        lines = [line.removeprefix("- ") for line in lines if not line.startswith(_NOISE)]
        lines = [line for line in lines if not line.startswith("Given value: ") or len(line) < 80]
        # Where a constructor of ours refused a value, the other types that it is not do not matter.
        lines = [line for line in lines if line.startswith("Expected argument `")] or lines
    return " ".join(lines) or type(error).__name__


# ---------------------------------------------------------------------- compare


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


_ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


def _compare_parser() -> _Parser:
    parser = _Parser(
        prog="lightning-uq compare",
        description="Train and evaluate uncertainty methods on the same splits with the same backbone and training; print one "
        "table, and write results.json, report.html and figures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        default="digits",
        help="digits (default), testbed (with --problem), or an .npz file with arrays x [N, ...] of numbers and y [N] of "
        "integer labels",
    )
    parser.add_argument(
        "--problem",
        metavar="FILE.npz",
        help="a stored problem of the Neural Testbed: adds kl_tau1 and kl_tau10 to each row",
    )
    parser.add_argument(
        "--ood-classes",
        type=_integers,
        metavar="LABELS",
        help="labels held out as out-of-distribution data, such as 8,9 (default: 8,9 of the digits, none of a file)",
    )
    parser.add_argument(
        "--methods", type=_names, metavar="NAMES", help="such as softmax,ensemble (default: all that fit the data)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--max-epochs", type=int, help="epochs of a training at most (default 100)")
    parser.add_argument(
        "--accelerator",
        choices=_ACCELERATORS,
        default="cpu",
        help="Lightning's accelerator (default cpu, where results repeat)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where to write (default runs/compare)")
    return parser


def _compare(arguments: list[str]) -> int:
    parsed = _compare_parser().parse_args(arguments)
    console = _console()
    from lightning_uq.compare import Configuration, Recipe, compare, write
    from lightning_uq.compare.terminal import TerminalProgress
    from lightning_uq.report import print_table

    recipe = Recipe() if parsed.max_epochs is None else Recipe(max_epochs=parsed.max_epochs)
    configuration = Configuration(
        parsed.data,
        parsed.ood_classes,
        parsed.methods,
        parsed.seeds,
        parsed.seed,
        parsed.accelerator,
        recipe,
        parsed.problem,
    )
    with _output_directory(parsed.out):
        with TerminalProgress(_console(stderr=True)) as progress:
            comparison = compare(configuration, progress)
        files = write(comparison, parsed.out)
    print_table(comparison.rows, console)
    figures = sum(name.endswith(".png") for name in files)
    console.print(
        f"Wrote results.json, report.html and {figures} figures to {parsed.out}", highlight=False, soft_wrap=True
    )
    return 0


def _console(*, stderr: bool = False) -> "Console":
    """Where tables go, or progress."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise _missing_extra("rich") from error
    console = Console(stderr=stderr)
    if not stderr and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a file or a pipe has no width; rich would take 80
    return console


@contextmanager
def _output_directory(path: Path) -> Iterator[None]:
    """The directory to write figures and results to, which is gone again where nothing came to be written."""
    from lightning_uq.report import writable_directory
    from lightning_uq.report.plots import new_figure

    # What would fail at the end fails now: a missing matplotlib, a directory that cannot be written to.
    new_figure(1, 1)
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    writable_directory(path)
    try:
        yield
    except BaseException:
        for directory in made:
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


def _missing_extra(module: str) -> MissingExtraError:
    return MissingExtraError(
        f"The command line needs {module}, which the extra `cli` brings: pip install 'lightning-uq[cli]'."
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected labels separated by commas, such as 8,9, but got {text!r}"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


# ---------------------------------------------------------------------- evaluate


def _evaluate_parser() -> _Parser:
    parser = _Parser(
        prog="lightning-uq evaluate",
        description="Evaluate trained checkpoints as the DDU experiments do: accuracy, calibration error and two "
        "out-of-distribution scores, before and after temperature scaling, as mean and standard error over runs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run",
        dest="runs",
        action="append",
        nargs="+",
        required=True,
        metavar="CKPT",
        help="a Lightning checkpoint, or those of an ensemble's members; give --run again for each further run",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="digits, mnist, fashion_mnist, kmnist, dirty_mnist, cifar10, cifar100, svhn, an .npz file, or the import path of a "
        "LightningDataModule",
    )
    parser.add_argument(
        "--ood",
        required=True,
        help="labels held out of digits or a file, such as 8,9; or a data set of like images, such as svhn; or one of the "
        "data module's ood_dataloaders()",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where to write")
    parser.add_argument(
        "--model-type",
        choices=("softmax", "ensemble", "gmm"),
        default="softmax",
        help="what m1 and m2 are: logsumexp and entropy (softmax, default), mutual information and entropy (ensemble), "
        "feature density and entropy of its posterior (gmm)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--module", help="import path of the LightningModule, for checkpoints that do not name theirs")
    source.add_argument("--network", help="import path of what builds the network alone, in place of a module")
    parser.add_argument("--init-args", type=_mapping, default={}, metavar="JSON", help="arguments of either")
    parser.add_argument(
        "--data-args", type=_mapping, default={}, metavar="JSON", help='such as \'{"root": "data", "batch_size": 256}\''
    )
    parser.add_argument(
        "--data-seeds",
        type=_integers,
        default=(),
        metavar="SEEDS",
        help="seeds of the split that each run (or each checkpoint) was trained on, such as 1,2,3",
    )
    parser.add_argument("--feature-layer", default="auto", help="gmm: name of the layer whose input is the features")
    parser.add_argument(
        "--regularization",
        type=_regularization,
        default="oas",
        help="gmm: oas (default), ddu (the original's schedule of jitters), or a number",
    )
    parser.add_argument("--accelerator", choices=_ACCELERATORS, default="cpu", help="where to compute (default cpu)")
    return parser


def _evaluate(arguments: list[str]) -> int:
    parsed = _evaluate_parser().parse_args(arguments)
    from lightning_uq.evaluate import Settings, evaluate, write
    from lightning_uq.report import writable_directory

    given = {name: value for name, value in vars(parsed).items() if name != "out"}
    settings = Settings(**given)
    if parsed.out.is_dir():
        raise UsageError(f"argument --out: expected a file to write to, but {parsed.out} is a directory")
    writable_directory(parsed.out.parent)
    result = evaluate(settings, lambda path: print(path, file=sys.stderr))
    write(result, parsed.out)
    for key, mean in result["mean"].items():
        error = result["std"][key]
        print(f"{key:14s} {mean:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    print(f"Wrote {parsed.out}")
    return 0


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, but {text!r} is none: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, but got {text!r}")
    return found


def _regularization(text: str) -> str | float:
    if text in ("oas", "ddu"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected oas, ddu or a number, but got {text!r}") from None


# ---------------------------------------------------------------------- bandit


def _bandit_parser() -> _Parser:
    parser = _Parser(
        prog="lightning-uq bandit",
        description="Let the Neural Testbed's agents play bandits by Thompson sampling, all the same ones: at each step an agent "
        "takes what is best under one hypothesis, and learns from the reward. Print each one's regret, and write results.json "
        "and regret.png.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        type=_names,
        metavar="NAMES",
        help="such as epinet,softmax (default: epinet,ensemble_prior,ensemble,dropout,softmax,uniform, of which the last takes "
        "any action; also hypermodel)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of problems, one a seed (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--steps", type=int, default=1000, help="actions of a run (default 1000)")
    parser.add_argument("--input-dim", type=int, default=2, metavar="D", help="dimension of an action (default 2)")
    parser.add_argument("--num-actions", type=int, metavar="A", help="actions to choose among (default 50 D)")
    parser.add_argument(
        "--temperature", type=float, default=0.1, metavar="T", help="how random rewards are (default 0.1)"
    )
    parser.add_argument("--fresh-actions", action="store_true", help="offer other actions at each step")
    parser.add_argument("--out", type=Path, default=Path("runs/bandit"), help="where to write (default runs/bandit)")
    return parser


def _bandit(arguments: list[str]) -> int:
    parsed = _bandit_parser().parse_args(arguments)
    console = _console()
    from lightning_uq.compare.bandit import COLUMNS, BanditConfiguration, play, write
    from lightning_uq.compare.terminal import TerminalProgress
    from lightning_uq.report.terminal import make_table

    given = {name: value for name, value in vars(parsed).items() if name != "out"}
    configuration = BanditConfiguration(**given)
    with _output_directory(parsed.out):
        with TerminalProgress(_console(stderr=True), "steps") as progress:
            result = play(configuration, progress)
        write(result, parsed.out)
    console.print(make_table(result.rows(), COLUMNS))
    console.print(f"Wrote results.json and regret.png to {parsed.out}", highlight=False, soft_wrap=True)
    return 0


# ---------------------------------------------------------------------- fit, validate, test, predict


def _lightning(arguments: list[str], *, from_process: bool) -> int:
    try:
        import jsonargparse  # noqa: F401  # LightningCLI would fail without naming our extra
    except ImportError as error:
        raise _missing_extra("jsonargparse") from error
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about how Lightning calls it

    class Parser(LightningArgumentParser):
        """Tells an error in one line, without the usage before it; an option is named in full."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.allow_abbrev = False

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:  # one of jsonargparse's trials: it goes on with the next
                super().error(message, ex)
            raise UsageError(message) from ex

    class CommandLine(LightningCLI):
        """Tells a constructor's refusal of its arguments as a mistake in the configuration."""

        def _parse_ckpt_path(self) -> None:
            # Lightning would put the configuration that a checkpoint remembers in the place of the one given here.
            command = self.config.get("subcommand")
            path = self.config[command].get("ckpt_path") if command else None
            if path and Path(path).is_file():
                _check_checkpoint(path)

        def before_predict(self) -> None:
            """Write what is predicted, where that is this package's and no callback of the user's does it."""
            from lightning.pytorch.callbacks import BasePredictionWriter

            from lightning_uq import PredictionWriter, UncertaintyModule

            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
            ours = isinstance(self.model, UncertaintyModule) or any(getattr(c, "attach", False) for c in callbacks)
            if ours and not any(isinstance(c, BasePredictionWriter | PredictionWriter) for c in callbacks):
                callbacks.append(PredictionWriter(self.trainer.default_root_dir, "csv", overwrite=True))
            # Nobody would see what the Trainer returns, and it grows with the data.
            self.config_init["predict"]["return_predictions"] = False

        def after_predict(self) -> None:
            """Tell which files this process wrote."""
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
        # Lightning's own, about the torch it runs on.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
        warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended to run from within Python.*")
        try:
            CommandLine(
                parser_class=Parser,
                parser_kwargs={"prog": "lightning-uq"},
                save_config_kwargs={"overwrite": True},
                # Without arguments it reads those of the process, which other ranks are started with.
                args=None if from_process else arguments,
            )
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise UsageError(f"the checkpoint does not fit the configured module: {str(error)[:400]} ...") from error
    return 0


def _check_checkpoint(path: str) -> None:
    """A :class:`UsageError` where a file is no checkpoint of plain data."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler, its zip reader or its checks raise
        raise UsageError(
            f"Expected `ckpt_path` to be a checkpoint of plain data, but {path} cannot be read as one "
            f"({type(error).__name__}): it is damaged, something else, or holds pickled code, which is not run."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UsageError(f"Expected `ckpt_path` to be a checkpoint, but {path} holds a {type(checkpoint).__name__}.")
