"""Train the networks of the density study, and keep their features and logits, one file a network:

    python benchmarks/density_features.py --root DATA --out FOLDER [--seeds 3] [--only mnist] [--budget MINUTES]

Networks: on scikit-learn's digits a perceptron of two hidden layers of 128; on 12,000 images of MNIST and FashionMNIST LeNet; on 27,000 of
CIFAR-10 a residual network of 16 to 128 channels. Each is trained with and without spectral normalisation (coefficient 3), those of the digits
without. A file that exists is not made again, so a run that was stopped goes on; what the budget does not reach is named.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from density_pairs import CHOOSE, REPORT
from lightning.pytorch import Trainer, seed_everything
from reproduce.image_sets import images, like
from reproduce.small_resnet import SmallResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule
from lightning_uq.networks.backbones import LeNet
from lightning_uq.networks.features import FeatureTap, last_layer
from lightning_uq.networks.spectral_norm import spectral_normalize

Rows = tuple[Tensor, Tensor]


class Scene:
    """One training set with everything that its networks are asked about.

    Attributes:
        train, val, test: Rows with labels.
        outside: Rows of each name out of distribution.
        make: Builds the network.
        epochs: Epochs of the training.
    """

    def __init__(
        self,
        train: Rows,
        val: Rows,
        test: Rows,
        outside: dict[str, Tensor],
        make: Callable[[], nn.Module],
        epochs: int,
        augment: bool = False,
    ) -> None:
        self.train, self.val, self.test, self.outside = train, val, test, outside
        self.make, self.epochs, self.augment = make, epochs, augment


def digits(pair: str, seed: int) -> Scene:
    """Eight of the ten digits; the other two are out of distribution."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    left_out = [int(d) for d in pair.split("+")]
    outside = torch.isin(y, torch.tensor(left_out))
    classes = torch.tensor([d for d in range(10) if d not in left_out])
    inside, labels = x[~outside], torch.searchsorted(classes, y[~outside])
    order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))
    inside, labels = inside[order], labels[order]
    parts = [(inside[a:b], labels[a:b]) for a, b in ((0, 900), (900, 1100), (1100, None))]

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))

    return Scene(*parts, {pair: x[outside]}, make, epochs=30)


