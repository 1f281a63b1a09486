"""Bayes by backprop: variational inference over a network's weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_at_least, check_integer, check_positive
from lightning_uq.losses.elbo import elbo_loss
from lightning_uq.method import Method, Setting
from lightning_uq.modules.arguments import given_network
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.generated.bayes_by_backprop import BayesByBackpropNetwork
from lightning_uq.networks.output import Output
from lightning_uq.running.loaders import num_training_samples
from lightning_uq.tasks import describe

KL_WEIGHT = 0.1
"""Factor of the divergence on the digits: the best of 1, 0.1, 0.01, 0.001 in validation joint log-loss (tau 10), over seeds
100-104, which the comparison does not use: 0.344, 0.247, 0.312, 0.377; softmax 0.418. For regression 0.1 is the best of 1, 0.1 and 0.01 too, in mean validation NLL on three UCI tables (seeds 100
and 101): -0.66, -1.20, -1.18; the plain network -1.04 (``benchmarks/regression_defaults.md``)."""


class BayesByBackpropModule(UncertaintyModule):
    """A Gaussian over every weight, fitted by the evidence lower bound: kl_weight * KL / N + the mean loss over draws.

    It has 2 P parameters, where P is the network's own number. An index is the seed of one draw of all weights.

    Args:
        network: The network, or a factory of it, which a checkpoint can store. Its outputs are as the task expects, its parameters
            become the means, and it has no BatchNorm.
        prior_std: Standard deviation of the weights' prior, a Gaussian of mean zero.
        second_prior_std: Standard deviation of a second prior component. The prior is then a scale mixture, and the divergence is
            estimated from the drawn weights. None: one component, and an exact divergence.
        mixture_weight: Probability of the first component.
        kl_weight: Factor of the divergence. A factor below 1 gives a cold posterior. The testbed's is sqrt(T) d.
        initial_std: Initial standard deviation of every weight.
        temperature: Divides the outputs.
        num_train: N. None: the size of the training data set, read when training begins.
        output: What the network returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        training: Arguments of :class:`UncertaintyModule`: ``task``, ``optimizer``, ``loss`` and the like.

    Raises:
        InputError: A number is out of range, N is unknown, or the task's loss is not a likelihood.
        UnsupportedError: The network has a BatchNorm layer.

    Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015 (arXiv 1505.05424).

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> BayesByBackpropModule(network)(torch.zeros(5, 4)).shape
        torch.Size([100, 5, 3])
    """

    default_train_samples = 8
    network: BayesByBackpropNetwork

    def __init__(
        self,
        network: nn.Module | Factory | Callable[[], nn.Module],
        *,
        prior_std: float = 1.0,
        second_prior_std: float | None = None,
        mixture_weight: float = 0.5,
        kl_weight: float = 1.0,
        initial_std: float = 0.01,
        temperature: float = 1.0,
        num_train: int | None = None,
        output: Output = "logits",
        **training: Any,
    ) -> None:
        _check(prior_std, second_prior_std, mixture_weight, kl_weight, num_train)
        built = given_network(network, training)
        super().__init__(
            BayesByBackpropNetwork(built, initial_std=initial_std, temperature=temperature, output=output), **training
        )
        if self.loss is None and not self.task.has_likelihood:
            raise InputError(
                f"The evidence lower bound needs a negative log-likelihood, but the loss of {describe(self.task)} is not one. Choose "
                "another loss of the task, for instance `Regression(head='mean_variance')`, or pass your own as argument `loss`."
            )
        self.prior: dict[str, Any] = {
            "prior_std": prior_std,
            "second_prior_std": second_prior_std,
            "mixture_weight": mixture_weight,
        }
        self.kl_weight = kl_weight
        self.num_train = num_train
        self._num_train = num_train

    def on_train_start(self) -> None:
        """Count the training samples, unless ``num_train`` was passed."""
        super().on_train_start()
        if self.num_train is None:
            self._num_train = num_training_samples(self.trainer)

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """The negative evidence lower bound per label, averaged over the drawn indices."""
        if self._num_train is None:
            raise InputError("The loss needs the number of training samples. Without a Trainer, pass `num_train`.")
        index = self._place(self.network.training_index(self.num_train_samples))
        weights = self.network.weights(index)
        losses, count = self.losses_and_count(self.network.call(x, weights), self.targets(y, batch, index))
        # A sample contributes one likelihood term per label that counts: per pixel, or per target dimension.
        labels_per_sample = torch.where(count > 0, count / len(y), 1)
        kl = self.network.kl(**self.prior, weights=weights) / labels_per_sample
        return self.regularized(elbo_loss(-losses, self.kl_weight * kl, self._num_train).mean(), x)


def _check(
    prior_std: float, second_prior_std: float | None, mixture_weight: float, kl_weight: float, num_train: int | None
) -> None:
    check_positive(prior_std=prior_std, second_prior_std=1.0 if second_prior_std is None else second_prior_std)
    if num_train is not None:
        check_integer("num_train", num_train, 1)
    check_at_least("kl_weight", kl_weight, 0)
    if not 0 <= mixture_weight <= 1:
        raise InputError(f"`mixture_weight` must lie in [0, 1], but it is {mixture_weight}.")


def _build(setting: Setting) -> BayesByBackpropModule:
    return BayesByBackpropModule(setting.network, kl_weight=KL_WEIGHT, **setting.training)


_ABOUT, _LINK = "one network with a Gaussian over each weight", "https://arxiv.org/abs/1505.05424"

METHODS = (
    Method(
        name="bayes_by_backprop",
        about=_ABOUT,
        build=_build,
        ood_score="predictive_entropy",
        tasks=("classification", "binary", "multilabel"),
        link=_LINK,
    ),
    Method(
        name="bayes_by_backprop",
        about=_ABOUT,
        build=_build,
        ood_score="epistemic_variance",
        tasks=("regression",),
        link=_LINK,
    ),
)
