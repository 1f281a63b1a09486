"""Epinets: joint predictions from one network, at the cost of a small head."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import describe
from lightning_uq.lightning_trees import is_instance
from lightning_uq.method import Method, Setting
from lightning_uq.modules.arguments import given_network, training_option
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.frozen import expect_eval_mode
from lightning_uq.modules.sharded_base import ShardedBase
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.networks.epinet.network import EpinetNetwork
from lightning_uq.networks.factory import Factory, build_network
from lightning_uq.networks.output import Output, OutputReader
from lightning_uq.networks.pooling import Pool
from lightning_uq.running.averages import averaged_copies
from lightning_uq.running.loaders import training_loader
from lightning_uq.tasks import describe as describe_task
from lightning_uq.tasks import task_of


class EpinetModule(UncertaintyModule):
    """An epinet on a network, trained with it or added to a pretrained one: f(x, z) = base(x) + epinet(sg[features], z).

    The base runs once and the head once per index, so a hundred hypotheses cost little more than one. The epinet's gradients do
    not reach the base, which learns from its own output.

    Args:
        network: The base: a network, or a factory of it, which a checkpoint can store. Its outputs are as the task expects.
        feature_layers: ``"auto"`` (the linear layer or convolution that produces the output), a layer's name, or several names. The
            features are the inputs of those layers.
        pool: Pooling of tokens [B, T, D], if they are the input of such a layer: ``"mean"``, ``"last_token"``, ``"cls"`` or a
            function ``pool(x, mask)``; or ``"positions"``, which applies the same head at each position of a map. None:
            ``"positions"`` for tasks on maps such as :class:`~lightning_uq.tasks.Segmentation`.
        head: Sizes and scales of the epinet and its priors; the defaults need no tuning for the network.
        prior: Factory of an additive prior g(x, z), for instance :func:`~lightning_uq.networks.mlp_prior`. Its scale is the
            head's ``additive_prior_scale``.
        freeze_base: Whether the base is frozen: in eval mode, without gradients. Only then does the module run under FSDP2
            (``ModelParallelStrategy`` with ``tensor_parallel_size=1``), which shards the base.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        training: Arguments of :class:`UncertaintyModule`: ``task``, ``optimizer``, ``loss`` and the like.

    Raises:
        InputError: A layer or ``pool`` is unknown, a layer's input needs a ``pool``, or arguments contradict each other.

    Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924).

    Example:
        >>> import torch
        >>> base = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> module = EpinetModule(base, head=EpinetHead(index_dim=4, hidden_sizes=(10,)))
        >>> module(torch.zeros(5, 4)).shape, module.predict(torch.zeros(5, 4)).probs.shape
        (torch.Size([100, 5, 3]), torch.Size([5, 3]))
        >>> maps = EpinetModule(nn.Conv2d(1, 3, 1), task="segmentation", num_eval_samples=10)
        >>> maps.predict(torch.zeros(2, 1, 8, 8)).mutual_information.shape
        torch.Size([2, 8, 8])
    """

    default_train_samples = 8
    network: EpinetNetwork

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        feature_layers: str | Sequence[str] = "auto",
        pool: Pool | None = None,
        head: EpinetHead = EpinetHead(),
        prior: Factory | Callable[[], nn.Module] | None = None,
        freeze_base: bool = False,
        output: Output = "logits",
        **training: Any,
    ) -> None:
        built = given_network(network, training)
        if not isinstance(head, EpinetHead):
            raise InputError(f"`head` must be an EpinetHead, but it is {describe(head)}. Pass `head=EpinetHead(...)`.")
        task = task_of(training_option(training, "task", "classification"))
        if task.has_positions and pool not in (None, "positions"):
            raise InputError(
                f"`pool` must be 'positions' for {describe_task(task)}, one result per position, but it is {pool!r}."
            )
        network_with_head = EpinetNetwork(
            built,
            feature_layers=feature_layers,
            pool="positions" if pool is None and task.has_positions else pool,
            num_outputs=task.num_outputs,
            output_axis=task.output_axis,
            head=head,
            prior=None if prior is None else build_network(prior, "prior"),
            freeze_base=freeze_base,
            output=OutputReader(output, training_option(training, "predict_fn", None)),
        )
        super().__init__(network_with_head, **training)
        self.network.evaluation_index(self.num_eval_samples)

    def setup(self, stage: str) -> None:
        """Build the head on a training batch, if the network's structure does not determine its sizes."""
        super().setup(stage)
        if stage == "fit" and not self.network.is_initialized:
            with isolate_rng():
                batch = next(iter(training_loader(self.trainer)), None)
            if batch is None:
                raise InputError("The training loader must hold data to find `feature_layers`, but it is empty.")
            x, _ = self.unpack_batch(batch)
            self.network.initialize(move_data_to_device(x, self.device))
            for average in averaged_copies(self.trainer):  # the copies were made before the head was built
                average.network = copy.deepcopy(self.network).to(average.device)
        if stage == "fit":
            expect_eval_mode(self.network.num_frozen)

    @property
    def runs_sharded(self) -> bool:
        """Whether the base is frozen: FSDP2 then shards the base, and all ranks hold the head."""
        return self.network.freeze_base

    def configure_callbacks(self) -> Sequence[Callback]:
        """Check the Trainer's callbacks. Under FSDP2, add what shards the base and averages the head's gradients."""
        found = super().configure_callbacks()
        callbacks = [found] if is_instance(found, Callback) else list(found)
        if not is_instance(self.trainer.strategy, ModelParallelStrategy):
            return callbacks
        return [*callbacks, ShardedBase(self, self.network.base)]

    def on_train_start(self) -> None:
        """Decide whether to track features: Lightning skips ``on_train_epoch_start`` when a training resumes within an epoch."""
        super().on_train_start()
        self._track_features()

    def on_train_epoch_start(self) -> None:
        """Freeze the feature statistics after the first epoch, if the base is frozen."""
        super().on_train_epoch_start()
        self._track_features()

    def _track_features(self) -> None:
        """Update the feature statistics only while they can change: those of a frozen base are complete after the first epoch."""
        self.network.track_features(not self.network.freeze_base or self.current_epoch == 0)

    def optimized_parameters(self) -> list[Any]:
        """The parameters that need a gradient: the base's, unless it is frozen, and the epinet's.

        Raises:
            InputError: The head has not been built.
        """
        if not self.network.is_initialized:
            raise InputError(
                "The epinet's head is not built yet, because the network's structure does not determine its sizes. Call "
                "`module.network.initialize(x)` with a batch, or name `feature_layers` and pass `task=Classification(num_classes=...)`."
            )
        return super().optimized_parameters()


