"""Whether two callbacks read the same outputs of a model."""

from functools import partial
from types import CodeType, FunctionType
from typing import Any

from lightning_uq.running.logits import LogitReader


def difference_of_readings(first: LogitReader, second: LogitReader) -> str | None:
    """The name of an argument by which two readers of one foreign model read other outputs, such as those of another head; None if they agree.

    Functions are equal if their code, their defaults and the objects that they refer to are equal.

    Example:
        >>> one, other = (LogitReader(output=lambda out: out["age"]) for _ in range(2))
        >>> difference_of_readings(one, other) is None
        True
        >>> difference_of_readings(one, LogitReader(output=lambda out: out["sex"]))
        'output'
    """
    tasks = (first.given_task, second.given_task)
    if None not in tasks and tasks[0] != tasks[1]:
        return "task"
    pairs = {
        "predict_fn": (first.predict_fn, second.predict_fn),
        "unpack_batch": (first.unpack_batch, second.unpack_batch),
        "output": (_numbers(first), _numbers(second)),
    }
    return next((name for name, pair in pairs.items() if not _are_equal(*pair)), None)


def _numbers(reader: LogitReader) -> Any:
    output = reader.read.output
    return "logits" if output == "log_probs" else output  # both are used unchanged


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, partial) and isinstance(other, partial):
        mine, its = (
            [f.func, *f.args, *f.keywords, *f.keywords.values(), len(f.args), len(f.keywords)] for f in (one, other)
        )
        return len(mine) == len(its) and all(map(_are_equal, mine, its))
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one is other or (
            _has_equal_code(one.__code__, other.__code__)
            and one.__globals__ is other.__globals__
            and all(map(_are_equal, _bound(one), _bound(other)))
        )
    if isinstance(one, str | int | float | bool | None):
        return type(one) is type(other) and bool(one == other)
    return one is other or (callable(one) and callable(other) and one == other)


def _has_equal_code(one: CodeType, other: CodeType) -> bool:
    """Whether two functions do the same, wherever they are written."""
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_argcount", "co_kwonlyargcount", "co_flags")
    return (
        all(getattr(one, part) == getattr(other, part) for part in parts)
        and len(one.co_consts) == len(other.co_consts)
        and all(
            _has_equal_code(mine, its)
            if isinstance(mine, CodeType) and isinstance(its, CodeType)
            else type(mine) is type(its) and mine == its
            for mine, its in zip(one.co_consts, other.co_consts, strict=True)
        )
    )


def _bound(function: FunctionType) -> list[Any]:
    """The objects that a function refers to besides its globals; functions with equal code have equally many cells."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*cells, len(defaults), *defaults]
