"""A checkpoint in a LightningModule, as Lightning itself would load it."""

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_uq.networks.compiled import take_compiled_names


def load_as_lightning(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint as ``load_from_checkpoint`` does: ``configure_model``, ``on_load_checkpoint``, then the weights.

    The module's ``strict_loading`` holds. Parts of the module may be compiled, where those in the checkpoint were not, and the
    other way around.

    Args:
        module: The module, which takes the weights.
        checkpoint: The checkpoint, which stays as it is but for what the module's hook changes below its first level.

    Raises:
        RuntimeError: The weights do not fit.

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
