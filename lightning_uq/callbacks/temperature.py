"""Temperature scaling after training, fitted on the validation data."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_uq.callbacks.calibration import Calibration, rounded_for
from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.functional.temperature import Method, Objective, Scope, check_method, fit_ensemble_temperature
from lightning_uq.functional.temperature_sums import ROWS, fit_temperature_to_sums, nll_at
from lightning_uq.functional.validation import check_choice
from lightning_uq.predictions import CategoricalPrediction, Prediction
from lightning_uq.running.classes import CalibrationReader, FittingRows
from lightning_uq.running.temperature_reader import TemperatureReader
from lightning_uq.running.transforms import PredictionTransform
from lightning_uq.tasks import describe


class TemperatureScaling(Calibration):
    """Temperature scaling after training, for any LightningModule that classifies.

    The temperature is fitted on the validation data in float64, for any precision of the training. It usually improves the
    held-out likelihood, but not always: a temperature fitted on few rows can make it worse.

    - ``scope="pooled"``: T acts on the log of the mean probabilities (Rahaman and Thiery). Members do not change, and neither do
      mutual information and joint log-loss.
    - ``"shared"``: one T acts inside all members and is fitted to their pooled likelihood. Joint predictions stay coherent.
    - ``"member"``: each member has its own T, as in DDU.

    For a single network, the three scopes are equal.

    With the default arguments, or ``per_label``, a fit adds up sums over the rows and keeps none of them, so it needs the same
    memory for any number of pixels. Its T has a relative deviation of at most 3e-8 from that of all rows in memory. ``method="grid"`` and the
    other scopes keep the logits of at most ``max_rows`` rows.

    Args:
        objective: ``"nll"``, or ``"ece"`` with ``method="grid"``.
        method: ``"newton"``, or ``"grid"`` for DDU's grid 0.1, 0.2, ..., 10.
        scope: ``"pooled"``, ``"shared"`` or ``"member"``.
        per_label: Whether each label of a :class:`~lightning_uq.tasks.Multilabel` task has its own T.
        fitting: ``max_rows`` (2^20 by default; if rows are kept and there are more, a random sample is fitted), and arguments of
            :class:`FittingCallback`: ``dataloader`` (default the validation loader), ``weights``, ``name``, ``predict_fn``,
            ``unpack_batch``, ``output``, ``task`` and ``attach``.

    Raises:
        InputError: At the start of the training, if there are no validation data or they have no labels.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599); Rahaman & Thiery, NeurIPS 2021 (arXiv 2007.08792).

    Example:
        >>> import torch
        >>> logits = torch.tensor([[4.0, 0.0]] * 10)
        >>> scaling = TemperatureScaling().fit_logits(logits, torch.tensor([0] * 8 + [1] * 2))
        >>> scaling.temperature.round(decimals=4)
        tensor(2.8854, dtype=torch.float64)
    """

    tensor_name = "temperature"
    runs_sharded = True

    def __init__(
        self,
        *,
        objective: Objective = "nll",
        method: Method = "newton",
        scope: Scope = "pooled",
        per_label: bool = False,
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        check_method(objective, method)
        check_choice("scope", scope, ("pooled", "shared", "member"))
        self.objective = objective
        self.method = method
        self.scope = scope
        self.per_label = per_label
        self.of_members = scope != "pooled"
        if per_label and self.of_members:
            raise InputError(f"`per_label` needs scope='pooled', but `scope` is {scope!r}.")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        fit = {"objective": self.objective, "method": self.method, "scope": self.scope, "per_label": self.per_label}
        return {**super().settings, **fit}

    @property
    def temperature(self) -> Tensor:
        """T in float64: a scalar, or [Z] with ``scope="member"``.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        return self._get()

    @property
    def fitted_numbers(self) -> dict[str, float]:
        """The temperature or temperatures, and the NLL of the fitting rows: see :attr:`Calibration.fitted_numbers`."""
        T = self.temperature
        own = {"temperature": float(T)} if T.ndim == 0 else {f"temperature/{i}": float(t) for i, t in enumerate(T)}
        return {**own, **super().fitted_numbers}

    @property
    def keeps_rows(self) -> bool:
        """Whether a fit keeps its rows in memory, rather than sums over them."""
        return self.of_members or self.method == "grid"

    def new_reader(self, who: str, where: str) -> CalibrationReader:
        """A reader of sums, or of rows if the fit keeps them."""
        if self.keeps_rows:
            return super().new_reader(who, where)
        return TemperatureReader(self.logits, who, where, per_label=self.per_label)

    def fit_read(self, reader: CalibrationReader, trainer: Trainer | None) -> dict[str, Any]:
        """The fitted temperature and the NLLs, from the sums or rows of all ranks. A collective."""
        if not isinstance(reader, TemperatureReader):
            return super().fit_read(reader, trainer)
        sums = reader.gather_sums(trainer)
        total, num_rows, num_off = sums.sum(0), sums[:, ROWS, 0], sums[:, ROWS, 2]
        T = fit_temperature_to_sums(total)
        if self.per_label:
            known = (num_off > 0) & (num_off < num_rows)
            T = self._of_labels(T, known, lambda label: fit_temperature_to_sums(sums[label]))
        per_label = zip(num_rows.tolist(), sums, T.expand(len(sums)).tolist(), strict=True)
        nll = sum(num * nll_at(own, t) for num, own, t in per_label if num) / float(num_rows.sum())
        return {
            "temperature": T,
            "fit_nll": T.new_tensor(nll_at(total, 1.0)),
            "fit_nll_calibrated": T.new_tensor(nll),
        }

    def fit_members(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The temperature for the logits [Z, N, C] of members."""
        fitted = fit_ensemble_temperature(logits, labels, self.scope, self.objective, self.method)
        return {"temperature": fitted}

    def fit_rows(self, rows: FittingRows) -> dict[str, Tensor]:
        """One temperature, or one per label [L] with ``per_label``. A label without both values gets that of all labels."""
        fitted = self.fit_members(rows.logits, rows.labels)
        if not self.per_label:
            return fitted
        own = [rows.group == label for label in range(rows.num_groups)]
        known = torch.tensor([0 < int(rows.labels[one].sum()) < int(one.sum()) for one in own])

        def fit(label: int) -> Tensor:
            return self.fit_members(rows.logits[:, own[label]], rows.labels[own[label]])["temperature"]

        return {"temperature": self._of_labels(fitted["temperature"], known, fit)}

    def _of_labels(self, of_all: Tensor, known: Tensor, fit: Callable[[int], Tensor]) -> Tensor:
        """The temperature of each label [L]; that of all labels if not both of its values are ``known``."""
        unfitted = (~known).nonzero().squeeze(1).tolist()
        if unfitted:
            rank_zero_warn(
                f"TemperatureScaling gives labels {unfitted} the temperature of all labels, because the fitting data hold only one "
                "of their values, 0 or 1."
            )
        return torch.stack([fit(label) if known[label] else of_all for label in range(len(known))])

    def calibrated_rows(
        self, prediction: CategoricalPrediction, rows: FittingRows, tensors: dict[str, Tensor]
    ) -> CategoricalPrediction:
        """The fitting rows, each with the temperature of its label."""
        T = tensors["temperature"]
        T = T[rows.group].unsqueeze(1) if self.per_label else T
        calibrated: Any = TemperatureTransform(T, self.of_members).apply(prediction)
        return calibrated  # type: ignore[no-any-return]

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Check that the batch holds labels and the model returns logits, and that there are several labels with ``per_label``."""
        super().check_batch(model, batch, trainer)
        task = self.logits.task(model)
        if self.per_label and task.has_classes:
            raise InputError(
                f"`per_label` needs several labels per input, but the task is {describe(task)}. Leave it out."
            )

    def transform(self) -> "TemperatureTransform":
        """The transform that adds the temperature to predictions, or tempers their members."""
        return TemperatureTransform(self.temperature, self.of_members)


class TemperatureTransform(PredictionTransform):
    """Adds a pooled temperature to a prediction, or tempers its members.

    Args:
        temperature: T: a scalar, or [Z] for members.
        of_members: Whether T acts inside the members.
    """

    kind = "calibration"

    def __init__(self, temperature: Tensor, of_members: bool = False) -> None:
        self.temperature = temperature
        self.of_members = of_members

    def apply(self, prediction: Prediction) -> Prediction:
        """The calibrated prediction."""
        if self.of_members:
            tempered: Prediction = prediction.map_logits(self._tempered)
            return tempered.replace(member_temperature=rounded_for(self.temperature, prediction))
        return prediction.replace(temperature=rounded_for(self.temperature, prediction))

    def _tempered(self, logits: Tensor) -> Tensor:
        logits = upcast(logits)  # a scalar T does not promote the dtype
        T = self.temperature.to(logits)
        return logits / (T.reshape(-1, *[1] * (logits.ndim - 1)) if T.ndim else T)
