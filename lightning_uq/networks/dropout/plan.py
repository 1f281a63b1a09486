"""Plans how to run a network's dropouts, by examining its first batch."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_uq.errors import InputError, UnsupportedError, without_period
from lightning_uq.networks.calling import is_nest_of_tensors
from lightning_uq.networks.dropout.passes import Dropped
from lightning_uq.networks.dropout.trunk import is_passed_by_all

_SEEDS = (11, 12)
_MANY = 8  # number of seeds and rows in the test for any variation


class Plan(NamedTuple):
    """How to run the dropouts of a network.

    Attributes:
        axes: The batch axis of each call's input, None if it has none.
        function_rates: The rates of function calls in training, in order.
        one_at_a_time: Whether indices must run one after the other, because a dropout's input has its batch in another axis
            than 0.
        sees_functions: Whether dropouts that are function calls must be intercepted.
        shares_trunk: Whether the layers before the first dropout can run once for all indices.
        row_size: The size per sample of the largest input of a dropout.
    """

    axes: tuple[int | None, ...] = ()
    function_rates: tuple[float, ...] = ()
    one_at_a_time: bool = False
    sees_functions: bool = False
    shares_trunk: bool = False
    row_size: int = 1


def make_plan(network: Any, x: Any) -> Plan:
    """Run a :class:`DropoutNetwork` on the first row of a batch, alone and repeated, and examine its dropouts.

    Warns about dropouts that do not depend on the index.

    Raises:
        InputError: No dropout drops anything.
        UnsupportedError: A row's output depends on the other rows of the batch.
    """
    leaves = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim]
    if not is_nest_of_tensors(x):  # the rows of a graph can be neither separated nor repeated
        return Plan(one_at_a_time=True, sees_functions=True)
    if not leaves or not len(leaves[0]):
        return Plan()
    inner: nn.Module = network.network
    one, two = _first_row(x, 1), _first_row(x, 2)
    with _examining(inner):
        calls, calls_of_two = (_recorded(network, rows) for rows in (one, two))
        axes = _batch_axes(calls, calls_of_two)
        rates = _function_rates(network, two)
        found = Plan(axes, rates, any(axis != 0 for axis in axes), sees_functions=True)
        found = _checked(network, found, one, two)
        several = tree_map_only(Tensor, lambda t: t[:_MANY] if t.ndim else t, x)
        outputs = _outputs(network, found, several, seeds=range(_MANY))
        found = _with_shared_trunk(network, found, calls, several, outputs)
    _warn_of_others(inner, network.layers(), calls, outputs)
    functional = any(call.layer is None for call in calls) or any(rates)
    fast = any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in inner.modules())
    if (functional or fast) and any(_is_compiled(module) for module in inner.modules()):
        raise UnsupportedError(
            f"{type(inner).__name__} is compiled, but has dropouts that are function calls or inside attention, which a compiled graph "
            "hides. Do not compile it, or use `nn.Dropout` layers."
        )
    return found._replace(sees_functions=functional or fast)


def _with_shared_trunk(network: Any, plan: Plan, calls: list[Dropped], x: Any, outputs: Tensor) -> Plan:
    """The plan with a shared trunk, if the first dropout is a layer that nothing bypasses and rows do not depend on one another."""
    inner: nn.Module = network.network
    if plan.one_at_a_time or not calls or calls[0].layer is None or network.read_output.predict_fn is not None:
        return plan
    if any(_is_compiled(module) for module in inner.modules()) or not is_passed_by_all(inner, calls[0].layer):
        return plan
    late = plan._replace(shares_trunk=True, row_size=max(1, *(math.prod(call.shape) for call in calls)))
    row = tree_map_only(Tensor, lambda t: t[:1] if t.ndim else t, x)
    differ = bool((outputs != outputs[:, :1]).any())  # equal rows would not show a dependence
    alone, together = (_outputs(network, late, rows, seeds=range(_MANY)) for rows in (row, x))
    return late if differ and _equal(alone, outputs[:, :1]) and _equal(together, outputs) else plan


def _recorded(network: Any, x: Any) -> list[Dropped]:
    plan = Plan(one_at_a_time=True, sees_functions=True)
    calls: list[Dropped] = network.run(x, torch.tensor(_SEEDS[:1]), plan, rate=0.0)[1].calls
    return calls


def _batch_axes(of_one: list[Dropped], of_two: list[Dropped]) -> tuple[int | None, ...]:
    """The axis of each call's input that grows with the batch."""
    axes: list[int | None] = []
    for one, two in zip(of_one, of_two, strict=False):
        grown = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if b == 2 * a]
        axes.append(grown[0] if grown else None)
    return tuple(axes)


