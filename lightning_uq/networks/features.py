"""Locates a network's features: the input of a layer, given by name or found as the one that feeds the output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from lightning_uq.errors import InputError
from lightning_uq.functional.precision import upcast
from lightning_uq.networks.calling import call_network
from lightning_uq.networks.padding_mask import PaddingMask
from lightning_uq.networks.pooling import Pool, pool_features

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The layers among which ``"auto"`` searches for the one that feeds the output."""

OUTPUT = "<output>"
"""A layer name in :class:`FeatureTap` for the network's own output."""


def last_layer(network: nn.Module, run: Callable[[], Any], argument: str = "feature_layer") -> str:
    """The name of the linear layer or convolution whose output reaches the network's without passing through another one.

    The output of every such layer is detached from its inputs. Layers that the gradient of the output still
    reaches feed it directly. Two heads on the same input (a mean and a variance) count as one. An input is one tensor, unchanged
    between the calls; a slice of it, or its values before an in-place operation, are another input.

    Args:
        network: The network to search.
        run: Calls it on a batch and returns its output.
        argument: Name of the caller's argument, for errors.

    Raises:
        InputError: No layer does, or several layers with different inputs do.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> last_layer(network, lambda: network(torch.zeros(1, 2)))
        '2'
    """
    found: list[tuple[str, _Input, Tensor]] = []
    names: dict[nn.Module, str] = {m: name for name, m in network.named_modules() if isinstance(m, LAYERS)}

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        found.append((names[module], _Input(_first(args, kwargs)), leaf))
        return leaf.clone()

    feeding: list[tuple[str, _Input]] = []
    hooks = [module.register_forward_hook(cut, with_kwargs=True) for module in names]
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
            f"`{argument}='auto'` needs a linear layer or a convolution that feeds the output of {type(network).__name__}, but "
            "there is none. Pass the name of the layer whose input holds the features."
        )
    if any(x.identity != feeding[-1][1].identity for _, x in feeding):
        listed = ", ".join(repr(uncompiled(name)) for name, _ in feeding)
        raise InputError(
            f"Several layers with different inputs feed the output of {type(network).__name__}: {listed}. Pass the name of one "
            f"as `{argument}`."
        )
    return uncompiled(feeding[-1][0])


class _Input:
    """The input of a layer in one call. The tensor is kept alive, so that no other tensor gets its memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        version = None if x.is_inference() else x._version  # counts in-place operations
        self.identity = (x.data_ptr(), x.shape, x.stride(), x.dtype, version)


def traced_last_layer(network: nn.Module) -> tuple[str, int | None] | None:
    """The result of :func:`last_layer` without data, if torch.fx can trace the network, and None otherwise.

    Returns:
        The layer's name, and the size of the network's output if that is the layer's own output.
    """
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception:  # tracing may raise anything; the network then waits for its first batch
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
        if node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), LAYERS):
            feeding[str(node.target)] = node
        else:
            waiting.extend(node.all_input_nodes)
    if len({_first(node.args, node.kwargs) for node in feeding.values()}) != 1:
        return None
    name, node = next(iter(feeding.items()))
    own = node is output.args[0]
    layer: Any = network.get_submodule(name)
    return uncompiled(name), (
        layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    ) if own else None


def uncompiled(name: str) -> str:
    """A module's path without the names that ``torch.compile`` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def submodule(network: nn.Module, name: str, argument: str = "feature_layer") -> nn.Module:
    """The submodule with this name; names are those of the uncompiled network.

    Raises:
        InputError: There is no such submodule; the message lists some.
    """
    # A compiled layer and its inner layer share a name. The inner layer comes last, and is the one that runs.
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
def input_of(module: nn.Module, *, detach: bool = True) -> Iterator[list[Any]]:
    """The first argument of every call of ``module`` inside the context: a tensor, or a nested structure of tensors. They are detached unless ``detach`` is False."""
    caught: list[Any] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(torch.utils._pytree.tree_map(lambda leaf: detached(leaf, detach), _first(args, kwargs)))

    hook = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()


