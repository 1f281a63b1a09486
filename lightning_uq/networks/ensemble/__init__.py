"""Ensembles as epistemic networks, with a finite set of indices: the numbers of the members.

- ``build.py``: :func:`build_ensemble`, which chooses how the members run.
- ``loop.py``, ``stacked.py``, ``vmapped.py``: the three executions, one class per file, with the same results.
- ``shared_trunk.py``: members that share the first part of their network; ``batch_ensemble.py``: all weights up to factors of rank one;
  ``lora.py``: adapters of one model. The last two are kinds of ``rows.py``.
- ``alike.py``: whether one forward pass can serve all members.
- ``trace.py``, ``lift.py``, ``operations.py``: the forward pass of a stacked ensemble.
- ``mapped_call.py``: one call with the weights of many networks, by ``torch.vmap``.
"""

from lightning_uq.networks.ensemble.batch_ensemble import BatchEnsembleNetwork
from lightning_uq.networks.ensemble.build import Execution, build_ensemble
from lightning_uq.networks.ensemble.loop import EnsembleNetwork
from lightning_uq.networks.ensemble.lora import LoraEnsembleNetwork
from lightning_uq.networks.ensemble.rows import RowEnsembleNetwork
from lightning_uq.networks.ensemble.shared_trunk import SharedTrunkNetwork
from lightning_uq.networks.ensemble.stacked import StackedEnsembleNetwork
from lightning_uq.networks.ensemble.vmapped import VmapEnsembleNetwork

__all__ = [
    "BatchEnsembleNetwork",
    "EnsembleNetwork",
    "Execution",
    "LoraEnsembleNetwork",
    "RowEnsembleNetwork",
    "SharedTrunkNetwork",
    "StackedEnsembleNetwork",
    "VmapEnsembleNetwork",
    "build_ensemble",
]
