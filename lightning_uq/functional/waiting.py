"""Where reading a value makes the program wait for a device."""

import torch
from torch import Tensor


def is_free(values: Tensor) -> bool:
    """Whether a number of the tensor can be read at no cost, as in the memory of the CPU.

    Elsewhere the program waits until the device has done all its work so far. There a check of values runs on the first batch alone, or adds
    up on the device and is read once, at the end.

    Example:
        >>> is_free(torch.zeros(1))
        True
    """
    return values.device.type == "cpu"


def read_scalars(*scalars: Tensor) -> list[float]:
    """The values of tensors [] on one device, with one wait for it.

    Example:
        >>> read_scalars(*torch.tensor([0.25, 0.5]).aminmax())
        [0.25, 0.5]
    """
    if is_free(scalars[0]):
        return [scalar.item() for scalar in scalars]  # each costs less than a stack of them all
    values: list[float] = torch.stack(scalars).tolist()
    return values
