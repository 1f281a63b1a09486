"""Builds a plain module from a trained model and the states fitted to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_uq.callbacks.calibration import rounded_for
from lightning_uq.callbacks.conformal_intervals import ConformalIntervals
from lightning_uq.callbacks.conformal_sets import ConformalSets
from lightning_uq.callbacks.density_transform import with_score
from lightning_uq.callbacks.held_out import HeldOutCallback
from lightning_uq.callbacks.laplace import FitLaplace
from lightning_uq.callbacks.ood_alarm import OODAlarm
from lightning_uq.callbacks.quantile_recalibration import QuantileRecalibration
from lightning_uq.callbacks.risk_control import ConformalRiskControl
from lightning_uq.callbacks.selective_threshold import SelectiveThreshold
from lightning_uq.callbacks.temperature import TemperatureTransform
from lightning_uq.callbacks.variance_scaling import VarianceScaling
from lightning_uq.errors import InputError
from lightning_uq.functional.class_calibration import CALIBRATIONS as CLASS_CALIBRATIONS
from lightning_uq.networks.feature_density import FeatureDensity
from lightning_uq.networks.feature_neighbors import FeatureNeighbors
from lightning_uq.networks.feature_score import FeatureScore
from lightning_uq.networks.features import uncompiled
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.fitted_predictor import FittedChange, FittedPredictor
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.networks.pooling import Pool, pool_setting
from lightning_uq.networks.virtual_logits import VirtualLogits
from lightning_uq.predictions import ClassProbabilities, Prediction
from lightning_uq.running.features import inner_networks
from lightning_uq.running.logits import LogitReader, is_uncertainty_module
from lightning_uq.tasks import Task

HELD_OUT: dict[str, type[HeldOutCallback]] = {
    kind.__qualname__: kind
    for kind in (
        VarianceScaling,
        QuantileRecalibration,
        ConformalSets,
        ConformalIntervals,
        ConformalRiskControl,
        SelectiveThreshold,
        OODAlarm,
    )
}
"""Callbacks on held-out predictions, by the name that stores their state in a file."""

FEATURE_SCORES: dict[str, type[FeatureScore]] = {
    "whitening": FeatureDensity,
    "neighbors": FeatureNeighbors,
    "residual": VirtualLogits,
}
"""Feature scores, by a suffix that only the names of their tensors have."""

PRECEDENCE = ("laplace", "calibration", "density")
"""The order in which fitted states act. Callbacks on held-out predictions follow, in their own order."""


def kind_of(key: str, state: dict[str, Any]) -> str | None:
    """The kind of a state: ``"calibration"``, ``"density"`` (any feature score), ``"laplace"``, or the class of a callback on held-out predictions."""
    tensors, name = state["tensors"], key.partition("{")[0]
    if name in HELD_OUT:
        return name
    if name == FitLaplace.__qualname__:
        return "laplace"
    if any(one in tensors for one in CLASS_CALIBRATIONS):
        return "calibration"
    return None if _score_type(tensors) is None else "density"


def _score_type(tensors: dict[str, Any]) -> type[FeatureScore] | None:
    """The class of the feature score that the tensors describe."""
    parts = {name.rpartition(".")[2] for name in tensors}
    return next((kind for name, kind in FEATURE_SCORES.items() if name in parts), None)


def _feature_score(tensors: dict[str, Any]) -> FeatureScore:
    """The feature score that tensors of kind ``"density"`` describe."""
    kind = _score_type(tensors)
    assert kind is not None
    return kind.from_tensors(tensors)


def compose(
    model: nn.Module,
    prefix: str,
    states: dict[str, Any],
    predict_fn: PredictFn | str | None,
    output: Output | None,
    pool: Pool | None,
    task: Task | None,
) -> FittedNetwork | FittedPredictor:
    """The model with the fitted states built in.

    Args:
        model: The model, with the weights of the fit.
        prefix: The prefix of its parameter names in the file.
        states: The states by key, at most one of each kind.
        predict_fn: See :func:`~lightning_uq.load_fitted`.
        output: Likewise.
        pool: Likewise.
        task: Likewise.

    Raises:
        InputError: An argument of the fit is missing, or a state needs more than a prediction.
    """
    for key, state in states.items():
        settings = state["settings"]
        if settings["predict_fn"] and predict_fn is None:
            raise InputError(f"{key} was fitted with a `predict_fn`: pass it as argument `predict_fn`.")
        if settings["output"] == "custom" and output is None:
            raise InputError(f"{key} was fitted with a function as `output`: pass it as argument `output`.")
    kinds = {key: kind_of(key, state) for key, state in states.items()}
    found = LogitReader(predict_fn, task=task).task(model)
    has_probs = found.takes_calibration
    is_network = has_probs and set(kinds.values()) <= {"calibration", "density"}
    wrapped: nn.Module
    if predict_fn is None and is_uncertainty_module(model):
        features = bool({"density", "laplace"} & set(kinds.values()))
        wrapped = _PackageNetwork(_with_layers(model), features=features, raw=not is_network)
        predict: Callable[[Tensor], Prediction] = model.prediction  # type: ignore[assignment]  # a Module's is untyped
    else:
        if output is None:  # the calibration's, if there is one
            key = max(states, key=lambda key: kinds[key] == "calibration")
            output = states[key]["settings"]["output"]
        wrapped, predict = _ForeignNetwork(model, predict_fn, output, task, raw=not is_network), found.predict
    if is_network:
        return _network(wrapped, model, prefix, states, pool, of_labels=not found.has_classes)
    ordered = sorted(states, key=lambda key: _place(kinds[key]))
    changes = [_change(key, kinds[key], states[key], wrapped, model, prefix, pool) for key in ordered]
    return FittedPredictor(wrapped, predict, changes)


def _place(kind: str | None) -> int:
    order = [*PRECEDENCE, *HELD_OUT]
    return order.index(kind) if kind in order else len(order)


def _network(
    wrapped: nn.Module, model: nn.Module, prefix: str, states: dict[str, Any], pool: Pool | None, *, of_labels: bool
) -> FittedNetwork:
    """Classes or labels with a calibration and a score of features."""
    parts: dict[str, Any] = {"of_labels": of_labels}
    for key, state in states.items():
        tensors = state["tensors"]
        if kind_of(key, state) == "density":
            layer = tensors["feature_layer"].removeprefix(prefix)
            parts.update(feature_score=_feature_score(tensors), layers=_layers(wrapped, model, layer))
            parts["pool"] = _pool(key, state["settings"].get("pool"), pool)
        else:
            parts.update({name: tensors[name] for name in CLASS_CALIBRATIONS if name in tensors})
            parts["of_members"] = state["settings"].get("scope", "pooled") != "pooled"
    return FittedNetwork(wrapped, **parts)


def _change(
    key: str,
    kind: str | None,
    state: dict[str, Any],
    wrapped: nn.Module,
    model: nn.Module,
    prefix: str,
    pool: Pool | None,
) -> FittedChange:
    """The change that a state makes to a prediction."""
    tensors = state["tensors"]
    if kind in ("density", "laplace"):
        layers = _layers(wrapped, model, tensors["feature_layer"].removeprefix(prefix))
        used = _pool(key, state["settings"].get("pool"), pool)
        if kind == "laplace":
            transform = FitLaplace.of_state(state).transform()
            if transform.outputs.has_logits:
                _ = transform.weights  # drawn now, since an exported graph cannot draw them
            return FittedChange(transform.changed, layers, used)
        return FittedChange(partial(with_score, _feature_score(tensors)), layers, used)
    if kind == "calibration":
        if state["settings"].get("scope", "pooled") != "pooled":
            return FittedChange(TemperatureTransform(tensors["temperature"], of_members=True).apply)
        own = {name: tensors[name] for name in CLASS_CALIBRATIONS if name in tensors}
        return FittedChange(partial(_calibrated, own))
    assert kind is not None
    return FittedChange(HELD_OUT[kind].of_state(state).transform().apply)


def _calibrated(tensors: dict[str, Tensor], prediction: Prediction) -> Prediction:
    """The prediction with its probabilities calibrated."""
    return prediction.replace(**{name: rounded_for(tensor, prediction) for name, tensor in tensors.items()})


def _pool(key: str, fitted: str | None, given: Pool | None) -> Pool | None:
    """The pooling of the score's fit: the name in its state, or the function that the caller must pass again."""
    is_function = fitted is not None and fitted.startswith("function ")
    if pool_setting(given) != fitted and (given is not None or is_function):
        advice = "Pass that function as argument `pool`." if is_function else "Leave argument `pool` out."
        raise InputError(
            f"{key} was fitted with pool={fitted!r}, but argument `pool` is {pool_setting(given)!r}. {advice}"
        )
    return given if is_function else fitted  # type: ignore[return-value]  # one of the names


