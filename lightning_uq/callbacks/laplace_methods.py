"""Laplace approximations as methods of the comparison, one per plain network."""

from lightning.pytorch import Callback

from lightning_uq.callbacks.laplace import FitLaplace
from lightning_uq.method import Method, Setting


def _fit(setting: Setting) -> list[Callback]:
    return [FitLaplace()]


def _method(network: str, *tasks: str) -> Method:
    return Method(
        name="laplace",
        about=f"the {network} network with a Gaussian over the weights of its last layer, fitted after training",
        trained_as=network,
        callbacks=_fit,
        ood_score="laplace",
        tasks=tasks,
        link="https://arxiv.org/abs/2106.14806",
    )


METHODS = (
    _method("softmax", "classification"),
    _method("sigmoid", "binary", "multilabel"),
    _method("gaussian", "regression"),
)
