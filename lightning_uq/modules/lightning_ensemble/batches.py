"""A batch of a member's own, which it may change in place."""

import copy
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_uq.errors import InputError


def own_batch(batch: Any) -> Any:
    """A copy of a batch with its own containers and tensors; two names of one tensor stay so.

    Raises:
        InputError: The batch holds something that cannot be copied.

    Example:
        >>> import torch
        >>> batch = {"x": torch.ones(2), "name": ["a", "b"]}
        >>> own = own_batch(batch)
        >>> own.pop("x").zero_()
        tensor([0., 0.])
        >>> batch["x"]
        tensor([1., 1.])
    """
    # A deep copy of a tensor that is a slice would copy all of its storage.
    clones = {id(leaf): leaf.clone() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    try:
        return copy.deepcopy(batch, clones)
    except Exception as error:
        raise InputError(
            f"A batch of type {type(batch).__name__} cannot be copied: {error}. Each member gets a copy, because it may change "
            "the batch in place. Return tensors in plain containers from the data set, or define `__deepcopy__`."
        ) from error
