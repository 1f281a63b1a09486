"""Explains an error of a user's network for a batch that is tried before a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, UQError, without_period


@contextmanager
def explaining_failure(model: nn.Module, x: Any, *, has_predict_fn: bool) -> Iterator[None]:
    """A context for the call of a user's network with an input read from a batch, whose error becomes an InputError with the arguments to pass.

    Errors of this package and a lack of memory are raised unchanged.

    Args:
        model: The user's module.
        x: The input.
        has_predict_fn: Whether ``predict_fn`` calls the network.

    Raises:
        InputError: The call raised another error, which is its cause.

    Example:
        >>> with explaining_failure(nn.Linear(16, 1), torch.zeros(2, 4, 4), has_predict_fn=False):
        ...     nn.Linear(16, 1)(torch.zeros(2, 4, 4))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_uq.errors.InputError: Linear failed on the input that is read from the batch, a tensor [2, 4, 4]: RuntimeError: ...
    """
    try:
        yield
    except (UQError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(_text(model, x, error, has_predict_fn)) from error


def _text(model: nn.Module, x: Any, error: Exception, has_predict_fn: bool) -> str:
    who = "`predict_fn`" if has_predict_fn else type(model).__name__
    found = f"{who} failed on the input that is read from the batch, {_described(x)}: {type(error).__name__}: {without_period(error)}. "
    if has_predict_fn:
        return (
            found
            + "Change `predict_fn`, or pass `unpack_batch`, a function that returns the input that it takes and the target."
        )
    if isinstance(x, (list, tuple)):
        return found + (
            "`forward` gets it as one argument. If it takes several, make `unpack_batch` return a mapping from their names, or pass "
            "`predict_fn=lambda model, x: model(*x)`."
        )
    several = " If `forward` takes several arguments, it returns a mapping from their names."
    return found + (
        "Pass `unpack_batch`, a function that returns the input on which your steps call `forward`, and the target."
        f"{several if isinstance(error, TypeError) else ''} Or pass `predict_fn`, a function `(model, x)` that returns the outputs."
    )


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, (list, tuple)) else "")
