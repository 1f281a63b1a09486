"""FitLaplace on UCI regression: its likelihood against a Gaussian with one variance, its alarm against an ensemble's.

    python benchmarks/laplace_uci.py --root DATA/uci --page docs/laplace.md [--splits 3]

Splits, networks and batches are those of benchmarks/reproduce/uci.py, but that the networks have means alone, and that the last fifth of the
training rows is held out. Five networks are trained at once, as an ensemble; each of them alone gets a FitLaplace, so a number is a mean over
five networks and all splits. Compared with Gaussians about the same means, with the mean squared residual of the training rows as their
variance, or that of the held-out rows.

Far inputs: normal ones with twice the standard deviation of the training inputs and no correlations ("twice"), and the standardised rows of
the next set in the list, whose columns are repeated or left out ("other set").

The default of `select` was chosen on CHOSEN_ON; the other sets report. The table replaces the one between the marks of the page.
"""

import argparse
import logging
import math
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parent / "reproduce"))

from recipe import quiet_trainer
from uci import FOLDERS, load, split_rows

from lightning_uq import EnsembleModule, FitLaplace, Regression
from lightning_uq.functional.ood import auroc

CHOSEN_ON = ("boston", "energy", "wine", "yacht")
SELECTS = ("auto", "marginal_likelihood", "held_out")
MARKS = ("<!-- table of benchmarks/laplace_uci.py -->", "<!-- end -->")
STEPS = 2000
"""Steps of the optimizer, at least; large sets have 40 epochs, the largest 20."""


