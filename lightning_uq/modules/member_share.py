"""The part of an ensemble that one process trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from lightning_uq.errors import UnsupportedError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.running.streams import RandomStream


class MemberShare:
    """The members that this process trains, on the storage of the whole ensemble.

    Args:
        whole: The network of all members.
        members: The numbers of this process's members.
        data_parallel_size: The number of processes that train these members.

    Attributes:
        network: The network of this process's members.
        members: Their numbers, as a slice.
    """

    def __init__(self, whole: EnsembleNetwork, members: range, data_parallel_size: int) -> None:
        self.network = whole.share(members)
        self._whole = whole
        self.members = slice(members.start, members.stop)
        self._num_members = whole.num_indices
        self._data_parallel_size = data_parallel_size
        self._stream: RandomStream | None = None
        self._coming: distributed.Work | None = None
        self._log: Callable[[], None] | None = None

    @contextmanager
    def training(self, seed: int, step: int, device: torch.device) -> Iterator[None]:
        """A context for a training step. Dropout draws from a stream of this process, so that all processes still draw one data order.

        Args:
            seed: The ensemble's seed.
            step: The number of steps so far; a resumed training starts a new stream.
            device: The module's device.
        """
        self.network.training = True  # of stacked members, which are no submodules
        if self.network.is_stacked:
            self._check_frozen()
        if self._stream is None:
            self._stream = RandomStream(
                member_seed(member_seed(seed, self._num_members + distributed.get_rank()), step)
            )
        with self._stream.active(device):
            yield

    def _check_frozen(self) -> None:
        for whole, own in zip(self._whole.parameters(), self.network.parameters(), strict=True):
            if whole.requires_grad != own.requires_grad:
                raise UnsupportedError(
                    "Stacked members cannot be frozen or unfrozen during a training under MemberParallelStrategy. Use execution='loop'."
                )

    def show_gradients(self) -> None:
        """Give each parameter of the whole stacked network a gradient: this process's rows are those of the share, the others are 0.

        They lie on the same storage, so a callback that changes gradients of ``module.parameters()`` changes what is stepped.
        """
        if not self.network.is_stacked:
            return
        for whole, own in zip(self._whole.parameters(), self.network.parameters(), strict=True):
            if own.grad is None:
                whole.grad = None
                continue
            if whole.grad is None:
                whole.grad = torch.zeros_like(whole)
            rows = whole.grad[self.members]
            if rows.data_ptr() != own.grad.data_ptr():
                own.grad = rows.copy_(own.grad)

    def among_all(self, output: Tensor) -> Tensor:
        """Outputs [m, B, ...] of this process's members among zeros [M, B, ...].

        The last elements of a tensor may round differently from the others, so the losses are computed on a tensor of the size that
        one process would use.
        """
        outputs = output.new_zeros(self._num_members, *output.shape[1:])
        return torch.cat([outputs[: self.members.start], output, outputs[self.members.stop :]])

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The mean loss over all members, from the sum over this process's members. A collective of one number.

        The number comes while the backward pass runs: it is there when :meth:`complete` has returned.
        """
        if self._coming is not None:
            self._coming.wait()
        mean = loss / (self._num_members * self._data_parallel_size)
        self._coming = distributed.all_reduce(mean, async_op=True)
        return mean

    def when_complete(self, log: Callable[[], None]) -> None:
        """Call this function at the next :meth:`complete`."""
        self._log = log

    def complete(self) -> None:
        """Wait for the mean loss and log it, if that was not done since the last training step."""
        if self._log is None:
            return
        if self._coming is not None:
            self._coming.wait()
        log, self._log, self._coming = self._log, None, None
        log()
