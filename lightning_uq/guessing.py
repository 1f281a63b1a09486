"""What the package assumes where nobody said it: each assumption is reported once, with how to overrule it."""

from functools import cache

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


@cache
def report_guess(text: str, *, is_doubtful: bool = False) -> None:
    """Report an assumption once: as information, or as a warning where another reading is likely too."""
    (rank_zero_warn if is_doubtful else rank_zero_info)(text)
