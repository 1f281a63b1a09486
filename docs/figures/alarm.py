"""Evidence against an unchanged stream: it stays low until the stream changes, then grows."""

import torch

from docs.figures import style
from lightning_uq import DriftMonitor


def draw():
    """Draw the evidence of ten streams that change after 1,000 rows, and of ten that do not."""
    generator = torch.Generator().manual_seed(0)
    held_out = torch.randn(500, generator=generator)
    figure, axis = style.panels(1)
    step = 50
    for shift, color, label in ((0.0, style.BLUE, "unchanged streams"), (0.5, style.ORANGE, "streams that change")):
        for stream in range(10):
            monitor = DriftMonitor(held_out, seed=stream)
            evidence = []
            for start in range(0, 2000, step):
                scores = torch.randn(step, generator=generator) + (shift if start >= 1000 else 0.0)
                monitor.update(scores)
                evidence.append(monitor.log10_evidence)
            axis.plot(range(step, 2001, step), evidence, color=color, linewidth=1, label=None if stream else label)
    axis.axvline(1000, color=style.GREY, linewidth=1, linestyle=":")
    axis.axhline(
        torch.tensor(20.0).log10().item(), color=style.TEXT, linestyle="--", linewidth=1.2, label="drift is found"
    )
    axis.set(xlabel="rows", ylabel="log10 of the evidence", ylim=(-3, 6))
    axis.legend(loc="upper left", fontsize=8)
    return figure
