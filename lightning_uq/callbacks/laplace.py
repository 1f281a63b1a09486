"""The Laplace approximation of the last layer: an epistemic variance for any trained network with a linear head."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.callbacks.foreign import transformed_prediction
from lightning_uq.callbacks.held_out_rows import HeldOutRows
from lightning_uq.callbacks.laplace_kinds import KINDS, kind_of
from lightning_uq.callbacks.laplace_logits import Classes
from lightning_uq.callbacks.laplace_numbers import Means
from lightning_uq.callbacks.laplace_outputs import LaplaceOutputs, Sums, draws_each
from lightning_uq.callbacks.laplace_transform import LaplaceTransform, Link
from lightning_uq.callbacks.last_layer import LastLayerReader, LastLayerRows
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.laplace import LastLayerPosterior
from lightning_uq.functional.precision import to_float64
from lightning_uq.functional.validation import check_choice, check_integer
from lightning_uq.guessing import report_guess
from lightning_uq.predictions import NumberPrediction, Prediction
from lightning_uq.running.classes import check_targets, target_of
from lightning_uq.running.evaluation import evaluating, to_device
from lightning_uq.running.features import LayerFeatures
from lightning_uq.running.loaders import can_be_reread
from lightning_uq.running.ranks import first_of_ranks, raising_on_all_ranks, sum_of_ranks
from lightning_uq.tasks import describe

Select = Literal["auto", "marginal_likelihood", "held_out"]
MIN_HELD_OUT = 20
"""The number of held-out rows from which ``select="auto"`` uses them."""
MAX_BYTES = 4 * 2**30
"""The largest memory for the second moments, or for the draws of the weights, of all outputs and members, in bytes."""


_OF_DRAWS = ("link", "num_samples", "seed")
"""Arguments that only affect how the posterior is used."""


class FitLaplace(FeatureCallback):
    """A Laplace approximation of the last linear layer after training: epistemic uncertainty for any network with a linear head.

    One pass over the training data gives a Gaussian over the layer's weights, centered on the trained ones (generalized Gauss-Newton), in float64.
    The other layers do not change. The result is the same on any number of ranks. Predictions then become:

    - means (``Regression(head="mean")``, or an unmodified regressor): a :class:`GaussianMixturePrediction` with one Gaussian per network. Its
      variance is s^2 + phi^T Sigma phi: a noise s^2 per target and the ``epistemic_variance`` of features phi, in the units of the targets;
    - means and variances: the variance grows by phi^T Sigma phi. Training rows are weighted by 1 / sigma^2(x);
    - logits of classes or labels: ``num_samples`` rows of logits, one per draw of the weights. All inputs share the draws, so joint
      predictions are coherent. Or, with ``link="probit"``, one row scaled down by its variance. For classes, the curvature is a Kronecker product.

    The test metrics of this package's modules are those of the changed predictions, and so are those of later callbacks on held-out
    rows, such as the coverage of :class:`ConformalIntervals`. The change does not affect the loss, the ``uq/test_*`` of a temperature, or the
    scores that :class:`OODDetection` computes from predictions. A temperature in the same Trainer acts on the changed predictions, but is fitted
    to unchanged ones. :class:`OODDetection` logs the score ``laplace``: for logits, the mutual information of target and
    weights; for numbers, the mean epistemic variance over targets (of means, in units of the noise) and over an ensemble's members. An
    ensemble has one posterior per member.

    The model may return some of the layer's outputs, picked by a ``predict_fn``: a language model's logits of a few answers at the last token of a
    prompt, with ``pool="last_token"``. The posterior is then that of their weights alone, and its size does not depend on the vocabulary.

    Args:
        select: How to choose the prior precision and the noise of means. ``"marginal_likelihood"``: by that of the training rows, in closed
            form. ``"held_out"``: by the likelihood of held-out rows. ``"auto"``: for means, the noise by held-out rows, if there are at
            least 20, since a network that overfits has larger errors there. For logits, the prior by held-out rows, which are then required, since
            the marginal likelihood misleads for a network that fits all its labels. The rest by the marginal likelihood.
        held_out: Rows that the network was not trained on; by default the only validation loader.
        link: How logits change: ``"samples"``, or ``"probit"`` for MacKay's correction.
        num_samples: Number of draws of the weights: rows of logits, and functions of :func:`~lightning_uq.active_learning.as_botorch_model`.
            For an ensemble in total, rounded up to equal numbers per member.
        seed: Seed of the draws.
        fitting: Arguments of :class:`FeatureCallback`: ``feature_layer``, ``pool``, ``dataloader``, ``weights``, ``name``, ``task``, ``attach`` and
            others.

    Raises:
        InputError: At the start of the training, if the outputs are not those of one linear layer (because of an activation after it, masks, or a
            prior network) or mean something else, such as quantiles or maps; for missing targets or held-out rows; if the sums or the draws would
            need more than 4 GiB.

    Source: MacKay, Neural Computation 4 (1992); Daxberger et al., NeurIPS 2021 (arXiv 2106.14806); Bigi et al., arXiv 2403.02251.

    Example:
        >>> from lightning_uq.tasks import Regression
        >>> network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> x = torch.linspace(-1, 1, 40).unsqueeze(1)
        >>> laplace = FitLaplace(select="marginal_likelihood", task=Regression(head="mean")).fit(network, [(x, x.sin())])
        >>> near, far = laplace.predict(network, torch.tensor([[0.0], [30.0]])).epistemic_variance.flatten()
        >>> bool(near < far)
        True
    """

    score_name = "laplace"
    recalibrates = True
    runs_sharded = True

    def __init__(
        self,
        *,
        select: Select = "auto",
        held_out: Any = None,
        link: Link = "samples",
        num_samples: int = 32,
        seed: int = 0,
        **fitting: Any,
    ) -> None:
        super().__init__(**fitting)
        check_choice("select", select, ("auto", "marginal_likelihood", "held_out"))
        check_choice("link", link, ("samples", "probit"))
        check_integer("num_samples", num_samples, 1)
        if self.features.pool == "positions":
            raise InputError("FitLaplace needs one row of outputs per input, so `pool` cannot be 'positions'.")
        if held_out is not None and select == "marginal_likelihood":
            raise InputError("`held_out` cannot be used with select='marginal_likelihood'. Leave it out.")
        self.select = select
        self.held_out = HeldOutRows(held_out)
        self.link = link
        self.num_samples = num_samples
        self.seed = seed
        self.layer = LastLayerReader(self.features, type(self).__name__)
        self._kind: type[LaplaceOutputs] | None = None  # from the first batch before a training
        self._transform: LaplaceTransform | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a fit depends on."""
        return {**super().settings, "select": self.select}

    # ------------------------------------------------------------------ before the training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for held-out rows before the training, if the fit needs them."""
        self.held_out.forget()
        self._kind = None
        super().on_fit_start(trainer, pl_module)
        is_number = self.logits.task(pl_module).has_numeric_targets
        # The usual kind, if the first batch could not be read.
        kind = self._kind or (Means if is_number else Classes)
        loader = self._held_out_loader(trainer, pl_module, kind)
        if loader is not None and can_be_reread(loader):
            with self.logits.trying():
                self.held_out.try_batch(
                    lambda batch: self._read(pl_module, batch, trainer, None, needs_target=True),
                    pl_module,
                    trainer,
                    loader,
                )
            self.features.reset()

    def check_batch(self, model: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Check that the layer makes the outputs, and that they have a Laplace approximation."""
        outputs, _ = self._read(model, batch, trainer, None)
        self._kind = type(outputs)
        self.features.reset()

    def fits_targets(self, model: nn.Module) -> bool:
        """True for numbers, since their noise is fitted to the targets."""
        return self.logits.task(model).has_numeric_targets

    def check_all_targets(self, model: nn.Module, target: Tensor, outputs: Tensor) -> None:
        """Check that the task accepts every target."""
        check_targets(self.logits, model, target, outputs, f"{type(self).__name__}'s fitting data")

    def preview(self, prediction: Prediction) -> Prediction:
        """A Gaussian instead of means, or draws instead of one row of logits."""
        kind = kind_of(prediction)
        return (
            prediction if kind is None else kind.preview(prediction, self.num_samples if self.link == "samples" else 1)
        )

    # ------------------------------------------------------------------ fitting

    def fit_tensors(self, model: nn.Module, loader: Any, trainer: Trainer | None) -> dict[str, Any]:
        """The posterior of each member."""
        outputs, sums = self._summed(model, loader, trainer, lambda outputs, rows: outputs.sums(rows))
        posteriors = outputs.posteriors(sums, self.layer.weights(model, outputs.rows))
        held_out = self._held_out_loader(trainer, model, type(outputs))
        if held_out is not None:
            exact = self.held_out.exact(held_out, trainer)
            _, sums = self._summed(
                model,
                exact,
                trainer,
                lambda outputs, rows: outputs.held_out_sums(rows, posteriors),
                of_held_out=outputs,
            )
            posteriors = self._chosen(model, outputs, posteriors, sums)
        tensors: dict[str, Any] = {
            "feature_layer": self.features.resolved,
            "outputs": outputs.name,
            "has_bias": self.layer.has_bias(model),
            "num_members": len(posteriors),
            **{name: getattr(self, name) for name in _OF_DRAWS},
            "rows": outputs.rows,
            "shift": outputs.shift,
            "scale": outputs.scale,
        }
        for i, posterior in enumerate(posteriors):
            tensors.update({f"{i}.{key}": value for key, value in posterior._asdict().items()})
        return tensors

    def _chosen(
        self, model: nn.Module, outputs: LaplaceOutputs, posteriors: list[LastLayerPosterior], sums: Sums
    ) -> list[LastLayerPosterior]:
        """The posteriors chosen by held-out rows, if there are enough."""
        fewest = int(sums["known"].min())
        has_choice = self.select == "auto" and outputs.has_noise
        if has_choice and fewest < MIN_HELD_OUT:
            self._report_lack(model, f"there are {fewest} held-out rows, fewer than {MIN_HELD_OUT}")
            return posteriors
        if not fewest:
            raise InputError(
                f"{self.held_out.where} must have a known value of each target, but one target is missing in all rows."
            )
        return outputs.chosen(posteriors, sums, keeps_prior=has_choice)

    def _held_out_loader(self, trainer: Trainer | None, model: nn.Module, kind: type[LaplaceOutputs]) -> Any:
        """The loader of held-out rows; None if they are not used, or the marginal likelihood can replace them.

        Raises:
            InputError: Held-out rows are needed, but there are none.
        """
        if self.select == "marginal_likelihood" or not (self.select == "held_out" or self._reads_held_out(kind)):
            return None
        loader, reason = self.held_out.find(trainer)
        if loader is None and (self.select == "held_out" or kind.has_logits):
            raise InputError(
                f"FitLaplace needs rows that the network was not trained on{'' if self.select == 'held_out' else ' to choose the prior of logits'}"
                f", but {reason}. Pass argument `held_out`, or `select='marginal_likelihood'`."
            )
        if loader is None:
            self._report_lack(model, reason)
        return loader

    @staticmethod
    def _reads_held_out(kind: type[LaplaceOutputs]) -> bool:
        """Whether ``select="auto"`` reads held-out rows."""
        return kind.has_noise or kind.has_logits

    def _report_lack(self, model: nn.Module, reason: str) -> None:
        report_guess(
            f"FitLaplace fits the noise to the training rows, by their marginal likelihood: {reason}. Networks that overfit have larger "
            "errors on other rows. Pass other rows as `held_out`, or accept this with `select='marginal_likelihood'`.",
            model,
        )

    def _summed(
        self,
        model: nn.Module,
        loader: Any,
        trainer: Trainer | None,
        of_rows: Callable[[LaplaceOutputs, LastLayerRows], Sums],
        of_held_out: LaplaceOutputs | None = None,
    ) -> tuple[LaplaceOutputs, Sums]:
        """The kind of outputs, and sums over the rows of a loader on all ranks, on the CPU. A collective."""
        outputs, total = of_held_out, Sums()
        with raising_on_all_ranks(trainer):
            for raw in loader:
                batch = to_device(raw, model, trainer)
                outputs, rows = self._read(model, batch, trainer, outputs, needs_target=of_held_out is not None)
                for name, value in of_rows(outputs, rows).items():
                    total[name] = total[name] + value.cpu() if name in total else value.cpu()
        own = {name: value.shape for name, value in total.items()} or None
        shared: list[Any] = first_of_ranks([own, outputs, self.features.resolved], trainer)
        shapes, outputs, layer = shared  # a rank without rows contributes zeros
        if shapes is None or outputs is None:
            what = "FitLaplace's fitting data are" if of_held_out is None else f"{self.held_out.where} are"
            raise InputError(f"{what} empty.")
        self.features.reset(layer)
        if trainer is not None and trainer.world_size > 1:
            for name in sorted(shapes):
                zeros = torch.zeros(shapes[name], dtype=torch.float64)
                total[name] = sum_of_ranks(total.get(name, zeros), trainer)
        return outputs, total

    def _read(
        self,
        model: nn.Module,
        batch: Any,
        trainer: Trainer | None,
        outputs: LaplaceOutputs | None,
        *,
        needs_target: bool = False,
    ) -> tuple[LaplaceOutputs, LastLayerRows]:
        """A batch at the last layer, and the kind of its outputs, which is ``outputs`` if known."""
        rows = self.layer(model, batch, trainer, is_first=outputs is None)
        if outputs is None:
            outputs = self._outputs_of(model, rows)
        if needs_target or outputs.needs_target:
            where = f"{type(self).__name__}'s fitting data"
            target = target_of(self.logits, model, batch, where)
            check_targets(self.logits, model, target, rows.raw, where)
            target = self.logits.task(model).aligned(target, rows.raw[0]).to(rows.features.device)
            is_number = target.is_floating_point() or not self.logits.task(model).has_classes
            rows = replace(rows, target=to_float64(target) if is_number else target)
        return outputs, rows

    def _outputs_of(self, model: nn.Module, rows: LastLayerRows) -> LaplaceOutputs:
        """The kind of outputs.

        Raises:
            InputError: They have no Laplace approximation here.
        """
        kind = kind_of(rows.prediction, rows.outputs.shape[2])
        if kind is None:
            raise InputError(
                f"FitLaplace supports outputs that are means, means and variances, or logits of classes or labels, with one row per input, but "
                f"{describe(self.logits.task(model))} makes a {type(rows.prediction).__name__} of them."
            )
        (members, _, num_features), num = rows.features.shape, rows.outputs.shape[2]
        sums = 8 * members * kind.num_sums(num_features, num)
        is_drawn = kind.has_logits and self.link == "samples"
        draws = 8 * members * draws_each(self.num_samples, members) * num_features * num if is_drawn else 0
        if max(sums, draws) > MAX_BYTES:
            what = "the second moments" if sums >= draws else "the draws of the weights"
            other = "" if sums >= draws else ", or `link='probit'`, which draws nothing"
            raise InputError(
                f"FitLaplace would need {max(sums, draws) / 2**30:.3g} GiB for {what} of {num_features} features and {num} outputs of "
                f"{members} networks, more than {MAX_BYTES / 2**30:.3g} GiB. Pass a `predict_fn` that returns only the outputs that matter, such as "
                f"the logits of a few answers of a language model{other}."
            )
        if self.held_out.given is not None and not (self._reads_held_out(kind) or self.select == "held_out"):
            raise InputError(
                f"`held_out` would not be used: for {describe(self.logits.task(model))}, select='auto' chooses the prior by the marginal likelihood. "
                "Leave it out, or pass `select='held_out'`."
            )
        if not isinstance(rows.prediction, NumberPrediction):
            return kind(rows.index, torch.zeros(num, dtype=torch.float64), torch.ones(num, dtype=torch.float64))
        zero = to_float64(rows.raw.new_zeros(1, 1, *rows.raw.shape[2:])).cpu()
        ends = [to_float64(self._means(model, end)).flatten() for end in (zero, zero + 1)]
        return kind(rows.index, ends[0], ends[1] - ends[0])

    def _means(self, model: nn.Module, outputs: Tensor) -> Tensor:
        prediction: Any = self.logits.prediction(model, outputs, to_members=False)
        found: Tensor = prediction.member_mean
        return found

    # ------------------------------------------------------------------ state and use

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "FitLaplace":
        """A callback with a saved state, which draws the same samples as the fit, for :func:`load_fitted`."""
        laplace = cls(**{name: state["tensors"][name] for name in _OF_DRAWS})
        laplace._set(state["tensors"], None)
        return laplace

    def restore_tensors(self, tensors: dict[str, Any] | None) -> None:
        """Build the transform from the fitted tensors."""
        super().restore_tensors(tensors)
        self._transform = None
        if tensors is None:
            return
        fields = LastLayerPosterior._fields
        self._transform = LaplaceTransform(
            LayerFeatures(tensors["feature_layer"], self.features.pool),
            KINDS[tensors["outputs"]](tensors["rows"], tensors["shift"], tensors["scale"]),
            [LastLayerPosterior(*(tensors[f"{i}.{field}"] for field in fields)) for i in range(tensors["num_members"])],
            has_bias=tensors["has_bias"],
            link=self.link,
            num_samples=self.num_samples,
            seed=self.seed,
        )

    def transform(self) -> LaplaceTransform:
        """The transform that adds the uncertainty of the weights to predictions.

        Raises:
            NotFittedError: The callback is not fitted.
        """
        if self._transform is None:
            raise NotFittedError("FitLaplace is not fitted: train with it, or call `fit(model, loader)`.")
        return self._transform

    def feature_scores(self, features: Tensor) -> Tensor:
        """The score [B] of inputs with features [M, B, D]: see the class."""
        return self.transform().score(features)

    @torch.no_grad()
    def predict(self, model: nn.Module, x: Any) -> Prediction:
        """The prediction for inputs or a batch, without a Trainer.

        Raises:
            NotFittedError: The callback is not fitted, or was fitted on other weights than those of ``model``.
            NotFiniteError: An input row holds NaN or infinity, unless ``nonfinite="inf"``.
        """
        self.check_fitted(model)
        with evaluating(model):
            batch = to_device(x, model)
            return transformed_prediction(model, batch, self.logits, [self.transform()], self.nonfinite)