def _function_rates(network: Any, x: Any) -> tuple[float, ...]:
    """The rates of function calls in training, which may be 0 in evaluation; empty if they cannot be read."""
    inner: nn.Module = network.network
    seeds, plan = torch.tensor(_SEEDS[:1]), Plan(one_at_a_time=True, sees_functions=True)
    in_evaluation = network.run(x, seeds, plan, rate=0.0)[1]
    if 0 not in in_evaluation.rates_seen:
        return ()
    norms = [m for m in inner.modules() if hasattr(m, "running_mean") or hasattr(m, "track_running_stats")]
    inner.train()
    for module in norms:
        module.eval()
    rates: list[float] = []
    reason = "the network makes other calls in training"
    try:
        rates = network.run(x, seeds, plan, rate=0.0)[1].rates_seen
    except Exception as error:  # a user's forward may need more in training, such as targets
        reason = f"its forward raised {type(error).__name__}: {without_period(error)}"
    inner.eval()
    if len(rates) == len(in_evaluation.rates_seen):
        return tuple(rates)
    rank_zero_warn(
        f"{type(inner).__name__} calls dropout or attention with a rate of 0 in evaluation, and its rates in training are unknown: "
        f"{reason}. These dropouts do not depend on the index."
    )
    return ()


def _outputs(network: Any, plan: Plan, x: Any, rate: float = 0.5, seeds: Sequence[int] = _SEEDS) -> Tensor:
    """Outputs [Z, B, ...] for some indices, with a rate at which masks differ wherever they can."""
    output: Tensor = network.run_all(x, torch.tensor(list(seeds)), plan, rate=rate)
    return output.detach().float()


def _checked(network: Any, plan: Plan, one: Any, two: Any) -> Plan:
    """A plan under which a row alone gives the same output as in a batch."""
    if not network.is_shared:
        return plan
    each = _outputs(network, plan._replace(one_at_a_time=True), one)
    if not plan.one_at_a_time and not _equal(_outputs(network, plan, one), each):
        plan = plan._replace(one_at_a_time=True)
    if _equal(_outputs(network, plan, two), each.repeat(1, 2, *[1] * (each.ndim - 2))):
        return plan
    raw = _outputs(network, plan, one, rate=0.0)
    if not _equal(_outputs(network, plan, two, rate=0.0), raw.repeat(1, 2, *[1] * (raw.ndim - 2))):
        return plan  # rows depend on one another even without dropout
    raise UnsupportedError(
        f"With the dropouts of {type(network.network).__name__}, a row in a batch has another output than the row alone, because their "
        "inputs mix rows and positions in one axis. Use mask='per_example', or give dropouts an input with the batch in axis 0."
    )


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return bool(((found - expected).abs() <= 1e-2 * scale + 1e-6).all()) if scale == scale else True


def _warn_of_others(
    inner: nn.Module, layers: list[tuple[str, _DropoutNd]], calls: list[Dropped], outputs: Tensor
) -> None:
    """Reject a network without dropout, and warn about dropouts that do not depend on the index."""
    varies = not bool((outputs == outputs[:1]).all())
    called = {id(call.layer) for call in calls}
    uncalled = [name for name, layer in layers if layer.p > 0 and id(layer) not in called]
    others = [
        f"{name or type(module).__name__} ({type(module).__name__})"
        for name, module in inner.named_modules()
        if _drops_by_itself(module)
    ]
    if not calls and not varies:
        inside = (
            f" The dropout inside {', '.join(others)} cannot be controlled: use `nn.Dropout` layers between its parts."
            if others
            else ""
        )
        raise InputError(
            f"`network` must have dropout with a rate above 0, but {type(inner).__name__} calls no `nn.Dropout` layer, no "
            f"`F.dropout`, and no attention with dropout.{inside}"
        )
    if uncalled:
        rank_zero_warn(f"Dropout layers {uncalled} are never called, so they have no effect.")
    if others:
        rank_zero_warn(
            f"The dropout inside {', '.join(others)} does not depend on the index: it is off in evaluation, and random in training. Use "
            "`nn.Dropout` layers between its parts instead."
        )
    if not varies:
        rank_zero_warn(
            f"The hypotheses of {type(inner).__name__} do not vary: no dropout changes the outputs of the first rows, so every "
            "disagreement is 0."
        )


def _drops_by_itself(module: nn.Module) -> bool:
    """Whether a module has its own dropout that masks cannot control."""
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    name = type(module).__name__.lower()
    if isinstance(module, _DropoutNd) or not ("stochasticdepth" in name or "droppath" in name or "drop_path" in name):
        return False
    return any(getattr(module, rate, 0) not in (0, None) for rate in ("p", "drop_prob", "drop_rate"))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _first_row(x: Any, times: int) -> Any:
    return tree_map_only(Tensor, lambda t: t[:1].expand(times, *t.shape[1:]).clone() if t.ndim else t, x)


@contextmanager
def _examining(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, eager and without gradients. Modes, buffers and random states are restored."""
    modes = {module: module.training for module in network.modules()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers() if not is_lazy(buffer)}
    network.eval()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in network.named_buffers():
            if name in buffers and not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
