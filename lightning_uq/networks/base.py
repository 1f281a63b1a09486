"""The base class of all methods: an epistemic network f(x, z)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.compiled import take_compiled_names
from lightning_uq.networks.indexers import EnsembleIndexer, Indexer
from lightning_uq.networks.output import Output, OutputReader, PredictFn
from lightning_uq.networks.priors.members import priors_of_members


class EpistemicNetwork(nn.Module, ABC):
    """A network f(x, z) of an input and an index z, which selects one hypothesis.

    A subclass passes its indexer to this constructor and defines :meth:`forward`. Predictions, metrics, modules and the
    comparison then work with it. The part that does not depend on z should run once, and only the rest Z times.

    Attributes:
        read_output: Calls an inner network and converts its return value to an output tensor. Subclasses use it for every inner call.
        is_stacked: Whether each parameter holds the slices of all members, [M, ...].

    Args:
        indexer: The source of z. Its set of indices is finite (an ensemble's members) or infinite. Training and
            evaluation use all indices of a finite set.
        output: What an inner network returns: see :class:`~lightning_uq.networks.output.OutputReader`.

    Raises:
        InputError: ``indexer`` is not an :class:`~lightning_uq.networks.Indexer`.

    Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924).
    """

    is_stacked: bool = False

    def __init__(self, indexer: Indexer, output: Output = "logits") -> None:
        super().__init__()
        if not isinstance(indexer, Indexer):
            raise InputError(f"`indexer` of {type(self).__name__} must be an Indexer, but it is {indexer!r}.")
        self.indexer = indexer
        self.read_output = output if isinstance(output, OutputReader) else OutputReader(output)

    def call_by(self, predict_fn: PredictFn | str) -> None:
        """Call the inner networks by ``predict_fn(network, x)``.

        Raises:
            UnsupportedError: The members run at once, by a translation of their own ``forward``.
        """
        if self.is_stacked:
            raise UnsupportedError("Members that run at once cannot be called by a `predict_fn`. Use execution='loop'.")
        for part in self.modules():
            if isinstance(part, EpistemicNetwork):
                part.read_output = OutputReader(part.read_output.output, predict_fn)

    @property
    def called_network(self) -> nn.Module | None:
        """An inner network that is called with the input, whose signature shows the arguments; None if unknown."""
        found = getattr(self, "network", None)
        return found.called_network if isinstance(found, EpistemicNetwork) else found

    @abstractmethod
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] for the Z rows of ``index``."""

    @property
    def num_indices(self) -> int | None:
        """Size of a finite set of indices (an ensemble's members); None for an infinite set."""
        return self.indexer.num_indices

    def sample_index(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` indices, stacked on axis 0: [Z] for members and seeds, [Z, index_dim] for vectors."""
        return self.indexer(num_samples, generator)

    def training_index(self, num_samples: int) -> Tensor:
        """The indices of one training step: all of a finite set, or else ``num_samples`` new draws."""
        return self.sample_index(num_samples) if self.num_indices is None else self.evaluation_index(num_samples)

    def evaluation_index(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """The indices for evaluation: all of a finite set, or else ``num_samples`` draws, the same in every call.

        Args:
            num_samples: Number of draws Z from an infinite set of indices. A finite set ignores it.
            seed: Seed of those draws, so that two evaluations of one network are equal.

        Raises:
            InputError: ``num_samples`` is below 1.
        """
        return self.indexer.evaluation_index(num_samples, seed)

    def feature_networks(self) -> list[nn.Module]:
        """The plain inner networks whose layers hold features of an input: one per member, or one.

        A subclass with such networks overrides this method.

        Raises:
            UnsupportedError: There are none, for instance because every index has its own weights.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has no plain inner network whose features could be read. If it has one, override "
            "`feature_networks()` to return it."
        )

    @property
    def feature_source(self) -> "EpistemicNetwork":
        """The network that calls the :meth:`feature_networks`: this one, or the network inside a wrapper."""
        return self

    @property
    def shows_features(self) -> bool:
        """Whether hooks on the :meth:`feature_networks` get the features while this network runs.

        False if the members run at once, or if the features depend on the index. Each feature network must then be
        called once more, directly on the input of :attr:`feature_source`.
        """
        return True

    def unstacked(self) -> "EpistemicNetwork":
        """The network with members that run one after the other: a copy of stacked members, or this network itself."""
        return self

    def evaluate_at(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] at an ``index`` from :meth:`evaluation_index`."""
        output: Tensor = self(x, index)
        return output

    def frozen_parts(self) -> list[nn.Module]:
        """The inner parts that are never trained and stay in eval mode, such as priors."""
        return priors_of_members(self.modules())

    @property
    def num_frozen(self) -> int:
        """The number of inner modules that are always in eval mode."""
        return len({module for part in self.frozen_parts() for module in part.modules()})

    def train(self, mode: bool = True) -> "EpistemicNetwork":
        """Set the mode; the :meth:`frozen_parts` stay in eval mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def learned_and_prior(self, x: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, ...]: the trained part, and the frozen priors, which are zeros if there are none.

        Raises:
            UnsupportedError: Its members have their own priors (:class:`NetworkWithPrior`), which they add themselves.
        """
        if priors_of_members(self._all_modules()):
            raise UnsupportedError(
                f"The members of {type(self).__name__} add their own priors, so the trained part cannot be separated. Use an "
                "EpistemicNetworkWithPrior of plain members and a ChoicePrior."
            )
        output: Tensor = self(x, index)
        return output, torch.zeros_like(output)

    def _all_modules(self) -> Iterable[nn.Module]:
        """All modules, including those that run with the weights of others."""
        return self.modules()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        take_compiled_names(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DeterministicNetwork(EpistemicNetwork):
    """A plain network as an epistemic one: a single index, whose output never varies.

    Args:
        network: Any module that maps x [B, ...] to outputs [B, ...].
        output: What ``network`` returns: ``"logits"``, ``"probs"``, ``"log_probs"``, or a function that picks the logits.

    Example:
        >>> import torch
        >>> net = DeterministicNetwork(torch.nn.Linear(2, 3))
        >>> net(torch.zeros(5, 2), net.evaluation_index(100)).shape
        torch.Size([1, 5, 3])
    """

    def __init__(self, network: nn.Module, output: Output = "logits") -> None:
        super().__init__(EnsembleIndexer(1), output)
        self.network = network

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of one pass, repeated over the index without a copy."""
        output = self.read_output.call(self.network, x)
        return output.unsqueeze(0).expand(len(index), *output.shape)

    def feature_networks(self) -> list[nn.Module]:
        """The network."""
        return [self.network]