def _with_layers(model: nn.Module) -> nn.Module:
    """A model whose members run one after the other. Members that run at once have no layers of their own."""
    network: Any = model.network
    source = network.feature_source
    loop = source.unstacked()
    if loop is not source:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if child is source:
                    setattr(module, name, loop)
    return model


def _layers(wrapped: nn.Module, model: nn.Module, layer: str) -> list[str]:
    """The full name of the layer, in each member."""
    names = {module: uncompiled(name) for name, module in wrapped.named_modules()}
    return [
        ".".join(filter(None, (names[inner], layer))) for inner in inner_networks(model)
    ]  # "" is the network itself


class _PackageNetwork(nn.Module):
    """Returns the logits of a module of this package, the log of a Dirichlet's mean, or raw outputs, at the evaluation indices.

    The indices are a buffer, since a graph cannot draw them. A subclass with its own ``forward`` draws them itself.
    """

    index: Tensor

    def __init__(self, model: nn.Module, features: bool, raw: bool) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.raw = raw
        self.calls_forward = type(model).forward.__module__.partition(".")[0] != __name__.partition(".")[0]
        network: Any = model.network
        self.register_buffer("index", network.evaluation_index(getattr(model, "num_eval_samples", 1)), persistent=False)
        self._input: Any = None
        if features and not network.shows_features:
            network.feature_source.register_forward_pre_hook(self._keep_input)

    def forward(self, x: Any) -> Tensor:
        network: Any = self.model.network
        logits: Tensor = self.model(x) if self.calls_forward else self.model.outputs_at(x, self.index)  # type: ignore[operator]
        if self.features and not network.shows_features:  # a pass without masks gives the scored features
            for inner in network.feature_networks():
                network.feature_source.read_output.raw(inner, self._input)
            self._input = None
        if self.raw:
            return logits
        prediction: ClassProbabilities = self.model.prediction(logits)  # type: ignore[operator]  # a Module's is untyped
        return prediction.calibration_logits

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0]


class _ForeignNetwork(nn.Module):
    """Returns the logits [Z, B, C, ...] or the raw outputs of a foreign module."""

    def __init__(
        self, model: nn.Module, predict_fn: PredictFn | str | None, output: Output, task: Task | None, raw: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.raw = raw
        self.read = LogitReader(predict_fn, _input_alone, output, task)

    def forward(self, x: Any) -> Tensor:
        outputs = self.read(self.model, x, check=False)
        if self.raw:
            return outputs
        prediction: ClassProbabilities = self.read.prediction(self.model, outputs)  # type: ignore[assignment]  # of classes
        return prediction.calibration_logits


def _input_alone(x: Any) -> tuple[Any, None]:
    return x, None
