"""What the package assumes where nobody said it: each assumption is reported once, with how to overrule it."""

from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_reported: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def report_guess(text: str, about: object | None, *, is_doubtful: bool = False) -> None:
    """Report an assumption: as information, or as a warning where another reading is likely too.

    Args:
        text: What is assumed, and how to overrule it.
        about: The module that it is about, or what stands for that module: each text is told of it once. None: once at all.
        is_doubtful: Whether another reading is likely too.
    """
    if torch.compiler.is_compiling():  # a graph says nothing
        return
    told = _reported.setdefault(report_guess if about is None else about, set())
    if text not in told:
        told.add(text)
        (rank_zero_warn if is_doubtful else rank_zero_info)(text)
