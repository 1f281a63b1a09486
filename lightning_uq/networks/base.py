"""The one idea of this package: every method is an epistemic network f(x, z)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks._calling import call_network
from lightning_uq.networks._compiled import take_compiled_names
from lightning_uq.networks.output import Output, OutputReader
from lightning_uq.networks.priors import NetworkWithPrior


class EpistemicNetwork(nn.Module, ABC):
    """A network f(x, z): an input, and an index z that says which hypothesis is speaking.

    A subclass provides :meth:`sample_index` and :meth:`forward`; everything downstream (predictions, metrics, modules,
    the comparison) then works on it. What does not depend on z should run once, only the head Z times.

    Attributes:
        num_indices: Size of a finite index set (an ensemble's members), or None where z is drawn from a distribution.
            A finite set is enumerated exactly at evaluation, never resampled.
        read_output: Turns what an inner network returns into its output tensor; subclasses apply it to every inner call.

    Args:
        output: What an inner network returns: see :class:`~lightning_uq.networks.output.OutputReader`.

    Source: Osband et al., "Epistemic Neural Networks", NeurIPS 2023 (arXiv 2107.08924).
    """

    num_indices: int | None = None
    _drawn: tuple[tuple[int, int], Tensor] | None = None

    def __init__(self, output: Output = "logits") -> None:
        super().__init__()
        self.read_output = OutputReader(output)

    @abstractmethod
    def sample_index(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``num_samples`` indices, stacked on axis 0: [Z] for members, [Z, index_dim] for vectors."""

    @abstractmethod
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] under each of the Z rows of ``index``."""

    def learned_and_prior(self, x: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, ...]: what is trained, and the frozen priors; zeros where it has none.

        Raises:
            UnsupportedError: Its members have priors of their own (:class:`NetworkWithPrior`), which they add themselves.
        """
        if any(isinstance(module, NetworkWithPrior) for module in self._all_modules()):
            raise UnsupportedError(
                f"The trained part of {type(self).__name__} cannot be told from its members' priors. Build it as an "
                "EpistemicNetworkWithPrior of plain members and a ChoicePrior."
            )
        output: Tensor = self(x, index)
        return output, torch.zeros_like(output)

    def evaluation_index(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """The indices to evaluate with: all of a finite set, else ``num_samples`` draws, the same at every call.

        Args:
            num_samples: Number of draws Z from an infinite index set; a finite one ignores it.
            seed: Seed of those draws, so that two evaluations of one network are equal.
        """
        if self.num_indices is not None:
            return torch.arange(self.num_indices)
        if num_samples < 1:
            raise InputError(f"Expected argument `num_samples` to be at least 1, but got {num_samples}.")
        if self._drawn is None or self._drawn[0] != (num_samples, seed):
            # Drawn once, so that an exported graph holds them as a constant; and never as inference tensors, with which no
            # gradient could be taken once that mode has ended.
            with torch.inference_mode(False):
                self._drawn = (num_samples, seed), self.sample_index(num_samples, torch.Generator().manual_seed(seed))
        return self._drawn[1]

    def _all_modules(self) -> Iterable[nn.Module]:
        """Its modules; also those that run under the weights of others."""
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

    num_indices = 1

    def __init__(self, network: nn.Module, output: Output = "logits") -> None:
        super().__init__(output)
        self.network = network

    def sample_index(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Zeros [Z]: there is one index."""
        return torch.zeros(num_samples, dtype=torch.long)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...]: one pass, repeated over the index without a copy."""
        output = self.read_output(call_network(self.network, x))
        return output.unsqueeze(0).expand(len(index), *output.shape)
