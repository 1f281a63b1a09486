"""Loads a ``-uq.ckpt`` as a plain network with the fitted states built in."""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.callbacks.compose import compose, kind_of
from lightning_uq.callbacks.sibling import WRITTEN_BY, check_complete, fitted_states
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError, UQError
from lightning_uq.functional.validation import check_choice
from lightning_uq.importing import import_object
from lightning_uq.lightning_trees import both, is_instance, is_subclass
from lightning_uq.networks.features import uncompiled
from lightning_uq.networks.fingerprint import same_weights, weights_fingerprint
from lightning_uq.networks.finite import NonFinite
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.fitted_predictor import FittedPredictor
from lightning_uq.networks.output import Output, PredictFn
from lightning_uq.networks.pooling import Pool
from lightning_uq.running.inferred_task import INFERABLE
from lightning_uq.running.loading import load_as_lightning
from lightning_uq.running.logits import is_uncertainty_module
from lightning_uq.tasks import Classification, Task, describe, task_from_config, task_of

Network = nn.Module | Callable[[], nn.Module]


def load_fitted(
    path: str | Path,
    network: Network | None = None,
    *,
    states: Sequence[str] | None = None,
    predict_fn: PredictFn | str | None = None,
    output: Output | None = None,
    pool: Pool | None = None,
    task: Task | str | None = None,
    nonfinite: NonFinite = "error",
) -> FittedNetwork | FittedPredictor:
    """A plain module with the states of fitted callbacks: densities, calibrations, posteriors, sets and intervals. No Trainer is needed.

    The module returns a dictionary. A classifier returns calibrated ``probs`` [B, C] (maps [B, C, *P]; [B, L] for several labels) and, if
    fitted, ``prediction_set`` and ``answered``. A regressor returns the entries of ``prediction.to_dict()``, such as ``mean``,
    ``variance``, ``conformal_lower`` and ``conformal_upper`` [B, D]. A fitted density adds ``log_density`` and its callback's
    ``ood_score``. ``torch.export`` can export the whole module. The weights are those of the file; they are checked against the
    fingerprint of the weights of the fit.

    Args:
        path: The ``-uq.ckpt``; it is loaded with ``weights_only=True``.
        network: The trained module, with any weights (the file's are loaded into a copy), or the network inside it. The network's
            names in the file may have one common prefix, such as ``model.``. None: the class that wrote the file is
            imported and built from its hyper-parameters. For a module of this package, ``network`` may also be anything that
            its own argument ``network`` accepts.
        states: Keys of the states to build in, if the file holds several calibrations or densities.
        predict_fn: The ``predict_fn(model, x)`` of the callbacks, if they had one.
        output: The ``output`` of the callbacks, if it was a function.
        pool: The ``pool`` of the density, if it was a function.
        task: The ``task`` of the callbacks, if it is your own class or has a function as a field. The file holds any other task.
        nonfinite: How an input row with NaN or infinity is treated: see :class:`~lightning_uq.networks.fitted.FittedNetwork`.

    Returns:
        The module, in evaluation mode, on the CPU.

    Raises:
        InputError: The file cannot be read or holds no such state; the network cannot be built or does not match; the weights
            are not those of the fit.

    Example:
        >>> load_fitted("missing-uq.ckpt")
        Traceback (most recent call last):
        ...
        lightning_uq.errors.InputError: `path` must name a checkpoint, but missing-uq.ckpt cannot be read: ...
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"`path` must be the path of a checkpoint, but its type is {type(path).__name__}. Call `load_fitted(path, network)`."
        )
    chosen = _choose(fitted_states(path), states, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The checkpoint holds what .* fitted")  # expected here
        model, prefix, beside = _model(path, network)
    current = _fingerprint(model, prefix, beside)
    for key, state in chosen.items():
        if state["fingerprint"] is None or not same_weights(state["fingerprint"], current, model):
            raise InputError(f"{key} was not fitted on the weights in {path}: their fingerprints differ.")
    found_task = _task(chosen, None if task is None else task_of(task))
    fitted = compose(model, prefix, chosen, predict_fn, output, pool, found_task)
    check_choice("nonfinite", nonfinite, ("error", "inf"))
    fitted.nonfinite = nonfinite
    return fitted.requires_grad_(False)


def _choose(found: dict[str, Any], wanted: Sequence[str] | None, path: str | Path) -> dict[str, Any]:
    """The states to build in, by key: at most one of each kind."""
    usable = {key: state for key, state in found.items() if kind_of(key, state) is not None}
    if wanted is not None:
        unknown = [key for key in ([wanted] if isinstance(wanted, str) else wanted) if key not in usable]
        if isinstance(wanted, str) or unknown:
            came = repr(wanted) if isinstance(wanted, str) else unknown[0]
            raise InputError(f"`states` must be a list of keys from {list(usable)}, but it is {came}.")
        usable = {key: usable[key] for key in wanted}
    if not usable:
        raise InputError(
            f"{path} holds no state that can be built into a network, but {list(found)}. Only these callbacks themselves can compute their "
            "results."
        )
    by_kind: dict[str | None, list[str]] = {}
    for key, state in usable.items():
        by_kind.setdefault(kind_of(key, state), []).append(key)
    for kind, several in by_kind.items():
        if len(several) > 1:
            raise InputError(
                f"{path} holds several states of {kind}: {several}. Pass the key of one of them as `states`."
            )
    return usable


def _task(states: Mapping[str, Any], given: Task | None) -> Task | None:
    """The task that all states were fitted with: the given one or the file's; None without a task."""
    held = {key: _held_task(state) for key, state in states.items()}
    texts = {
        key: state["settings"].get("task") if (own := held[key]) is None else describe(own)
        for key, state in states.items()
    }
    found = next((own for own in held.values() if own is not None), None) if given is None else given
    for key, text in texts.items():
        if text == (None if found is None else describe(found)):
            continue
        is_default = found is not None and describe(found) == describe(Classification())
        if text is None and (is_default or kind_of(key, states[key]) == "density"):  # features do not depend on a task
            continue
        if given is None and found is not None:
            raise InputError(
                f"The states in the file were fitted with different tasks: {texts}. Pass the keys of one task as `states`."
            )
        advice = "leave argument `task` out" if text is None or held[key] else "pass it as argument `task`"
        raise InputError(f"{key} was fitted with {'no `task`' if text is None else f'task={text}'}: {advice}.")
    return found


