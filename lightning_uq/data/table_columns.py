"""Checks whether a table's columns hold numbers or categories; errors name the column."""

import re
from typing import Any, Literal

import numpy as np

from lightning_uq.data.table_files import import_pandas, passed
from lightning_uq.errors import InputError

_SIGNS = re.compile(r"[%$€£¥]")
_THOUSANDS = re.compile(r"(?<=\d)[,' \u00a0\u202f](?=\d{3}(?!\d))")
_COMMA_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d{3})*,\d+\s*")
_DATE = re.compile(r"\s*(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})([T ].*)?")


def column_kind(name: str, values: Any) -> Literal["integers", "floats", "booleans", "strings", "categories", "empty"]:
    """The kind of values in a ``pandas.Series``, apart from missing ones.

    Raises:
        InputError: Dates, or values that are neither numbers nor text.
    """
    pandas = import_pandas()
    if isinstance(values.dtype, pandas.CategoricalDtype):
        return "categories"
    if values.isna().all():
        return "empty"
    found = pandas.api.types.infer_dtype(values, skipna=True)
    kinds = {
        "integer": "integers",
        "floating": "floats",
        "mixed-integer-float": "floats",
        "decimal": "floats",
        "boolean": "booleans",
        "string": "strings",
    }
    if found in kinds:
        return kinds[found]  # type: ignore[return-value]
    if found in ("datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period"):
        raise _date_error(name)
    raise InputError(f"Column `{name}` must hold numbers or text, but it holds {found} values. {_drop_advice(name)}")


def check_text(name: str, values: Any) -> None:
    """Raise if a column of strings holds dates, or numbers that were not parsed.

    Raises:
        InputError: The message names the column and the argument to pass.
    """
    pandas = import_pandas()
    texts = values.dropna().astype(str)
    bare = texts.str.replace(_SIGNS, "", regex=True)
    is_number = pandas.to_numeric(texts, errors="coerce").notna()
    has_commas = bare.map(lambda text: _COMMA_NUMBER.fullmatch(text) is not None)
    ungrouped = pandas.to_numeric(bare.str.replace(_THOUSANDS, "", regex=True), errors="coerce")
    means_number = has_commas | ungrouped.notna()
    if _share(means_number) > 0.5:
        are_categories = (
            f"If the values are categories, pass {passed(categorical=[name])}, or task='classification' for a target."
        )
        signed, separated = texts[means_number & (bare != texts)], texts[means_number & ~is_number]
        if len(signed):
            advice = f"numbers with a sign or unit, such as {signed.iloc[0]!r}. Remove it from the values, and name it in the header."
        elif len(separated):
            advice = (
                f"text such as {separated.iloc[0]!r}, which looks like numbers with commas or groups of thousands. Pass {passed(decimal=',')} "
                "for decimal commas (with sep=';' if semicolons separate the fields), or thousands=',' for groups. Remove other separators."
            )
        elif len(other := texts[~is_number]):
            advice = (
                f"numbers as text. If {other.iloc[0]!r} is a missing value, pass {passed(na_values=[other.iloc[0]])}."
            )
        else:
            advice = "numbers as text. Convert it to numbers."
        raise InputError(f"Column `{name}` holds {advice} {are_categories}")
    if _share(texts.map(lambda text: _DATE.fullmatch(text) is not None)) > 0.5:
        raise _date_error(name)


def numbers(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values [N] in float64, NaN if missing.

    Raises:
        InputError: The column holds text or infinity.
    """
    pandas = import_pandas()
    if column_kind(name, values) in ("strings", "categories"):
        bad = values[pandas.to_numeric(values.astype(object), errors="coerce").isna() & values.notna()]
        example = (bad if len(bad) else values.dropna()).iloc[0]
        raise InputError(
            f"Column `{name}` must hold numbers, as in the training rows, but it holds text such as {example!r}."
        )
    found = np.full(len(values), np.nan)
    present = values.notna().to_numpy(dtype=bool)
    found[present] = values[present].to_numpy(dtype=np.float64)
    if np.isinf(found).any():
        raise InputError(f"Column `{name}` must be finite, but {int(np.isinf(found).sum())} rows are infinite.")
    return found


def texts(values: Any) -> Any:
    """The values as text in an object array, None if missing. 3, 3.0 and "3" are the same category."""
    codes, distinct = import_pandas().factorize(values.astype(object))
    names = np.array([*map(_text, distinct), None], dtype=object)
    return names[codes]  # the code of a missing value is -1


def levels_of(values: Any) -> list[str]:
    """The different values as text, in the order of a categorical dtype, or sorted, with numbers by size."""
    found = {text for text in texts(values) if text is not None}
    if hasattr(values, "cat"):
        return [text for text in map(_text, values.cat.categories) if text in found]
    return sorted(found, key=_order)


def _order(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _share(flags: Any) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def _date_error(name: str) -> InputError:
    return InputError(
        f"Column `{name}` holds dates or times, which cannot be used as a feature. Replace it by numbers, such as the days "
        f"since an event or the month. {_drop_advice(name)}"
    )


def _drop_advice(name: str) -> str:
    return f"To leave a feature out, pass {passed(drop=[name])}."
