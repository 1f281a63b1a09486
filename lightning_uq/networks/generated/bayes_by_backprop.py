"""Bayes by backprop: a Gaussian over every weight of a network. The index is the seed of a draw."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.hashing import to_normal
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_positive
from lightning_uq.functional.variational import diagonal_gaussian_kl, sampled_kl
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.chunks import in_chunks
from lightning_uq.networks.generated.weights import call_with_weights, check_generable, sets_at_once
from lightning_uq.networks.indexers import SeedIndexer
from lightning_uq.networks.output import Output


class Spread(nn.Module):
    """Standard deviations softplus(start + rho) of P weights, where rho is learned and starts at zero.

    softplus^-1(0.01) is -4.6, where bfloat16 numbers are 0.03 apart, so an optimizer's steps would be lost without the separate start.

    Args:
        num_weights: P.
        initial_std: The initial standard deviation; the state dict holds it too.

    Example:
        >>> Spread(3, 0.5)()
        tensor([0.5000, 0.5000, 0.5000], grad_fn=<SoftplusBackward0>)
    """

    def __init__(self, num_weights: int, initial_std: float) -> None:
        super().__init__()
        self.start = initial_std + math.log(-math.expm1(-initial_std))  # exp(initial_std) would overflow
        self.rho = nn.Parameter(torch.zeros(num_weights))

    def forward(self) -> Tensor:
        """Standard deviations [P], at least in float32."""
        return F.softplus(upcast(self.rho) + self.start)

    def get_extra_state(self) -> Tensor:
        """The start of the standard deviations."""
        return torch.tensor(self.start, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """See :meth:`get_extra_state`."""
        self.start = float(state)


class BayesByBackpropNetwork(EpistemicNetwork):
    """f(x, z) = network(x; mean + std noise(z)) / temperature, with noise(z) ~ N(0, I_P): one number per weight.

    The index z is a seed. The noise is generated from it on demand, equal on every device. All parameters of the network
    that require a gradient have their own standard deviation. The parameters themselves are the means, so a
    pretrained network starts from its weights. All indices run in one batched call; in evaluation, as many at once as suit the
    device. A BatchNorm layer raises, since its running statistics would mix those of all indices.

    Args:
        network: The network; its parameters become the means, in place.
        initial_std: Initial standard deviation of every weight.
        temperature: Divides the outputs.
        output: What ``network`` returns.

    Raises:
        InputError: The network has nothing to train, or a number is not above zero.
        UnsupportedError: The network has a BatchNorm layer with running statistics.

    Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015 (arXiv 1505.05424); ``make_bbb_enn`` of ENN.

    Example:
        >>> network = BayesByBackpropNetwork(nn.Linear(4, 3))
        >>> network.num_weights, network(torch.zeros(5, 4), network.sample_index(7)).shape
        (15, torch.Size([7, 5, 3]))
    """

    def __init__(
        self, network: nn.Module, *, initial_std: float = 0.01, temperature: float = 1.0, output: Output = "logits"
    ) -> None:
        super().__init__(SeedIndexer(), output)
        check_positive(initial_std=initial_std, temperature=temperature)
        check_generable(network, "BayesByBackpropNetwork")
        self.network = network
        self.temperature = temperature
        means = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not means:
            raise InputError(
                f"`network` must have parameters that require a gradient, but {type(network).__name__} has none."
            )
        self.names = list(means)
        self._sizes = [mean.numel() for mean in means.values()]
        like = next(iter(means.values()))
        self.spread = Spread(self.num_weights, initial_std).to(like.device, like.dtype)

    @property
    def num_weights(self) -> int:
        """P, the number of weights that have a distribution."""
        return sum(self._sizes)

    @property
    def mean(self) -> Tensor:
        """Means of the weights [P], in the order of ``names``."""
        return torch.cat([mean.flatten() for mean in self._means().values()])

    @property
    def std(self) -> Tensor:
        """Standard deviations of the weights [P], at least in float32."""
        std: Tensor = self.spread()
        return std

    def noise(self, index: Tensor) -> Tensor:
        """Standard normal numbers [Z, P] in float32, for the seeds ``index`` [Z].

        Raises:
            InputError: ``index`` does not hold integers [Z].
        """
        if index.ndim != 1 or index.is_floating_point():
            raise InputError(
                f"`index` must be seeds, integers [Z], but it is {index.dtype} of shape {list(index.shape)}."
            )
        return to_normal(index.to(self.spread.rho.device), self.num_weights)

    def weights(self, index: Tensor) -> dict[str, Tensor]:
        """The weights [Z, *shape] for the seeds ``index`` [Z], by their names in the network."""
        return self.weights_of_noise(self.noise(index))

    def weights_of_noise(self, noise: Tensor, std: Tensor | None = None) -> dict[str, Tensor]:
        """The weights mean + std noise [Z, *shape] for any ``noise`` [Z, P], by their names. ``std`` avoids computing :attr:`std` again."""
        stds = torch.split(self.std if std is None else std, self._sizes)
        noises = torch.split(noise, self._sizes, dim=1)
        return {
            name: (mean + (part.to(std) * std).reshape(-1, *mean.shape)).to(mean.dtype)
            for (name, mean), std, part in zip(self._means().items(), stds, noises, strict=True)
        }

    def call(self, x: Any, weights: dict[str, Tensor]) -> Tensor:
        """Outputs [Z, B, ...] with the weights from :meth:`weights`."""
        return call_with_weights(self.network, self.read_output, weights, x) / self.temperature

    def forward(self, x: Any, index: Tensor) -> Tensor:
        """Outputs [Z, B, ...] of the batch ``x`` [B, ...] for the seeds ``index`` [Z]."""
        if self.training or torch.compiler.is_compiling():
            return self.call(x, self.weights(index))
        std = self.std

        def run(part: Tensor) -> Tensor:
            return self.call(x, self.weights_of_noise(self.noise(part), std))

        return in_chunks(run, index, sets_at_once(self.num_weights, x, self.spread.rho.device))

    def kl(
        self,
        prior_std: float = 1.0,
        second_prior_std: float | None = None,
        mixture_weight: float = 0.5,
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """KL divergence of the weights' distribution from a prior, in nats: exact for one Gaussian, else estimated from ``weights``.

        Args:
            prior_std: Standard deviation of the prior.
            second_prior_std: Standard deviation of a second component; None: there is only one.
            mixture_weight: Probability of the first component.
            weights: Draws of the weights, which the estimate against a mixture needs.

        Returns:
            A scalar, or an estimate per draw [Z].

        Raises:
            InputError: There are no draws for a mixture prior, or a number is out of range.
        """
        if second_prior_std is None:
            return diagonal_gaussian_kl(self.mean, self.std, prior_std)
        if weights is None:
            raise InputError(
                "The divergence from a mixture of priors is estimated from draws of the weights. Pass `weights`."
            )
        draws = torch.cat([weights[name].flatten(1) for name in self.names], dim=1)
        return sampled_kl(draws, self.mean, self.std, prior_std, second_prior_std, mixture_weight)

    def _means(self) -> dict[str, Tensor]:
        return {name: self.network.get_parameter(name) for name in self.names}
