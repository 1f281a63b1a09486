"""The errors this package raises on purpose.

All share :class:`UQError`, so that a caller (the command line, for one) can tell a message meant for its user from a
bug. Each also is the built-in error a Python programmer would expect, so ``except ValueError`` keeps working.
"""


class UQError(Exception):
    """Base class of every error of this package's contract."""


class InputError(UQError, ValueError):
    """An argument, a batch or a file does not hold what is documented; the message names it, what was expected, what came."""


class NotFiniteError(InputError):
    """An input, or what a network makes of it, holds NaN or infinity, so nothing can be predicted from it."""


class NotFittedError(UQError, RuntimeError):
    """Something that a post-training fit provides was asked for before that fit."""


class MissingExtraError(UQError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class UnsupportedError(UQError, NotImplementedError):
    """A combination that is known not to work, said before anything runs."""


def without_period(error: BaseException) -> str:
    """An error's text as a part of a sentence that goes on, or that ends with a period of its own.

    Example:
        >>> f"The file cannot be read: {without_period(ValueError('It is empty.'))}."
        'The file cannot be read: It is empty.'
    """
    return str(error).strip().rstrip(".")


def is_interrupt(error: BaseException) -> bool:
    """Whether a Ctrl-C ended the work. A Trainer catches it and exits with code 1.

    Example:
        >>> is_interrupt(KeyboardInterrupt()), is_interrupt(SystemExit(1))
        (True, False)
    """
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