def make_network(inputs: int, hidden: int) -> nn.Module:
    """One hidden layer, and a mean."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def standardized(x: Tensor, like: Tensor) -> Tensor:
    """Rows in units of other rows, in float32."""
    spread = like.std(0, correction=0)
    return ((x - like.mean(0)) / torch.where(spread > 0, spread, 1.0)).float()


def train(x: Tensor, y: Tensor, task: Regression, hidden: int, epochs: int) -> EnsembleModule:
    """Five networks that share batches of 100 rows."""
    module = EnsembleModule(
        partial(make_network, x.shape[1], hidden),
        num_members=5,
        execution="stacked",
        task=task,
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )
    data = TensorDataset(x, y)
    batches = BatchSampler(RandomSampler(data), batch_size=100, drop_last=False)
    trainer = quiet_trainer(accelerator="cpu", max_epochs=epochs)
    trainer.fit(module, DataLoader(data, batch_size=None, sampler=batches))
    return module.eval()


def gaussian_nll(residual: Tensor, variance: float) -> float:
    """Of residuals under one variance."""
    return float(0.5 * (math.log(2 * math.pi * variance) + residual.square() / variance).mean())


def alarm(inside: Tensor, outside: Tensor) -> float:
    """The AUROC of scores."""
    return float(auroc(torch.cat([inside, outside]), torch.arange(len(inside) + len(outside)) >= len(inside)))


@torch.no_grad()
def run_split(name: str, split: int, root: Path) -> dict[str, float]:
    """The numbers of one split, by name."""
    x, y = load(name, root)
    rows, test = split_rows(len(x), split)
    rows, held_out = rows[: round(0.8 * len(rows))], rows[round(0.8 * len(rows)) :]
    inputs, targets = standardized(x, x[rows]), y.float()
    task = Regression(head="mean", target_scale=(float(y[rows].mean()), float(y[rows].std(correction=0))))
    seed_everything(split, verbose=False)
    large = name == "protein"
    epochs = 20 if large else max(40, math.ceil(STEPS / math.ceil(len(rows) / 100)))
    with torch.enable_grad():
        ensemble = train(inputs[rows], targets[rows], task, 100 if large else 50, epochs)
    names = list(FOLDERS)
    other = load(names[(names.index(name) + 1) % len(names)], root)[0]
    other = standardized(other, other)[: len(test)]
    far = {
        "twice": 2 * torch.randn(len(test), x.shape[1], generator=torch.Generator().manual_seed(split)),
        "other set": other[:, torch.arange(x.shape[1]) % other.shape[1]],
    }

    def loader(which: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(inputs[part], targets[part]) for part in which.split(1000)]

    found: dict[str, list[float]] = {}
    score = ensemble.predict(inputs[test]).epistemic_variance[:, 0]
    for kind, other in far.items():
        found[f"{kind}, ensemble"] = [alarm(score, ensemble.predict(other).epistemic_variance[:, 0])]
    shift, scale = task.target_scale  # type: ignore[misc]
    for member in map(ensemble.network.member, range(5)):
        residuals = [
            y[part, 0] - (shift + scale * member(inputs[part])[:, 0].double()) for part in (rows, held_out, test)
        ]
        for kind, residual in zip(("training", "held-out"), residuals, strict=False):
            found.setdefault(f"nll, {kind} variance", []).append(
                gaussian_nll(residuals[2], float(residual.square().mean()))
            )
        for select in SELECTS:
            given = {} if select == "marginal_likelihood" else {"held_out": loader(held_out)}
            laplace = FitLaplace(select=select, task=task, **given).fit(member, loader(rows))
            nll = -laplace.predict(member, inputs[test]).log_prob(targets[test]).double().mean()
            found.setdefault(f"nll, {select}", []).append(float(nll))
            inside = laplace.score(member, [inputs[test]])
            for kind, other in far.items():
                found.setdefault(f"{kind}, {select}", []).append(alarm(inside, laplace.score(member, [other])))
    return {key: sum(values) / len(values) for key, values in found.items()}


def table(results: dict[str, dict[str, float]], splits: dict[str, int]) -> str:
    """The page's tables, and on which sets each choice wins and loses."""
    nll = ["training variance", "held-out variance", *SELECTS]
    lines = ["NLL:", "", f"| set | splits | {' | '.join(nll)} |", f"|---|---|{'---|' * len(nll)}"]
    for name, values in results.items():
        cells = " | ".join(f"{values[f'nll, {column}']:.4f}" for column in nll)
        lines.append(f"| {name}{' (choosing)' if name in CHOSEN_ON else ''} | {splits[name]} | {cells} |")
    far = [(kind, method) for kind in ("twice", "other set") for method in ("ensemble", "auto", "held_out")]
    names = " | ".join(f"{kind}: {method}" for kind, method in far)
    lines += ["", "AUROC; `marginal_likelihood` has the numbers of `auto`, since its prior is the same:", ""]
    lines += [f"| set | {names} |", f"|---|{'---|' * len(far)}"]
    for name, values in results.items():
        cells = " | ".join(f"{values[f'{kind}, {method}']:.4f}" for kind, method in far)
        lines.append(f"| {name}{' (choosing)' if name in CHOSEN_ON else ''} | {cells} |")

    def won(key: str, other: str, sign: int, chosen: list[str]) -> str:
        lost = [name for name in chosen if sign * (results[name][key] - results[name][other]) < 0]
        return f"{len(chosen) - len(lost)} of {len(chosen)}" + (f" (not {', '.join(lost)})" if lost else "")

    rest = [name for name in results if name not in CHOSEN_ON]
    for title, chosen in (("All sets", list(results)), ("The sets that did not choose", rest)):
        lines += ["", f"{title}:", ""]
        for select in SELECTS:
            better = [won(f"nll, {select}", f"nll, {kind} variance", -1, chosen) for kind in ("training", "held-out")]
            alarms = [won(f"{kind}, {select}", f"{kind}, ensemble", 1, chosen) for kind in ("twice", "other set")]
            lines.append(
                f"- `{select}`: NLL at most that of the training variance on {better[0]}, of the held-out variance on {better[1]}; AUROC at least "
                f"the ensemble's on {alarms[0]} for twice, on {alarms[1]} for the other set."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    parser.add_argument("--sets", default=",".join(FOLDERS), help="names of sets, with commas between them")
    parser.add_argument("--splits", type=int, default=3, help="splits of each set; of protein and naval one")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    start, results, splits = time.monotonic(), {}, {}
    for name in arguments.sets.split(","):
        splits[name] = 1 if name in ("protein", "naval") else arguments.splits
        found: list[dict[str, Any]] = [run_split(name, split, arguments.root) for split in range(splits[name])]
        results[name] = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
        print(f"{time.monotonic() - start:.0f} s: {name}", flush=True)
    text = table(results, splits)
    print(text)
    if arguments.page:
        page = arguments.page.read_text()
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        arguments.page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    sys.exit(main())
