"""The numbers of one run: accuracy, calibration error and detection scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_uq.evaluate.settings import ModelType
from lightning_uq.functional import (
    auroc,
    average_precision,
    energy,
    expected_calibration_error,
    mean_log_probs,
    mutual_information,
    predictive_entropy,
)
from lightning_uq.functional.entropy import entropy, log_softmax
from lightning_uq.functional.precision import to_float64

NUM_BINS = 15


@dataclass(frozen=True)
class Outputs:
    """The members' outputs for the test and the out-of-distribution data, in float64.

    Attributes:
        logits: Logits [Z, N, C] of the test inputs.
        labels: Their labels [N].
        ood_logits: Logits [Z, M, C] of the out-of-distribution inputs; None without such data.
        temperature: Each member's temperature [Z].
        log_prob: For ``gmm``, log p(f | c) [N, C] of the test inputs' features.
        ood_log_prob: The same [M, C] for the out-of-distribution inputs.
    """

    logits: Tensor
    labels: Tensor
    ood_logits: Tensor | None
    temperature: Tensor
    log_prob: Tensor | None = None
    ood_log_prob: Tensor | None = None


def metrics(model_type: ModelType, outputs: Outputs) -> dict[str, float]:
    """Accuracy, calibration and detection metrics of one run, before and after its temperatures, as fractions rather than per cent.

    Without out-of-distribution inputs, there are no detection metrics.

    The keys are the original's; :func:`~lightning_uq.evaluate.names.with_plain_names` adds the plain ones.

    Example:
        >>> outputs = Outputs(
        ...     logits=torch.tensor([[[4.0, 0.0], [0.0, 4.0]]]),
        ...     labels=torch.tensor([0, 1]),
        ...     ood_logits=torch.tensor([[[0.5, 0.0]]]),
        ...     temperature=torch.ones(1),
        ... )
        >>> values = metrics("softmax", outputs)
        >>> values["accuracy"], values["m1_auroc"], values["m2_auprc"]
        (1.0, 1.0, 1.0)
    """
    scale = outputs.temperature.view(-1, 1, 1)
    values: dict[str, float] = {}
    for prefix, T in (("", torch.ones_like(scale)), ("t_", scale)):
        logits = outputs.logits / T
        probs = mean_log_probs(logits).exp()
        if not prefix:
            values["accuracy"] = float(to_float64(probs.argmax(1) == outputs.labels).mean())
        values[f"{prefix}ece"] = float(expected_calibration_error(probs, outputs.labels, NUM_BINS))
        if outputs.ood_logits is None:
            continue
        inside, outside = logits, outputs.ood_logits / T
        if model_type == "gmm":
            assert outputs.log_prob is not None
            assert outputs.ood_log_prob is not None
            inside, outside = outputs.log_prob[None], outputs.ood_log_prob[None]
        for name, (score, positive) in _SCORES[model_type].items():
            values.update({f"{prefix}{name}_{key}": v for key, v in _detect(score, positive, inside, outside).items()})
    return values


def _posterior_entropy(log_prob: Tensor) -> Tensor:
    """Entropy of p(c | f) under equal priors."""
    return entropy(log_softmax(log_prob, 2), 2)[0]


Positive = Literal["in", "out"]

# The original ranks a confidence, whose positives are in distribution, or an uncertainty, whose positives are out.
_SCORES: dict[ModelType, dict[str, tuple[Callable[[Tensor], Tensor], Positive]]] = {
    "softmax": {"m1": (energy, "in"), "m2": (predictive_entropy, "out")},
    "ensemble": {"m1": (mutual_information, "out"), "m2": (predictive_entropy, "out")},
    "gmm": {"m1": (energy, "in"), "m2": (_posterior_entropy, "out")},
}


def _detect(score: Callable[[Tensor], Tensor], positive: Positive, inside: Tensor, outside: Tensor) -> dict[str, float]:
    scores = torch.cat([score(inside), score(outside)])
    is_ood = torch.arange(len(scores)) >= inside.shape[1]
    found = {f"auprc_{kind}": float(average_precision(scores, is_ood, kind)) for kind in ("in", "out")}
    return {"auroc": float(auroc(scores, is_ood)), "auprc": found[f"auprc_{positive}"], **found}
