"""One forward pass over the stacked weights of many networks of one architecture.

A *lifted* tensor is what every member would hold at one point of its forward pass, stacked: [M, *shape of one member].
:func:`lift` traces one member with ``torch.fx`` and translates the graph into one over lifted tensors: a linear layer
becomes one batched product, an element-wise function stays as it is, an axis moves back by one. What the tables below do
not name is refused, never guessed.
"""

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks._alike import named_tensors
from lightning_uq.networks.labels import label
from lightning_uq.networks.output import OutputReader
from lightning_uq.networks.priors import add_prior

# --------------------------------------------------------------------------------- operations over lifted tensors


def align(*lifted: Tensor) -> list[Tensor]:
    """Give lifted tensors one number of axes, with ones behind the member axis: broadcasting then is each member's own.

    Example:
        >>> [tuple(t.shape) for t in align(torch.zeros(5, 8, 3), torch.zeros(5, 3), torch.zeros(5))]
        [(5, 8, 3), (5, 1, 3), (5, 1, 1)]
    """
    ndim = max(tensor.ndim for tensor in lifted)
    dtypes = [tensor.dtype for tensor in lifted if tensor.ndim > 1 and tensor.is_floating_point()]
    if dtypes and len(dtypes) < len(lifted):  # a member's scalar does not widen the type of its other operand
        dtype = functools.reduce(torch.promote_types, dtypes)
        lifted = tuple(t.to(dtype) if t.ndim == 1 and t.is_floating_point() else t for t in lifted)
    return [_pad_axes(tensor, ndim) for tensor in lifted]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for each member: x [M, ..., in], weight [M, out, in], bias [M, out].

    Example:
        >>> linear(torch.ones(2, 7, 4), torch.ones(2, 3, 4), torch.zeros(2, 3)).shape
        torch.Size([2, 7, 3])
    """
    if x.ndim == 2:
        return linear(x.unsqueeze(1), weight, bias).squeeze(1)
    if x.ndim > 3:
        return linear(x.flatten(1, -2), weight, bias).reshape(*x.shape[:-1], weight.shape[1])
    if torch.is_autocast_enabled(x.device.type):  # its rules do not reach into a function with its own backward
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = _narrow(x, dtype), _narrow(weight, dtype), None if bias is None else _narrow(bias, dtype)
    output: Tensor = _BatchedLinear.apply(x, weight, bias)
    return output


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


class _BatchedLinear(torch.autograd.Function):
    """The product x weight^T + bias of every member, with the weight's gradient in the weight's own layout.

    Autograd's would come transposed, and be copied into place at each step: a fifth of the time of a wide network.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if of_x else None,
            torch.bmm(grad.mT, x) if of_weight else None,
            grad.sum(1) if of_bias else None,
        )


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm`` for each member."""
    return _scale_and_shift(F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` for each member."""
    return _scale_and_shift(F.rms_norm(x, normalized_shape, None, eps), weight, None)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    count: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation of x [M, B, C] or [M, B, C, L], each member over its own batch, as M * C channels of one.

    Like the module, it moves the running statistics, in place, where it has them and is ``training``.
    """
    if x.ndim not in (3, 4):
        raise InputError(f"Expected BatchNorm1d to get inputs [B, C] or [B, C, L], but got shape {list(x.shape[1:])}.")
    if training and count is not None:
        count += 1
    channels = x.transpose(0, 1).flatten(1, 2)
    mean, variance, weight, bias = (None if t is None else t.view(-1) for t in (mean, variance, weight, bias))
    out = F.batch_norm(channels, mean, variance, weight, bias, training or mean is None, momentum, eps)
    return out.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """``x.reshape(shape)`` for each member."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    return x.reshape(x.shape[0], *sizes)


def member_shape(x: Tensor) -> torch.Size:
    """``x.shape`` as each member sees it."""
    return x.shape[1:]


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    dtype = x.dtype
    if weight is not None:
        x = x * _pad_axes(weight, x.ndim)
    if bias is not None:
        x = x + _pad_axes(bias, x.ndim)
    return x.to(dtype)  # under autocast the weights are wider, and the norms keep their input's type


def _pad_axes(lifted: Tensor, ndim: int) -> Tensor:
    missing = ndim - lifted.ndim
    return lifted.reshape(lifted.shape[0], *[1] * missing, *lifted.shape[1:]) if missing > 0 else lifted


# ---------------------------------------------------------------------------------------- from one member to all

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.AlphaDropout, nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink,
)  # fmt: skip

_ELEMENTWISE = [
    "abs", "add", "celu", "clamp", "contiguous", "cos", "div", "dropout", "elu", "exp", "expm1", "gelu",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "logsigmoid", "maximum", "minimum",
    "mish", "mul", "neg", "pow", "relu", "relu6", "rsqrt", "rsub", "selu", "sigmoid", "silu", "sin", "softplus",
    "softsign", "sqrt", "square", "sub", "tanh", "tanhshrink", "true_divide", "truediv",
]  # fmt: skip

