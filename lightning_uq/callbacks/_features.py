"""The features that a density is fitted on: the input of a layer, found by name or by what feeds the output."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_uq.callbacks._running import LogitReader, is_uncertainty_module
from lightning_uq.errors import InputError, NotFittedError, UnsupportedError
from lightning_uq.networks.base import DeterministicNetwork
from lightning_uq.networks.ensemble import EnsembleNetwork


class FeatureReader:
    """Features [M, B, D] of a batch: the input of ``layer`` in each of the M members (one, for a plain network).

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
            x, _ = self.logits.unpack(model, batch)
            network = _inner_networks(model)[0]
            if network is model:
                self.resolved = last_linear(model, lambda: self.logits(model, batch, trainer, check=False))
            else:
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
        ensemble = getattr(model, "network", None)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if (
                isinstance(ensemble, EnsembleNetwork) and ensemble.is_stacked
            ):  # members that run at once have no layers of their own: they run once more, each by itself
                inputs = stack.enter_context(_input_of(ensemble))

                def features() -> Tensor:
                    return torch.stack([self._alone(member, inputs[-1], trainer) for member in _inner_networks(model)])
            else:
                records = [stack.enter_context(_input_of(_submodule(n, layer))) for n in _inner_networks(model)]

                def features() -> Tensor:
                    if not all(records):
                        raise InputError(
                            "Expected argument `feature_layer` to name a layer that the network runs, but "
                            f"{layer!r} was not called in its forward pass."
                        )
                    return torch.stack([_as_features(record[-1]) for record in records])

            yield features

    def _alone(self, member: nn.Module, x: Tensor, trainer: Trainer | None) -> Tensor:
        assert self.resolved is not None
        with _input_of(_submodule(member, self.resolved)) as record:
            _run(member, x, trainer)
        return _as_features(record[-1])


def _inner_networks(model: nn.Module) -> list[nn.Module]:
    """The networks that have features of their own: an ensemble's members, our modules' network, or the model itself."""
    network = model.network if is_uncertainty_module(model) else None
    if isinstance(network, EnsembleNetwork):
        return [network.member(i) for i in range(network.num_indices)]
    if isinstance(network, DeterministicNetwork):
        return [network.network]
    if network is None:
        return [model]
    base = getattr(network, "base", None)
    if not isinstance(base, nn.Module):
        raise UnsupportedError(
            f"{type(network).__name__} names no `base` network whose features a density could be of."
        )
    return [base]


def _as_features(x: Tensor) -> Tensor:
    x = x.flatten(2).mean(2) if x.ndim > 2 else x
    return x if x.dtype == torch.float64 else x.float()


def last_linear(network: nn.Module, run: Callable[[], Any]) -> str:
    """Name of the linear layer whose output reaches the network's without passing another linear layer.

    Every linear layer's output is cut off from what lies before it; those that the gradient of the output then still
    reaches feed it directly. Two heads on one input (a mean and a variance) count as one.

    Raises:
        InputError: None does, or several with different inputs.
    """
    found: list[tuple[str, Tensor, Tensor]] = []
    names: dict[nn.Module, str] = {m: name for name, m in network.named_modules() if isinstance(m, nn.Linear)}

    def cut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        found.append((names[module], args[0], leaf))
        return leaf.clone()

    feeding: list[tuple[str, Tensor]] = []
    hooks = [module.register_forward_hook(cut) for module in names]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            leaves = torch.utils._pytree.tree_leaves(run())
            outputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
            if found and outputs:
                total = torch.stack([t.float().sum() for t in outputs]).sum()
                gradients = torch.autograd.grad(total, [leaf for _, _, leaf in found], allow_unused=True)
                feeding = [(n, x) for (n, x, _), gradient in zip(found, gradients, strict=True) if gradient is not None]
    finally:
        for hook in hooks:
            hook.remove()
    if not feeding:
        raise InputError(
            f"Expected a linear layer that feeds the output of {type(network).__name__}, for `feature_layer='auto'`, but "
            "found none. Name the layer whose input holds the features."
        )
    if any(x.data_ptr() != feeding[-1][1].data_ptr() for _, x in feeding):
        listed = ", ".join(repr(_uncompiled(name)) for name, _ in feeding)
        raise InputError(
            f"Several linear layers with different inputs feed the output of {type(network).__name__}: {listed}. Name one "
            "as `feature_layer`."
        )
    return _uncompiled(feeding[-1][0])


def _uncompiled(name: str) -> str:
    """A module's path without what ``torch.compile`` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _submodule(network: nn.Module, name: str) -> nn.Module:
    # Of a compiled layer and the one inside, which share a name, the inner one is last, and is the one that is run.
    modules = {_uncompiled(path): module for path, module in network.named_modules()}
    if name not in modules:
        linear = [path for path, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
        raise InputError(
            f"Expected argument `feature_layer` to be 'auto' or the name of a submodule of {type(network).__name__}, but "
            f"got {name!r}. Its linear layers and convolutions are: {', '.join(linear[-8:])}."
        )
    found: nn.Module = modules[name]
    return found


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of every call of ``module`` inside the context."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0].detach())

    hook = module.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()


def _run(network: nn.Module, x: Any, trainer: Trainer | None) -> Any:
    if trainer is None:
        return network(x)
    with trainer.precision_plugin.forward_context():
        return network(x)