def image_scene(name: str, outside: list[str], root: str, seed: int) -> Scene:
    """A part of MNIST, FashionMNIST or CIFAR-10."""
    base = name.split()[0]
    cifar = base == "cifar10"
    x, y = images(base, root, train=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    number = 27000 if cifar else 12000
    train, val = order[:number], order[number : number + 3000]
    if name.endswith("imbalanced"):
        keep = torch.ones(len(train), dtype=torch.bool)
        for c in range(5):
            rows = (y[train] == c).nonzero().flatten()
            keep[rows[len(rows) // 5 :]] = False
        train = train[keep]
    test_x, test_y = images(base, root)
    made = {"brighter": 3.0, "darker": 0.3}
    shape = x[:1]
    found = {
        other: test_x.float() * made[other] if other in made else like(images(other, root)[0], shape)
        for other in outside
    }
    scaled = scaling(x[train].float())
    return Scene(
        (scaled(x[train]), y[train]),
        (scaled(x[val]), y[val]),
        (scaled(test_x[:5000]), test_y[:5000]),
        {other: scaled(rows[:5000]) for other, rows in found.items()},
        SmallResNet if cifar else LeNet,
        epochs=20 if cifar else 8,
        augment=cifar,
    )


def scaling(train: Tensor) -> Callable[[Tensor], Tensor]:
    """Each channel by its mean and standard deviation over the training images."""
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return lambda x: (x.float() - mean) / std


def shifted(x: Tensor) -> Tensor:
    """Images moved by up to four pixels, half of them mirrored: one move a batch."""
    dx, dy = torch.randint(-4, 5, (2,)).tolist()
    x = torch.roll(x, (dy, dx), (2, 3))
    mirrored = torch.rand(len(x)) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


class Trained(DeterministicModule):
    """A classifier by SGD with one cycle of the learning rate, or by Adam for the perceptron."""

    def __init__(self, network: nn.Module, scene: Scene, steps: int) -> None:
        super().__init__(network)
        self.scene, self.steps = scene, steps

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Rows:
        x, y = super().on_after_batch_transfer(batch, dataloader_idx)
        return (shifted(x), y) if self.scene.augment and self.training else (x, y)

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        if self.scene.train[0].ndim == 2:
            return torch.optim.Adam(self.parameters(), lr=2e-3)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def train(scene: Scene, normalized: bool, seed: int) -> nn.Module:
    """A trained network in evaluation mode."""
    seed_everything(seed, verbose=False)
    network = scene.make()
    if normalized:
        exclude = [last_layer(network.eval(), lambda: network(scene.train[0][:2]))]
        spectral_normalize(network.train(), coefficient=3.0, exclude=exclude)
    batch = 32 if scene.train[0].ndim == 2 else 128
    loader = DataLoader(TensorDataset(*scene.train), batch, shuffle=True, drop_last=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = Trained(network, scene, scene.epochs * len(loader))
    Trainer(accelerator="cpu", max_epochs=scene.epochs, **quiet).fit(module, loader)
    return network.eval()


def collect(network: nn.Module, x: Tensor, tap: FeatureTap) -> Rows:
    """Features [N, D] and logits [N, C]."""
    found = []
    with torch.no_grad():
        for part in x.split(500):
            logits, (features,) = tap.run(network, part)
            found.append((features, logits))
    features, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
    return features, logits


def jobs(seeds: int) -> list[tuple[str, list[str], bool, int]]:
    """Scene, its data out of distribution, whether with spectral normalisation, and seed: every scene's first seed comes first."""
    scenes: dict[str, list[str]] = {}
    for half in (CHOOSE, REPORT):
        for name, outside in half.items():
            if name == "digits":
                scenes |= {f"digits {pair}": [pair] for pair in outside}
            else:
                scenes.setdefault(name, []).extend(outside)
    order = [
        (name, outside, normalized, seed)
        for seed in range(seeds)
        for name, outside in scenes.items()
        for normalized in ([False] if name.startswith("digits") else [False, True])
    ]
    return [job for job in order if job[3] == 0 or not job[0].startswith("cifar10")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files that are written")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind; of CIFAR-10 always one")
    parser.add_argument("--only", default="", help="only scenes whose name begins so")
    parser.add_argument("--budget", type=float, default=60, help="minutes after which no further network is begun")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start, left_out = time.monotonic(), []
    for name, outside, normalized, seed in jobs(arguments.seeds):
        path = arguments.out / f"{name.replace(' ', '-')}{'-sn' if normalized else ''}-{seed}.pt"
        if path.exists() or not name.startswith(arguments.only):
            continue
        if time.monotonic() - start > 60 * arguments.budget:
            left_out.append(path.stem)
            continue
        scene = (
            digits(name.split()[1], seed)
            if name.startswith("digits")
            else image_scene(name, outside, arguments.root, seed)
        )
        network = train(scene, normalized, seed)
        tap = FeatureTap(network, [last_layer(network, lambda n=network, s=scene: n(s.train[0][:2]))], "mean")
        parts = {
            "train": scene.train[0],
            "val": scene.val[0],
            "test": scene.test[0],
            **{f"ood/{k}": v for k, v in scene.outside.items()},
        }
        found = {part: collect(network, x, tap) for part, x in parts.items()}
        accuracy = float((found["test"][1].argmax(1) == scene.test[1]).float().mean())
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        torch.save(
            {
                "rows": found,
                "labels": scene.train[1],
                "val_labels": scene.val[1],
                "accuracy": accuracy,
                "weight": last.weight.detach(),
                "bias": last.bias.detach(),
            },
            path,
        )
        print(f"{path.stem}: accuracy {accuracy:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    if left_out:
        print(f"Left out by the budget: {', '.join(left_out)}")


if __name__ == "__main__":
    sys.exit(main())