@contextmanager
def features_at(
    network: nn.Module, layer: str, pool: Pool | None = None, *, detach: bool = True
) -> Iterator[list[Tensor]]:
    """The features [B, D] for every call of a layer inside the context: its pooled input, detached unless ``detach`` is False.

    Raises:
        InputError: There is no such layer, or :func:`~lightning_uq.networks.pooling.pool_features` raises it.
    """
    module = submodule(network, layer)
    caught: list[Tensor] = []
    mask = PaddingMask()

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(pool_features(detached(_first(args, kwargs), detach), module, pool, mask.tokens, name=layer))

    # The mask's hooks come first, since the layer may be the network itself.
    hooks = [*_watched(mask, network, pool), module.register_forward_pre_hook(catch, with_kwargs=True)]
    mask.start()
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


class FeatureTap:
    """Runs a network and returns its output together with the inputs of some of its layers.

    Its hooks are set once, so that later results of ``torch.compile`` and ``torch.export`` include them.

    Args:
        network: The network.
        layers: Names of its layers; :data:`OUTPUT` is the network's own output.
        pool: How an input with more axes than [B, D] is pooled: see :func:`~lightning_uq.networks.pooling.pool_features`.

    Raises:
        InputError: There is no such layer, or the forward pass does not call it.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> output, features = FeatureTap(network, ["2", OUTPUT]).run(network, torch.zeros(5, 2))
        >>> [f.shape for f in features]
        [torch.Size([5, 4]), torch.Size([5, 3])]
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], pool: Pool | None = None) -> None:
        self.layers = list(layers)
        self.pool = pool
        self.mask = PaddingMask()
        self.caught: dict[str, Tensor] | None = None
        self.detach = True
        _watched(self.mask, network, pool)
        for name in self.layers:
            if name != OUTPUT:
                submodule(network, name, "feature_layers").register_forward_pre_hook(
                    _Catch(self, name), with_kwargs=True
                )

    def run(
        self, network: nn.Module, x: Any, call: Callable[[nn.Module, Any], Any] = call_network, *, detach: bool = True
    ) -> tuple[Any, list[Tensor]]:
        """The result of ``call(network, x)``, and the layers' features [B, D], in order. The output as features is not pooled.

        The features are detached unless ``detach`` is False.
        """
        self.detach = detach
        output, caught = self._run(network, x, call)
        if len(caught) < len(self.layers) and not torch.compiler.is_compiling():
            # A network that was compiled and called before the hooks were set runs without them.
            with torch.compiler.set_stance("force_eager"):
                output, caught = self._run(network, x, call)
        missing = [name for name in self.layers if name not in caught]
        if missing:
            raise InputError(
                f"`feature_layers` must name layers that the network runs, but {missing[0]!r} was not called in its forward pass."
            )
        return output, [caught[name] for name in self.layers]

    def _run(self, network: nn.Module, x: Any, call: Callable[[nn.Module, Any], Any]) -> tuple[Any, dict[str, Tensor]]:
        """The network's return value, and the features by layer."""
        self.caught = {}
        self.mask.start()
        try:
            output = call(network, x)
            caught = self.caught
            if OUTPUT in self.layers and isinstance(output, Tensor):
                caught[OUTPUT] = upcast(detached(output, self.detach))
        finally:
            self.caught = None
            self.mask.stop()
        return output, caught


class _Catch:
    """A hook that is copied together with its network."""

    def __init__(self, tap: FeatureTap, name: str) -> None:
        self.tap = tap
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap.caught is not None:
            x = detached(_first(args, kwargs), self.tap.detach)
            self.tap.caught[self.name] = pool_features(x, module, self.tap.pool, self.tap.mask.tokens, name=self.name)


def _watched(mask: PaddingMask, network: nn.Module, pool: Pool | None) -> list[RemovableHandle]:
    """The hooks that read the padding mask, if the pooling uses one."""
    return [] if pool in (None, "cls", "positions") else mask.watch(network)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def detached(x: Any, detach: bool = True) -> Any:
    """A tensor without its graph if ``detach`` is True; anything else as it is."""
    return x.detach() if detach and isinstance(x, Tensor) else x
