"""The names of the numbers of an evaluation: the original's, plain ones, and labels for the table."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_uq.evaluate.settings import ModelType

AFTER = "_after_temperature"


@dataclass(frozen=True)
class Quantity:
    """One number of a run.

    Attributes:
        key: The original's key. After temperature scaling it begins with ``t_``.
        name: The plain name. After temperature scaling it ends with ``_after_temperature``.
        label: Its row in the table.
    """

    key: str
    name: str
    label: str


SCORES: dict[ModelType, dict[str, str]] = {
    "softmax": {"m1": "energy", "m2": "predictive_entropy"},
    "ensemble": {"m1": "mutual_information", "m2": "predictive_entropy"},
    "gmm": {"m1": "log_density", "m2": "posterior_entropy"},
}
"""The names of the original's two scores m1 and m2."""

_DETECTION = {
    "auroc": "AUROC",
    "auprc_in": "average precision, in-distribution positive",
    "auprc_out": "average precision, OOD positive",
}


def quantities(model_type: ModelType) -> list[Quantity]:
    """The numbers of a model type, in the order of the table.

    Example:
        >>> [one.name for one in quantities("softmax")][:3]
        ['accuracy', 'ece', 'ood_auroc_energy']
    """
    detection = [
        Quantity(f"{key}_{kind}", f"ood_{kind}_{score}", f"OOD by {score.replace('_', ' ')}: {label}")
        for key, score in SCORES[model_type].items()
        for kind, label in _DETECTION.items()
    ]
    return [
        Quantity("accuracy", "accuracy", "Accuracy"),
        Quantity("ece", "ece", "Expected calibration error, 15 bins"),
        *detection,
    ]


def with_plain_names(model_type: ModelType, values: Mapping[str, float]) -> dict[str, float]:
    """Values by the original's keys, followed by the same values by their plain names.

    Example:
        >>> with_plain_names("softmax", {"accuracy": 0.9, "ece": 0.02, "t_ece": 0.01})
        {'accuracy': 0.9, 'ece': 0.02, 't_ece': 0.01, 'ece_after_temperature': 0.01}
    """
    names = {one.key: one.name for one in quantities(model_type)}
    names |= {f"t_{key}": f"{name}{AFTER}" for key, name in names.items()}
    return {**values, **{names[key]: value for key, value in values.items() if key in names}}
