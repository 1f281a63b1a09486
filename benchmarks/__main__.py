"""Measure this package beside its peers, and write benchmarks/results.json and results.md:

    python -m benchmarks [--only predictions ece] [--repeats 5] [--threads 1] [--device cuda]
    python -m benchmarks scaling      # the tables of docs/scaling.md

A group that is not measured keeps its previous results.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import lightning.fabric
import lightning.pytorch
import torch

from benchmarks.harness import circumstances, clock_for, measure
from benchmarks.page import page, section

FOLDER = Path(__file__).parent
GROUPS = sorted(path.stem for path in (FOLDER / "timings").glob("*.py") if path.stem != "__init__")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["peers", "scaling"], default="peers", help="what to measure")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="NAME", help=f"groups: {', '.join(GROUPS)}"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each implementation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results.json and results.md")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device.")
    torch.set_num_threads(options.threads)
    for package in (lightning.pytorch, lightning.fabric):  # importing them sets the level
        logging.getLogger(package.__name__).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of the peers, and of trainings without a validation
    if options.what == "scaling":
        from benchmarks.scaling import write_page

        write_page(options.repeats, circumstances("cpu", options.threads, options.repeats))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only:
        key = name if options.device == "cpu" else f"{name}, {options.device}"
        results[key] = measure_group(name, options)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "results.md").write_text(page(dict(sorted(results.items()))))
        print(section(results[key]), flush=True)


def measure_group(name: str, options: argparse.Namespace) -> dict:
    """Measure the works of one file of timings/."""
    group = importlib.import_module(f"benchmarks.timings.{name}")
    threads = options.threads * getattr(group, "PROCESSES", 1)
    where = circumstances(options.device, threads, options.repeats)
    clock = clock_for(options.device, threads)
    found = []
    for work in group.works(options.device):
        print(f"{name}: {work.name}", flush=True)
        with (
            Path(os.devnull).open("w") as null,
            redirect_stdout(null),
            redirect_stderr(null),
        ):  # progress bars of the peers
            found.append(measure(work, repeats=options.repeats, clock=clock, device=options.device))
    return {"title": group.TITLE, "about": " ".join(group.ABOUT.split()), "where": where, "works": found}


if __name__ == "__main__":
    main()
