"""The environment of a comparison: the command, the versions, the machine, and the state of the git checkout."""

import os
import platform
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics

from lightning_uq.compare.configuration import Configuration
from lightning_uq.version import __version__


def command_line(configuration: Configuration) -> str:
    """The command that repeats the comparison.

    Example:
        >>> command_line(Configuration(methods=("softmax",), seeds=2))
        'lightning-uq compare --data digits --methods softmax --seeds 2 --seed 0'
    """
    arguments: list[str] = []
    for option in fields(Configuration):
        value = getattr(configuration, option.name)
        written = _written(value)
        is_default = value == option.default and option.name not in ("data", "methods", "seeds", "seed")
        if written is not None and not is_default:
            arguments += [f"--{option.name.replace('_', '-')}", written]
    if configuration.recipe.max_epochs is not None:
        arguments += ["--max-epochs", str(configuration.recipe.max_epochs)]
    if configuration.recipe.tune:
        arguments += ["--tune", str(configuration.recipe.tune)]
    return shlex.join(["lightning-uq", "compare", *arguments])


def _written(value: Any) -> str | None:
    """A value as a command-line argument; None if there is no option for it."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return None


def versions() -> dict[str, str]:
    """The versions and the machine, which affect the numbers, and the times above all."""
    return {
        "lightning_uq": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "Python": platform.python_version(),
        "System": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
    }


def git_state(directory: Path | None = None) -> dict[str, Any] | None:
    """The commit of a directory's checkout, and whether it has changes; None without a checkout or without git.

    Args:
        directory: The directory; None: the current one.
    """
    try:
        commit, changes = (
            subprocess.run(
                ["git", *arguments], cwd=directory, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "has_changes": bool(changes)}
