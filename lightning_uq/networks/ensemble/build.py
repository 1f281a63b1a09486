"""Builds an ensemble of given members and chooses how they run."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

from lightning_uq.errors import InputError, UnsupportedError, without_period
from lightning_uq.networks.ensemble.checks import check_members
from lightning_uq.networks.ensemble.loop import EnsembleNetwork
from lightning_uq.networks.ensemble.stacked import StackedEnsembleNetwork
from lightning_uq.networks.ensemble.vmapped import VmapEnsembleNetwork, check_mappable
from lightning_uq.networks.output import Output, OutputReader

Execution = Literal["loop", "stacked", "vmap", "auto"]


def build_ensemble(
    members: Iterable[nn.Module],
    execution: Execution = "auto",
    *,
    output: Output = "logits",
    mixed_precision: bool = False,
) -> EnsembleNetwork:
    """Build an ensemble of ``members`` that runs as ``execution`` says. Its ``execution_reason`` explains the choice.

    ``"auto"`` stacks members of equal architecture whose layers can be stacked (linear, norms, activations, dropout). For
    other members of equal architecture it uses ``torch.vmap`` if their weights are on a GPU. All others run one after
    the other: LightningModules, and convolutions on a CPU, where batching has no benefit. The choice depends only on the
    members, and not on the machine.

    Args:
        members: The M networks.
        execution: ``"loop"``, ``"stacked"``, ``"vmap"`` or ``"auto"``.
        output: The kind of a member's output: see :class:`~lightning_uq.networks.output.OutputReader`.
        mixed_precision: Whether the members will run under autocast. ``"auto"`` then avoids ``torch.vmap``, under which
            autocast affects the layers that this package knows, but not the products in a member's own code.

    Raises:
        InputError: ``execution`` is unknown, or a member is not a module.
        UnsupportedError: The members cannot run like this; the message names the module or operation.

    Example:
        >>> network = build_ensemble([nn.Linear(2, 3) for _ in range(5)])
        >>> network.execution, network.execution_reason
        ('stacked', 'Ensemble of 5 runs stacked: its members are alike, and one batched product serves them all.')
    """
    if execution not in ("loop", "stacked", "vmap", "auto"):
        raise InputError(f"`execution` must be 'loop', 'stacked', 'vmap' or 'auto', but it is {execution!r}.")
    members = check_members(members)
    begin = f"Ensemble of {len(members)} runs"
    if execution == "auto":
        return _choose(members, output, mixed_precision, begin)
    kind = {"loop": EnsembleNetwork, "stacked": StackedEnsembleNetwork, "vmap": VmapEnsembleNetwork}[execution]
    how = "in a loop" if execution == "loop" else execution if execution == "stacked" else "under torch.vmap"
    try:
        return kind(members, output, execution_reason=f"{begin} {how}, as asked.")
    except UnsupportedError as error:
        raise UnsupportedError(
            f"execution={execution!r} does not support these members: {without_period(error)}. Use execution='loop' or 'auto'."
        ) from error


def _choose(members: list[nn.Module], output: Output, mixed_precision: bool, begin: str) -> EnsembleNetwork:
    if len(members) == 1:
        return EnsembleNetwork(members, output, execution_reason=f"{begin} in a loop: one member has nothing to share.")
    why = "its members are alike, and one batched product serves them all"
    try:
        return StackedEnsembleNetwork(members, output, execution_reason=f"{begin} stacked: {why}.")
    except UnsupportedError as error:
        reason = without_period(error)
    if all(p.is_cuda for member in members for p in member.parameters()) and not mixed_precision:
        try:
            check_mappable(members[0], OutputReader(output))
            return VmapEnsembleNetwork(
                members,
                output,
                execution_reason=f"{begin} under torch.vmap: its members are alike, on a GPU, and {reason}.",
            )
        except UnsupportedError as error:
            reason = without_period(error)
    return EnsembleNetwork(members, output, execution_reason=f"{begin} in a loop: {reason}.")
