"""Frozen parts of a network, which stay in eval mode during training."""

import warnings

from lightning.fabric.utilities.warnings import PossibleUserWarning


def expect_eval_mode(num_modules: int) -> None:
    """Silence Lightning's warning about exactly this many modules in eval mode: frozen parts always are."""
    if num_modules:
        warnings.filterwarnings("ignore", rf".*Found {num_modules} module\(s\) in eval mode", PossibleUserWarning)
