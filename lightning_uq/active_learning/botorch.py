"""A BoTorch model whose posterior consists of the functions f(., z) of an epistemic network."""

from contextlib import nullcontext
from functools import cache
from typing import Any

from torch import Tensor

from lightning_uq.callbacks.laplace_transform import LaplaceTransform
from lightning_uq.errors import InputError, MissingExtraError, UnsupportedError
from lightning_uq.functional.validation import check_integer
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.frozen import in_eval_mode
from lightning_uq.networks.dropout import DropoutNetwork
from lightning_uq.predictions import NumberPrediction
from lightning_uq.tasks import describe


def as_botorch_model(module: UncertaintyModule, *, num_outputs: int = 1) -> Any:
    """A BoTorch model with joint samples f(x_1, z), ..., f(x_q, z) of a trained regressor, for Bayesian optimisation.

    Each index z of the module's evaluation is one function of x: a member of an ensemble, or one of ``num_eval_samples`` draws of an
    epinet, a hypermodel, a dropout network or Bayes by backprop. With a fitted :class:`FitLaplace`, the functions are those of
    ``num_samples`` draws of the last layer's weights. A sample of the posterior takes one function for all q points, so acquisition
    functions that need joint samples (qLogEI, qLogNEI, Thompson sampling) run. The functions are the same at each call.

    The values are the means E[y | x, z] in the units of the targets, without the noise of an observation. Calibrations that change only
    the distribution of y, such as conformal intervals, have no effect. Inputs may have any floating-point dtype: they are converted to
    that of the module, and the values are converted back. Gradients reach the inputs. The module runs in evaluation mode, keeps its
    own modes, and may be trained further; the model then has its new weights.

    Args:
        module: A regressor with several functions.
        num_outputs: Number of targets D; over a horizon, H D.

    Returns:
        A ``botorch.models.ensemble.EnsembleModel``. Its posterior at X [..., q, d] has samples [..., q, D]. Like every
        ``EnsemblePosterior``, its ``variance`` divides by Z - 1, whereas ``epistemic_variance`` of a prediction divides by Z.

    Raises:
        MissingExtraError: BoTorch is not installed.
        InputError: The module has a single function, masks that differ between inputs, or a task without means, such as
            classes, maps or quantiles. At a posterior: the module has another number of outputs.
        UnsupportedError: A posterior with observation noise is requested.

    Source: Balandat et al., "BoTorch", NeurIPS 2020 (arXiv 1910.06403); Osband et al., "Epistemic Neural Networks", NeurIPS 2023
    (arXiv 2107.08924).

    Example:
        >>> import torch
        >>> from botorch.acquisition import qLogExpectedImprovement  # doctest: +SKIP
        >>> from lightning_uq import EnsembleModule, Regression
        >>> task = Regression(head="mean")
        >>> module = EnsembleModule(lambda: torch.nn.Linear(2, 1), num_members=5, task=task, seed=0)
        >>> model = as_botorch_model(module)  # doctest: +SKIP
        >>> acquisition = qLogExpectedImprovement(model, best_f=0.0)  # doctest: +SKIP
        >>> acquisition(torch.rand(7, 3, 2)).shape  # of 7 candidates for a batch of 3 points  # doctest: +SKIP
        torch.Size([7])
    """
    check_integer("num_outputs", num_outputs, 1)
    _checked(module)
    return _model_class()(module, num_outputs)


