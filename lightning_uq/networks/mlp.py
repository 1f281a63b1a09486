"""Networks for tabular data: a plain MLP, and the network of the deep-ensembles literature."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_integer

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "gelu": nn.GELU}
_NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class MLP(nn.Sequential):
    """Multilayer perceptron. Each hidden layer is Linear, norm, activation, dropout; the last layer is a single Linear.

    Args:
        in_features: Size of the input [B, in_features].
        out_features: Size of the output [B, out_features].
        hidden_sizes: Widths of the hidden layers; without any, the model is linear.
        activation: ``"relu"``, ``"silu"``, ``"tanh"`` or ``"gelu"``.
        norm: None, ``"rms"``, ``"layer"`` or ``"batch"``.
        dropout: Probability of a zero after each activation.

    Raises:
        InputError: A size is below 1, a name is unknown, or a probability is outside [0, 1).

    Example:
        >>> MLP(4, 3, hidden_sizes=(8,))
        MLP(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=3, bias=True)
        )
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: Literal["relu", "silu", "tanh", "gelu"] = "relu",
        norm: Literal["rms", "layer", "batch"] | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features, hidden_sizes=hidden_sizes)
        if activation not in _ACTIVATIONS:
            raise InputError(f"`activation` must be one of {list(_ACTIVATIONS)}, but it is {activation!r}.")
        if norm is not None and norm not in _NORMS:
            raise InputError(f"`norm` must be None or one of {list(_NORMS)}, but it is {norm!r}.")
        if not 0 <= dropout < 1:
            raise InputError(f"`dropout` must lie in [0, 1), but it is {dropout}.")
        layers: list[nn.Module] = []
        width = in_features
        for size in hidden_sizes:
            layers.append(nn.Linear(width, size))
            if norm is not None:
                layers.append(_NORMS[norm](size))
            layers.append(_ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        super().__init__(*layers, nn.Linear(width, out_features))


class TabularNetwork(nn.Module):
    """The network of deep-ensembles-pytorch: Linear layers with RMSNorm and SiLU between them.

    With ``heads="gaussian"`` the last Linear is a pair of heads, and the output [B, 2 D] holds the means and then the
    raw variances, whose softplus is the variance (:func:`~lightning_uq.losses.split_gaussian`). As in the original, the
    heads take the last hidden Linear directly, so depth 3 has one nonlinearity, and depth 2 or less has none.

    Args:
        in_features: Size of the input [B, in_features].
        out_features: Target dimensions D, or classes C.
        hidden_features: Width of the hidden layers.
        depth: Number of Linear layers between input and output.
        norm: Whether an RMSNorm precedes each SiLU.
        heads: ``"gaussian"`` for a regression network, None for a single output [B, out_features] (logits).

    Raises:
        InputError: A size is below 1, or ``heads`` is unknown.

    Example:
        >>> TabularNetwork(13, 1)(torch.zeros(5, 13)).shape
        torch.Size([5, 2])
        >>> TabularNetwork(13, 10, heads=None)(torch.zeros(5, 13)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        hidden_features: int = 100,
        depth: int = 3,
        norm: bool = True,
        heads: Literal["gaussian"] | None = "gaussian",
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, hidden_features=hidden_features, depth=depth)
        if heads not in ("gaussian", None):
            raise InputError(f"`heads` must be 'gaussian' or None, but it is {heads!r}.")
        self.heads = heads
        widths = [in_features] + [hidden_features] * (depth - 1)
        if heads is None:
            widths.append(out_features)
        layers: list[nn.Module] = []
        for i, (width, size) in enumerate(itertools.pairwise(widths)):
            if i:
                # The original divides by max(|x|, 1e-12), whose eps affects only an input of zeros.
                layers += [nn.RMSNorm(width, eps=1e-12), nn.SiLU()] if norm else [nn.SiLU()]
            layers.append(nn.Linear(width, size))
        self.backbone = nn.Sequential(*layers)
        if heads is not None:
            self.mean_head = nn.Linear(widths[-1], out_features)
            self.variance_head = nn.Linear(widths[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Output [B, 2 D] (means, raw variances) or [B, out_features]."""
        x = self.backbone(x)
        if self.heads is None:
            return x
        return torch.cat([self.mean_head(x), self.variance_head(x)], dim=-1)


def load_deep_ensembles_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Load weights saved by deep-ensembles-pytorch.

    Args:
        network: A :class:`TabularNetwork` for the state of one member, or an ensemble of them, with any execution, for
            the state of a ``DeepEnsemble`` or ``DeepEnsembleClassifier``.
        state: The state dict, or the content of its trainer's file, which holds one under ``model``.

    Raises:
        InputError: Names or shapes do not match ``network``.

    Source: deep-ensembles-pytorch 0.1.2, where RMSNorm's weight is named ``g``, the layers of the classifier are named
    ``net``, and ``log_var_head`` returns the raw variance.

    Example:
        >>> network = TabularNetwork(2, depth=1)
        >>> load_deep_ensembles_state(network, {
        ...     "mean_head.weight": torch.ones(1, 2), "mean_head.bias": torch.zeros(1),
        ...     "log_var_head.weight": torch.zeros(1, 2), "log_var_head.bias": torch.zeros(1)})
        >>> network(torch.ones(1, 2))
        tensor([[2., 0.]], grad_fn=<CatBackward0>)
    """
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    renamed = {"net": "backbone", "log_var_head": "variance_head", "g": "weight"}
    ours = {".".join(renamed.get(part, part) for part in name.split(".")): value for name, value in state.items()}
    try:
        network.load_state_dict(ours)
    except RuntimeError as error:
        raise InputError(f"`state` does not match the network: {error}") from error


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Reject layer sizes, given by name, one or several each, that are not integers of at least 1."""
    for name, given in sizes.items():
        for size in given if isinstance(given, Sequence) else [given]:
            check_integer(name, size, 1)
