"""Where a network's features are: the input of a layer, found by name or by what feeds the output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.networks.calling import call_network

OUTPUT = "<output>"
"""Among the layers of :class:`FeatureTap`: the network's own output."""


def pooled(x: Tensor) -> Tensor:
    """Features [B, D]: further axes, as a convolution's [B, D, H, W], are averaged; half precision is upcast to float32."""
    x = x.flatten(2).mean(2) if x.ndim > 2 else x
    return upcast(x)


def last_linear(network: nn.Module, run: Callable[[], Any], argument: str = "feature_layer") -> str:
    """Name of the linear layer whose output reaches the network's without passing another linear layer.

    Every linear layer's output is cut off from what lies before it; those that the gradient of the output then still
    reaches feed it directly. Two heads on one input (a mean and a variance) count as one.

    Args:
        network: The network that is looked through.
        run: Calls it on a batch, and gives its output.
        argument: The caller's argument that an error names.

    Raises:
        InputError: None does, or several with different inputs.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> last_linear(network, lambda: network(torch.zeros(1, 2)))
        '2'
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
            f"`{argument}='auto'` needs a linear layer that feeds the output of {type(network).__name__}, but there is "
            "none. Name the layer whose input holds the features."
        )
    if any(x.data_ptr() != feeding[-1][1].data_ptr() for _, x in feeding):
        listed = ", ".join(repr(uncompiled(name)) for name, _ in feeding)
        raise InputError(
            f"Several linear layers with different inputs feed the output of {type(network).__name__}: {listed}. Name one "
            f"as `{argument}`."
        )
    return uncompiled(feeding[-1][0])


def traced_last_linear(network: nn.Module) -> tuple[str, int | None] | None:
    """What :func:`last_linear` finds, without data, where torch.fx can trace the network; else None.

    Returns:
        The layer's name, and the size of the network's output where that is the layer's own.
    """
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception:  # what cannot be traced raises anything at all; such a network waits for its first batch
        return None
    output = next(node for node in graph.nodes if node.op == "output")
    feeding: dict[str, fx.Node] = {}
    seen: set[fx.Node] = set()
    waiting = list(output.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), nn.Linear):
            feeding[str(node.target)] = node
        else:
            waiting.extend(node.all_input_nodes)
    if len({node.args[0] for node in feeding.values()}) != 1:
        return None
    name, node = next(iter(feeding.items()))
    own = node is output.args[0]
    return uncompiled(name), network.get_submodule(name).out_features if own else None  # type: ignore[return-value]


def uncompiled(name: str) -> str:
    """A module's path without what ``torch.compile`` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def submodule(network: nn.Module, name: str, argument: str = "feature_layer") -> nn.Module:
    """The submodule of that name; names are those of the uncompiled network.

    Raises:
        InputError: There is none; the message lists some.
    """
    # Of a compiled layer and the one inside, which share a name, the inner one is last, and is the one that is run.
    modules = {uncompiled(path): module for path, module in network.named_modules()}
    if name not in modules:
        linear = [path for path, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
        raise InputError(
            f"`{argument}` must be 'auto' or the name of a submodule of {type(network).__name__}, but "
            f"it is {name!r}. Its linear layers and convolutions are: {', '.join(linear[-8:])}."
        )
    found: nn.Module = modules[name]
    return found


@contextmanager
def input_of(module: nn.Module) -> Iterator[list[Any]]:
    """The first argument of every call of ``module`` inside the context: a tensor, or a nest of them."""
    caught: list[Any] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args[0]))

    hook = module.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()


class FeatureTap:
    """Runs a network and gives, beside its output, the inputs of some of its layers, detached.

    Its hooks are set once, so that what ``torch.compile`` or ``torch.export`` makes of the network afterwards holds them.

    Args:
        network: The network.
        layers: Names of its layers; :data:`OUTPUT` stands for the network's own output.

    Raises:
        InputError: There is no such layer, or the forward pass does not call it.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> output, features = FeatureTap(network, ["2", OUTPUT]).run(network, torch.zeros(5, 2))
        >>> [f.shape for f in features]
        [torch.Size([5, 4]), torch.Size([5, 3])]
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        self.caught: dict[str, Tensor] | None = None
        for name in self.layers:
            if name != OUTPUT:
                submodule(network, name, "feature_layers").register_forward_pre_hook(_Catch(self, name))

    def run(self, network: nn.Module, x: Any) -> tuple[Any, list[Tensor]]:
        """The network's output, and the layers' inputs [B, D], in order."""
        self.caught = {}
        try:
            output = call_network(network, x)
            caught = self.caught
        finally:
            self.caught = None
        if OUTPUT in self.layers and isinstance(output, Tensor):
            caught[OUTPUT] = output.detach()
        missing = [name for name in self.layers if name not in caught]
        if missing:
            raise InputError(
                f"`feature_layers` must name layers that the network runs, but {missing[0]!r} was not "
                "called in its forward pass. A network that was compiled, and called, before it came here skips new hooks: "
                "compile the whole instead."
            )
        return output, [pooled(caught[name]) for name in self.layers]


class _Catch:
    """A hook that is copied with the network it hangs on."""

    def __init__(self, tap: FeatureTap, name: str) -> None:
        self.tap = tap
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.tap.caught is not None:
            self.tap.caught[self.name] = args[0].detach()
