"""How a network is called and what it returns: ``predict_fn`` and ``output``."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, finfo, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.scores import NEED_LOGITS
from lightning_uq.guessing import report_guess
from lightning_uq.importing import as_function
from lightning_uq.networks.calling import call_network

Output = Literal["logits", "probs", "log_probs"] | Callable[[Any], Tensor]
PredictFn = Callable[[Any, Any], Any]
"""``predict_fn(model, x) -> output``; typed loosely, so that the command line can build classes with such an argument."""


class OutputReader:
    """Calls a network, and converts its return value to a tensor of logits (or of regression outputs).

    If ``output`` is not a function, the reader takes the ``logits`` of a mapping or of a Hugging Face output, or the first tensor of a
    tuple, and reports that once.

    Args:
        output: ``"logits"`` and ``"log_probs"`` are used unchanged (softmax(log p) = p), ``"probs"`` are converted to log
            space, and a callable, or its import path, picks the tensor from any other output, e.g. ``lambda out: out["scores"]``.
        predict_fn: ``predict_fn(network, x)``, or its import path, instead of ``network(x)``.

    Raises:
        InputError: An argument is invalid, or the network did not return a tensor and ``output`` is not a callable that picks one.

    Example:
        >>> import torch
        >>> OutputReader("probs")(torch.tensor([[0.5, 0.5]]))
        tensor([[-0.6931, -0.6931]])
        >>> OutputReader(predict_fn=lambda network, x: network(2 * x)).call(nn.Identity(), torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    def __init__(self, output: Output = "logits", predict_fn: PredictFn | str | None = None) -> None:
        if isinstance(output, str) and "." in output:
            output = as_function(output, "output")
        if not callable(output) and output not in ("logits", "probs", "log_probs"):
            raise InputError(f"`output` must be 'logits', 'probs', 'log_probs' or a callable, but it is {output!r}.")
        self.output = output
        self.predict_fn: PredictFn | None = None if predict_fn is None else as_function(predict_fn, "predict_fn")

    def raw(self, network: nn.Module, x: Any) -> Any:
        """The network's return value for an input."""
        return call_network(network, x) if self.predict_fn is None else self.predict_fn(network, x)

    def call(self, network: nn.Module, x: Any) -> Tensor:
        """The output tensor for an input of the network."""
        return self(self.raw(network, x))

    def __call__(self, raw: Any, model: nn.Module | None = None) -> Tensor:
        """The output tensor in a network's return value.

        Assumptions are reported once per ``model``; without it, each text is reported once.
        """
        raw = self.output(raw) if callable(self.output) else self._picked(raw, self if model is None else model)
        if not isinstance(raw, Tensor):
            holds = f" with keys {sorted(map(str, raw))}" if isinstance(raw, Mapping) else ""
            raise InputError(
                f"The network returned a {type(raw).__name__}{holds}, not a tensor. Pass argument `output`, a function "
                'that picks the logits from it, for example `output=lambda out: out["scores"]`.'
            )
        if self.output == "probs":
            # A half-precision 0, or a rounding below it, is a valid probability, so bound it by the smallest normal number.
            probs = upcast(raw)
            return probs.clamp_min(finfo(probs.dtype).tiny).log()
        return raw

    def can_read(self, raw: Any) -> bool:
        """Whether :meth:`__call__` finds a tensor in a network's return value."""
        if callable(self.output) or isinstance(raw, Tensor) or isinstance(_logits_of(raw), Tensor):
            return True
        return (
            isinstance(raw, (list, tuple))
            and len(raw) > 0
            and isinstance(raw[0], Tensor)
            and raw[0].is_floating_point()
        )

    def reports_log_probs(self, outputs: Tensor, model: nn.Module) -> bool:
        """Whether outputs [Z, B, C, ...] that should be logits look like log-probabilities, which is then reported."""
        found = (
            self.output == "logits" and outputs.ndim > 2 and outputs.shape[1] > 1 and _are_log_probs(outputs.detach())
        )
        if found:
            report_guess(
                f"The outputs of {type(model).__name__} look like log-probabilities, such as those of `log_softmax`: the exponentials of each row "
                f"sum to 1. Predictions are the same, but {' and '.join(NEED_LOGITS)} would be meaningless. Pass "
                '`output="log_probs"`, or return the logits.',
                model,
            )
        return found

    def _picked(self, raw: Any, about: object) -> Any:
        """The tensor in a mapping, a tuple or an output of Hugging Face, if it is unambiguous; else ``raw`` itself."""
        if isinstance(raw, Tensor):
            return raw
        kind = type(raw).__name__
        logits = _logits_of(raw)
        if isinstance(logits, Tensor) and self.output == "logits":
            report_guess(
                f"The network returns a {kind}, whose `logits` are used. To use another part, pass a function that picks it as `output`.",
                about,
            )
            return logits
        if isinstance(raw, (list, tuple)) and raw and isinstance(raw[0], Tensor) and raw[0].is_floating_point():
            first, *others = raw
            report_guess(
                f"The network returns a {kind} of {len(raw)}, whose first part, a tensor with {first.ndim} axes, is used as its "
                "output. To use another part, pass `output`, for example `output=lambda out: out[1]`.",
                about,
                is_doubtful=any(isinstance(other, Tensor) and other.ndim == first.ndim for other in others),
            )
            return first
        return raw


def _logits_of(raw: Any) -> Any:
    return raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", None)


def _are_log_probs(outputs: Tensor) -> bool:
    """Whether the exponentials of outputs [Z, B, C, ...] are probabilities that sum to 1 over the classes."""
    tolerance = max(1e-3, outputs.shape[2] ** 0.5 * finfo(outputs.dtype).eps)
    values = upcast(outputs)
    return bool((values.amax() <= 0) & (values.logsumexp(2).abs().amax() < tolerance))
