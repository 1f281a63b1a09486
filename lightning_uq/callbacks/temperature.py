"""Temperature scaling after training, fitted on the validation data."""

from typing import Any

from torch import Tensor

from lightning_uq.callbacks.calibration import Calibration, rounded_for
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.temperature import Method, Objective, Scope, check_method, fit_ensemble_temperature
from lightning_uq.functional.validation import check_choice
from lightning_uq.predictions import Prediction
from lightning_uq.running.transforms import PredictionTransform


class TemperatureScaling(Calibration):
    """Temperature scaling after training, on any LightningModule that classifies.

    Fitted on the validation data in float64, whatever the precision of the training. Held-out likelihood usually falls,
    but nothing guarantees that it does: a temperature fitted on few rows can be worse than none.

    - ``scope="pooled"``: T on the log of the mean probabilities (Rahaman and Thiery). The members stay as they are, hence
      mutual information and joint log-loss too.
    - ``"shared"``: one T inside all members, whose pooled likelihood is fitted; joint predictions stay coherent.
    - ``"member"``: each member's own, as DDU has it.

    For a single network the three are one.

    Args:
        objective: ``"nll"``, or ``"ece"`` with ``method="grid"``.
        method: ``"newton"``, or ``"grid"``, DDU's 0.1, 0.2, ..., 10.
        scope: ``"pooled"``, ``"shared"`` or ``"member"``.
        fitting: ``max_rows`` (above 2^20 rows, a random sample of so many is fitted), and arguments of
            :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``,
            ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Raises:
        InputError: At the start of the training, where there is no validation data or it has no labels.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599); Rahaman & Thiery, NeurIPS 2021 (arXiv 2007.08792).

    Example:
        >>> import torch
        >>> logits = torch.tensor([[4.0, 0.0]] * 10)
        >>> scaling = TemperatureScaling().fit_logits(logits, torch.tensor([0] * 8 + [1] * 2))
        >>> scaling.temperature.round(decimals=4)
        tensor(2.8854, dtype=torch.float64)
    """

    tensor_name = "temperature"

    def __init__(
        self,
        *,
        objective: Objective = "nll",
        method: Method = "newton",
        scope: Scope = "pooled",
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        check_method(objective, method)
        check_choice("scope", scope, ("pooled", "shared", "member"))
        self.objective = objective
        self.method = method
        self.scope = scope
        self.of_members = scope != "pooled"

    @property
    def settings(self) -> dict[str, Any]:
        """What a fit depends on."""
        return {**super().settings, "objective": self.objective, "method": self.method, "scope": self.scope}

    @property
    def temperature(self) -> Tensor:
        """T, a scalar in float64, or [Z] with ``scope="member"``.

        Raises:
            NotFittedError: Nothing was fitted.
        """
        return self._get()

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The temperature of members' logits [Z, N, C]."""
        fitted = fit_ensemble_temperature(logits, labels, self.scope, self.objective, self.method)
        return {"temperature": fitted}

    def transform(self) -> "TemperatureTransform":
        """Predictions carry the temperature, or tempered members."""
        return TemperatureTransform(self.temperature, self.of_members)


class TemperatureTransform(PredictionTransform):
    """Adds a pooled temperature to a prediction, or tempers its members.

    Args:
        temperature: T, a scalar, or [Z] of the members.
        of_members: Whether T acts inside the members.
    """

    kind = "calibration"

    def __init__(self, temperature: Tensor, of_members: bool = False) -> None:
        self.temperature = temperature
        self.of_members = of_members

    def apply(self, prediction: Prediction) -> Prediction:
        """The calibrated prediction."""
        if self.of_members:
            return prediction.map_logits(self._tempered)
        return prediction.replace(temperature=rounded_for(self.temperature, prediction))

    def _tempered(self, logits: Tensor) -> Tensor:
        logits = upcast(logits)  # a scalar T would not, and round again
        T = self.temperature.to(logits)
        return logits / (T.reshape(-1, *[1] * (logits.ndim - 1)) if T.ndim else T)
