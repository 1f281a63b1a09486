"""Modules whose weights no optimizer sees, and the check that a prior reads an index."""

import inspect

from torch import Tensor, nn

from lightning_uq.errors import InputError


def check_prior(prior: nn.Module | None, argument: str) -> None:
    """Check that a prior g(x, z) takes an input and an index.

    Raises:
        InputError: It takes one argument, as a plain network does, or it is no module.
    """
    if prior is None:
        return
    if not isinstance(prior, nn.Module):
        raise InputError(f"Expected argument `{argument}` to be a module g(x, z), but got {prior!r}.")
    try:
        inspect.signature(prior.forward).bind(None, None)
    except TypeError:
        raise InputError(
            f"`{argument}` must be a network g(x, z) of an input and an index, but {type(prior).__name__} takes no index. "
            "`lightning_uq.networks.AdditivePrior` makes one of plain networks."
        ) from None


def freeze_as_buffers(module: nn.Module) -> nn.Module:
    """Turn every parameter of ``module`` into a buffer of the same name, in place, and set it to eval mode.

    The state dict keeps its names, and the weights move with the module; no optimizer, weight decay, gradient clipping
    or DDP ever sees them.

    Args:
        module: The module tree; a parameter that two names share stays shared.

    Returns:
        ``module`` itself.

    Raises:
        InputError: A lazy module has not seen its first batch.

    Example:
        >>> frozen = freeze_as_buffers(nn.Linear(2, 1))
        >>> list(frozen.parameters()), sorted(frozen.state_dict())
        ([], ['bias', 'weight'])
    """
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise InputError(f"Expected argument `module` to be initialised, but {type(module).__name__} is lazy.")
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
