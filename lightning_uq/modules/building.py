"""Building the members of an ensemble, each by a factory call under its own seed, and choosing how they run."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.bootstrap import member_seed
from lightning_uq.functional.validation import check_integer
from lightning_uq.lightning_trees import is_instance
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.calling import has_forward, no_forward
from lightning_uq.networks.ensemble import (
    BatchEnsembleNetwork,
    EnsembleNetwork,
    Execution,
    LoraEnsembleNetwork,
    RowEnsembleNetwork,
    SharedTrunkNetwork,
    build_ensemble,
)
from lightning_uq.networks.factory import build_network, check_factory
from lightning_uq.networks.output import Output
from lightning_uq.networks.priors.members import NetworkWithPrior
from lightning_uq.running.streams import RandomStream

_SAME_START = "members start from the same weights"


def build_members(
    network: Callable[[], nn.Module],
    num_members: int,
    seed: int,
    *,
    prior_network: Callable[[], nn.Module] | None = None,
    prior_scale: float = 0.0,
    has_predict_fn: bool = False,
) -> tuple[list[nn.Module], list[RandomStream]]:
    """Call the factory once per member, without a draw from the global generators.

    Args:
        network: The factory.
        num_members: M.
        seed: Member i is built under ``member_seed(seed, i)``.
        prior_network: Factory of the members' frozen priors, drawn after each member's network.
        prior_scale: Scale of the priors.
        has_predict_fn: Whether a ``predict_fn`` calls the members.

    Returns:
        The members, and each member's random stream in its state after the build. A member that draws from its stream draws
        the same numbers as in a process of its own, seeded with its seed.

    Raises:
        InputError: The factory returns an instance or parameter twice, or builds both LightningModules and plain networks.
        UnsupportedError: The members would have priors that ``predict_fn`` does not call.
    """
    if has_predict_fn and prior_network is not None:
        raise UnsupportedError(
            "`prior_network` adds a network to what a member's `forward` returns, but `predict_fn` does not call it. Remove one of "
            "them."
        )
    streams = [RandomStream(member_seed(seed, i)) for i in range(num_members)]
    members: list[nn.Module] = []
    seen: dict[int, object] = {}  # keeps the objects alive: a freed id may be reused
    for i, stream in enumerate(streams):
        with stream.active():
            member = _new(network, "network", i, seen)
            if prior_network is not None and not is_instance(
                member, LightningModule
            ):  # a LightningModule is refused below
                member = NetworkWithPrior(member, _new(prior_network, "prior_network", i, seen), prior_scale)
        members.append(member)
    lightning = [is_instance(member, LightningModule) for member in members]
    if any(lightning) and not all(lightning):
        raise InputError(
            "The factory in argument `network` built both LightningModules and plain networks: let it build one kind."
        )
    inside = getattr(members[0], "_orig_mod", None)
    if is_instance(inside, LightningModule):
        raise InputError(
            f"The factory in argument `network` compiles {type(inside).__name__} as a whole, which hides its own steps and optimizer. "
            "Compile the network inside it: `self.net = torch.compile(net)`."
        )
    if not lightning[0] and not has_forward(members[0]) and not has_predict_fn:
        raise InputError(no_forward(members[0]))
    if isinstance(members[0], UncertaintyModule):
        raise InputError(
            f"The factory in argument `network` must build plain networks, or LightningModules of your own, but it built a "
            f"{type(members[0]).__name__}. Pass a factory of its network."
        )
    if num_members > 1 and _same_weights(members):
        rank_zero_warn(
            f"All {num_members} {_SAME_START}: the factory in argument `network` loads them, or sets the seed itself. The "
            "members will differ only by the random numbers of their training."
        )
    return members, streams


@contextmanager
def ignore_same_start() -> Iterator[None]:
    """Suppress the warning that members start from the same weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{_SAME_START}")
        yield


def _new(factory: Callable[[], nn.Module], argument: str, i: int, seen: dict[int, object]) -> nn.Module:
    built = build_network(factory, argument)
    shared = [name for name, p in built.named_parameters() if p.requires_grad and id(p) in seen]
    if id(built) in seen or shared:
        what = f"the same {type(built).__name__}" if id(built) in seen else f"the same parameter {shared[0]!r}"
        raise InputError(
            f"The factory in argument `{argument}` must build a new network at each call, but call {i + 1} returned {what} as an "
            "earlier call. Members would train each other's weights."
        )
    seen.update({id(part): part for part in (built, *built.parameters())})
    return built


def _same_weights(members: Sequence[nn.Module]) -> bool:
    """Whether all members agree in every parameter that is not constant."""
    drawn = [
        name
        for name, p in members[0].named_parameters()
        if p.requires_grad and not nn.parameter.is_lazy(p) and _varies(p)
    ]
    others = [dict(member.named_parameters()) for member in members[1:]]
    return bool(drawn) and all(
        name in other and torch.equal(members[0].get_parameter(name), other[name]) for name in drawn for other in others
    )


