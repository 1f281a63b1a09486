"""Translate one member's forward pass into one pass over the stacked weights of all members.

:func:`lift` traces one member with ``torch.fx`` and translates the graph into one over lifted tensors: a linear layer
becomes one batched product, an element-wise function does not change, and an axis shifts by one. Operations outside the
tables in ``operations.py`` are rejected.
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_uq.errors import UnsupportedError
from lightning_uq.networks.ensemble.alike import named_tensors
from lightning_uq.networks.ensemble.operations import (
    AXES,
    AXIS_FUNCTIONS,
    ELEMENTWISE,
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_MODULES,
    LIFTED_FUNCTIONS,
    align,
    batch_norm,
    layer_norm,
    linear,
    member_shape,
    reshape,
    rms_norm,
)
from lightning_uq.networks.ensemble.trace import own_name, trace
from lightning_uq.networks.labels import label
from lightning_uq.networks.output import OutputReader
from lightning_uq.networks.priors.members import add_prior


class Program:
    """The forward pass of all members at once: ``program(x[M, ...], tensors)`` with each tensor [M, ...] by name."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        self.module = module
        self.names = tuple(names)

    def __call__(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lifted outputs of lifted inputs."""
        output: Tensor = self.module(x, *[tensors[name] for name in self.names])
        return output


def lift(network: nn.Module, reader: OutputReader) -> Program:
    """Translate ``network``, in its current mode, into one forward pass over stacked tensors.

    Args:
        network: One member; its values are not used.
        reader: Selects the output tensor; a function is traced together with the network.

    Raises:
        UnsupportedError: An operation has no lifted counterpart; the message names it.

    Example:
        >>> program = lift(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), OutputReader())
        >>> program(torch.zeros(4, 5, 2), {"0.weight": torch.zeros(4, 3, 2), "0.bias": torch.zeros(4, 3)}).shape
        torch.Size([4, 5, 3])
    """
    return _Lifter(network, reader).program()


class _Lifter:
    """Translates the graph of one member node by node."""

    def __init__(self, network: nn.Module, reader: OutputReader) -> None:
        self.traced = trace(network, reader)
        self.modules = {f"network.{name}": module for name, module in network.named_modules() if name}
        self.modules["network"] = network
        self.graph = fx.Graph()
        self.kept: dict[str, nn.Module] = {}  # element-wise modules, called as they are
        self.input = self.graph.placeholder("x")
        names = [name for name, _ in named_tensors(network)]
        self.leaves = {f"network.{name}": self.graph.placeholder(f"leaf_{i}") for i, name in enumerate(names)}
        self.env: dict[fx.Node, Any] = {}
        self.sizes: set[fx.Node] = set()  # nodes that hold numbers, not tensors
        self.tuples: set[fx.Node] = set()  # nodes that hold several tensors

    def program(self) -> Program:
        for node in self.traced.nodes:
            self.env[node] = getattr(self, f"_{node.op}")(node)
        used = {name: leaf for name, leaf in self.leaves.items() if leaf.users}
        for leaf in self.leaves.values():
            if not leaf.users:
                self.graph.erase_node(leaf)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target is batch_norm)
        return Program(fx.GraphModule(self.kept, self.graph), [own_name(name) for name in used])

    # One method per kind of node; each returns the node of the new graph.

    def _placeholder(self, node: fx.Node) -> fx.Node:
        return self.input

    def _get_attr(self, node: fx.Node) -> fx.Node:
        leaf = self.leaves.get(str(node.target))
        if leaf is None:
            raise self._refusal("a tensor that is neither a parameter nor a buffer")
        return leaf

    def _output(self, node: fx.Node) -> Any:
        result = node.args[0]
        if self._is_tensor(result):
            return self.graph.output(self.env[result])  # type: ignore[index]
        kind = "several tensors or a size" if isinstance(result, fx.Node) else f"a {type(result).__name__}"
        kind = kind.replace("immutable_", "")  # as fx names its lists and dicts
        raise UnsupportedError(f"the members return {kind}, not one tensor; argument `output` can select it")

    def _call_module(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        module = self.modules[name]
        if len(node.args) != 1 or node.kwargs or not self._is_tensor(node.args[0]):
            raise self._refusal(f"a call of {label(own_name(name), module)} with more than one tensor")
        x = self.env[node.args[0]]  # type: ignore[index]  # just checked to be a node
        weight, bias = self.leaves.get(f"{name}.weight"), self.leaves.get(f"{name}.bias")
        call = self.graph.call_function
        if type(module) is nn.Linear:
            return call(linear, (x, weight, bias))
        if type(module) is nn.LayerNorm:
            return call(layer_norm, (x, module.normalized_shape, weight, bias, module.eps))
        if type(module) is nn.RMSNorm:
            return call(rms_norm, (x, module.normalized_shape, weight, module.eps))
        if type(module) is nn.BatchNorm1d:
            running = [self.leaves.get(f"{name}.{k}") for k in ("running_mean", "running_var", "num_batches_tracked")]
            return call(batch_norm, (x, weight, bias, *running, module.training, module.momentum, module.eps))
        if type(module) is nn.Flatten:
            return call(torch.flatten, (x, _lift_axis(module.start_dim), _lift_axis(module.end_dim)))
        if type(module) in (nn.Softmax, nn.LogSoftmax) and module.dim is not None:
            function = torch.softmax if type(module) is nn.Softmax else torch.log_softmax
            return call(function, (x, _lift_axis(module.dim)))
        if type(module) in ELEMENTWISE_MODULES:
            kept = copy.deepcopy(module)
            if getattr(kept, "inplace", False):
                self._check_overwrite(node, node.args[0])
                kept.inplace = False
            key = f"module_{len(self.kept)}"
            self.kept[key] = kept
            return self.graph.call_module(key, (x,))
        raise self._refusal(label(own_name(name), module))

    def _call_function(self, node: fx.Node) -> Any:
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        call = self.graph.call_function
        if target is operator.getitem:
            return self._getitem(node)
        if target is getattr and args[1] == "shape" and self._is_tensor(args[0]):
            return self._size(call(member_shape, (self._map(args[0]),)), node)
        if target is add_prior:
            return call(add_prior, self._map(args), self._map(kwargs))
        if target in LIFTED_FUNCTIONS and args and self._is_tensor(args[0]):
            return call(LIFTED_FUNCTIONS[target], self._map(args), self._map(kwargs))
        if target in ELEMENTWISE_FUNCTIONS:
            return self._elementwise(node, ELEMENTWISE_FUNCTIONS[target])
        if target is torch.cat and (heads := self._parallel_heads(node)) is not None:
            return heads
        if target in AXIS_FUNCTIONS:
            return self._with_axes(node, AXIS_FUNCTIONS[target])
        if target is getattr:
            raise self._refusal(f"the attribute {args[1]!r} of a tensor")
        raise self._refusal(f"the function {getattr(target, '__name__', target)}")

    def _call_method(self, node: fx.Node) -> Any:
        name, args = str(node.target), node.args
        if self._is_tensor(args[0]):
            x = self.env[args[0]]  # type: ignore[index]
            if name in ("view", "reshape") and torch.dtype not in map(type, args):
                return self.graph.call_function(reshape, (x, *self._map(args[1:])), self._map(dict(node.kwargs)))
            if name == "size":
                shape = self.graph.call_function(member_shape, (x,))
                dims = [*args[1:], *node.kwargs.values()]
                return self._size(self.graph.call_function(operator.getitem, (shape, *dims)) if dims else shape, node)
            if name in ELEMENTWISE:
                return self._elementwise(node, name)
            if name in AXES:
                return self._with_axes(node, name)
        raise self._refusal(f"the method {name}")

    def _elementwise(self, node: fx.Node, name: str) -> fx.Node:
        args, kwargs = list(self._map(node.args)), dict(self._map(node.kwargs))
        if all(not isinstance(a, fx.Node) or a in self.sizes for a in node.args):  # arithmetic on sizes
            return self._size(self.graph.create_node(node.op, node.target, tuple(args), kwargs), node)
        if kwargs.pop("inplace", False):
            self._check_overwrite(node, node.args[0])
        if any(arg in self.tuples for arg in node.args if isinstance(arg, fx.Node)):
            raise self._refusal(f"{name} of a tuple of tensors")
        if any(isinstance(value, fx.Node) for value in kwargs.values()):
            raise self._refusal(f"{name} with a tensor as a keyword argument")
        where = [i for i, arg in enumerate(node.args) if self._is_tensor(arg)]
        if len(where) > 1:
            aligned = self.graph.call_function(align, tuple(args[i] for i in where))
            for k, i in enumerate(where):
                args[i] = self.graph.call_function(operator.getitem, (aligned, k))
        return self.graph.create_node(node.op, node.target, tuple(args), kwargs)

    def _with_axes(self, node: fx.Node, name: str) -> fx.Node:
        args, kwargs = list(node.args), dict(node.kwargs)
        if "axis" in kwargs:
            raise self._refusal(f"{name} with `axis` instead of `dim`")
        for position, keyword, default in AXES[name]:
            inside = position < len(args)
            axis: Any = args[position] if inside else kwargs.get(keyword, default)
            axes = axis if isinstance(axis, list | tuple) else (axis,)
            if not all(type(a) is int for a in axes):
                raise self._refusal(f"{name} without a fixed `{keyword}`")
            lifted = type(axes)(map(_lift_axis, axes)) if axes is axis else _lift_axis(axis)
            if inside:
                args[position] = lifted
            else:
                kwargs[keyword] = lifted
        new = self.graph.create_node(node.op, node.target, self._map(tuple(args)), self._map(kwargs))
        if name in ("chunk", "split"):
            self.tuples.add(node)
        return new

    def _parallel_heads(self, node: fx.Node) -> fx.Node | None:
        """Linear heads on the same input whose outputs are concatenated, as one product with the concatenated weights; else None."""
        heads: Any = node.args[0] if node.args else ()
        if not heads or not isinstance(heads, list | tuple) or [*node.args[1:], *node.kwargs.values()] != [-1]:
            return None
        for head in heads:
            if not (
                isinstance(head, fx.Node)
                and head.op == "call_module"
                and type(self.modules[str(head.target)]) is nn.Linear
                and head.args == heads[0].args
                and len(head.users) == 1
            ):
                return None
        weights, biases = ([self.leaves.get(f"{head.target}.{name}") for head in heads] for name in ("weight", "bias"))
        if None in biases:
            return None
        cat, call = torch.cat, self.graph.call_function
        return call(linear, (self._map(heads[0].args[0]), call(cat, (weights, 1)), call(cat, (biases, 1))))

    def _getitem(self, node: fx.Node) -> Any:
        source, item = node.args
        call = self.graph.call_function
        if source in self.sizes:
            return self._size(call(operator.getitem, self._map((source, item))), node)
        if source in self.tuples:
            if type(item) is not int:
                raise self._refusal("a slice of a tuple of tensors")
            return call(operator.getitem, (self.env[source], item))  # type: ignore[index]
        items = item if isinstance(item, tuple) else (item,)
        if not self._is_tensor(source) or not all(
            i is None or i is Ellipsis or type(i) is int or (isinstance(i, slice) and not _nodes(i)) for i in items
        ):
            raise self._refusal("indexing with anything but numbers and slices")
        return call(operator.getitem, (self.env[source], (slice(None), *items)))  # type: ignore[index]

    def _size(self, new: fx.Node, node: fx.Node) -> fx.Node:
        self.sizes.add(node)
        return new

    def _is_tensor(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and arg not in self.sizes and arg not in self.tuples

    def _map(self, args: Any) -> Any:
        return fx.map_arg(args, lambda node: self.env[node])

    def _check_overwrite(self, node: fx.Node, source: Any) -> None:
        """Reject an in-place operation, unless its tensor is the output of a layer and is not used again."""
        fresh = source.op == "call_module" and type(self.modules[str(source.target)]) in _FRESH
        if not fresh or len(source.users) > 1:
            raise self._refusal("an in-place operation on a tensor that is used again")

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{what} has no counterpart over stacked members")


_FRESH = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)


def _lift_axis(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _nodes(value: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (value.start, value.stop, value.step))
