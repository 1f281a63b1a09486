"""Sets of classes hold 90 % of the test labels, and grow where classes meet."""

from functools import partial

import torch

from docs.figures import moons, style, toy
from lightning_uq import ConformalSets, DeterministicModule
from lightning_uq.data import two_moons
from lightning_uq.networks import MLP


def draw():
    """Draw the size of the sets around two noisy moons, and the coverage of 200 draws of the held-out rows."""
    x, y = two_moons(2700, 0.35, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = DeterministicModule(MLP(2, 2, hidden_sizes=(32, 32)), optimizer=partial(torch.optim.Adam, lr=0.01))
    sets = ConformalSets(alpha=0.05)
    toy.train(module, (x[:300], y[:300]), (x[300:700], y[300:700]), epochs=30, callbacks=[sets])
    figure, (left, right) = style.panels(2)
    size = module.predict(moons.GRID).set_size
    moons.score_map(left, size.float(), "one class (no colour) or two")
    rest = module.predict(x[700:])
    shuffle = torch.Generator().manual_seed(0)
    coverage = []
    for _ in range(200):
        order = torch.randperm(2000, generator=shuffle)
        held_out, test = order[:200], order[200:]
        drawn = ConformalSets(alpha=0.05).fit_predictions(rest[held_out], y[700:][held_out]).sets(rest[test])
        coverage.append(drawn[torch.arange(len(test)), y[700:][test]].double().mean().item())
    right.hist(coverage, bins=20, color=style.BLUE)
    right.axvline(0.95, color=style.ORANGE, label="asked for")
    right.axvline(sum(coverage) / len(coverage), color=style.TEXT, linestyle="--", label="mean of the draws")
    right.set(xlabel="coverage of 1,800 test rows", ylabel="draws of 200 held-out rows")
    right.legend(loc="upper left", fontsize=8)
    return figure
