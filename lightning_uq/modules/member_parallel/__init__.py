"""The members of an ensemble over the processes of a training."""

from lightning_uq.modules.member_parallel.strategy import MemberParallelStrategy

__all__ = ["MemberParallelStrategy"]
