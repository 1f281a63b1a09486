"""Many networks of one architecture at once: are they alike, and what is their forward pass over stacked weights?

A *lifted* tensor is what every member would hold at one point of its forward pass, stacked: [M, *shape of one member].
:func:`lift` traces one member with ``torch.fx`` and translates the graph into one over lifted tensors: a linear layer
becomes one batched product, an element-wise function stays as it is, an axis moves back by one. What the tables below do
not name is refused, never guessed.
"""

import contextlib
import copy
import enum
import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.networks.output import OutputReader
from lightning_uq.networks.priors import add_prior

# --------------------------------------------------------------------------------------------- are the members alike?


def check_alike(members: Sequence[nn.Module]) -> None:
    """Check that one forward pass, with the members' tensors exchanged, speaks for all of them.

    Raises:
        UnsupportedError: They differ in anything but the values of their parameters and buffers, or hold what cannot be
            exchanged; the message names it.
    """
    first = members[0]
    _check_exchangeable(first)
    seen: set[int] = set()
    for i, member in enumerate(members):
        for name, tensor in named_tensors(member):
            if id(tensor) in seen:
                raise UnsupportedError(f"{name!r} of member {i} is shared with another member or under another name")
            seen.add(id(tensor))
    ours = dict(first.named_modules())
    for i, member in enumerate(members[1:], 1):
        theirs = dict(member.named_modules())
        if ours.keys() != theirs.keys():
            raise UnsupportedError(f"member {i} has other submodules than member 0")
        for name, module in ours.items():
            difference = _difference(module, theirs[name])
            if difference is not None:
                raise UnsupportedError(f"{_label(name, module)} of member {i} differs from member 0 in {difference}")
    # One switch will move all modules, so their modes must be those that it leaves (a frozen prior's is its own).
    switched = dict(skeleton(first).train(first.training).named_modules())
    for name, module in ours.items():
        if module.training != switched[name].training:
            raise UnsupportedError(f"{_label(name, module)} is not in the mode of the whole network")


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under every name they have."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of ``network`` without the values of its tensors.

    Raises:
        UnsupportedError: It cannot be copied.
    """
    try:
        return copy.deepcopy(network).to("meta")
    except Exception as error:  # whatever an attribute raises that no copy can be made of
        raise UnsupportedError(f"{type(network).__name__} cannot be copied ({error})") from error


def _check_exchangeable(network: nn.Module) -> None:
    if any(base.__name__ == "LightningModule" for base in type(network).__mro__):
        raise UnsupportedError("a LightningModule runs its own steps, one member after the other")
    tensors = dict(named_tensors(network))
    if not tensors:
        raise UnsupportedError(f"{type(network).__name__} has no parameters")
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedError(f"{name!r} is lazy and has not seen its first batch")
        if type(tensor) not in (nn.Parameter, Tensor):
            raise UnsupportedError(f"{name!r} is a {type(tensor).__name__}, not a plain parameter or buffer")
    for name, module in network.named_modules():
        where = _label(name, module)
        for hooks in ("forward", "forward_pre", "backward", "backward_pre", "state_dict", "load_state_dict_pre"):
            if getattr(module, f"_{hooks}_hooks"):
                raise UnsupportedError(f"{where} has {hooks} hooks")
        if isinstance(module, nn.RNNBase):
            raise UnsupportedError(f"{where} is recurrent")
        if isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedError(f"{where} talks to other processes")
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is None:
            raise UnsupportedError(f"{where} has momentum=None, a cumulative average")
    names = {name for name, _ in network.named_parameters()} | set(persistent_buffers(network))
    if set(network.state_dict()) != names:
        raise UnsupportedError(
            f"the state dict of {type(network).__name__} has entries beside its parameters and buffers"
        )


def _label(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__


def persistent_buffers(network: nn.Module) -> list[str]:
    """Names of the buffers that the state dict holds."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}


