"""Reports of what the package guesses from the data: once per guess, with the argument that overrules it."""

from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_reported: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def report_guess(text: str, about: object | None, *, is_doubtful: bool = False) -> bool:
    """Report a guess: as information, or as a warning if another reading is likely too.

    Args:
        text: The guess, and how to overrule it.
        about: The module that the guess is about, or its stand-in. A text is reported once per module; for None, once per process.
        is_doubtful: Whether another reading is likely too.

    Returns:
        Whether it was reported now, for the first time.
    """
    if torch.compiler.is_compiling():  # a compiled graph cannot log
        return False
    reported = _reported.setdefault(report_guess if about is None else about, set())
    is_new = text not in reported
    if is_new:
        reported.add(text)
        (rank_zero_warn if is_doubtful else rank_zero_info)(text)
    return is_new
