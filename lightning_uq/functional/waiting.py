"""Whether reading a value makes the program wait for a device."""

import torch
from torch import Tensor


def is_free(values: Tensor) -> bool:
    """Whether the tensor's values can be read at no cost, as in the memory of the CPU.

    On other devices the program waits until the device has finished all its work. There, values are checked only for the first batch, or
    counted on the device and read once at the end.

    Example:
        >>> is_free(torch.zeros(1))
        True
    """
    return values.device.type == "cpu"


def read_scalars(*scalars: Tensor) -> list[float]:
    """The values of scalar tensors on one device, with a single wait.

    Example:
        >>> read_scalars(*torch.tensor([0.25, 0.5]).aminmax())
        [0.25, 0.5]
    """
    if is_free(scalars[0]):
        return [scalar.item() for scalar in scalars]  # cheaper than stacking them
    values: list[float] = torch.stack(scalars).tolist()
    return values
