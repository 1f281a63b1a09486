"""Losses over indices, with weights of the samples, held to the numbers of google-deepmind/enn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.targets import Targets

DATA = {
    k: torch.from_numpy(v)
    for k, v in np.load(Path(__file__).parents[1] / "reference/enn_losses_single_index.npz").items()
}
Y = DATA["y_cls"].flatten().long()


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def module(**kwargs):
    return DeterministicModule(nn.Linear(2, 3), **kwargs)


def test_cross_entropy_of_each_index():
    check(module().index_losses(DATA["cls_out"], Y), DATA["xent/none"])


def test_weights_of_noise_divide_by_the_number_of_samples_not_by_their_sum():
    weights = DATA["weights"].flatten()
    noisy = module().index_losses(DATA["cls_out"], Targets(Y, noise_weights=weights))
    check(noisy, DATA["xent/weights"])
    own = module().index_losses(DATA["cls_out"], Targets(Y, weights=weights))  # a batch's own divide by their sum
    check(own, DATA["xent/weights"] / weights.float().mean())


@pytest.mark.parametrize("kind", ["bernoulli", "exponential", "poisson", "uniform"])
@pytest.mark.parametrize("seed", [0, 3])
def test_weights_of_each_index(kind, seed):
    weights = DATA[f"boot/{kind}/seed{seed}/weights"].squeeze(2).float()
    check(
        module().index_losses(DATA["cls_out"], Targets(Y, noise_weights=weights)), DATA[f"boot/{kind}/seed{seed}/xent"]
    )


def test_the_average_over_drawn_indices():
    drawn = DATA["cls_out"][DATA["avg/indices"].long()]
    check(module().index_losses(drawn, Targets(Y, noise_weights=DATA["weights"].flatten())).mean(), DATA["avg/xent"])


def test_the_l2_penalty_is_adams_weight_decay_of_twice_its_scale():
    """Scale times the sum of squares has the gradient 2 scale p, which is what Adam's ``weight_decay`` adds."""
    weights = [DATA[f"wd/{name}"].clone().requires_grad_() for name in ("lin/w", "lin/b")]
    penalty = 0.37 * sum(w.square().sum() for w in weights)
    check(penalty.detach(), DATA["wd/noprior_decay"])  # priors have none, as with the testbed's agents
    gradients = torch.autograd.grad(penalty, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        parameter = nn.Parameter(weight.detach().clone())
        parameter.grad = torch.zeros_like(parameter)
        torch.optim.Adam([parameter], lr=0.1, weight_decay=2 * 0.37).step()
        other = nn.Parameter(weight.detach().clone())
        other.grad = gradient
        torch.optim.Adam([other], lr=0.1).step()
        check(parameter, other)