def _held_task(state: Mapping[str, Any]) -> Task | None:
    """The task that a state stores, or None, also for a task that a file cannot hold."""
    if state["inferred_task"] is not None:
        return INFERABLE[state["inferred_task"]]
    return None if state["task"] is None else task_from_config(state["task"])


# ---------------------------------------------------------------------- the network


def _model(path: str | Path, network: Network | None) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """The module with the file's weights, the prefix of its names in the file, and the remaining weights."""
    checkpoint = read_checkpoint(path)
    written_by = checkpoint.get(WRITTEN_BY, {})
    if network is None or (written_by.get("is_ours") and not is_uncertainty_module(network)):
        return _rebuilt(path, checkpoint, network), "", {}
    if not isinstance(network, nn.Module):
        raise InputError(
            f"`network` must be a torch.nn.Module, but its type is {type(network).__name__}. A factory works only for files of this package's "
            "own modules."
        )
    model = copy.deepcopy(network)
    if is_instance(model, LightningModule) and type(model).__name__ == _class_name(written_by):
        with _misfit(path):
            load_as_lightning(model, checkpoint)
        return model, "", {}
    state = {uncompiled(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    names = {uncompiled(name): name for name in model.state_dict()}
    first = next(iter(names), "")
    prefixes = [name[: -len(first)] for name in state if name == first or name.endswith(f".{first}")]
    prefix = next((p for p in sorted(prefixes, key=len) if all(p + name in state for name in names)), None)
    beside = {name: t for name, t in state.items() if prefix is not None and not name.startswith(prefix)}
    if prefix is None or len(beside) + len(names) != len(state):
        missing, foreign = sorted(set(names) - set(state)), sorted(set(state) - {f"{prefix or ''}{n}" for n in names})
        raise InputError(
            f"`network` does not fit the weights in {path}: "
            + (f"the file lacks {missing[:1]}" if prefix is None else f"the network lacks {foreign[:1]}")
            + f" ({len(names)} and {len(state)} tensors)."
        )
    with _misfit(path):
        model.load_state_dict({own: state[prefix + name] for name, own in names.items()})
    return model, prefix, beside


@contextmanager
def _misfit(path: str | Path) -> Iterator[None]:
    """Turn torch's error about weights into one about ``network``."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"`network` does not fit the weights in {path}: {reason}") from error


def _class_name(written_by: Mapping[str, Any]) -> str:
    """The name of the class that wrote a file, without its Python module, which may differ in a notebook."""
    return str(written_by.get("class_path")).rpartition(".")[2]


def _rebuilt(path: str | Path, checkpoint: dict[str, Any], network: Network | None) -> nn.Module:
    """An instance of the class that wrote the file, built from its hyper-parameters."""
    written_by = checkpoint.get(WRITTEN_BY, {})
    name = written_by.get("class_path")
    hint = "Pass an instance of it with any weights as `network`."
    if name is None:
        raise InputError(f"{path} does not name the class of the module that wrote it. {hint}")
    try:
        found = import_object(name)
    except InputError as error:
        raise InputError(f"{path} was written by {name}, which cannot be imported here. {hint}") from error
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise InputError(f"{path} was written by {name}, which is not a torch.nn.Module here. {hint}")
    given: Any = {} if network is None else {"network": copy.deepcopy(network)}
    check_complete(path, checkpoint, given, hint)
    if not written_by.get("is_ours"):  # this package's modules save all arguments
        _check_arguments(path, checkpoint, found, hint)
    try:
        if not is_subclass(found, LightningModule):
            plain = found()
            plain.load_state_dict(checkpoint["state_dict"])
            return plain
        rebuilt: nn.Module = found.load_from_checkpoint(path, map_location="cpu", weights_only=True, **given)
        return rebuilt
    except (UQError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} was written by {name}, which cannot be built from the file: {reason} {hint}"
        ) from error


def _check_arguments(path: str | Path, checkpoint: dict[str, Any], kind: type[nn.Module], hint: str) -> None:
    """Reject a class with arguments that the file lacks. Their defaults may differ, for instance in an activation without weights."""
    if kind.__init__ in [base.__init__ for base in both(LightningModule)]:
        return  # no arguments
    parameters = inspect.signature(kind).parameters.values()
    saved = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    whole = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)  # the argument that takes all of them
    lacking = [
        one.name
        for one in parameters
        if one.name not in saved
        and one.name != whole
        and not (saved and one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
    ]
    if lacking:
        raise InputError(
            f"{path} was written by {kind.__module__}.{kind.__qualname__}, which cannot be built from the file: it lacks the arguments "
            f"{', '.join(lacking)}. {hint}"
        )


def _fingerprint(model: nn.Module, prefix: str, beside: dict[str, Tensor]) -> Tensor:
    """The fingerprint of the whole model, of which the network below ``prefix`` and the weights ``beside`` it are parts."""
    whole = model
    for part in reversed([part for part in prefix.split(".") if part]):
        outer = nn.Module()
        outer.add_module(part, whole)
        whole = outer
    for name, tensor in beside.items():
        owner = whole
        *path, own = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(own, tensor)
    return weights_fingerprint(whole)
