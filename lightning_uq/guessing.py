"""Reports of what the package guesses from the data: once per guess, with the argument that overrules it."""

from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_reported: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def report_guess(text: str, about: object | None, *, is_doubtful: bool = False) -> None:
    """Report a guess: as information, or as a warning if another reading is likely too.

    Args:
        text: The guess, and how to overrule it.
        about: The module that the guess is about, or its stand-in. A text is reported once per module; for None, once per process.
        is_doubtful: Whether another reading is likely too.
    """
    if torch.compiler.is_compiling():  # a compiled graph cannot log
        return
    reported = _reported.setdefault(report_guess if about is None else about, set())
    if text not in reported:
        reported.add(text)
        (rank_zero_warn if is_doubtful else rank_zero_info)(text)
