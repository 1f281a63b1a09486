"""Train and eval modes: frozen parts stay in eval mode, and predictions switch a whole module to it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn


def expect_eval_mode(num_modules: int) -> None:
    """Silence Lightning's warning about exactly this number of modules in eval mode, because frozen parts always are."""
    if num_modules:
        warnings.filterwarnings("ignore", rf".*Found {num_modules} module\(s\) in eval mode", PossibleUserWarning)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Set every part of a module to eval mode, and restore each part's own mode at the end."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
