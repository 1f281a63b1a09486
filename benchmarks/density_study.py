"""How FitGMM's default is chosen, and what it then gives: AUROC of every score on the features that density_features.py kept.

    python benchmarks/density_study.py FOLDER choose      # the half on which the default is chosen
    python benchmarks/density_study.py FOLDER report      # the other half, looked at once

Writes ``density_choose.json`` or ``density_report.json`` beside this file, and prints a table: the mean over the networks of each pair.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from density_pairs import CHOOSE, REPORT
from torch import Tensor

from lightning_uq.functional.feature_transforms import coordinates_of, transform_features
from lightning_uq.functional.ood import auroc
from lightning_uq.functional.ood_features import fit_vim, gen, knn_distance, unit_rows, vim_score
from lightning_uq.functional.scores import energy
from lightning_uq.functional.tail import fit_tail
from lightning_uq.networks.density import GaussianDensity
from lightning_uq.networks.feature_density import FeatureDensity

TRANSFORMS = ("raw", "polar", "direction", "combined")
Rows = dict[str, tuple[Tensor, Tensor]]


def density(rows: Rows, labels: Tensor, transform: str, score: str = "log_density", **fit: object) -> FeatureDensity:
    """What FitGMM fits to the training rows, with tails of the validation rows."""
    features, held_out = rows["train"][0], rows["val"][0]
    parts = {
        name: [GaussianDensity.fit_features(transform_features(features, name), labels, **fit)]
        for name in coordinates_of(transform)
    }
    fitted = FeatureDensity(parts, score=score)
    if transform != "combined":
        return fitted
    tails = {name: fit_tail(fitted.part_score(held_out[None], name)) for name in parts}
    return FeatureDensity(parts, tails, score)


def scores(found: dict[str, object], outside: list[str]) -> dict[str, dict[str, Tensor]]:
    """Every method's scores of the test rows and of those outside: {method: {part: [N]}}."""
    rows, labels = found["rows"], found["labels"]
    parts = {"test": rows["test"], **{name: rows[f"ood/{name}"] for name in outside}}
    every: dict[str, dict[str, Tensor]] = {}
    for transform in TRANSFORMS:
        for regularization in ("held_out", "oas"):
            fitted = density(rows, labels, transform, regularization=regularization)
            every[f"{transform} {regularization}"] = {name: fitted(f[None]) for name, (f, _) in parts.items()}
        for score in ("mahalanobis", "relative_mahalanobis"):
            tied = density(rows, labels, transform, score, covariance="tied")
            every[f"{score} {transform}"] = {name: tied(f[None]) for name, (f, _) in parts.items()}
    bank = unit_rows(rows["train"][0])
    vim = fit_vim(*rows["train"], found["weight"], found["bias"])
    logits = {name: z.unsqueeze(0) for name, (_, z) in parts.items()}
    every["knn"] = {name: knn_distance(unit_rows(f), bank, 50, normalize=False) for name, (f, _) in parts.items()}
    every["vim"] = {name: vim_score(f, z, vim) for name, (f, z) in parts.items()}
    every["gen"] = {name: gen(z.double()) for name, z in logits.items()}
    every["energy"] = {name: energy(z.double()) for name, z in logits.items()}
    every["entropy"] = {
        name: torch.distributions.Categorical(logits=z[0].double()).entropy() for name, z in logits.items()
    }
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the files that density_features.py wrote")
    parser.add_argument("half", choices=["choose", "report"])
    arguments = parser.parse_args()
    pairs = {"choose": CHOOSE, "report": REPORT}[arguments.half]
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    networks: dict[str, list[str]] = defaultdict(list)
    for scene, names in pairs.items():
        for path in sorted(arguments.folder.glob("*.pt")):
            name = path.stem[:-2].removesuffix("-sn").replace("-", " ")  # without the seed
            pair = name.removeprefix("digits ")
            outside = names if name == scene else [pair] if scene == "digits" and pair in names else []
            if not outside:
                continue
            for far in outside:
                networks[f"{scene} / {far}"].append(path.stem)
            found = torch.load(path)
            for method, by_part in scores(found, outside).items():
                inside = by_part["test"]
                for far in outside:
                    both = torch.cat([inside, by_part[far]])
                    value = float(auroc(both, torch.arange(len(both)) >= len(inside)))
                    table[f"{scene} / {far}"][method].append(value)
    means = {pair: {method: mean(values) for method, values in row.items()} for pair, row in table.items()}
    methods = list(next(iter(means.values())))
    print(f"{'':34s}" + " ".join(f"{pair[:18]:>18s}" for pair in means) + f"{'mean':>8s}")
    for method in methods:
        row = [means[pair][method] for pair in means]
        print(f"{method:34s}" + " ".join(f"{value:18.3f}" for value in row) + f"{mean(row):8.3f}")
    path = Path(__file__).with_name(f"density_{arguments.half}.json")
    path.write_text(json.dumps({"auroc": means, "networks": networks, "by_network": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
