"""Reads the features for a density: the input of a layer, given by name or found as the one that feeds the output."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq._lightning import trainer_of
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.guessing import report_guess
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.features import features_at, input_of, last_layer, submodule
from lightning_uq.networks.pooling import Pool, check_pool
from lightning_uq.running.logits import LogitReader, is_uncertainty_module


class LayerFeatures:
    """Features [M, B, D] at one layer: its input in each of the M members of a model (one for a plain network).

    An input with more axes than [B, D] is pooled: see :func:`~lightning_uq.networks.pooling.pool_features`. A network with
    MC-dropout runs without masks. Compiled networks run eagerly, since a compiled graph skips hooks that
    are added after its first call.

    Args:
        layer: Name of a submodule as in ``named_modules``.
        pool: How its input is pooled.
    """

    def __init__(self, layer: str, pool: Pool | None = None) -> None:
        self.layer = layer
        self.pool = pool
        self._members: tuple[Any, list[nn.Module]] | None = None

    @contextmanager
    def recording(
        self, model: nn.Module, trainer: Trainer | None = None, *, detach: bool = True
    ) -> Iterator[Callable[[], Tensor]]:
        """A context for one call of the model; the function that it yields then returns the features [M, B, D].

        They are detached unless ``detach`` is False.
        """
        trainer = trainer_of(model) if trainer is None else trainer
        source = _source(model)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if source is not None and not source.shows_features:
                inputs = stack.enter_context(input_of(source, detach=detach))

                def features() -> Tensor:
                    return torch.stack(
                        [self._alone(member, inputs[-1], trainer, source, detach) for member in self.networks(model)]
                    )
            else:
                networks = self.networks(model)
                records = [
                    stack.enter_context(features_at(one, self.layer, self.pool, detach=detach)) for one in networks
                ]

                def features() -> Tensor:
                    if not all(records):
                        raise InputError(
                            f"The network's forward pass does not call layer {self.layer!r}. Pass the name of another layer as "
                            "`feature_layer`."
                        )
                    return torch.stack([record[-1] for record in records])

            yield features

    def networks(self, model: nn.Module) -> list[nn.Module]:
        """The M networks. Those of a stacked ensemble are built once over its own tensors, so they share later changes."""
        source = _source(model)
        if source is None or not source.is_stacked:
            return inner_networks(model)
        # The stored members keep the tensors alive, so no other tensor can have their addresses.
        tensors = (*source.parameters(), *source.buffers())
        key = source.training, [(t.data_ptr(), t.dtype, t.shape) for t in tensors]
        if self._members is None or self._members[0] != key:
            with torch.inference_mode(False):  # a later batch may need gradients
                self._members = key, inner_networks(model)
        return self._members[1]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layer whose input is read, in each of the M members."""
        return [submodule(network, self.layer) for network in self.networks(model)]

    def release(self) -> None:
        """Free the members of a stacked ensemble."""
        self._members = None

    def _alone(
        self, member: nn.Module, x: Any, trainer: Trainer | None, source: EpistemicNetwork, detach: bool
    ) -> Tensor:
        with features_at(member, self.layer, self.pool, detach=detach) as record:
            _run(member, x, trainer, source)
        return record[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": None}


class FeatureReader:
    """Features [M, B, D] of a batch, from a layer that is given or found.

    Args:
        layer: Name of a submodule, or ``"auto"``: the linear layer or convolution that feeds the output directly.
        logits: Reader of the model's outputs and batches.
        pool: How an input with more axes than [B, D] is pooled.

    Attributes:
        found: The features at the layer; None before it is known.

    Raises:
        InputError: ``pool`` is unknown.
    """

    def __init__(self, layer: str, logits: LogitReader, pool: Pool | None = None) -> None:
        check_pool(pool)
        self.pool = pool
        self.layer = layer
        self.logits = logits
        self.found: LayerFeatures | None = None
        self.reset()

    def reset(self, resolved: str | None = None) -> None:
        """Set the layer that a fit found, or forget it, since another network's layer may differ."""
        named = None if self.layer == "auto" else self.layer
        name = named if resolved is None else resolved  # "" is the model itself
        self.found = None if name is None else LayerFeatures(name, self.pool)

    @property
    def resolved(self) -> str | None:
        """The layer's name, once it is known."""
        return None if self.found is None else self.found.layer

    @property
    def at_layer(self) -> LayerFeatures:
        """The features at the layer.

        Raises:
            NotFittedError: The layer is not known yet.
        """
        if self.found is None:
            raise NotFittedError("The feature layer is unknown before a fit.")
        return self.found

    def __call__(self, model: nn.Module, batch: Any, trainer: Trainer | None = None) -> Tensor:
        """Features [M, B, D] of a batch; half precision is upcast to float32.

        Raises:
            InputError: The layer is not found or not called, its input needs another ``pool``, or the features do not have one
                row per sample.
        """
        if self.found is None:
            self.found = self._find(model, batch, trainer)
            report_guess(
                f"The features of {type(model).__name__} are the input of layer {self.resolved!r}, because that layer feeds the "
                f"output. To use another layer, pass its name as `feature_layer`.",
                model,
            )
        with self.at_layer.recording(model, trainer) as recorded:
            _, num_rows = self.logits.outputs_if_any(model, batch, trainer)
        features = recorded()
        if num_rows not in (None, features.shape[1]):
            raise InputError(
                f"The features at layer {self.resolved!r} must have one row per sample, but there are {features.shape[1]} rows for "
                f"{num_rows} samples. Axis 0 of the layer's input must be the batch. Pass the name of another layer, or "
                "a function `pool(x, mask)` that returns features [B, D] as `pool`."
            )
        return features

    def recording(
        self, model: nn.Module, trainer: Trainer | None = None
    ) -> AbstractContextManager[Callable[[], Tensor]]:
        """See :meth:`LayerFeatures.recording`."""
        return self.at_layer.recording(model, trainer)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layer whose input is read, in each of the M members."""
        return self.at_layer.layers(model)

    def _find(self, model: nn.Module, batch: Any, trainer: Trainer | None) -> LayerFeatures:
        found = LayerFeatures("", self.pool)
        source = _source(model)
        if source is None:
            found.layer = last_layer(model, lambda: self.logits.run(model, batch, trainer))
            return found
        network = found.networks(model)[0]
        with input_of(source) as inputs:
            self.logits.run(model, batch, trainer)
        # A `predict_fn` may call the inner network directly.
        x = inputs[-1] if inputs else self.logits.unpack(model, batch)[0]
        found.layer = last_layer(network, lambda: source.read_output(_run(network, x, trainer, source)))
        return found


def inner_networks(model: nn.Module) -> list[nn.Module]:
    """The networks whose layers hold features: those that a module of this package names, or the model itself."""
    source = _source(model)
    return [model] if source is None else source.feature_networks()


def _source(model: nn.Module) -> EpistemicNetwork | None:
    """The network, inside a module of this package, that calls the networks with the features; None for another model."""
    if not is_uncertainty_module(model):
        return None
    network: Any = model.network
    source: EpistemicNetwork = network.feature_source
    return source


def _run(network: nn.Module, x: Any, trainer: Trainer | None, source: EpistemicNetwork) -> Any:
    """The output of a network inside ``source``, called like ``source`` calls it."""
    if trainer is None:
        return source.read_output.raw(network, x)
    with trainer.precision_plugin.forward_context():
        return source.read_output.raw(network, x)
