"""Members over ranks: each process trains its own members, without any traffic of gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from lightning_uq._lightning import keep_training_sampler, split_training_sampler, synchronizes_batch_norm
from lightning_uq.batches import sampler_of
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.validation import check_integer
from lightning_uq.losses.index import takes_indices
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.member_parallel.states import joined, narrowed, own_entries
from lightning_uq.modules.member_share import MemberShare
from lightning_uq.networks.ensemble import EnsembleNetwork, RowEnsembleNetwork, SharedTrunkNetwork
from lightning_uq.running.averages import averaged_copies
from lightning_uq.running.loaders import can_be_reread, loader_list

_SPLIT = (
    "training_step",
    "training_loss",
    "index_losses",
    "losses_and_count",
    "regularized",
    "reported_loss",
    "configure_optimizers",
    "optimized_parameters",
    "configure_gradient_clipping",
)
"""Methods that see this process's members alone. An override that expects all members would train wrong ones, without an error."""


class MemberParallelStrategy(DDPStrategy):
    """Train an ensemble's members on different processes: W processes train M members about W times as fast as one.

    Every process holds all members, reads all rows, and trains its own share of the members: members 0 and 1 on the first of two processes, and
    2 and 3 on the second. No gradients are sent. Before each validation, checkpoint and end of an epoch, each process sends its members'
    weights to the others. Validation, test and prediction then run as under DDP: all members on each process, with the rows split. A
    checkpoint holds all members and their optimizer states; it resumes on any number of processes, and without this strategy.

    Without random numbers in the networks, the weights and the optimizer's state are those of one process, if both get the same batches: to
    shuffle, seed all processes alike (``seed_everything``). Members of a loop are bitwise equal; stacked ones up to rounding. Dropout draws from a
    stream of each process. ``train_loss`` is logged after the backward pass.

    Args:
        data_parallel_size: D. Groups of D processes train the same members on different rows, and average their gradients within the group.
        kwargs: Arguments of Lightning's ``DDPStrategy``, such as ``process_group_backend``.

    Attributes:
        mesh: The processes [groups, D]; None before the training.

    Raises:
        InputError: The number of processes is not a multiple of D, there are more groups than members, or the training loader has a
            ``DistributedSampler`` of its own with other than D parts. Raised before the training.
        UnsupportedError: The model is not an :class:`EnsembleModule` of plain networks, the precision scales the loss (``16-mixed``),
            BatchNorm is synchronized, a network has a state besides parameters and buffers, the ``regularizer`` is not declared as a sum over members, or a subclass overrides a part of the
            training step or the optimizer. Raised before the training.

    Example:
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=MemberParallelStrategy(), logger=False)
        >>> trainer.strategy.data_parallel_size
        1
    """

    def __init__(self, data_parallel_size: int = 1, **kwargs: Any) -> None:
        check_integer("data_parallel_size", data_parallel_size, 1)
        super().__init__(**kwargs)
        self.data_parallel_size = data_parallel_size
        self.mesh: DeviceMesh | None = None
        self._fitting: Trainer | None = None
        self._trained: EnsembleNetwork | None = None  # also after the training, when a checkpoint may be saved
        self._is_ahead = False  # whether this process's members were trained since the others received them

    # ------------------------------------------------------------------ the share of this process

    @property
    def shares(self) -> list[range]:
        """The members of each group of processes: consecutive ones, and equally many up to one."""
        members = range(self._ensemble.network.num_indices)
        parts = torch.arange(len(members)).tensor_split(self._num_groups)
        return [members[int(part[0]) : int(part[-1]) + 1] for part in parts]

    @property
    def _num_groups(self) -> int:
        return int(self.world_size) // self.data_parallel_size

    @property
    def _own_members(self) -> range:
        return self.shares[self.global_rank // self.data_parallel_size]

    @property
    def _ensemble(self) -> EnsembleModule:
        module = self.lightning_module
        if not isinstance(module, EnsembleModule):
            raise UnsupportedError(
                f"MemberParallelStrategy trains the members of an EnsembleModule, but the model is a {type(module).__name__}. Use "
                "strategy='ddp'."
            )
        return module

    def _check(self) -> None:
        ensemble, size = self._ensemble, self.data_parallel_size
        if ensemble.members is not None:
            raise UnsupportedError(
                "MemberParallelStrategy trains plain networks, but the members are LightningModules "
                f"({type(ensemble.members.modules[0]).__name__}). Use strategy='ddp', or let the factory return the network alone."
            )
        if ensemble.loss is not None and takes_indices(ensemble.loss):
            raise UnsupportedError(
                f"MemberParallelStrategy needs a loss of a single member, but `loss` is computed over all members together "
                f"({ensemble.loss!r}). Use strategy='ddp'."
            )
        if ensemble.regularizer is not None and not getattr(ensemble.regularizer, "sums_members", False):
            raise UnsupportedError(
                f"MemberParallelStrategy needs a `regularizer` that is a sum over members, because each process has only its own, but "
                f"{ensemble.regularizer!r} does not declare this. If it is one, give it an attribute `sums_members = True`. Otherwise use "
                "strategy='ddp'."
            )
        for name in _SPLIT:
            if getattr(type(ensemble), name) is not getattr(EnsembleModule, name):
                raise UnsupportedError(
                    f"MemberParallelStrategy cannot split `{type(ensemble).__name__}.{name}`, an override that may use all members. Use "
                    "strategy='ddp'."
                )
        for part in ensemble.network.modules():
            if type(part).get_extra_state is not nn.Module.get_extra_state:
                raise UnsupportedError(
                    f"MemberParallelStrategy sends parameters and buffers between processes, but `{type(part).__name__}` has a state of "
                    "another kind (`get_extra_state`). Keep it in a buffer, or use strategy='ddp'."
                )
        if isinstance(ensemble.network, SharedTrunkNetwork | RowEnsembleNetwork):
            raise UnsupportedError(
                "MemberParallelStrategy cannot train members that share weights. Use strategy='ddp'."
            )
        if self.world_size % size:
            raise InputError(f"{self.world_size} processes cannot be split into groups of data_parallel_size={size}.")
        if self._num_groups > ensemble.network.num_indices:
            raise InputError(
                f"{self._num_groups} groups of processes cannot share {ensemble.network.num_indices} members. Use fewer devices, or "
                f"data_parallel_size={-(-self.world_size // ensemble.network.num_indices)} or more."
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UnsupportedError(
                "MemberParallelStrategy does not support precision='16-mixed', where one member's overflow skips the step of all. Use "
                "'bf16-mixed'."
            )
        if synchronizes_batch_norm(self):
            raise UnsupportedError(
                "`sync_batchnorm=True` would mix the statistics of different members. Remove it under MemberParallelStrategy."
            )

    # ------------------------------------------------------------------ start and end of a training

    @property
    def repeats_training_rows(self) -> bool:
        """Whether several processes read the same training rows."""
        return self._num_groups > 1

    def setup_environment(self) -> None:
        """Leave the order of the rows to the training loader, which a ``setup`` hook may already build."""
        super().setup_environment()
        assert self.lightning_module is not None
        self._fitting = trainer = self.lightning_module.trainer
        if trainer.state.fn == TrainerFn.FITTING and self.data_parallel_size == 1:
            keep_training_sampler(trainer)

    def setup(self, trainer: Trainer) -> None:
        """Refuse trainings that cannot be split."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check()
            trainer.callbacks = [SendMembers(self), *trainer.callbacks]  # type: ignore[attr-defined]  # set by a connector
        super().setup(trainer)

    def check_sampler(self) -> None:
        """Refuse a training loader whose own sampler gives the members of different processes different rows."""
        assert self._fitting is not None
        size = self.data_parallel_size
        for loader in loader_list(self._fitting.train_dataloader):
            sampler = sampler_of(loader)
            if isinstance(sampler, DistributedSampler) and sampler.num_replicas not in (1, size):
                raise InputError(
                    f"The training loader's sampler splits the rows into {sampler.num_replicas} parts, but MemberParallelStrategy with "
                    f"data_parallel_size={size} needs {size}. Remove the sampler, or pass `num_replicas={size}` "
                    "to it."
                )

    def check_stream(self, batch: Any) -> None:
        """Refuse a training stream whose first batches differ between processes that need the same rows. A collective."""
        assert self._fitting is not None
        if all(can_be_reread(loader) for loader in loader_list(self._fitting.train_dataloader)):
            return
        size, found = self.data_parallel_size, [""] * self.world_size
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        # As text, in which NaN equals NaN, and to the digits that different processors agree on.
        distributed.all_gather_object(
            found, str([(*leaf.shape, f"{float(leaf.double().sum()):.6g}") for leaf in tensors])
        )
        if found != [found[rank % size] for rank in range(self.world_size)]:
            reader, divide = (
                ("every process", "not")
                if size == 1
                else (f"each group of {size} processes", f"by rank % {size} alone")
            )
            raise InputError(
                f"The first batches of the training stream differ, but under MemberParallelStrategy {reader} reads the whole stream. Divide it "
                f"{divide}, and seed all processes alike (`seed_everything`) if it shuffles."
            )

    def configure_ddp(self) -> None:
        """Give the ensemble its share of the members; no wrapper sends gradients."""
        ensemble = self._ensemble
        self.mesh = init_device_mesh(
            self.root_device.type, (self._num_groups, self.data_parallel_size), mesh_dim_names=("members", "rows")
        )
        send([*ensemble.parameters(), *ensemble.buffers()], 0)
        ensemble.train_members(self._own_members, data_parallel_size=self.data_parallel_size)
        self._trained = ensemble.trained_network
        self._is_ahead = False

    def teardown(self) -> None:
        """Give the ensemble all members back."""
        module, trainer = self.lightning_module, self._fitting
        if isinstance(module, EnsembleModule):
            module.train_members(None)
        if trainer is not None:
            split_training_sampler(trainer)
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, SendMembers)]  # type: ignore[attr-defined]
        super().teardown()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The split of the rows: over the processes of a group in training, over all processes in evaluations."""
        if self._fitting is not None and self._fitting.training:
            size = self.data_parallel_size
            return {"num_replicas": size, "rank": self.global_rank % size}
        return super().distributed_sampler_kwargs

    # ------------------------------------------------------------------ training

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Note that the members change: a step that only accumulates gradients still updates the statistics of BatchNorm."""
        self._is_ahead = True
        return super().training_step(*args, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step this process's members, after averaging their gradients within the group."""

        def averaging() -> Any:
            result = closure()
            self._average_gradients()
            return result

        return super().optimizer_step(
            optimizer, closure if self.data_parallel_size == 1 else averaging, model, **kwargs
        )

    def _average_gradients(self) -> None:
        assert self.mesh is not None
        group = self.mesh["rows"].get_group()
        for parameter in self._ensemble.trained_network.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad.div_(self.data_parallel_size), group=group)

    def send_members(self) -> None:
        """Send the trained values of each process's members to all others, those of averaged weights as well. A collective."""
        if not self._is_ahead or self._fitting is None:
            return
        self._is_ahead = False
        for module in (self._ensemble, *averaged_copies(self._fitting)):
            network: EnsembleNetwork = module.network  # type: ignore[assignment]
            for group, members in enumerate(self.shares):
                tensors = [tensor for i in members for tensor in network.member_tensors(i).values()]
                send(tensors, group * self.data_parallel_size)

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of all members. A collective."""
        self.send_members()
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of all members on rank 0, as one process would have it. A collective."""
        state = super().optimizer_state(optimizer)
        assert self._trained is not None
        own = own_entries(getattr(optimizer, "optimizer", optimizer), self._trained)
        gathered: list[Any] = [None] * self.world_size
        distributed.gather_object(own, gathered if self.is_global_zero else None)
        if not self.is_global_zero:
            return state
        shares = gathered[:: self.data_parallel_size]
        return {**state, "state": joined(shares, is_stacked=self._trained.is_stacked)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's part of the state of all members."""
        network = self._ensemble.network
        if network.is_stacked:
            states = [narrowed(s, self._own_members, network.num_indices) for s in checkpoint["optimizer_states"]]
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)


class SendMembers(Callback):
    """Stands before all other callbacks, so that they see all members as trained.

    Args:
        strategy: The strategy of the training.
    """

    def __init__(self, strategy: MemberParallelStrategy) -> None:
        self.strategy = strategy
        self._is_first_batch = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the training loader, which exists from now on."""
        self.strategy.check_sampler()
        self._is_first_batch = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the first batch of a stream."""
        if self._is_first_batch:
            self.strategy.check_stream(batch)
        self._is_first_batch = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean loss, which was on its way during the backward pass, and show the gradients to other callbacks."""
        if (share := _share_of(pl_module)) is not None:
            share.complete()
            share.show_gradients()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the loss of a step without a backward pass, as StochasticWeightAveraging has some for BatchNorm."""
        if (share := _share_of(pl_module)) is not None:
            share.complete()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the members."""
        self.strategy.send_members()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the members."""
        self.strategy.send_members()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the members."""
        self.strategy.send_members()


def _share_of(module: LightningModule) -> MemberShare | None:
    return module.share if isinstance(module, EnsembleModule) else None


@torch.no_grad()
def send(tensors: Sequence[Tensor], source: int) -> None:
    """Copy the values of tensors from one rank to all others, bit for bit, in one message. A collective.

    Args:
        tensors: The tensors, which have the same shapes on all ranks; they are written in place.
        source: The rank that sends.
    """
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    message = torch.cat(parts)
    distributed.broadcast(message, source)
    if distributed.get_rank() == source:
        return
    for tensor, part in zip(tensors, torch.split(message, [len(part) for part in parts]), strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a clone, since the slice may not be aligned
