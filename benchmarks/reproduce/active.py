"""Active learning by Deep Deterministic Uncertainty (arXiv 2102.11582): which digits to label next, on MNIST and on Dirty-MNIST.

    python benchmarks/reproduce/active.py --root DATA --out FOLDER [--data mnist,dirty_mnist] [--seeds 5] [--budget MINUTES] [--publish]

Twenty digits are labelled, two of each class. A new network is trained on the labelled samples, and of the unlabelled ones those with the
highest score are labelled next, until 300 are. The accuracy is that on MNIST's test images. Scores: random numbers, the entropy of one
network, the entropy and the mutual information of five, and minus the log-density of one network's features (a Gaussian per class).
The pool of ``dirty_mnist`` is 1,000 digits and 60,000 ambiguous samples, of which ten share an image: the published ones where their files lie
under DATA, else generated ones (DirtyMNISTDataModule).

The paper labels 5 samples at a time (``--step 5``), scores the whole pool (``--candidates 60000``), trains for 20 epochs of 5,056 draws
(``--steps 1580``), and its network is a ResNet-18. Here the network is a LeNet with strided convolutions of 16 and 32 channels in place
of its pooling. As in the paper: Adam, learning rate 1e-3, weight decay 5e-4, batches of 64, the weights of the last step.

One JSON file per data, seed and score. Files that exist are not made again, so a stopped run continues when it is called again.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from image_sets import images
from lightning.pytorch import seed_everything
from recipe import quiet_trainer
from results import markdown, reproduce
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, FitGMM, UncertaintyModule
from lightning_uq.active_learning import score, select
from lightning_uq.data import DirtyMNISTDataModule

SCORES = {  # members of the ensemble, and the name of the score
    "random": (1, "uniform"),
    "softmax entropy": (1, "predictive_entropy"),
    "ensemble entropy": (5, "predictive_entropy"),
    "ensemble MI": (5, "mutual_information"),
    "density": (1, "log_density"),
}
DATA = {"mnist": "MNIST", "dirty_mnist": "Dirty-MNIST"}
PER_CLASS = 2
NUM_CLEAN = 1000
"""Digits in the pool of Dirty-MNIST."""


@dataclass(frozen=True)
class Digits:
    """Samples, and MNIST's test images.

    Attributes:
        x: Images [N, 1, 28, 28], normalized.
        y: Labels [S] of the samples.
        rows: The image [S] of each sample.
        num_clean: The first so many samples are digits; the others are ambiguous.
        test: MNIST's test images and labels.
        source: Where the ambiguous samples come from.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    num_clean: int
    test: tuple[Tensor, Tensor]
    source: str


def load(name: str, root: Path) -> Digits:
    """The samples of ``mnist`` or ``dirty_mnist``, before 1,000 digits of the latter are chosen."""
    module = DirtyMNISTDataModule(str(root))
    digits, labels = images("mnist", root, train=True)
    test_x, test_y = images("mnist", root)
    rows, source = torch.arange(len(labels)), "none"
    num_clean = len(labels)
    if name == "dirty_mnist":
        digits, labels, rows = module.load_samples(train=True)
        source = str(module.ambiguous_source)
    normal = partial(normalized, module.mean[0], module.std[0])
    return Digits(normal(digits), labels, rows, num_clean, (normal(test_x), test_y), source)


def normalized(shift: float, scale: float, x: Tensor) -> Tensor:
    """Images in 0 ... 255 or, if they are floats, in 0 ... 1."""
    return ((x.float() / 255 if x.dtype == torch.uint8 else x) - shift) / scale


