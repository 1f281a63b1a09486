"""The errors that this package raises on purpose.

All share :class:`UQError`, so that a caller such as the command line can distinguish a message for its user from a bug. Each
is also the built-in error that a Python programmer would expect, so ``except ValueError`` keeps working.
"""


class UQError(Exception):
    """Base class of all errors that this package raises on purpose."""


class InputError(UQError, ValueError):
    """An argument, a batch or a file does not hold what is documented. The message says what was expected and what was found."""


class NotFiniteError(InputError):
    """An input, or a network's output for it, holds NaN or infinity, so there is no prediction for it."""


class NotFittedError(UQError, RuntimeError):
    """A fit that follows training was needed, but has not been made."""


class MissingExtraError(UQError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class UnsupportedError(UQError, NotImplementedError):
    """A combination that is known not to work; it is refused before anything runs."""


def without_period(error: BaseException) -> str:
    """An error's text without its final period, to be continued in a longer sentence.

    Example:
        >>> f"The file cannot be read: {without_period(ValueError('It is empty.'))}."
        'The file cannot be read: It is empty.'
    """
    return str(error).strip().rstrip(".")


def is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C ended the work. A Trainer catches it and exits with code 1.

    Example:
        >>> is_interrupt(KeyboardInterrupt()), is_interrupt(SystemExit(1))
        (True, False)
    """
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
