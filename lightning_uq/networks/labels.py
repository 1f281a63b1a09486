"""Names submodules in error messages."""

from torch import nn


def label(name: str, module: nn.Module) -> str:
    """A submodule's name and class.

    Example:
        >>> label("layer1.0", nn.ReLU()), label("", nn.ReLU())
        ("'layer1.0' (ReLU)", 'ReLU')
    """
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__