def make_network() -> nn.Module:
    """A LeNet whose convolutions have a stride; its features have 84 dimensions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def train(x: Tensor, y: Tensor, members: int, steps: int) -> UncertaintyModule:
    """A new module trained on batches that are drawn with replacement."""
    adam = partial(torch.optim.Adam, lr=1e-3, weight_decay=5e-4)
    module: UncertaintyModule
    if members == 1:
        module = DeterministicModule(make_network(), optimizer=adam)
    else:
        module = EnsembleModule(make_network, num_members=members, optimizer=adam)
    rows = TensorDataset(x, y)
    draws = BatchSampler(RandomSampler(rows, replacement=True, num_samples=64 * steps), 64, drop_last=False)
    trainer = quiet_trainer([], max_epochs=1, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader(rows, batch_size=None, sampler=draws))
    return module


def initial(y: Tensor, generator: torch.Generator) -> Tensor:
    """The first labelled samples, as many of each class."""
    order = torch.randperm(len(y), generator=generator)
    return torch.cat([order[y[order] == label][:PER_CLASS] for label in range(10)])


def run(label: str, seed: int, load_data: Callable[[], Digits], options: Namespace) -> dict[str, Any]:
    """Label with one score: after each training the number of labels, the accuracy, and the share of ambiguous samples."""
    data = load_data()
    members, name = SCORES[label]
    generator = torch.Generator().manual_seed(seed)  # the same first labels for every score
    is_digit = torch.arange(len(data.y)) < data.num_clean
    in_pool = torch.ones_like(is_digit)
    if not bool(is_digit.all()):
        dropped = torch.randperm(data.num_clean, generator=generator)[NUM_CLEAN:]
        in_pool[dropped] = False
    clean = (in_pool & is_digit).nonzero().flatten()
    labelled = clean[initial(data.y[clean], generator)]
    seed_everything(seed, verbose=False)
    result: dict[str, Any] = {"source": data.source, "labels": [], "accuracy": [], "ambiguous": []}
    while True:
        x, y = data.x[data.rows[labelled]], data.y[labelled]
        module = train(x, y, members, options.steps)
        result["labels"].append(len(labelled))
        result["accuracy"].append(accuracy(module, *data.test))
        result["ambiguous"].append(float((labelled >= data.num_clean).double().mean()))
        in_pool[labelled] = False
        if len(labelled) >= options.labels:
            return result
        candidates = in_pool.nonzero().flatten()
        candidates = candidates[torch.randperm(len(candidates), generator=generator)[: options.candidates]]
        if name == "log_density":
            FitGMM(feature_transform="raw").fit(module, [(x, y)])
        found = torch.cat([scored(name, module, data.x[data.rows[part]]) for part in candidates.split(250)])
        labelled = torch.cat([labelled, candidates[select(found, min(options.step, len(found)))]])


def scored(name: str, module: UncertaintyModule, x: Tensor) -> Tensor:
    """A score [B], the highest of which are labelled."""
    prediction = module.predict(x)
    return prediction.score(name) if name == "log_density" else score(name, prediction)


def accuracy(module: UncertaintyModule, x: Tensor, y: Tensor) -> float:
    """The share of labels that are right."""
    probs: Any = torch.cat([module.predict(part).probs for part in x.split(250)])  # type: ignore[attr-defined]
    return float((probs.argmax(1) == y).double().mean())


def by_score(results: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """The results of all seeds by data and score."""
    found: dict[str, dict[str, list[Any]]] = {}
    for job, result in results.items():
        name, _, label = job.split("-")
        found.setdefault(name, {}).setdefault(label, []).append(result)
    return found


def over_seeds(runs: list[Any], key: str) -> list[tuple[float, float]]:
    """The mean and its standard error in per cent, after each training; the error of one run is 0."""
    columns = zip(*[run[key] for run in runs], strict=True)
    return [
        (100 * mean(column), 100 * stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0) for column in columns
    ]


def table(results: Mapping[str, Any]) -> str:
    """Accuracies over the number of labels, then the share of ambiguous samples."""
    lines: list[str] = []
    for name, scores in by_score(results).items():
        first = next(iter(scores.values()))[0]
        kinds = {"accuracy": f"{DATA[name]}: accuracy, %"}
        if name == "dirty_mnist":
            kinds["ambiguous"] = f"{DATA[name]} ({first['source']}): share of ambiguous samples, %"
        for key, title in kinds.items():
            rows = [
                [
                    label,
                    str(len(runs)),
                    *(f"{centre:.1f}" + f" ±{error:.1f}" * (len(runs) > 1) for centre, error in over_seeds(runs, key)),
                ]
                for label, runs in scores.items()
            ]
            lines += markdown([title, "seeds", *(f"{labels} labels" for labels in first["labels"])], rows)
    return "\n".join(lines).strip()


def jobs(options: Namespace) -> dict[str, Any]:
    """One for each data, seed and score, the scores of a seed in turn."""
    names = options.data.split(",")
    if unknown := set(names) - DATA.keys():
        raise SystemExit(f"--data: unknown {', '.join(sorted(unknown))}. The data are {', '.join(DATA)}.")
    loaders = {name: cache(partial(load, name, options.root)) for name in names}
    return {
        f"{name}-{seed}-{label}": partial(run, label, seed, loaders[name], options)
        for seed in range(options.seeds)
        for name in names
        for label in SCORES
    }


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", default=",".join(DATA), help="mnist, dirty_mnist, or both with a comma between them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=300, help="labels after which a run ends")
    parser.add_argument("--step", type=int, default=40, help="samples labelled at a time; the paper's are 5")
    parser.add_argument("--candidates", type=int, default=10000, help="samples of the pool that are scored at a time")
    parser.add_argument("--steps", type=int, default=200, help="steps of a training; the paper's are 1,580")
    settings = ("labels", "step", "candidates", "steps")
    reproduce("active", parser, jobs, table, settings=settings, about=__doc__)
