"""Errors of the command line, printed in one line."""

from lightning_uq.errors import MissingExtraError, UQError

_UNION = "Does not validate against any of the Union subtypes"
_NOISE = (_UNION, "Subtypes:", "Errors:", "Given value type:", "- Expected a <class 'NoneType'>", f"- {_UNION}")


class UsageError(UQError):
    """The command line or a configuration file is invalid."""


def missing_extra(module: str) -> MissingExtraError:
    """The error for a package that the command line needs and that is not installed."""
    return MissingExtraError(
        f"The command line needs {module}, which is not installed. Install the extra `cli`: pip install 'lightning-uq[cli]'."
    )


def recoverable_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message tells the user what to do: ours, Lightning's about its configuration, and unusable files."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return UQError, MisconfigurationException, FileNotFoundError, PermissionError, IsADirectoryError


def one_line(error: BaseException) -> str:
    """An error's message in one line, without the text of jsonargparse around the reason that helps."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if _UNION in text:
        lines = [line.removeprefix("- ") for line in lines if not line.startswith(_NOISE)]
        lines = [line for line in lines if not line.startswith("Given value: ") or len(line) < 80]
        # If a constructor of this package rejected a value, the other types of the argument do not matter.
        lines = [line for line in lines if line.startswith(("`", "Expected argument `"))] or lines
    return " ".join(lines) or type(error).__name__
