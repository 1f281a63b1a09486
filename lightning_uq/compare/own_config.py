"""The user's own module and data module: their classes, and the arguments for building them."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lightning_uq.errors import InputError, MissingExtraError, without_period
from lightning_uq.importing import import_class
from lightning_uq.running.foreign_data import ForeignDataModule
from lightning_uq.running.streams import RandomStream

KEYS = {
    "module": ("class_path", "init_args", "task", "output", "predict_fn", "unpack_batch", "monitor", "mode"),
    "data": ("class_path", "init_args"),
}
"""The parts of a file, and the keys of each."""


def read_config(path: str) -> dict[str, dict[str, Any]]:
    """The arguments for a module and for data from a YAML or JSON file, in the layout of LightningCLI's files.

    ::

        module:
          class_path: my.module.LitModel   # or --module
          init_args: {hidden_size: 64}     # arguments of the class; nested classes as class_path and init_args
          task: regression                 # the meaning of its outputs, if not the data's task; or {name: Regression, init_args: {head: mean_variance}}
          output: probs                    # what it returns: logits, probs, log_probs, or the path of a function that picks the logits
          predict_fn: my.module.logits     # function of (module, x) that returns the outputs, if `forward` does not
          unpack_batch: my.module.unpack   # function of a batch that returns input and target
          monitor: val_acc                 # the validation metric whose best epoch is kept
          mode: max
        data:
          class_path: my.module.MyDataModule   # or --data-module; without either, init_args are additional arguments of --data
          init_args: {root: data}

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be read, or has other keys.
        MissingExtraError: PyYAML is not installed.
    """
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]  # has no types of its own
    except ImportError as error:
        raise MissingExtraError("`config` needs PyYAML: pip install pyyaml.") from error
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"`config` must be a YAML or JSON file, but {path!r} cannot be read: {' '.join(str(error).split())}."
        ) from error
    found = {} if found is None else found
    _check_keys(found, path, "", tuple(KEYS))
    for part, content in found.items():
        _check_keys(content, path, part, KEYS[part])
        arguments = content.get("init_args", {})
        if not isinstance(arguments, Mapping):
            raise InputError(f"`config`: {part}.init_args of {path} must be a mapping, but it is {arguments!r}.")
    return dict(found)


def _check_keys(content: Any, path: str, part: str, allowed: tuple[str, ...]) -> None:
    where = f"{part} of {path}" if part else path
    if not isinstance(content, Mapping):
        raise InputError(f"`config`: {where} must hold {', '.join(allowed)}, but it is {content!r}.")
    unknown = [str(key) for key in content if key not in allowed]
    if unknown:
        raise InputError(f"`config`: {where} holds {', '.join(unknown)}, but it may only hold {', '.join(allowed)}.")


def class_of(given: str | None, contents: Mapping[str, Any], part: str, argument: str) -> str | None:
    """The class named by an option or by the file.

    Raises:
        InputError: The two names differ, or the file has arguments without the name of a class.
    """
    content = contents.get(part, {})
    named = content.get("class_path")
    if given is None and named is None and content and part == "module":
        raise InputError(
            f"`config` has arguments for the {part}, but not its class. Pass the class as `{argument}`, or as {part}.class_path."
        )
    if given and named and given.replace(":", ".") != str(named).replace(":", "."):
        raise InputError(
            f"`{argument}` is {given!r}, but {part}.class_path of `config` is {named!r}. Pass only one of them."
        )
    return given or named


def make_builder(path: str, base: type, arguments: Mapping[str, Any], argument: str) -> Callable[[], Any]:
    """A function that builds a new object of a class in each call.

    jsonargparse reads the arguments as in LightningCLI: it checks them against the types of the class, and builds nested objects from
    ``class_path`` and ``init_args``.

    Args:
        path: ``"my.module:Class"`` or ``"my.module.Class"``.
        base: The base class.
        arguments: Arguments of the class.
        argument: Name of the option, for errors.

    Raises:
        InputError: The class does not exist or takes other arguments. Also raised by the function, if the constructor rejects them.
        MissingExtraError: There are arguments, and jsonargparse is not installed.
    """
    kind = import_class(path, base, argument)
    if not arguments:
        _check_defaults(kind, argument)
        return kind  # type: ignore[no-any-return]  # a class is a function of no arguments
    try:
        from jsonargparse import ArgumentError, ArgumentParser, Namespace
    except ImportError as error:
        raise MissingExtraError("`config` needs jsonargparse: pip install 'lightning-uq[cli]'.") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "init_args", fail_untyped=False)
    try:
        parsed: Namespace = parser.parse_object({"init_args": dict(arguments)})
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        text = " ".join(without_period(error).split())
        raise InputError(f"`config` does not match {kind.__name__}{inspect.signature(kind)}: {text}.") from error

    # Its name before release 4.49.
    instantiate: Callable[[Any], Any] = getattr(parser, "instantiate", None) or parser.instantiate_classes

    def build() -> Any:
        return instantiate(parsed).init_args

    return build


def _check_defaults(kind: Any, argument: str) -> None:
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        part = "module" if argument == "module" else "data"
        raise InputError(
            f"`{argument}`: {kind.__name__}{inspect.signature(kind)} has arguments without default values. Pass them in a file as `config`, "
            f"under {part}.init_args."
        ) from error


def build_data_module(path: str, contents: Mapping[str, Any], task: str) -> ForeignDataModule:
    """The user's data module, set up, with the interface for a comparison.

    Raises:
        InputError: It cannot be built, lacks a loader, or its targets do not determine a task.
    """
    content = contents.get("data", {})
    build = make_builder(path, LightningDataModule, content.get("init_args", {}), "data_module")
    with RandomStream(0).active(advance=False):  # a constructor may draw a split
        data = ForeignDataModule(build(), task=task)
    data.setup()
    return data
