"""Bounds every layer of a network, and restores plain weights."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from lightning_uq.errors import InputError, NotFittedError, UnsupportedError
from lightning_uq.functional.validation import check_integer
from lightning_uq.networks.labels import label
from lightning_uq.networks.spectral_norm.attach import attach, bound_of, detach
from lightning_uq.networks.spectral_norm.batchnorm import BatchNormBound
from lightning_uq.networks.spectral_norm.bound import Bound
from lightning_uq.networks.spectral_norm.convolution import CONVOLUTIONS, ConvolutionNorm
from lightning_uq.networks.spectral_norm.matrix import MatrixNorm
from lightning_uq.networks.spectral_norm.together import join, part

NetworkT = TypeVar("NetworkT", bound=nn.Module)

_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *_TRANSPOSED)


def spectral_normalize(
    network: NetworkT,
    *,
    coefficient: float = 3.0,
    exclude: Sequence[str] = (),
    n_power_iterations: int = 1,
    n_warmup_iterations: int = 15,
    conv_norm: Literal["operator", "reshaped"] = "operator",
    bound_batchnorm: bool = False,
    eps: float = 0.0,
) -> NetworkT:
    r"""Bound the Lipschitz constant of every linear layer and convolution in ``network`` by ``coefficient``, in place.

    The bound is soft: :math:`\bar W = W / \max(1, \sigma / c)`, where :math:`\sigma` is the largest singular value of the
    layer as a linear operator. A layer within the bound is unchanged. Power iteration follows :math:`\sigma` by
    ``n_power_iterations`` steps per training forward; the gradient flows through :math:`\sigma = u^T W v`, but not
    through u and v. A convolution's operator depends on the size of its input, which is learned at the first forward,
    and again whenever it changes in training. Before the first forward, ``weight`` is unbounded. Evaluation uses the
    bound of the last training forward, at any input size.

    The network may come from any library. Its layers keep their behavior. Their trained parameter becomes
    ``parametrizations.weight.original``, which is the same object, so an existing optimizer still works. Two layers that
    share a weight are each bounded by their own norm, and other users of that weight, such as a tied embedding, get the
    unbounded one. A layer that runs several times in one forward takes ``n_power_iterations`` steps each time.

    A call of ``network`` in training computes the norms of all its layers together, in few operations. A layer that runs
    again, or outside such a call (as in ``network.features(x)``), computes its own norm, with the same result but more slowly.

    Copies, pickles, checkpoints, weight averages, autocast and low precision work as before; u, v and sigma have at least
    float32. Evaluation without gradients computes the bounded weight once, and again after ``eval()``, ``train()``,
    ``load_state_dict`` or a change of the parameter. Only a write through ``.data`` goes unnoticed: call ``eval()`` after
    it. A compiled network computes the bound in its graph; call :func:`remove_spectral_norm` before deployment.

    u and v start from a fixed seed, independent of the global random state, so all processes agree on them, and
    ``DistributedDataParallel`` broadcasts them as buffers. In each step, all processes need inputs of the same size.

    ``load_state_dict`` also accepts the weights of a plain network, and those of the original code (``weight_orig``,
    ``weight_u``, ``weight_v``, ``weight_sigma``).

    In a configuration, a nested target builds the network (see :class:`~lightning_uq.networks.factory.Factory`):

    .. code-block:: yaml

        network:
          class_path: lightning_uq.Factory
          init_args:
            target: lightning_uq.networks.spectral_normalize
            kwargs:
              network: {target: torchvision.models.resnet18, kwargs: {num_classes: 10}}
              coefficient: 3.0
              exclude: [fc]

    Args:
        network: Any network. Attention, recurrent layers and embeddings have no such operator and stay unbounded, but linear
            layers inside them are bounded. A convolution is bounded when it is called, so not if other code only reads
            its ``weight``.
        coefficient: The bound c on the norm of one layer.
        exclude: Names of submodules that stay unbounded, with everything inside them. DDU excludes the last layer:
            ``exclude=["fc"]``.
        n_power_iterations: Steps of the power iteration in each training forward.
        n_warmup_iterations: Steps at a layer's first forward, so that the bound holds from the start. The estimate of the
            norm grows; after 15 steps it is about 3 % too small for a random 3x3 kernel. The original code uses 0.
        conv_norm: ``"operator"``, or ``"reshaped"`` for the norm of the kernel as a matrix [out, in * k * k], as in SNGP.
            The latter is cheaper but does not bound the operator. Both agree for kernels of one element with ``groups=1``,
            unless they pad with copies (``padding_mode`` other than ``"zeros"``).
        bound_batchnorm: Also bound :math:`\max_i |\gamma_i| / \sqrt{\mathrm{var}_i + \epsilon}` of each BatchNorm, with
            its running variance. Otherwise, as in DDU, the network as a whole has no Lipschitz bound.
        eps: Number added to the divisor of convolutions whose operator is bounded. The original code always adds 1e-5.

    Returns:
        The same network.

    Raises:
        InputError: An argument is out of range, ``exclude`` has an unknown name, there is no layer to bound, or a layer is
            already bounded.
        UnsupportedError: The operator of a layer is unknown: a transposed convolution, a subclass with its own
            ``forward``, an uninitialized layer, complex weights, weights that are not parameters, a BatchNorm without
            scale or running variance. The network is unchanged.

    Source: Mukhoti et al., "Deep Deterministic Uncertainty", CVPR 2023 (arXiv 2102.11582); the soft bound and the norm
    of the convolution follow Gouk et al., "Regularisation of neural networks by enforcing Lipschitz continuity", Machine
    Learning 110 (2021, arXiv 1804.04368), also for BatchNorm; Behrmann et al., ICML 2019 (arXiv 1811.00995).

    Example:
        >>> import torch
        >>> net = spectral_normalize(nn.Sequential(nn.Linear(2, 2, bias=False)), coefficient=0.5)
        >>> with torch.no_grad():
        ...     _ = net[0].parametrizations.weight.original.copy_(torch.diag(torch.tensor([4.0, 1.0])))
        >>> net.eval()(torch.eye(2)).detach()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.1250]])
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"`network` must be a torch.nn.Module, but it is {network!r}.")
    if not (math.isfinite(coefficient) and coefficient > 0):
        raise InputError(f"`coefficient` must be a positive number, but it is {coefficient}.")
    check_integer("n_power_iterations", n_power_iterations, 1)
    check_integer("n_warmup_iterations", n_warmup_iterations, 0)
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"`eps` must be at least 0, but it is {eps}.")
    if conv_norm not in ("operator", "reshaped"):
        raise InputError(f"`conv_norm` must be 'operator' or 'reshaped', but it is {conv_norm!r}.")

    excluded = _modules_of(network, exclude)
    chosen: list[tuple[nn.Module, Bound]] = []
    for name, layer in network.named_modules():
        if layer in excluded:
            continue
        where = label(name, layer)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if bound_batchnorm:
                _check_batchnorm(layer, where)
                chosen.append((layer, BatchNormBound(layer, coefficient)))
        elif isinstance(layer, _LAYERS):
            kind = _check_layer(layer, where)
            conv: Any = layer
            bound: Bound
            if kind is nn.Linear or _is_matrix(conv) or conv_norm == "reshaped":
                bound = MatrixNorm(conv.weight, coefficient, n_power_iterations, n_warmup_iterations)
            else:
                bound = ConvolutionNorm(conv, kind, coefficient, n_power_iterations, n_warmup_iterations, eps)
            chosen.append((layer, bound))
    if not chosen:
        raise InputError(
            f"There is nothing to bound: {type(network).__name__} has no linear layer and no convolution outside of "
            "`exclude`."
        )
    for layer, bound in chosen:  # after all checks, so that an error leaves the network unchanged
        attach(layer, bound)
    if len(chosen) > 1:
        join(network)
    return network


