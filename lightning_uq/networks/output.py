"""What a network returns, said once: ``output="logits" | "probs" | "log_probs" | callable``."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast

Output = Literal["logits", "probs", "log_probs"] | Callable[[Any], Tensor]


class OutputReader:
    """Turns what a network returned into a tensor of logits (or of regression outputs).

    Args:
        output: ``"logits"`` and ``"log_probs"`` are taken as they are (softmax(log p) = p), ``"probs"`` are taken to log
            space, and a callable picks the tensor from anything else, e.g. ``lambda out: out["logits"]``.

    Raises:
        InputError: The network returned no tensor, and ``output`` is no callable that picks one.

    Example:
        >>> OutputReader("probs")(torch.tensor([[0.5, 0.5]]))
        tensor([[-0.6931, -0.6931]])
    """

    def __init__(self, output: Output = "logits") -> None:
        if not callable(output) and output not in ("logits", "probs", "log_probs"):
            raise InputError(f"`output` must be 'logits', 'probs', 'log_probs' or a callable, but it is {output!r}.")
        self.output = output

    def __call__(self, raw: Any) -> Tensor:
        """The tensor that downstream code works on."""
        if callable(self.output):
            raw = self.output(raw)
        if not isinstance(raw, Tensor):
            holds = f" with keys {sorted(map(str, raw))}" if isinstance(raw, Mapping) else ""
            raise InputError(
                f"The network returned a {type(raw).__name__}{holds}, not a tensor. Pass argument `output` a function that "
                'picks the logits from it, for example `output=lambda out: out["logits"]`.'
            )
        if self.output == "probs":
            # A half-precision 0 or a rounding below it is a legal probability: bound it by the smallest normal number.
            probs = upcast(raw)
            return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
        return raw
