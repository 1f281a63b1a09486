"""Train and eval modes: of frozen parts, which stay in eval mode, and of a whole module during a prediction."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn


def expect_eval_mode(num_modules: int) -> None:
    """Silence Lightning's warning about exactly this many modules in eval mode: frozen parts always are."""
    if num_modules:
        warnings.filterwarnings("ignore", rf".*Found {num_modules} module\(s\) in eval mode", PossibleUserWarning)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Set every part of a module to eval mode; each part's own mode is put back at the end."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
