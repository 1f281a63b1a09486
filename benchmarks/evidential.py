"""The evidential losses beside uncertainty-loss 0.1.2, forward and backward, as ratios of one interleaved run.

uncertainty-loss pins numpy<2, which it does not use, so it goes into a folder of its own:

    pip install --no-deps --target DIR uncertainty-loss==0.1.2
    PYTHONPATH=DIR python benchmarks/evidential.py [--sizes 100 1000 4000] [--classes 10] [--repeats 40]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import uncertainty_loss as peer
from torch import Tensor

from lightning_uq import losses

Loss = Callable[[Tensor, Tensor], Tensor]
PAIRS: dict[str, tuple[Loss, Callable[..., Tensor]]] = {
    "evidential + KL": (
        lambda e, y: peer.evidential_loss(e, y, reg_factor=1.0),
        lambda e, y, **kwargs: losses.evidential_loss(e, y, 1.0, **kwargs),
    ),
    "evidential": (
        lambda e, y: peer.evidential_loss(e, y),
        lambda e, y, **kwargs: losses.evidential_loss(e, y, **kwargs),
    ),
    "max-norm + Fisher": (
        lambda e, y: peer.maxnorm_loss(e, y, reg_factor=1.0),
        lambda e, y, **kwargs: losses.maxnorm_loss(e, y, 1.0, **kwargs),
    ),
    "max-norm": (
        lambda e, y: peer.maxnorm_loss(e, y),
        lambda e, y, **kwargs: losses.maxnorm_loss(e, y, **kwargs),
    ),
}


def median_seconds(calls: list[Loss], evidence: Tensor, target: Tensor, repeats: int) -> list[float]:
    """Each call's median of processor time, all of them in turn so that a slow moment of the machine meets each."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 2):
        for call, seconds in zip(calls, times, strict=True):
            evidence.grad = None
            start = time.process_time()
            call(evidence, target).backward()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), C={options.classes}, median of {options.repeats}")
    print(f"{'loss':18s} {'N':>5s} {'peer ms':>8s} {'ours ms':>8s} {'':>8s} {'unchecked ms':>13s}")
    for size in options.sizes:
        generator = torch.Generator().manual_seed(0)
        evidence = torch.randn(size, options.classes, generator=generator).exp().requires_grad_()
        target = torch.randint(options.classes, (size,), generator=generator)
        for name, (original, ours) in PAIRS.items():
            theirs, mine = original(evidence, target), ours(evidence, target)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            calls = [original, ours, lambda e, y, f=ours: f(e, y, validate_args=False)]
            old, new, unchecked = median_seconds(calls, evidence, target, options.repeats)
            print(
                f"{name:18s} {size:5d} {1e3 * old:8.2f} {1e3 * new:8.2f} {old / new:7.1f}x {1e3 * unchecked:8.2f} "
                f"{old / unchecked:5.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
