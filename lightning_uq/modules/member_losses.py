"""The training loss of an ensemble of plain networks."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_uq.modules.member_share import MemberShare
from lightning_uq.networks.held_buffers import held_buffers

if TYPE_CHECKING:
    from lightning_uq.modules.ensemble import EnsembleModule


def sum_of_losses(module: "EnsembleModule", share: MemberShare | None, x: Any, y: Tensor, batch: Any) -> Tensor:
    """The sum of the members' losses, each the mean of clean and adversarial loss if the module has an adversary.

    Args:
        module: The ensemble.
        share: The members that this process trains; None for all.
        x: Inputs [B, ...].
        y: Targets of the batch.
        batch: The whole batch, which may hold weights and positions.
    """
    network = module.trained_network
    targets = module.targets(y, batch, torch.arange(module.network.num_indices))

    def total(output: Tensor) -> Tensor:
        if share is None:
            return module.index_losses(output, targets).sum()
        return module.index_losses(share.among_all(output), targets)[share.members].sum()

    with nullcontext() if share is None else share.training(module.seed, module.global_step, module.device):
        if module.adversary is None:
            return total(network(x))
        return module.adversary.loss(
            lambda xs: total(network.forward_each(xs)),
            x,
            list(network.parameters()),
            copies=network.num_indices,
            scaler=module.gradient_scaler,
            second_pass=held_buffers(network),
        )