def _difference(a: nn.Module, b: nn.Module) -> str | None:
    if type(a) is not type(b):
        return f"its class, {type(b).__name__} instead of {type(a).__name__}"
    for kind in ("_parameters", "_buffers"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        for name in {**ours, **theirs}:
            if _signature(ours.get(name)) != _signature(theirs.get(name)):
                return f"the shape, dtype, device or requires_grad of {name!r}"
    if a._non_persistent_buffers_set != b._non_persistent_buffers_set:
        return "which buffers are persistent"
    ours, theirs = ({k: v for k, v in vars(m).items() if k not in _MODULE_ATTRIBUTES} for m in (a, b))
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name]):
            return f"its attribute {name!r}"
    return None


def _signature(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


_PLAIN = (str, int, float, complex, bytes, torch.dtype, torch.device, type(None), type, enum.Enum, range, slice)


def _same(a: Any, b: Any) -> bool:
    """Whether two attributes surely mean the same. A tensor never does: it would be one for all members."""
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if a is b:
        return True
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, FunctionType):  # a lambda in a constructor is a new function at each call
        return a.__code__ is b.__code__ and _same(_bound_values(a), _bound_values(b))
    return isinstance(a, _PLAIN) and bool(a == b)


def _bound_values(function: FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    # A function in a closure may refer back to this one, so it counts by identity alone.
    cells = [id(value) if isinstance(value, FunctionType) else value for value in cells]
    return function.__defaults__, function.__kwdefaults__, cells


# ------------------------------------------------------------------------------------ operations over lifted tensors


def align(*lifted: Tensor) -> list[Tensor]:
    """Give lifted tensors one number of axes, with ones behind the member axis: broadcasting then is each member's own."""
    ndim = max(tensor.ndim for tensor in lifted)
    return [_pad_axes(tensor, ndim) for tensor in lifted]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for each member: x [M, ..., in], weight [M, out, in], bias [M, out]."""
    if x.ndim == 2:
        return linear(x.unsqueeze(1), weight, bias).squeeze(1)
    if x.ndim > 3:
        return linear(x.flatten(1, -2), weight, bias).reshape(*x.shape[:-1], weight.shape[1])
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


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
    mean, variance, weight, bias = (None if t is None else t.reshape(-1) for t in (mean, variance, weight, bias))
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


# ------------------------------------------------------------------------------------------- from one member to all

_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
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
        return Program(fx.GraphModule(self.kept, self.graph), [name.removeprefix("network.") for name in used])

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
        if not isinstance(result, fx.Node) or result in self.sizes or result in self.tuples:
            raise UnsupportedError(
                f"the members return a {type(result).__name__}, not one tensor; argument `output` can pick it"
            )
        return self.graph.output(self.env[result])

    def _call_module(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        module = self.modules[name]
        if len(node.args) != 1 or node.kwargs or not self._is_tensor(node.args[0]):
            raise self._refusal(f"a call of {name.removeprefix('network.')!r} with more than one tensor")
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
        if type(module) in _ELEMENTWISE_MODULES:
            kept = copy.deepcopy(module)
            if getattr(kept, "inplace", False):
                self._check_overwrite(node, node.args[0])
                kept.inplace = False
            key = f"module_{len(self.kept)}"
            self.kept[key] = kept
            return self.graph.call_module(key, (x,))
        raise self._refusal(f"{name.removeprefix('network.')!r} ({type(module).__name__})")

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
        raise self._refusal(f"the function {getattr(target, '__name__', target)}")

    def _call_method(self, node: fx.Node) -> Any:
        name, args = str(node.target), node.args
        if self._is_tensor(args[0]):
            x = self.env[args[0]]  # type: ignore[index]
            if name in ("view", "reshape"):
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
        args, kwargs = list(self._map(node.args)), self._map(dict(node.kwargs))
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
        if not isinstance(heads, list | tuple) or [*node.args[1:], *node.kwargs.values()] != [-1]:
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


def _lift_axis(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _nodes(value: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (value.start, value.stop, value.step))


# ----------------------------------------------------------------------------------------------------------- torch.vmap


def call_mapped(
    network: nn.Module, reader: OutputReader, tensors: Mapping[str, Tensor], x: Any, x_axis: int | None
) -> Tensor:
    """Outputs [M, B, ...] of ``network`` under stacked ``tensors`` [M, ...], by ``torch.vmap``.

    Args:
        network: One member; its values are not looked at.
        reader: What picks the output tensor.
        tensors: Every parameter and buffer by name; buffers that the network moves in place are moved in place.
        x: The input, shared by the members (``x_axis`` None) or one a member, stacked (``x_axis`` 0).
        x_axis: Where the member axis of ``x`` is.

    Raises:
        UnsupportedError: ``torch.vmap`` cannot map what the network does.
    """

    def call_one(tensors: dict[str, Tensor], x: Any) -> Tensor:
        return reader(torch.func.functional_call(network, tensors, (x,)))

    device = next(iter(tensors.values())).device.type
    autocast = _AutocastInVmap(device) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
    try:
        with autocast:
            output: Tensor = torch.vmap(call_one, in_dims=(0, x_axis), randomness="different")(dict(tensors), x)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UnsupportedError(
            f"execution='vmap' does not support {type(network).__name__}: {error} Use execution='loop'."
        ) from error
    return output


class _AutocastInVmap(TorchFunctionMode):
    """Gives mapped layers the types that autocast gives them outside of ``torch.vmap``.

    A mapped layer is taken apart before autocast sees it: its bias or scale would be added in float32.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AUTOCAST_LOW:
            args, kwargs = _cast((args, kwargs), torch.get_autocast_dtype(self.device))
        elif func in _AUTOCAST_NORMS:
            dtype = _norm_dtype(func, args[0].dtype, self.device, torch.get_autocast_dtype(self.device))
            args, kwargs = _cast((args, kwargs), torch.float32)
            return func(*args, **kwargs).to(dtype)
        return func(*args, **kwargs)


_AUTOCAST_LOW = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.addmm, torch.baddbmm, torch.addbmm,
}  # fmt: skip
_AUTOCAST_NORMS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    F.layer_norm: lambda x, weight: F.layer_norm(x, (1,), weight, weight),
    F.rms_norm: lambda x, weight: F.rms_norm(x, (1,), weight),
    F.group_norm: lambda x, weight: F.group_norm(x, 1, weight, weight),
    F.batch_norm: lambda x, weight: F.batch_norm(x, weight.clone(), weight.clone(), weight, weight, True),
}


def _cast(args: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if wide else value

    return tree_map(cast, args)


@functools.lru_cache
def _norm_dtype(func: Any, dtype: torch.dtype, device: str, autocast: torch.dtype) -> torch.dtype:
    """What an unmapped norm of this input returns under the autocast that is on: asked of a tiny one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the slower kernel that it takes for mixed types
        x = torch.zeros(2, 1, dtype=dtype, device=device)
        return _AUTOCAST_NORMS[func](x, torch.ones(1, device=device)).dtype


_MAPPABLE = (
    *_ELEMENTWISE_MODULES, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Flatten,
    nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.MaxPool1d, nn.MaxPool2d, nn.RMSNorm,
)  # fmt: skip


def check_mappable(network: nn.Module, reader: OutputReader) -> None:
    """Check that ``torch.vmap`` is known to map every layer, and that no branch depends on values.

    Raises:
        UnsupportedError: It is not known.
    """
    for node in trace(network, reader).nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target).removeprefix("network").removeprefix("."))
            if type(module) not in _MAPPABLE:
                raise UnsupportedError(
                    f"{node.target!r} ({type(module).__name__}) is not known to work under torch.vmap"
                )