def remove_spectral_norm(network: NetworkT) -> NetworkT:
    """Replace :func:`spectral_normalize` by the bounded weights as plain parameters, e.g. for export.

    A weight that several layers share is copied, since each layer has its own bound. Other parametrizations of a
    bounded weight are removed too, but their effect remains.

    Args:
        network: A network changed by :func:`spectral_normalize`; it is changed back in place.

    Returns:
        The same network. Its outputs in evaluation do not change, and it has its original classes and state keys again.

    Raises:
        InputError: Nothing in ``network`` is bounded.
        NotFittedError: A convolution was not called yet, so its norm is unknown.

    Example:
        >>> import torch
        >>> net = spectral_normalize(nn.Linear(3, 2), coefficient=0.1)
        >>> x = torch.ones(1, 3)
        >>> expected = net.eval()(x)
        >>> torch.equal(remove_spectral_norm(net)(x), expected), sorted(net.state_dict())
        (True, ['bias', 'weight'])
    """
    bounds = {layer: (name, bound) for name, layer in network.named_modules() if (bound := bound_of(layer))}
    if not bounds:
        raise InputError(f"There is no bound to remove: no layer of {type(network).__name__} is spectral-normalized.")
    for name, bound in bounds.values():
        if not bound.is_sized:
            raise NotFittedError(
                f"The norm of {name or 'the network'} depends on the size of its input, but it was not called yet. Run "
                "one batch through the network first."
            )
    for layer in bounds:
        _own_weight(layer, network)
        detach(layer)
    part(network)
    return network


