"""Modules whose weights are hidden from optimizers: frozen networks, and priors that take an index."""

import inspect

from torch import Tensor, nn

from lightning_uq.errors import InputError


def adopt_prior(prior: nn.Module | None) -> nn.Module | None:
    """Freeze a prior g(x, z), in place, and return it; None stays None.

    Raises:
        InputError: It takes no index, like a plain network, or is not a module.
    """
    if prior is None:
        return None
    if not isinstance(prior, nn.Module):
        raise InputError(f"`prior` must be a module g(x, z), but it is {prior!r}.")
    try:
        inspect.signature(prior.forward).bind(None, None)
    except TypeError:
        raise InputError(
            f"`prior` must be a network g(x, z) of an input and an index, but {type(prior).__name__} takes no index. "
            "Build one from plain networks with `lightning_uq.networks.AdditivePrior`."
        ) from None
    return freeze_as_buffers(prior)


def freeze_as_buffers(module: nn.Module) -> nn.Module:
    """Turn every parameter of ``module`` into a buffer of the same name, in place, and set it to eval mode.

    The state dict keeps its names, and the weights move with the module. Optimizers, weight decay, gradient clipping
    and DDP do not see them. A second call changes nothing.

    Args:
        module: The module tree; a parameter that two names share stays shared.

    Returns:
        ``module`` itself.

    Raises:
        InputError: A lazy module is not initialized.

    Example:
        >>> frozen = freeze_as_buffers(nn.Linear(2, 1))
        >>> list(frozen.parameters()), sorted(frozen.state_dict())
        ([], ['bias', 'weight'])
    """
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError(f"`module` must be initialized, but {type(module).__name__} is lazy.")
    buffers: dict[int, Tensor] = {}
    for submodule in module.modules():
        for name, parameter in list(submodule._parameters.items()):
            if parameter is not None:
                del submodule._parameters[name]
                buffer = buffers.setdefault(id(parameter), parameter.detach())
                submodule.register_buffer(name, buffer)
        if isinstance(submodule, nn.RNNBase):
            submodule._apply(lambda t: t, recurse=False)  # type: ignore[no-untyped-call]  # renews its list of weights
    return module.eval()
