"""What the package assumes where nobody said it: each assumption is reported once, with how to overrule it."""

from functools import cache

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def report_guess(text: str, *, is_doubtful: bool = False) -> None:
    """Report an assumption once: as information, or as a warning where another reading is likely too."""
    if not torch.compiler.is_compiling():  # a graph says nothing
        _report(text, is_doubtful)


@cache
def _report(text: str, is_doubtful: bool) -> None:
    (rank_zero_warn if is_doubtful else rank_zero_info)(text)
