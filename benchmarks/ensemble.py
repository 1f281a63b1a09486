"""EnsembleModule under Lightning's Trainer beside deep-ensembles-pytorch's own Trainer, as ratios of one interleaved run.

Both train M regressors 13-100-100-1 (mean and variance heads) on the same data with Adam, a cosine schedule, an
exponential moving average and gradient clipping, in batches of 100; ours through everything that ``trainer.fit`` does.

    make bench                      # or: python benchmarks/ensemble.py --members 5 10 20 --steps 300 --repeats 3
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from deep_ensembles_pytorch import DeepEnsemble, TensorDataset
from deep_ensembles_pytorch import Trainer as PeerTrainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from lightning_uq import EnsembleModule
from lightning_uq.networks import TabularNetwork

FEATURES, ROWS, BATCH = 13, 2000, 100


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, x[:, :1].sin() + 0.1 * torch.randn(ROWS, 1, generator=generator)


def peer(members: int, steps: int, adversarial: bool) -> float:
    """Seconds that deep-ensembles-pytorch's Trainer takes."""
    ensemble = DeepEnsemble(FEATURES, num_members=members, use_adversarial_training=adversarial)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PeerTrainer(
            ensemble,
            TensorDataset(*data()),
            train_batch_size=BATCH,
            train_num_steps=steps,
            results_folder=folder,
            save_every=10**9,
        )
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def ours(members: int, steps: int, adversarial: bool, execution: str) -> float:
    """Seconds that ``trainer.fit`` takes."""
    module = EnsembleModule(
        partial(TabularNetwork, in_features=FEATURES, out_features=1, heads="gaussian"),
        num_members=members,
        task="regression",
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps * BATCH // ROWS),
        adversarial_epsilon=0.01 if adversarial else None,
        adversarial_scale="absolute",
        execution=execution,
        seed=0,
    )
    loader = DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=BATCH, shuffle=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[EMAWeightAveraging(decay=0.995, update_every_n_steps=10)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    start = time.perf_counter()
    trainer.fit(module, loader)
    return time.perf_counter() - start


def median_seconds(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Each run's median, all of them in turn so that a slow moment of the machine meets each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
                times[name].append(run())
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.steps} steps, median of {options.repeats}")
    print(f"{'FGSM':>5s} {'M':>3s} {'peer steps/s':>13s} {'stacked steps/s':>16s} {'stacked':>8s} {'loop':>6s}")
    for adversarial in (False, True):
        for members in options.members:
            arguments = members, options.steps, adversarial
            seconds = median_seconds(
                {
                    "peer": partial(peer, *arguments),
                    "stacked": partial(ours, *arguments, "stacked"),
                    "loop": partial(ours, *arguments, "loop"),
                },
                options.repeats,
            )
            rate = {name: options.steps / value for name, value in seconds.items()}
            print(
                f"{'yes' if adversarial else 'no':>5s} {members:3d} {rate['peer']:13.1f} {rate['stacked']:16.1f} "
                f"{rate['stacked'] / rate['peer']:7.2f}x {rate['loop'] / rate['peer']:5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
