"""Acquisition by gradients: uncertain inputs that differ from each other."""

import torch
from torch import Tensor

from lightning_uq.active_learning.strategies.base import PoolBatch, Rows, Strategy
from lightning_uq.errors import InputError


def badge(errors: Tensor, features: Tensor, num: int, generator: torch.Generator | None = None) -> Tensor:
    """Positions [num] by k-means++ on gradient embeddings g_i = (p_i - e_i) h_i^T, where e_i is the one-hot vector of the likeliest class.

    g_i is the gradient of the cross-entropy with respect to the last layer's weights if the prediction is right. It is large for
    uncertain inputs. The first position is the one of the largest gradient; each following one is drawn with a probability
    proportional to the squared distance of its gradient to the nearest chosen one. Embeddings are never formed, since
    <g_i, g_j> = <p_i - e_i, p_j - e_j> <h_i, h_j>.

    Args:
        errors: p_i - e_i, [P, C].
        features: h_i, [P, D].
        num: Number of positions.
        generator: Source of the draws; None: torch's global generator.

    Raises:
        InputError: There are fewer inputs.

    Source: Ash et al., "Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds", ICLR 2020.

    Example:
        >>> errors = torch.tensor([[-0.5, 0.5], [-0.5, 0.5], [-0.4, 0.4]])
        >>> badge(errors, torch.tensor([[0.0, 2.0], [0.0, 2.0], [2.0, 0.0]]), 2)  # 0 and 1 are copies
        tensor([0, 2])
    """
    if len(errors) < num:
        raise InputError(f"`badge` needs at least {num} inputs, but there are {len(errors)}.")
    errors, features = errors.double(), features.double()
    size = errors.square().sum(1) * features.square().sum(1)
    chosen = [int(size.argmax())]
    distance = torch.full_like(size, torch.inf)
    while True:
        last = chosen[-1]
        product = (errors @ errors[last]) * (features @ features[last])
        distance = torch.minimum(distance, (size + size[last] - 2 * product).clamp_min(0.0))
        distance[chosen] = 0.0
        if len(chosen) == num:
            return torch.tensor(chosen)
        weights = distance if bool(distance.any()) else torch.ones_like(distance)  # all that is left are copies
        weights = weights.clone()
        weights[chosen] = 0.0
        # Not multinomial, which takes at most 2^24 categories.
        total = weights.cumsum(0)
        draw = torch.rand(1, dtype=torch.float64, generator=generator) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), int(weights.nonzero()[-1])))


class Badge(Strategy):
    """Uncertain inputs that differ from each other: :func:`badge`.

    Cost: features and predictions of the pool, and P (C + D) products for each input that is acquired. The features of an
    ensemble's members stand side by side.

    Args:
        feature_layer: Name of the layer whose input are the features; ``"auto"`` finds the one that makes the outputs.
    """

    def __init__(self, feature_layer: str = "auto") -> None:
        self.feature_layer = feature_layer

    def rows(self, batch: PoolBatch) -> Rows:
        """Errors [B, C] and features [B, D]."""
        probs = batch.log_probs.exp().mean(1)
        errors = probs - torch.nn.functional.one_hot(probs.argmax(1), probs.shape[1]).to(probs.dtype)
        return errors, batch.features

    def choose(self, pool: Rows, num: int, reference: Rows | None, generator: torch.Generator) -> Tensor:
        """A draw by k-means++."""
        errors, features = pool
        return badge(errors, features, num, generator)
