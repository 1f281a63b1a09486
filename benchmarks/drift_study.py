"""Which sequential test says that a stream has drifted, at which rate of false alarms: a simulation, and streams of digits.

    python benchmarks/drift_study.py simulate [--streams 1000] [--rows 10000]
    python benchmarks/drift_study.py digits [--root DATA]

A stream's rows have scores, higher for inputs out of distribution, and n calibration rows have scores of the same distribution until the drift.
Each test is a capital that starts at 1 and gives an alarm once it reaches 20, which it should do in at most 5 % of streams without a drift:

- ``fixed``: p-values from the calibration rows alone, and a mixture of bets on them.
- ``conditional``: the same, from p-values that are valid given the calibration rows with a probability of 99 % (Bates et al. 2023,
  the Simes adjustment), tested at the remaining 4 %.
- ``online``: ranks among the calibration rows and the stream's earlier rows.
- ``restarted``: ``online``, where a share of the capital waits and begins to bet at each row, so that a late drift is not hidden by early losses. The
  package's :class:`~lightning_uq.functional.DriftTest`.

``simulate`` gives false alarms, and delays after a drift at three rows, with standard errors. ``digits`` trains networks on nine of ten digits; one row in
ten of a stream is the tenth.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_uq.functional.drift import TAILS, DriftTest, RankBins, bets

SIZES = (500, 1000, 5000)
LEVEL = 0.05
DELTA = 0.01  # of the conditional p-values
METHODS = ("fixed", "conditional", "online", "restarted")


def log_capital(bins: Tensor, sizes: Tensor, *, online: bool) -> Tensor:
    """The log of the capital [T] of bets that all begin with the first row: against the ranks' own distribution, or against the calibration rows' alone."""
    multipliers, weights = bets(sizes)
    rows = multipliers[:, bins]
    expected, total = (multipliers @ sizes.double())[:, None], sizes.sum().double()
    if online:
        expected, total = expected + rows.cumsum(1) - rows, total + torch.arange(len(bins))
    return torch.logsumexp((rows.log() - (expected / total).log()).cumsum(1) + weights.log()[:, None], 0)


def conditional_log_capital(places: Tensor, n: int) -> Tensor:
    """The log of the capital [T] from adjusted p-values; ``places`` are numbers of calibration rows at least as high [T]."""
    k = n // 2
    i = torch.arange(n, 0, -1, dtype=torch.float64)  # of p-values 1 / (n + 1) ... n / (n + 1)
    j = torch.arange(k, dtype=torch.float64)
    log_ratio = ((i[:, None] - j).clamp_min(0).log() - (n - j).log()).sum(1)
    adjusted = torch.cat([1 - torch.exp((log_ratio + math.log(DELTA)) / k), torch.ones(1, dtype=torch.float64)])
    p = adjusted[places]
    found = []
    for tail in [tail for tail in TAILS if tail <= 0.5]:
        for strength in (0.03, 0.1, 0.3, 0.8):
            found.append(((1 - strength) + strength / tail * (p <= tail)).log().cumsum(0))
    return torch.logsumexp(torch.stack(found), 0) - math.log(len(found))


def first_alarm(method: str, calibration: Tensor, stream: Tensor) -> int:
    """The row of a stream of scores at which a test gives an alarm, or -1."""
    n = len(calibration)
    ordered = calibration.sort(descending=True).values
    if method == "conditional":
        places = torch.searchsorted(-ordered, -stream, right=True)
        capital, level = conditional_log_capital(places, n), LEVEL - DELTA
    else:
        ranks, level = RankBins.of(calibration), LEVEL
        bins = ranks(stream, torch.full((len(stream),), 0.5))
        if method == "restarted":
            _, capital = DriftTest.start(ranks.sizes).advance(bins)
        else:
            capital = log_capital(bins, ranks.sizes, online=method == "online")
    rows = (capital >= -math.log(level)).nonzero()
    return int(rows[0]) if len(rows) else -1


def share(flags: Tensor) -> str:
    """A share in percent, with its standard error."""
    p = float(flags.double().mean())
    return f"{100 * p:5.1f} +- {100 * math.sqrt(p * (1 - p) / len(flags)):.1f}"


def summary(alarms: Tensor, drift: int) -> str:
    """Alarms before a drift, those within 1,000 rows of it, and the median delay."""
    early, late = (alarms >= 0) & (alarms < drift), alarms >= drift
    found = late & (alarms < drift + 1000)
    delay = torch.where(late, alarms - drift, 10**9)[~early]
    median = float(delay.double().quantile(0.5))
    return f"{share(early)} | {share(found)} | " + (f"{median:.0f}" if median < 10**8 else "none")


def simulate(streams: int, rows: int) -> None:
    """False alarms, and delays where one row in ten has scores of another distribution, by which rows are found with an AUROC of 0.89."""
    print("| test | calibration rows | streams with a false alarm, % |\n|---|---|---|")
    for method in METHODS:
        for n in SIZES:
            alarms = []
            for seed in range(streams):
                draw = torch.Generator().manual_seed(seed)
                scores = torch.rand(n + rows, generator=draw, dtype=torch.float64)
                alarms.append(first_alarm(method, scores[:n], scores[n:]))
            print(f"| {method} | {n} | {share(torch.tensor(alarms) >= 0)} |", flush=True)
    print(
        "\n| test | calibration rows | drift at row | alarm before, % | within 1,000 rows, % | median delay |\n|---|---|---|---|---|---|"
    )
    for method in METHODS[1:]:
        for n in SIZES:
            for drift in (0, 1000, rows):
                alarms = []
                for seed in range(streams // 4):
                    draw = torch.Generator().manual_seed(seed)
                    scores = torch.rand(n + drift + 3000, generator=draw, dtype=torch.float64)
                    other = 1 - torch.rand(drift + 3000, generator=draw, dtype=torch.float64) ** 8
                    is_other = torch.rand(drift + 3000, generator=draw) < 0.1
                    is_other[:drift] = False
                    alarms.append(first_alarm(method, scores[:n], torch.where(is_other, other, scores[n:])))
                print(f"| {method} | {n} | {drift} | {summary(torch.tensor(alarms), drift)} |", flush=True)


# ---------------------------------------------------------------------- digits

Scores = dict[str, tuple[Tensor, Tensor]]


def scored(x: Tensor, y: Tensor, digit: int, num_train: int, epochs: int, network: nn.Module) -> Scores:
    """Scores of rows that a network was not trained on, and those of a digit that it never saw, by score."""
    from lightning.pytorch import Trainer, seed_everything
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_uq import DeterministicModule, FitGMM

    seed_everything(digit, verbose=False)
    known = torch.where(y != digit)[0]
    known = known[torch.randperm(len(known))]
    labels = torch.where(y > digit, y - 1, y)
    train, rest = known[:num_train], known[num_train:]
    module = DeterministicModule(network, optimizer=partial(torch.optim.Adam, lr=3e-3))
    rows = TensorDataset(x[train], labels[train])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=epochs, **quiet).fit(module, DataLoader(rows, batch_size=64, shuffle=True))
    density = FitGMM().fit(module, DataLoader(rows, batch_size=500))
    both = {}
    for name in ("predictive_entropy", "ood_score"):
        inside, outside = (
            torch.cat([module.predict(part).score(name) for part in x[at].split(1000)]).double()
            for at in (rest, torch.where(y == digit)[0])
        )
        both[name] = inside, outside
    density.handle.remove()
    return both


def perceptron(inputs: int, width: int) -> nn.Module:
    """One hidden layer, and nine logits."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 9))