PRIOR_SCALE_OF_NUMBERS = 0.1
"""Prior scale for regression. The default is made for logits and too large for targets in standardised units: the mean validation NLL on
three UCI tables (seeds 100 and 101) with 0.03, 0.1, 0.3 and 1 was -1.12, -1.11, -0.91 and -0.27; the plain network has -1.04. 0.03 is within
the error of 0.1 (``benchmarks/regression_defaults.md``)."""


def _build(setting: Setting) -> EpinetModule:
    # The default scale, untuned. On validation data (seeds 100-104) its joint log-loss was 0.302; softmax has 0.418. Larger scales
    # lowered it further, to 0.106 at 20, but raised the test NLL on ten other seeds (0.075; softmax has 0.053).
    return EpinetModule(setting.network, **setting.training)


def _build_numbers(setting: Setting) -> EpinetModule:
    return EpinetModule(setting.network, head=EpinetHead(prior_scale=PRIOR_SCALE_OF_NUMBERS), **setting.training)


_ABOUT, _LINK = (
    "one network and a small head that reads its features and a random index",
    "https://arxiv.org/abs/2107.08924",
)

METHODS = (
    Method(
        name="epinet",
        about=_ABOUT,
        build=_build,
        ood_score="predictive_entropy",
        tasks=("classification", "binary", "multilabel"),
        link=_LINK,
    ),
    Method(
        name="epinet",
        about=_ABOUT,
        build=_build_numbers,
        ood_score="epistemic_variance",
        tasks=("regression",),
        link=_LINK,
    ),
)