def _varies(parameter: nn.Parameter) -> bool:
    return parameter.numel() > 1 and bool((parameter != parameter.flatten()[0]).any())


def run_members(
    members: list[nn.Module],
    execution: Execution,
    output: Output,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    has_predict_fn: bool = False,
) -> EnsembleNetwork:
    """Join the members into one network, run as ``execution`` says and the optimizer allows.

    Args:
        members: The members.
        execution: How they run.
        output: What a member returns.
        optimizer: Makes their optimizer.
        has_predict_fn: Whether a ``predict_fn`` calls the members, one by one.

    Raises:
        UnsupportedError: ``execution`` stacks the members, but the optimizer would mix them.
    """
    if has_predict_fn and execution == "auto":
        reason = f"Ensemble of {len(members)} runs in a loop: `predict_fn` calls each member."
        return EnsembleNetwork(members, output, execution_reason=reason)
    if execution != "loop" and not is_instance(members[0], LightningModule):
        kind = type(optimizer([nn.Parameter(torch.zeros(1, 1))]))
        if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            if execution != "auto":
                raise UnsupportedError(
                    f"execution={execution!r} does not support {kind.__name__}, which may not act entry by entry: one member's "
                    "gradient could move another. Use SGD, Adam or AdamW, or execution='loop' or 'auto'."
                )
            why = f"{kind.__name__} may not act entry by entry, as SGD, Adam and AdamW do"
            reason = f"Ensemble of {len(members)} runs in a loop: {why}."
            return EnsembleNetwork(members, output, execution_reason=reason)
    return build_ensemble(members, execution, output=output)


def share_weights(network: nn.Module, num_members: int, sharing: Any, output: Output, seed: int) -> RowEnsembleNetwork:
    """Members that share a network's weights: a BatchEnsemble, or LoRA adapters. Their own values are drawn under the seed of the member after the last."""
    with RandomStream(member_seed(seed, num_members)).active():
        if sharing == "batch_ensemble":
            return BatchEnsembleNetwork(network, num_members, output=output)
        return LoraEnsembleNetwork(network, sharing, num_members, output=output)


def on_trunk(heads: EnsembleNetwork, trunk: nn.Module | Callable[[], nn.Module], seed: int) -> SharedTrunkNetwork:
    """The heads on one trunk, which a factory builds under the seed of the member after the last."""
    if isinstance(trunk, nn.Module):
        return SharedTrunkNetwork(trunk, heads)
    with RandomStream(member_seed(seed, heads.num_indices)).active():
        return SharedTrunkNetwork(build_network(trunk, "trunk"), heads)


def check_averaging(network: EnsembleNetwork, callbacks: Sequence[Callback]) -> None:
    """Raise an :class:`UnsupportedError` if a callback cannot average members that run at once."""
    kind = StochasticWeightAveraging
    if not network.is_stacked or not any(is_instance(callback, kind) for callback in callbacks):
        return
    if kind.pl_module_contains_batch_norm(network.member(0)):  # type: ignore[arg-type]  # it takes any nn.Module
        raise UnsupportedError(
            "StochasticWeightAveraging recomputes the statistics of BatchNorm layers for its average, but cannot find the layers of "
            "members that run at once: they would keep the statistics of the last weights. Use execution='loop'."
        )


def check_arguments(**given: Any) -> None:
    """Raise an :class:`InputError` if arguments of an ensemble are out of range or contradict each other."""
    check_factory(given["network"])
    if given["prior_network"] is not None:
        check_factory(given["prior_network"], "prior_network")
    if given["trunk"] is not None and not callable(given["trunk"]):  # a network is callable as well
        raise InputError(f"`trunk` must be a network or a factory of it, but it is {given['trunk']!r}.")
    check_integer("num_members", given["num_members"], 1)
    check_integer("seed", given["seed"], 0)
    for name in ("adversarial_epsilon", "prior_scale"):
        value = given[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if value is not None and not number:
            raise InputError(f"`{name}` must be a finite number of at least 0, but it is {value!r}.")
    if (given["prior_network"] is None) != (given["prior_scale"] == 0):
        raise InputError(
            f"`prior_network` and `prior_scale` must be given together, but prior_scale={given['prior_scale']} comes "
            f"{'without' if given['prior_network'] is None else 'with'} a prior network. You can pass the same factory as `network`."
        )
    choices = {
        "adversarial_scale": ("range", "absolute"),
        "bootstrap": (None, "none", "bernoulli", "exponential", "poisson", "uniform"),
    }
    for name, allowed in choices.items():
        if given[name] not in allowed:
            raise InputError(f"`{name}` must be one of {allowed}, but it is {given[name]!r}.")