def stream_alarms(
    method: str, n: int, length: int, scores: tuple[Tensor, Tensor], draw: torch.Generator
) -> tuple[int, int]:
    """The first alarm in a stream without the unknown digit, and in one with it in every tenth row on average."""
    inside, outside = (part[torch.randperm(len(part), generator=draw)] for part in scores)
    calibration, plain = inside[:n], inside[n : n + length]
    mixed = plain.clone()
    at = torch.randperm(len(plain), generator=draw)[: len(plain) // 10]
    mixed[at] = outside[: len(at)]
    return first_alarm(method, calibration, plain), first_alarm(method, calibration, mixed)


def digits(root: Path | None, repeats: int) -> None:
    """False alarms and detections on digits, over all held-out digits."""
    from sklearn.datasets import load_digits

    data, target = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    sets = [
        ("scikit-learn's digits", data.float() / 16, target.long(), 500, 40, partial(perceptron, 64, 100), (300,), 780)
    ]
    if root is not None:
        from torchvision.datasets import MNIST

        mnist = MNIST(root, train=True)
        images = mnist.data.float().flatten(1) / 255
        sets.append(("MNIST", images, mnist.targets, 10_000, 5, partial(perceptron, 784, 200), SIZES, 1000))
    print(
        "| data | score | test | calibration rows | false alarms, % | found within 1,000 rows, % | median delay |\n|---|---|---|---|---|---|---|"
    )
    for name, x, y, num_train, epochs, make, sizes, length in sets:
        found = [scored(x, y, digit, num_train, epochs, make()) for digit in range(10)]
        for score in found[0]:
            for method in METHODS[1:]:
                for n in sizes:
                    draw = torch.Generator().manual_seed(0)
                    both = [stream_alarms(method, n, length, one[score], draw) for one in found for _ in range(repeats)]
                    plain, mixed = torch.tensor(both).T
                    line = summary(mixed, 0).partition("| ")[2]
                    print(f"| {name} | {score} | {method} | {n} | {share(plain >= 0)} | {line} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["simulate", "digits"])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=100, help="streams per held-out digit")
    parser.add_argument("--root", type=Path, default=None, help="folder of torchvision's MNIST")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "simulate":
        simulate(given.streams, given.rows)
    else:
        digits(given.root, given.repeats)