_REQUIRED = object()
# The arguments that are axes: position (counting the tensor as 0), name, default.
_AXES: dict[str, list[tuple[int, str, Any]]] = {
    "flatten": [(1, "start_dim", 0), (2, "end_dim", -1)],
    "cat": [(1, "dim", 0)],
    "stack": [(1, "dim", 0)],
    "chunk": [(2, "dim", 0)],
    "split": [(2, "dim", 0)],
    "unsqueeze": [(1, "dim", _REQUIRED)],
    "squeeze": [(1, "dim", _REQUIRED)],
    "transpose": [(1, "dim0", _REQUIRED), (2, "dim1", _REQUIRED)],
    "softmax": [(1, "dim", _REQUIRED)],
    "log_softmax": [(1, "dim", _REQUIRED)],
    "logsumexp": [(1, "dim", _REQUIRED)],
    "mean": [(1, "dim", _REQUIRED)],
    "sum": [(1, "dim", _REQUIRED)],
    "normalize": [(2, "dim", 1)],
}


def _by_function(names: Sequence[str]) -> dict[Any, str]:
    return {
        function: name
        for name in names
        for room in (torch, F, operator)
        if callable(function := getattr(room, name, None))
    }


_LIFTED_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
}
_ELEMENTWISE_FUNCTIONS = _by_function(_ELEMENTWISE)
_AXIS_FUNCTIONS = _by_function(list(_AXES))


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
    """Translate ``network``, in the mode it is in, into one forward pass over stacked tensors.

    Args:
        network: One member; its values are not looked at.
        reader: What picks the output tensor; a function is traced with the network.

    Raises:
        UnsupportedError: The network does something that has no lifted counterpart; the message names it.

    Example:
        >>> program = lift(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), OutputReader())
        >>> program(torch.zeros(4, 5, 2), {"0.weight": torch.zeros(4, 3, 2), "0.bias": torch.zeros(4, 3)}).shape
        torch.Size([4, 5, 3])
    """
    return _Lifter(network, reader).program()


class _WithReader(nn.Module):
    """A network and the function that picks its output, as one module for the tracer."""

    def __init__(self, network: nn.Module, reader: OutputReader) -> None:
        super().__init__()
        self.network = network
        self.pick = reader.output if callable(reader.output) else None

    def forward(self, x: Any) -> Any:
        output = self.network(x)
        return output if self.pick is None else self.pick(output)


def trace(network: nn.Module, reader: OutputReader) -> fx.Graph:
    """The graph of one member; its names begin with ``network.``.

    Raises:
        UnsupportedError: Its forward pass depends on values, or fails without them.
    """
    root = _WithReader(network, reader)
    root.training = network.training
    try:
        return fx.Tracer().trace(root)
    except Exception as error:  # whatever the user's code does with a stand-in for a tensor
        raise UnsupportedError(
            f"the forward pass of {type(network).__name__} cannot be traced ({type(error).__name__}: {error})"
        ) from error


class _Lifter:
    """Walks the graph of one member and writes the lifted one."""

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

    # One method a kind of node. Each gives the node of the new graph.

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
        kind = kind.replace("immutable_", "")  # what fx makes of a list or a dict
        raise UnsupportedError(f"the members return {kind}, not one tensor; argument `output` can pick it")

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
        if target in _LIFTED_FUNCTIONS and args and self._is_tensor(args[0]):
            return call(_LIFTED_FUNCTIONS[target], self._map(args), self._map(kwargs))
        if target in _ELEMENTWISE_FUNCTIONS:
            return self._elementwise(node, _ELEMENTWISE_FUNCTIONS[target])
        if target is torch.cat and (heads := self._parallel_heads(node)) is not None:
            return heads
        if target in _AXIS_FUNCTIONS:
            return self._with_axes(node, _AXIS_FUNCTIONS[target])
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
            if name in _ELEMENTWISE:
                return self._elementwise(node, name)
            if name in _AXES:
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
        for position, keyword, default in _AXES[name]:
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
        """Linear heads on one input, concatenated, as one product with the concatenated weights; else None."""
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
        """In-place is dropped where nobody can tell: the tensor is a layer's fresh output and is not used again."""
        fresh = source.op == "call_module" and type(self.modules[str(source.target)]) in _FRESH
        if not fresh or len(source.users) > 1:
            raise self._refusal("an in-place operation on a tensor that is used again")

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{what} has no counterpart over stacked members")


_FRESH = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)


def own_name(name: str) -> str:
    """The name that a submodule or tensor of a traced graph has in its network."""
    return name.removeprefix("network").removeprefix(".")


def _lift_axis(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _nodes(value: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (value.start, value.stop, value.step))
