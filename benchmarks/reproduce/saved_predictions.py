"""Real classifiers' saved predictions, and the rows that are fitted and tested."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]
"""Logits or log-probabilities [N, C] and class indices [N]."""


def classifiers(root: Path) -> Iterator[tuple[str, Rows, Rows | None]]:
    """Each classifier's name, its rows, and the test rows where the file has them apart.

    The files are ``*.npz`` with ``val_logits``, ``val_labels``, ``test_logits`` and ``test_labels``, or with any number of ``NAME_probs`` and
    ``NAME_labels``. Files of other content are passed over.
    """
    for path in sorted(root.glob("*.npz")):
        held = np.load(path)
        if "val_logits" in held:
            parts = [
                (torch.from_numpy(held[f"{part}_logits"]), _labels(held[f"{part}_labels"])) for part in ("val", "test")
            ]
            yield path.stem, parts[0], parts[1]
            continue
        for key in sorted(held):
            if key.endswith("_probs"):
                probs = torch.from_numpy(held[key].astype(np.float64))
                tiny = float(np.finfo(np.float32).tiny)
                log_probs = (probs / probs.sum(1, keepdim=True)).clamp_min(tiny).log()
                model = key.removesuffix("_probs")
                name = path.stem if model == "test" else f"{path.stem}/{model}"
                yield name, (log_probs, _labels(held[f"{model}_labels"])), None


def halves(rows: Rows, tests: Rows | None, seed: int) -> tuple[Rows, Rows]:
    """Rows to fit and to test. Seed 0 keeps the parts that a file has; without parts, a half of the rows is fitted."""
    if tests is not None and seed == 0:
        return rows, tests
    logits, y = rows if tests is None else (torch.cat([rows[i], tests[i]]) for i in range(2))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    num = len(y) // 2 if tests is None else len(rows[1])
    return (logits[order[:num]], y[order[:num]]), (logits[order[num:]], y[order[num:]])


def _labels(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
