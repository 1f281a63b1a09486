"""Loads a checkpoint into a LightningModule like Lightning does."""

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_uq.networks.compiled import take_compiled_names


def load_as_lightning(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint like ``load_from_checkpoint``: ``configure_model``, ``on_load_checkpoint``, then the weights.

    The module's ``strict_loading`` is respected. Parts of the module may be compiled although those of the checkpoint were not, and
    vice versa.

    Args:
        module: The module, which takes the weights.
        checkpoint: The checkpoint. It does not change, except for the module's hook below its first level.

    Raises:
        RuntimeError: The weights do not match the module.

    Example:
        >>> import torch
        >>> module = LightningModule()
        >>> module.net = torch.nn.Linear(1, 1, bias=False)
        >>> load_as_lightning(module, {"state_dict": {"net._orig_mod.weight": torch.ones(1, 1)}})
        >>> module.net.weight.item()
        1.0
    """
    module.configure_model()
    checkpoint = {**checkpoint, "state_dict": copy.copy(checkpoint["state_dict"])}
    module.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    take_compiled_names(module, state, "")
    module.load_state_dict(state, strict=module.strict_loading)
