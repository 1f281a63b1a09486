"""Temperature scaling as methods of the comparison, one per plain network."""

from lightning.pytorch import Callback

from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.method import Method, Setting


def _fit(setting: Setting) -> list[Callback]:
    return [TemperatureScaling()]


def _method(network: str, *tasks: str) -> Method:
    return Method(
        name="temperature",
        about=f"the {network} network, whose logits are divided by a number fitted to the validation data",
        trained_as=network,
        callbacks=_fit,
        ood_score="predictive_entropy",
        tasks=tasks,
        link="https://arxiv.org/abs/1706.04599",
    )


METHODS = (_method("softmax", "classification", "segmentation"), _method("sigmoid", "binary", "multilabel"))
