"""Regression by a distribution over atoms for every index, also ready-made as an ensemble of MLPs with priors."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.atoms import atom_moments, check_atoms
from lightning_uq.functional.softplus import inverse_softplus
from lightning_uq.functional.validation import check_integer
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.ensemble import build_ensemble
from lightning_uq.networks.initializers import truncated_normal_init_
from lightning_uq.networks.mlp import MLP
from lightning_uq.networks.precision import KeepsPrecision
from lightning_uq.networks.priors.index_priors import ChoicePrior
from lightning_uq.networks.priors.random_features import Gamma, RandomFeatureGP
from lightning_uq.networks.wrapped import WrappedNetwork

_SMALLEST_VARIANCE = 1e-12  # of a distribution on one atom


class CategoricalRegressionNetwork(WrappedNetwork):
    """A regressor with a distribution over atoms for every index, whose mean is sum_a softmax(logits)_a atom_a + prior(x, z).

    ``forward`` returns the distribution's mean and variance in the layout of every regression network here, so it works
    with any module and metric. :class:`~lightning_uq.modules.CategoricalRegressionModule` trains the distribution itself.
    The variance is that of the atoms. A target between two atoms is learned as a mixture of both, so even noise-free data
    have a variance of up to a quarter of the squared distance between two atoms.

    Args:
        network: Epistemic network with outputs [Z, B, D A]: the logits over A atoms of each target dimension.
        atoms: Ascending numbers [A] that cover the targets minus the prior. Targets outside are clipped in training.
        prior: Frozen function g(x, z) to [Z, B, D], in units of the target; its parameters become buffers, in place.
        prior_scale: Factor of the prior.

    Raises:
        InputError: The atoms do not ascend, or the outputs of the network or the prior have another shape.

    Source: ``CatOutputWithPrior`` of google-deepmind/enn; Schrittwieser et al., Nature 2020, for the atoms.

    Example:
        >>> from lightning_uq.networks import EnsembleNetwork
        >>> members = EnsembleNetwork([nn.Linear(4, 9) for _ in range(5)])
        >>> network = CategoricalRegressionNetwork(members, torch.linspace(-2, 2, 9))
        >>> logits, prior = network.logits_and_prior(torch.zeros(6, 4), torch.arange(5))
        >>> logits.shape, prior.shape, network(torch.zeros(6, 4), torch.arange(5)).shape
        (torch.Size([5, 6, 1, 9]), torch.Size([5, 6, 1]), torch.Size([5, 6, 2]))
    """

    def __init__(
        self,
        network: EpistemicNetwork,
        atoms: Tensor | Sequence[float],
        *,
        prior: nn.Module | None = None,
        prior_scale: float = 1.0,
    ) -> None:
        super().__init__(network, prior)
        if not 0 <= prior_scale < math.inf:
            raise InputError(f"`prior_scale` must be a number of at least 0, but it is {prior_scale}.")
        self.support = _Atoms(check_atoms(atoms))
        self.prior_scale = prior_scale

    @property
    def atoms(self) -> Tensor:
        """The atoms [A]."""
        return self.support.atoms

    def logits_and_prior(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [Z, B, D, A] over the atoms, and the scaled prior [Z, B, D]."""
        output: Tensor = self.network(x, index)
        size, num_atoms = output.shape[-1], len(self.atoms)
        if output.ndim != 3 or size % num_atoms:
            raise InputError(
                f"The network must return [B, D x {num_atoms}], logits over {num_atoms} atoms for each of D "
                f"target dimensions, but its shape is {list(output.shape[1:])}."
            )
        logits = output.reshape(*output.shape[:-1], size // num_atoms, num_atoms)
        if self.prior is None:
            return logits, logits.new_zeros(logits.shape[:-1])
        prior = self.prior_scale * self.prior(x, index)
        if prior.shape != logits.shape[:-1]:
            raise InputError(
                f"The prior's output must have shape {list(logits.shape[:-1])}, but its shape is {list(prior.shape)}."
            )
        return logits, prior

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Means and raw variances [Z, B, 2 D] of x [B, ...]. The variance is softplus of the raw one."""
        learned, prior = self.learned_and_prior(x, index)
        return learned + prior

    def learned_and_prior(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the output, each [Z, B, 2 D]: the distribution's moments, and the prior, which only shifts means."""
        logits, prior = self.logits_and_prior(x, index)
        mean, variance = atom_moments(logits, self.atoms)
        learned = torch.cat([mean, inverse_softplus(variance.clamp_min(_SMALLEST_VARIANCE))], -1)
        return learned, F.pad(prior.to(learned.dtype), (0, prior.shape[-1]))


class CatMLPEnsemble(CategoricalRegressionNetwork):
    """An ensemble of M MLPs with distributions over atoms, each with its own real-valued random prior.

    Args:
        in_features: Size of the flattened input.
        atoms: Ascending numbers [A].
        num_outputs: Target dimensions D.
        num_members: M.
        hidden_sizes: Widths of each MLP's hidden layers.
        prior: ``"mlp"``: MLPs of the same widths; ``"gp"``: random-feature Gaussian processes; None: no prior.
        prior_scale: Factor of the prior.
        num_features: Number of random features of a Gaussian process.
        gamma: Its inverse length scale, or a range to draw it from.
        seed: Seed of the priors; None uses the global generator.

    Raises:
        InputError: An argument is invalid.

    Source: ``CatMLPEnsemble``, ``CatMLPEnsembleMlpPrior`` and ``CatMLPEnsembleGpPrior`` of google-deepmind/enn, where every
    Gaussian process has one output for any D.

    Example:
        >>> network = CatMLPEnsemble(4, torch.linspace(-2, 2, 9).tolist(), num_members=5, prior="gp")
        >>> network(torch.zeros(6, 4), network.evaluation_index(100)).shape
        torch.Size([5, 6, 2])
    """

    def __init__(
        self,
        in_features: int,
        atoms: Tensor | Sequence[float],
        *,
        num_outputs: int = 1,
        num_members: int = 10,
        hidden_sizes: Sequence[int] = (50, 50),
        prior: Literal["mlp", "gp"] | None = "mlp",
        prior_scale: float = 1.0,
        num_features: int = 100,
        gamma: Gamma = 1.0,
        seed: int | None = None,
    ) -> None:
        if prior not in ("mlp", "gp", None):
            raise InputError(f"`prior` must be 'mlp', 'gp' or None, but it is {prior!r}.")
        check_integer("num_members", num_members, 1)
        check_integer("num_outputs", num_outputs, 1)
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def mlp(out_features: int, generator: torch.Generator | None = None) -> nn.Module:
            return truncated_normal_init_(
                nn.Sequential(nn.Flatten(), MLP(in_features, out_features, hidden_sizes=hidden_sizes)), generator
            )

        size = num_outputs * len(check_atoms(atoms))
        members = build_ensemble([mlp(size) for _ in range(num_members)])
        functions: list[nn.Module] = []
        if prior == "mlp":
            functions = [mlp(num_outputs, generator) for _ in range(num_members)]
        elif prior == "gp":
            functions = [
                RandomFeatureGP(in_features, num_outputs, num_features=num_features, gamma=gamma, generator=generator)
                for _ in range(num_members)
            ]
        super().__init__(members, atoms, prior=ChoicePrior(functions) if functions else None, prior_scale=prior_scale)


class _Atoms(KeepsPrecision):
    """The atoms, which keep their precision when the module is cast to half precision."""

    atoms: Tensor

    def __init__(self, atoms: Tensor) -> None:
        super().__init__()
        self.register_buffer("atoms", atoms)
