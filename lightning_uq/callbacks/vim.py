"""Virtual-logit matching: compares the features outside their principal subspace with the logits."""

import warnings
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_uq.callbacks.feature_scores import MAX_FEATURES, FeatureCallback
from lightning_uq.errors import InputError
from lightning_uq.functional.ood_features import fit_vim
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_integer
from lightning_uq.method import Method, Setting
from lightning_uq.networks.virtual_logits import VirtualLogits
from lightning_uq.running.row_sample import RowSample


class FitViM(FeatureCallback):
    """Virtual-logit matching after training: features and logits in one out-of-distribution score.

    The norm of the features outside the principal subspace of the training features becomes an additional logit. The score is that
    logit minus the log-sum-exp of the others, which orders inputs like its softmax probability. ``feature_layer`` must be the
    linear layer that makes the logits; they are taken before any calibration. During the fit, the
    features of at most ``max_rows`` training rows, N x D numbers, are kept in memory.

    The predictions of this package's modules then carry the score as ``ood_score``. :class:`OODDetection` logs it as ``vim``, and
    :meth:`score` returns it for any loader. The score of an ensemble is the mean over its members. Labels are not used, except the
    ``ignore_index`` of a segmentation.

    Args:
        dim: Dimension of the principal subspace; by default as in the paper: 1000 for D >= 2048, 512 for D >= 768, and D / 2 otherwise.
        max_rows: The largest number of training rows to read. If there are more, a random sample is read, the same on any number
            of ranks. None reads all.
        fitting: Arguments of :class:`FeatureCallback`: ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name`` and
            others.

    Raises:
        InputError: The layer is not linear; the features hold NaN, or leave nothing outside the subspace; there is no
            fitting data.

    Warns:
        UserWarning: The largest logits of the training rows are negative in the mean, so that the scale of the virtual logit
            is too, and the score is of no use.

    Source: Wang et al., CVPR 2022 (arXiv 2203.10807).

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = network[1].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> x = torch.tensor([[2.0, 0.1], [-2.0, -0.1], [2.0, -0.1], [-2.0, 0.1]])
        >>> vim = FitViM(dim=1).fit(network, [x])
        >>> vim.score(network, [torch.tensor([[2.0, 0.0], [2.0, 3.0]])]).round(decimals=2)
        tensor([-2.0200, 57.9800], dtype=torch.float64)
    """

    score_name = "vim"
    can_continue = True

    def __init__(self, *, dim: int | None = None, max_rows: int | None = MAX_FEATURES, **fitting: Any) -> None:
        super().__init__(**fitting)
        RowSample(max_rows)
        self.max_rows = max_rows
        if dim is not None:
            check_integer("dim", dim, 1)
        self.dim = dim

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        return {**super().settings, "dim": self.dim}

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Each member's origin, residual space and scale, and its last layer."""
        features = self.gather_features(model, loader, trainer, self.max_rows)
        tensors: dict[str, Any] = {"feature_layer": self.features.resolved, "num_members": len(features)}
        for i, (rows, layer) in enumerate(zip(features, self.features.layers(model), strict=True)):
            if not isinstance(layer, nn.Linear) or layer.in_features != rows.shape[1]:
                raise InputError(
                    f"`feature_layer` must name the linear layer that makes the logits of features [B, D], but "
                    f"{self.features.resolved!r} is a {type(layer).__name__} whose features are [B, {rows.shape[1]}]."
                )
            weight = to_float64(layer.weight.cpu())
            bias = weight.new_zeros(len(weight)) if layer.bias is None else to_float64(layer.bias.cpu())
            logits = nn.functional.linear(rows, weight.to(rows.dtype), bias.to(rows.dtype))
            fit = fit_vim(rows, logits, weight, bias, self.dim)
            if not fit.alpha > 0:
                warnings.warn(
                    "The largest logits of the training rows are negative in the mean, so that ViM's virtual logit is too: the "
                    "score is of no use. Shift the last layer's bias.",
                    stacklevel=2,
                )
            tensors.update({f"{i}.{key}": value for key, value in fit._asdict().items()})
            tensors.update({f"{i}.weight": weight, f"{i}.bias": bias})
        return tensors

    def make_scorer(self, tensors: dict[str, Any]) -> VirtualLogits:
        """The virtual logits, with the layers that make the others."""
        return VirtualLogits.from_tensors(tensors)


def _fit(setting: Setting) -> list[Callback]:
    return [FitViM()]


METHOD = Method(
    name="vim",
    about="the softmax network; part of the features outside their main subspace, compared with the logits",
    trained_as="softmax",
    callbacks=_fit,
    ood_score="vim",
    link="https://arxiv.org/abs/2203.10807",
    detects_only=True,
)
