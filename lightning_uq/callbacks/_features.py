"""The features that a density is fitted on: the input of a layer, found by name or by what feeds the output."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.callbacks._running import LogitReader, is_uncertainty_module
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.networks.calling import call_network
from lightning_uq.networks.features import input_of, last_linear, pooled, submodule


class FeatureReader:
    """Features [M, B, D] of a batch: the input of ``layer`` in each of the M members (one, for a plain network).

    Those of a network with MC-dropout are of the network without masks.

    Features with more axes, as a convolution's [B, D, H, W], are averaged over them. What ``torch.compile`` compiled runs
    eagerly here, for a compiled graph skips hooks that are added after its first call.

    Args:
        layer: Name of a submodule as ``named_modules`` gives it, or ``"auto"``: the linear layer that feeds the output
            through no other linear layer.
        logits: How the model is called, and its batches unpacked.

    Attributes:
        resolved: The layer's name, once it is known.
    """

    def __init__(self, layer: str, logits: LogitReader) -> None:
        self.layer = layer
        self.logits = logits
        self.resolved: str | None = None
        self.reset()

    def reset(self, resolved: str | None = None) -> None:
        """Take the layer that a fit found, or, without it, be as new: another network's may be another."""
        self.resolved = resolved or (None if self.layer == "auto" else self.layer)

    def __call__(self, model: nn.Module, batch: Any, trainer: Trainer | None = None) -> Tensor:
        """Features [M, B, D] of a batch; half precision is upcast to float32."""
        if self.resolved is None:
            source = _source(model)
            if source is None:
                self.resolved = last_linear(model, lambda: self.logits(model, batch, trainer, check=False))
            else:
                network = source.feature_networks()[0]
                with input_of(source) as inputs:
                    self.logits(model, batch, trainer, check=False)
                # A `predict_fn` may call the inner network by itself.
                x = inputs[-1] if inputs else self.logits.unpack(model, batch)[0]
                self.resolved = last_linear(network, lambda: _run(network, x, trainer))
        with self.recording(model, trainer) as features:
            self.logits(model, batch, trainer, check=False)
        return features()

    @contextmanager
    def recording(self, model: nn.Module, trainer: Trainer | None = None) -> Iterator[Callable[[], Tensor]]:
        """A context around one call of the model; the function that it yields then gives the features [M, B, D]."""
        if self.resolved is None:
            raise NotFittedError("The feature layer is not known before a fit.")
        layer = self.resolved
        trainer = getattr(model, "_trainer", None) if trainer is None else trainer
        source = _source(model)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if source is not None and not source.shows_features:
                inputs = stack.enter_context(input_of(source))

                def features() -> Tensor:
                    return torch.stack([self._alone(member, inputs[-1], trainer) for member in inner_networks(model)])
            else:
                records = [stack.enter_context(input_of(submodule(n, layer))) for n in inner_networks(model)]

                def features() -> Tensor:
                    if not all(records):
                        raise InputError(
                            "Expected argument `feature_layer` to name a layer that the network runs, but "
                            f"{layer!r} was not called in its forward pass."
                        )
                    return torch.stack([pooled(record[-1]) for record in records])

            yield features

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layer whose input is read, in each of the M members."""
        if self.resolved is None:
            raise NotFittedError("The feature layer is not known before a fit.")
        return [submodule(network, self.resolved) for network in inner_networks(model)]

    def _alone(self, member: nn.Module, x: Any, trainer: Trainer | None) -> Tensor:
        assert self.resolved is not None
        with input_of(submodule(member, self.resolved)) as record:
            _run(member, x, trainer)
        return pooled(record[-1])


def inner_networks(model: nn.Module) -> list[nn.Module]:
    """The networks whose layers hold features: those that one of our modules names, or the model itself."""
    source = _source(model)
    return [model] if source is None else source.feature_networks()


def _source(model: nn.Module) -> EpistemicNetwork | None:
    """The network, inside of one of our modules, that calls the networks with the features; None for another model."""
    if not is_uncertainty_module(model):
        return None
    network: Any = model.network
    source: EpistemicNetwork = network.feature_source
    return source


def _run(network: nn.Module, x: Any, trainer: Trainer | None) -> Any:
    if trainer is None:
        return call_network(network, x)
    with trainer.precision_plugin.forward_context():
        return call_network(network, x)
