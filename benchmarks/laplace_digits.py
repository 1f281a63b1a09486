"""FitLaplace on scikit-learn's digits: what its choice of prior does to a classifier.

    python benchmarks/laplace_digits.py [--seeds 3] [--epochs 60]

A perceptron learns the digits 0 to 7: 60 % of them to train, 20 % held out, 20 % to test. The digits 8 and 9 are unknown inputs. For the trained
network and for each way to choose the prior: NLL of the test rows, and AUROCs of the predictive entropy, of the score `laplace` (the mutual
information), and of the mean variance of the logits.
"""

import argparse
import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent / "reproduce"))

from recipe import quiet_trainer

from lightning_uq import DeterministicModule, FitLaplace
from lightning_uq.functional.ood import auroc

HEAD = f"{'seed':>4} {'method':>20} {'NLL':>8} {'entropy':>8} {'laplace':>8} {'variance':>8}"


def alarm(inside: Tensor, outside: Tensor) -> float:
    """The AUROC of scores."""
    return float(auroc(torch.cat([inside, outside]), torch.arange(len(inside) + len(outside)) >= len(inside)))


def make_network() -> nn.Module:
    """Two hidden layers, and eight logits."""
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 8))


def run(seed: int, epochs: int) -> list[str]:
    """The lines of one seed."""
    data, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x, y = data.float() / 16, digits.long()
    known = torch.where(y < 8)[0]
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    rows, held_out, test = known.split(
        [int(0.6 * len(known)), int(0.2 * len(known)), len(known) - int(0.6 * len(known)) - int(0.2 * len(known))]
    )
    unknown = x[y >= 8]
    seed_everything(seed, verbose=False)
    module = DeterministicModule(make_network(), optimizer=partial(torch.optim.Adam, lr=3e-3))
    loader = DataLoader(TensorDataset(x[rows], y[rows]), batch_size=32, shuffle=True)
    trainer = quiet_trainer(accelerator="cpu", max_epochs=epochs)
    trainer.fit(module, loader)
    lines = []
    with torch.no_grad():
        inside, outside = module.predict(x[test]), module.predict(unknown)
        nll, entropy = -inside.log_prob(y[test]).mean(), alarm(inside.predictive_entropy, outside.predictive_entropy)
        lines.append(f"{seed:>4} {'trained network':>20} {nll:>8.4f} {entropy:>8.3f}")
        for select in ("held_out", "marginal_likelihood"):
            given = {"held_out": [(x[held_out], y[held_out])]} if select == "held_out" else {}
            laplace = FitLaplace(select=select, **given).fit(module, loader)
            inside, outside = laplace.predict(module, x[test]), laplace.predict(module, unknown)
            score = alarm(laplace.score(module, [x[test]]), laplace.score(module, [unknown]))
            spread = alarm(inside.logits.var(0).mean(1), outside.logits.var(0).mean(1))
            nll, entropy = (
                -inside.log_prob(y[test]).mean(),
                alarm(inside.predictive_entropy, outside.predictive_entropy),
            )
            lines.append(f"{seed:>4} {select:>20} {nll:>8.4f} {entropy:>8.3f} {score:>8.3f} {spread:>8.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(HEAD)
    for seed in range(arguments.seeds):
        print("\n".join(run(seed, arguments.epochs)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