def _is_matrix(conv: Any) -> bool:
    """Whether a convolution applies one matrix at every position, to inputs without overlap."""
    pads_with_copies = conv.padding_mode != "zeros" and not isinstance(conv.padding, str) and any(conv.padding)
    return conv.weight[0, 0].numel() == 1 and conv.groups == 1 and not pads_with_copies


def _modules_of(network: nn.Module, names: Sequence[str]) -> set[nn.Module]:
    """The submodules with these names, and everything inside them."""
    found = dict(network.named_modules(remove_duplicate=False))
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in found:
            raise InputError(
                f"`exclude` names {name!r}, but {type(network).__name__} has no such submodule; "
                "`named_modules()` lists their names."
            )
    return {inner for name in names for inner in found[name].modules()}


def _own_weight(layer: nn.Module, network: nn.Module) -> None:
    """Give ``layer`` a copy of a weight that others also hold, since they must not get the bounded weight."""
    owners = Counter(id(p) for module in network.modules() for p in module._parameters.values())
    on_weight = layer.get_submodule("parametrizations.weight")
    for name, parameter in list(on_weight._parameters.items()):
        if parameter is not None and owners[id(parameter)] > 1:
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            on_weight._parameters[name] = copied


def _check_layer(layer: Any, where: str) -> type[nn.Module]:
    """The base class whose operator ``layer`` has."""
    kind = next(base for base in _LAYERS if isinstance(layer, base))
    if kind in _TRANSPOSED:
        raise UnsupportedError(f"{where} is a transposed convolution, which has no bound yet. Name it in `exclude`.")
    if type(layer).forward is not kind.forward:
        raise UnsupportedError(
            f"{where} is a {kind.__name__} with its own `forward`, so its operator is unknown. Name it in `exclude`."
        )
    if isinstance(getattr(layer, "weight", None), nn.UninitializedParameter):
        raise UnsupportedError(f"{where} has no weight yet. Run one batch through the network first.")
    _check_unbound(layer, where)
    if layer.weight.is_complex():
        raise UnsupportedError(f"{where} has complex weights, which have no bound yet. Name it in `exclude`.")
    return kind


def _check_batchnorm(layer: Any, where: str) -> None:
    if layer.weight is None or layer.running_var is None or isinstance(layer.weight, nn.UninitializedParameter):
        raise UnsupportedError(
            f"{where} lacks a scale or a running variance, which `bound_batchnorm` needs. Name it in `exclude`."
        )
    _check_unbound(layer, where)


def _check_unbound(layer: nn.Module, where: str) -> None:
    if bound_of(layer) is not None:
        raise InputError(
            f"{where} is already spectral-normalized. Call `spectral_normalize` once, or name the layer in `exclude`."
        )
    if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight"):
        raise UnsupportedError(
            f"The weight of {where} is not a parameter: it is a buffer, or other code computes it before each forward. Name "
            "the layer in `exclude`."
        )
