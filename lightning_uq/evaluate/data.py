"""The data named by ``--data`` and ``--ood``."""

import inspect
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

import lightning_uq.data
from lightning_uq.data import ArrayDataModule, ImageDataModule, NpzDataModule
from lightning_uq.errors import InputError
from lightning_uq.evaluate.errors import naming_argument
from lightning_uq.evaluate.models import input_errors
from lightning_uq.evaluate.settings import Settings
from lightning_uq.importing import import_class
from lightning_uq.running.loaders import fit_dataloader_of


@dataclass(frozen=True)
class EvaluationData:
    """Loaders of the data for the evaluation of a checkpoint.

    Attributes:
        fit: Training data without augmentation, for a density.
        val: Validation data, for the temperature.
        test: Test data.
        ood: Out-of-distribution data, or None.
        ood_name: Name of the out-of-distribution data.
    """

    fit: Any
    val: Any
    test: Any
    ood: Any
    ood_name: str | None


_OOD_ARGUMENTS = {"ood_classes", "ood_datasets"}


def data_names() -> dict[str, type[LightningDataModule]]:
    """Data modules by their names for ``--data``.

    Example:
        >>> sorted(data_names())
        ['cifar10', 'cifar100', 'digits', 'dirty_mnist', 'fashion_mnist', 'kmnist', 'mnist', 'svhn']
    """
    kinds = [getattr(lightning_uq.data, name) for name in lightning_uq.data.__all__]
    return {
        kind.name: kind
        for kind in kinds
        if inspect.isclass(kind)
        and issubclass(kind, ArrayDataModule | ImageDataModule)
        and getattr(kind, "name", None)
        and not _OOD_ARGUMENTS.isdisjoint(inspect.signature(kind).parameters)
    }


def make_data(settings: Settings, seed: int | None) -> EvaluationData:
    """The data of these settings, split with a seed if one is given.

    Raises:
        InputError: The data do not exist, or the data module does not take the arguments.
    """
    named = data_names()
    kind: Any = named.get(settings.data) or (NpzDataModule if settings.data.endswith(".npz") else None)
    if kind is None:
        if not {".", ":"} & set(settings.data):
            raise InputError(
                f"`data` must be one of {', '.join(named)}, the path of an .npz file, or the import path of a "
                f"LightningDataModule, but it is {settings.data!r}."
            )
        kind = import_class(settings.data, LightningDataModule, "data")
    parameters = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"path": settings.data, "task": "classification"} if kind is NpzDataModule else {}
    chosen = settings.ood is not None
    if settings.ood is None:
        pass
    elif "ood_classes" in parameters:
        arguments["ood_classes"] = _labels(settings.ood)
    elif "ood_datasets" in parameters:
        arguments["ood_datasets"] = [settings.ood]
    else:
        chosen = False
    if seed is not None:
        if "seed" not in parameters:
            raise InputError(f"`data_seeds` holds {seed}, but {kind.__name__} takes no `seed`.")
        arguments["seed"] = seed
    with input_errors(f"{kind.__name__} does not take these `data_args`"):
        bound = inspect.signature(kind).bind(**{**arguments, **settings.data_args})
    aliases = {"ood_classes": "ood", "ood_datasets": "ood", "path": "data", "seed": "data_seeds"}
    with naming_argument("data_args" if settings.data_args else "data", aliases):
        data: Any = kind(*bound.args, **bound.kwargs)
        data.prepare_data()
        for stage in ("fit", "test"):
            data.setup(stage)
    fit = fit_dataloader_of(data) or data.train_dataloader
    if settings.ood is None:
        return EvaluationData(fit(), data.val_dataloader(), data.test_dataloader(), None, None)
    if not hasattr(data, "ood_dataloaders"):
        raise InputError(
            f"`data`: {kind.__name__} has no out-of-distribution data. Give it a method `ood_dataloaders()` that returns loaders by name."
        )
    outside = data.ood_dataloaders()
    if not chosen and settings.ood not in outside:
        raise InputError(
            f"`ood` must name one of the `ood_dataloaders()` of {kind.__name__} ({', '.join(outside) or 'it has none'}), but "
            f"it is {settings.ood!r}."
        )
    name = next(iter(outside)) if chosen else settings.ood
    return EvaluationData(fit(), data.val_dataloader(), data.test_dataloader(), outside[name], name)


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"`ood` must be labels that are held out of the data, such as 8,9, but it is {text!r}."
        ) from None
