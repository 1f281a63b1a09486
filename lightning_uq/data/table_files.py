"""Reads tables with a header, CSV and Parquet, with pandas."""

import csv as csv_module
import importlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_uq.errors import InputError, MissingExtraError, without_period

CSV_ARGUMENTS = (
    "sep",
    "decimal",
    "thousands",
    "encoding",
    "quotechar",
    "na_values",
    "keep_default_na",
    "comment",
    "skiprows",
    "skipinitialspace",
)
"""Supported arguments of :func:`pandas.read_csv`."""


def import_pandas() -> Any:
    """``pandas``, from the extra ``data``.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise MissingExtraError(
            "Tables need pandas. Install the extra `data`: pip install 'lightning-uq[data]'."
        ) from error


def passed(**arguments: Any) -> str:
    """Arguments of a table as text, in Python and in a file for the command line, which has no options for them.

    Example:
        >>> print(passed(sep=";", drop=["id"]))
        sep=';', drop=['id'] (in the file of --config: {data: {init_args: {sep: ";", drop: ["id"]}}})
    """
    python = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    yaml = ", ".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return f"{python} (in the file of --config: {{data: {{init_args: {{{yaml}}}}}}})"


_CHECK_SEPARATOR = f"Check the quotes and the separator. For a separator other than a comma, pass {passed(sep=';')}."


def check_table(path: str, csv: Mapping[str, Any]) -> None:
    """Check the suffix of a table's path, and that the arguments are valid for its kind.

    Raises:
        InputError: The suffix or an argument is invalid.
    """
    if Path(path).suffix not in (".csv", ".parquet"):
        raise InputError(f"`path` must be the path of a .csv or .parquet file, but it is {path!r}.")
    unknown = [name for name in csv if name not in CSV_ARGUMENTS]
    if unknown:
        raise InputError(
            f"TableDataModule has no argument `{unknown[0]}`. It accepts these arguments of pandas.read_csv: {', '.join(CSV_ARGUMENTS)}."
        )
    if csv and Path(path).suffix == ".parquet":
        raise InputError(f"`{next(iter(csv))}` is for .csv files, but {path} is a .parquet file.")


def read_table(path: str, csv: Mapping[str, Any]) -> Any:
    """The table as a ``pandas.DataFrame`` whose column names are strings.

    Args:
        path: A ``.csv`` or ``.parquet`` file.
        csv: Arguments of :func:`pandas.read_csv` from :data:`CSV_ARGUMENTS`.

    Raises:
        InputError: The file cannot be read, is empty, or has another separator.
        MissingExtraError: pandas is not installed, or pyarrow for Parquet.
    """
    check_table(path, csv)
    pandas = import_pandas()
    try:
        frame = _read_parquet(pandas, path) if path.endswith(".parquet") else _read_csv(pandas, path, csv)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} cannot be read as {csv.get('encoding', 'utf-8')}: {without_period(error)}. Pass its encoding, for example "
            f"{passed(encoding='latin-1')}."
        ) from error
    except pandas.errors.ParserWarning as error:
        raise InputError(f"{path}: some rows have more fields than the header. {_CHECK_SEPARATOR}") from error
    except InputError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a table: {without_period(error)}. {_CHECK_SEPARATOR}") from error
    frame.columns = [str(name) for name in frame.columns]
    _check_names(path, frame.columns)
    if not len(frame):
        raise InputError(f"{path} must hold rows below its header, but it has none.")
    return frame.reset_index(drop=True)


def _read_parquet(pandas: Any, path: str) -> Any:
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'lightning-uq[parquet]'.") from error
    return pandas.read_parquet(path, engine="pyarrow")


def _read_csv(pandas: Any, path: str, csv: Mapping[str, Any]) -> Any:
    if "sep" not in csv and "skiprows" not in csv:
        _check_header(path, csv.get("encoding", "utf-8-sig"))
    header = {name: value for name, value in csv.items() if name not in ("na_values", "keep_default_na")}
    names = pandas.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, index_col=False, **header)
    _check_names(path, names.iloc[0])  # since pandas renames the second of two equal names
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        # Without `index_col=False`, a row with one field too many silently shifts all values by one column.
        return pandas.read_csv(path, index_col=False, low_memory=False, **csv)


def _check_header(path: str, encoding: str) -> None:
    """Raise for a header with semicolons, tabs or bars, which pandas would read as one column."""
    with Path(path).open(encoding=encoding) as file:
        header = file.readline()
    for separator in (";", "\t", "|"):
        if separator in header and "," not in header:
            decimal = " If its numbers have decimal commas, add decimal=','." if separator == ";" else ""
            raise InputError(
                f"The header of {path} has no commas, but {header.count(separator)} {separator!r}. Pass {passed(sep=separator)}.{decimal}"
            )


def _check_names(path: str, names: Any) -> None:
    twice = [name for name, count in Counter(map(str, names)).items() if count > 1 and name]
    if twice:
        raise InputError(f"The column names of {path} must be unique, but `{twice[0]}` occurs twice. Rename one.")


def place_of(path: str, csv: Mapping[str, Any], row: int) -> str:
    """The place of a row of a table in its file: its line number for plain CSV, or its row number, from 1, for other files.

    Args:
        path: The file.
        csv: The arguments for reading it.
        row: Position of the row, from 0.
    """
    skipped, separator = csv.get("skiprows", 0), csv.get("sep", ",")
    is_plain = path.endswith(".csv") and "comment" not in csv and isinstance(skipped, int) and len(separator) == 1
    if not is_plain:
        return f"row {row + 1}"
    with Path(path).open(encoding=csv.get("encoding", "utf-8-sig"), newline="") as file:
        for _ in range(skipped):
            file.readline()
        reader = csv_module.reader(
            file,
            delimiter=separator,
            quotechar=csv.get("quotechar", '"'),
            skipinitialspace=csv.get("skipinitialspace", False),
        )
        start, left = 1, row + 1  # the header is a record too
        for record in reader:
            is_blank = not "".join(record).strip() and len(record) < 2
            if not is_blank and not left:
                return f"line {start + skipped}"
            left -= not is_blank
            start = reader.line_num + 1
    return f"row {row + 1}"