@cache
def _model_class() -> Any:
    """The class of the models. It is built here, because its base class is in a package that may not be installed."""
    try:
        from botorch.models.ensemble import EnsembleModel
    except ImportError as error:
        raise MissingExtraError(
            "`as_botorch_model` needs BoTorch, which is not installed. Install the extra `botorch`: pip install 'lightning-uq[botorch]'."
        ) from error

    class EpistemicModel(EnsembleModel):  # type: ignore[misc]  # BoTorch is not read by mypy
        """The functions of a module."""

        def __init__(self, module: UncertaintyModule, num_outputs: int) -> None:
            super().__init__()
            self.module = module
            self._num_outputs = num_outputs

        def forward(self, X: Tensor) -> Tensor:
            """Values [..., Z, q, D] of all functions at X [..., q, d]."""
            return _function_values(self.module, X, self._num_outputs)

        def posterior(
            self,
            X: Tensor,
            output_indices: list[int] | None = None,
            observation_noise: bool | Tensor = False,
            posterior_transform: Any = None,
        ) -> Any:
            """The joint posterior of the functions at X [..., q, d]."""
            if observation_noise is not False:
                raise UnsupportedError(
                    "The posterior of a network holds its functions, without observation noise. Pass `observation_noise=False`."
                )
            return super().posterior(X, output_indices, posterior_transform)

        def train(self, mode: bool = True) -> "EpistemicModel":
            """Set the mode of all but the module: BoTorch sets it at each posterior, but a training of the module needs its own modes."""
            self.training = mode
            for child in self.children():
                if child is not self.module:
                    child.train(mode)
            return self

        def eval(self) -> "EpistemicModel":
            """Set evaluation mode. BoTorch's own method warns that a model with an ``input_transform`` holds no training inputs."""
            return self.train(False)

    return EpistemicModel


def _function_values(module: UncertaintyModule, X: Tensor, num_outputs: int) -> Tensor:
    """Values [..., Z, q, D] of all functions at X [..., q, d]."""
    laplace = _checked(module)
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    rows = X.to(parameter).flatten(0, -2)
    with in_eval_mode(module), nullcontext() if laplace is None else laplace.drawing(module) as draw:
        output = module(rows)
        # As a prediction of Z B inputs by one hypothesis, whose mean is the hypothesis' own for every head.
        prediction: NumberPrediction = module.prediction(output.flatten(0, 1).unsqueeze(0))  # type: ignore[assignment]
        means = prediction.mean.reshape(*output.shape[:2], *prediction.mean.shape[1:])
        values: Tensor = (means if draw is None else draw(means)).flatten(2)
    if values.shape[2] != num_outputs:
        raise InputError(
            f"`num_outputs` must be the number of the module's outputs, {values.shape[2]}, but it is {num_outputs}."
        )
    return values.to(X).reshape(-1, *X.shape[:-1], num_outputs).movedim(0, -3)


def _checked(module: UncertaintyModule) -> LaplaceTransform | None:
    """The posterior of the last layer, if one was fitted to the module's weights; refuses a module without joint samples of functions."""
    if not isinstance(module, UncertaintyModule):
        raise InputError(
            f"`module` must be an UncertaintyModule, but it is a {type(module).__name__}. Wrap a network in a module of this package."
        )
    task = module.task
    if not task.has_numeric_targets or task.has_positions or getattr(task, "head", None) == "quantiles":
        raise InputError(
            f"BoTorch needs a regressor that predicts means, but the task of this {type(module).__name__} is {describe(task)}. Use "
            "`task=Regression(head='mean')` or `'mean_variance'`."
        )
    if any(isinstance(part, DropoutNetwork) and not part.is_shared for part in module.network.modules()):
        raise InputError(
            "Joint samples need one dropout mask for all inputs, but this module has `mask='per_example'`. Use `mask='shared'`."
        )
    attached = module.prediction_transforms.before("", module)
    laplace = next((one for one in attached if isinstance(one, LaplaceTransform)), None)
    num_indices = module.network.num_indices
    if laplace is not None:
        number, advice = laplace.num_samples, "Raise `num_samples` of FitLaplace."
    elif num_indices is None:
        number, advice = module.num_eval_samples, "Raise `num_eval_samples` of the module."
    else:
        number, advice = (
            num_indices,
            "Use an ensemble, an epinet, dropout with shared masks, Bayes by backprop or a hypermodel, or fit FitLaplace to it.",
        )
    if number < 2:
        raise InputError(
            f"BoTorch needs several functions of x, but this {type(module).__name__} has only one. {advice}"
        )
    return laplace
