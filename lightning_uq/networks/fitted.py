"""A trained network with its calibration and feature score built in, as one plain module."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, NotFiniteError
from lightning_uq.functional.bernoulli import pooled_logits
from lightning_uq.functional.entropy import mean_log_probs
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_choice
from lightning_uq.networks.class_calibration import ClassCalibration
from lightning_uq.networks.feature_score import FeatureScore
from lightning_uq.networks.features import FeatureTap
from lightning_uq.networks.finite import NonFinite, check_finite, nonfinite_rows, with_zeros
from lightning_uq.networks.pooling import Pool
from lightning_uq.networks.positions import resized


class FittedNetwork(nn.Module):
    """Maps inputs to named outputs: calibrated ``probs`` [B, C], with a feature score ``ood_score`` [B], and with a density ``log_density`` [B] before it.

    ``log_density`` is the log-density itself, higher for typical inputs. ``ood_score`` is the score of the callback that fitted it, higher for
    out-of-distribution inputs, like all scores. For maps, the probabilities are [B, C, *P], and a score with ``pool="positions"`` is [B, *P].

    :func:`~lightning_uq.load_fitted` returns this module. It needs no Trainer and no callbacks, and can be moved, cast, pickled, compiled and
    exported as a whole. An exported graph returns the same dictionary; for ONNX, pass ``output_names=fitted.output_names``. Temperatures and the score's tensors keep their precision in a cast to half precision.

    With a score, features are read while the network runs, so an instance must not be used by several threads at the same
    time. An exported graph may be.

    Args:
        network: Returns logits [Z, B, C], or, for a Dirichlet, the log of its mean [1, B, C].
        temperature: T, for the pooled probabilities. With ``of_members``, one T inside all members, or one per member.
        of_members: Whether T acts inside the members.
        of_labels: Whether the logits are [Z, B, L], for labels that are on or off; the probabilities are then [B, L].
        class_scaling: Scale and bias [2, C] of the log of the mean probabilities, instead of T.
        class_matrix: Weights, bias, floor and 1 / T [C + 3, C] of their matrix scaling, instead of T.
        class_curves: Knots and values [2, C, K] of their isotonic calibration, instead of T.
        feature_score: The score of the members' features.
        layers: Names, in ``network``, of the layers whose inputs are the features.
        pool: How an input with more axes than [B, D] is pooled.
        nonfinite: How to treat an input row with NaN or infinity: ``"error"`` raises; ``"inf"`` returns probabilities of NaN and a score of plus
            infinity, as a compiled or exported graph always does.

    Raises:
        InputError: Several calibrations are given, or the number of layers is not the score's number of members.

    Example:
        >>> from lightning_uq.networks.ensemble import EnsembleNetwork
        >>> network = EnsembleNetwork([nn.Linear(2, 2)])
        >>> fitted, x = FittedNetwork(network, temperature=torch.tensor(2.0)), torch.randn(3, 2)
        >>> torch.allclose(fitted(x)["probs"], torch.softmax(network(x)[0] / 2, 1))
        True
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        temperature: Tensor | None = None,
        of_members: bool = False,
        of_labels: bool = False,
        class_scaling: Tensor | None = None,
        class_matrix: Tensor | None = None,
        class_curves: Tensor | None = None,
        feature_score: FeatureScore | None = None,
        layers: Sequence[str] = (),
        pool: Pool | None = None,
        nonfinite: NonFinite = "error",
    ) -> None:
        super().__init__()
        scalings = {"class_scaling": class_scaling, "class_matrix": class_matrix, "class_curves": class_curves}
        given = {name: tensor for name, tensor in scalings.items() if tensor is not None}
        if (calibrations := [*(["temperature"] if temperature is not None else []), *given])[1:]:
            raise InputError(
                f"{' and '.join(f'`{name}`' for name in calibrations)} cannot be combined. Pass one of them."
            )
        members = 0 if feature_score is None else feature_score.num_members
        if len(layers) != members:
            raise InputError(
                f"`layers` must name one layer per member of `feature_score`, but there are {len(layers)} layers and {members} members."
            )
        check_choice("nonfinite", nonfinite, ("error", "inf"))
        self.nonfinite = nonfinite
        self.network = network
        # Plain numbers instead of a buffer, which a cast to half precision would round.
        self.temperature: Any = None if temperature is None else temperature.tolist()
        self.of_members = of_members
        self.of_labels = of_labels
        self.calibration = ClassCalibration(**given) if given else None
        self.feature_score = feature_score
        self.tap = FeatureTap(network, layers, pool) if layers else None
        self.eval()

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs, in order."""
        return ["probs", *(() if self.feature_score is None else self.feature_score.names)]

    def forward(self, x: Any) -> dict[str, Tensor]:
        """``probs``, and the results of the feature score, if there is one.

        Raises:
            NotFiniteError: A row of the input or its probabilities hold NaN or infinity. Not raised with ``nonfinite="inf"``, or in a graph.
        """
        refuses = self.nonfinite == "error" and not torch.compiler.is_compiling()
        if refuses:
            check_finite(x, advice="Pass `nonfinite='inf'` to `load_fitted` for an `ood_score` of infinity instead.")
        if self.tap is None or self.feature_score is None:
            return {"probs": self._finite(x, self._probs(self.network(with_zeros(x))), math.nan, refuses)}
        logits, features = self.tap.run(self.network, with_zeros(x))
        results = {"probs": self._finite(x, self._probs(logits), math.nan, refuses)}
        for name, values in self.feature_score.results(torch.stack(features)).items():
            bad = -math.inf if name == "log_density" else math.inf
            on_grid = resized(values, logits.shape[3:] if values.ndim > 1 else ())
            results[name] = self._finite(x, on_grid, bad, refuses=False)
        return results

    def _finite(self, x: Any, values: Tensor, bad: float, refuses: bool) -> Tensor:
        """Values [B, ...] with ``bad`` in the rows whose input is not finite. With ``refuses``, raise for NaN from a finite input."""
        rows = nonfinite_rows(x)
        if rows is not None:
            values = torch.where(rows.reshape(-1, *[1] * (values.ndim - 1)), bad, values)
        if refuses and bool(values.isnan().any()):
            raise NotFiniteError(
                "The probabilities hold NaN although the input is finite, because the network's outputs overflow."
            )
        return values

    def _probs(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities of classes, or of L labels that are on or off."""
        if not self.of_labels:
            return self._log_probs(logits).exp()
        logits = upcast(logits)
        if self.temperature is None:
            return torch.sigmoid(pooled_logits(logits))
        T = torch.tensor(
            self.temperature, dtype=logits.dtype, device=logits.device
        )  # a scalar, [L], or [Z] for members
        if self.of_members:
            return torch.sigmoid(pooled_logits(logits / T.reshape(-1, 1, 1)))
        return torch.sigmoid(pooled_logits(logits) / T)

    def _log_probs(self, logits: Tensor) -> Tensor:
        logits = upcast(logits)
        if self.temperature is None:
            log_probs = mean_log_probs(logits)
        elif self.of_members:
            T = torch.tensor(self.temperature, dtype=logits.dtype, device=logits.device)
            log_probs = mean_log_probs(logits / T.reshape(-1, *[1] * (logits.ndim - 1)))
        else:
            log_probs = torch.log_softmax(mean_log_probs(logits) / self.temperature, 1)
        return log_probs if self.calibration is None else self.calibration(log_probs)

    def extra_repr(self) -> str:
        """The parts of the module."""
        inside = []
        if self.temperature is not None:
            inside.append(f"temperature={self.temperature}{' of members' if self.of_members else ''}")
        if self.calibration is not None:
            inside += [name for name, _ in self.calibration.named_buffers()]
        if self.tap is not None:
            inside.append(f"{type(self.feature_score).__name__} of {self.tap.layers}")
        return ", ".join(inside) or "nothing fitted"
