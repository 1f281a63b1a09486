"""Reading a batch: its input, target, weights and positions, and which of its rows count."""

import copy
from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_uq.data.indexed import IndexedSample
from lightning_uq.errors import InputError, without_period
from lightning_uq.guessing import report_guess

TARGET_NAMES = ("target", "targets", "label", "labels", "y", "mask")
"""Keys under which a batch may hold its target."""


def unpack_batch(
    batch: Any, signature: Signature | None = None, *, allows_whole: bool = False, about: object | None = None
) -> tuple[Any, Tensor | None]:
    """Input and target of a batch: ``(x, y)`` or longer, a bare ``x``, or a mapping with ``input`` (and ``target``).

    Other keys are read if only one reading is plausible, and that reading is reported once. The target's key may be ``target``,
    ``targets``, ``label``, ``labels``, ``y`` or ``mask``, in a mapping, a named tuple or an object such as a graph. A mapping's input
    is its only other tensor, or the arguments of the network's ``forward``. In three or more elements, the second is the target.

    Args:
        batch: The batch.
        signature: The signature of the network's ``forward``.
        allows_whole: Whether a mapping that cannot be read is an input as a whole, without a target.
        about: The module that the batch is for. Guesses are reported once per module.

    Raises:
        InputError: The batch is a mapping that cannot be read, or an empty sequence.

    Example:
        >>> unpack_batch({"input": torch.zeros(2, 3)})[1] is None
        True
        >>> unpack_batch({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1]), "path": ["a", "b"]})[1]
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        found = _input_and_target(batch, signature, about)
        if found is not None:
            return found
        if allows_whole:
            return batch, None
        raise InputError(
            f"A mapping batch must hold `input` (and `target`), but its keys are {sorted(map(str, batch))}. Pass `unpack_batch`, a "
            "function that returns the input and the target, for example `lambda batch: (batch['x'], batch['y'])`."
        )
    if isinstance(batch, list | tuple):
        if not batch:
            raise InputError("A batch must hold an input, but it is an empty sequence.")
        name = _target_name(getattr(batch, "_fields", ()))
        if name is not None:
            return batch[0], _target_attribute(batch, name, about)
        if len(batch) > 2:
            _report_second(batch, about)
        return batch[0], batch[1] if len(batch) > 1 else None
    if isinstance(batch, Tensor):
        return batch, None
    name = _target_name([name for name in TARGET_NAMES if isinstance(getattr(batch, name, None), Tensor)])
    return batch, None if name is None else _target_attribute(batch, name, about)


def _input_and_target(
    batch: Mapping[Any, Any], signature: Signature | None, about: object | None
) -> tuple[Any, Tensor | None] | None:
    """Input and target of a mapping; None if its keys are ambiguous."""
    target = "target" if "target" in batch else _target_name([key for key, v in batch.items() if isinstance(v, Tensor)])
    y = None if target is None else batch[target]
    if "input" in batch:
        if target not in (None, "target"):
            _report_batch({"input": batch["input"]}, target, y, about)
        return batch["input"], y
    several = [key for key in batch if isinstance(key, str) and key in TARGET_NAMES]
    if len(several) > 1 and target is None:
        return None
    others = {key: value for key, value in batch.items() if key not in (target, "index", "weight")}
    tensors = [key for key, value in others.items() if isinstance(value, Tensor)]
    parameters = {} if signature is None else signature.parameters
    named = [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL]
    kinds = {p.kind for p in parameters.values()}
    takes_all = Parameter.VAR_KEYWORD in kinds and Parameter.VAR_POSITIONAL not in kinds
    if len(tensors) == 1 and (tensors[0] not in named or tensors[0] == named[0]):
        _report_batch({tensors[0]: others[tensors[0]]}, target, y, about)
        return others[tensors[0]], y
    taken = {key: value for key, value in others.items() if isinstance(key, str) and (takes_all or key in named)}
    needed = [p.name for p in parameters.values() if p.name in named and p.default is p.empty]
    if not taken or not set(needed) <= set(taken):
        return None
    _report_batch(taken, target, y, about)
    return taken, y


def _target_name(names: Iterable[Any]) -> str | None:
    """The one name among these that a target has; None if there is none, or if there are several."""
    found = [name for name in names if isinstance(name, str) and name.lower() in TARGET_NAMES]
    return found[0] if len(found) == 1 else None


def _target_attribute(batch: Any, name: str, about: object | None) -> Any:
    if getattr(batch, "_fields", ("", name))[1:2] != (name,):
        report_guess(
            f"The target of a {type(batch).__name__} is read from its `{name}`. If it is another, pass `unpack_batch`, a function "
            "that returns the input and the target.",
            about,
        )
    return getattr(batch, name)


def _report_batch(inputs: Mapping[str, Any], target: str | None, y: Any, about: object | None) -> None:
    """Report how a mapping is read, and warn of labels that seem to be meant for the next token."""
    names = list(inputs)
    one = f"batch[{names[0]!r}]"
    x = one if len(names) == 1 else "{key: batch[key] for key in [...]}"
    is_first = report_guess(
        f"Batches are read as input {', '.join(map(repr, names))} and {'no target' if target is None else f'target {target!r}'}. If they mean "
        f"something else, pass `unpack_batch`, for example `lambda batch: ({x}, {None if target is None else f'batch[{target!r}]'})`.",
        about,
    )
    if is_first and _repeats_tokens(y, inputs.get("input_ids")):
        report_guess(
            f"{target!r} repeats `input_ids`, as for a causal language model, whose logits at a token are about the next one. If this is one, "
            "pass `unpack_batch=lightning_uq.data.next_token_batch`: otherwise a fit or a metric compares them with the token itself.",
            about,
            is_doubtful=True,
        )


def _repeats_tokens(y: Any, tokens: Any) -> bool:
    """Whether labels [B, T] are the tokens themselves, apart from negative labels, which do not count."""
    if not (isinstance(y, Tensor) and isinstance(tokens, Tensor)) or y.ndim < 2 or y.shape != tokens.shape:
        return False
    counted = y >= 0
    return bool(counted.any()) and torch.equal(y[counted], tokens[counted])


def _report_second(batch: Any, about: object | None) -> None:
    """Report that the second of several elements is read as the target; warn if a later one could be the target too."""
    x, y, *others = batch
    rows = num_rows(x, others)
    is_plain = isinstance(y, Tensor) and y.ndim > 0 and len(y) == rows and not y.is_floating_point()
    labels = [i for i, other in enumerate(others, 2) if _is_label(other, rows)]
    is_first = report_guess(
        f"Batches have {len(batch)} elements, of which the first is read as the input and the second as the target. If they mean "
        f"something else, pass `unpack_batch`, for example `lambda batch: (batch[0], batch[{labels[0] if labels else 2}])`.",
        about,
        is_doubtful=bool(labels) and not is_plain,
    )
    # The second may be lengths. Numbers that are all different, such as the samples' positions, or all the same are no labels.
    rival = (
        next((i for i in labels if 1 < len(batch[i].unique()) < len(batch[i])), None) if is_first and is_plain else None
    )
    if rival is not None:
        report_guess(
            f"Batches hold integers per row in element {rival} too, which repeat as labels do, but element 1 is read as the target. If it is not, pass "
            f"`unpack_batch`, for example `lambda batch: (batch[0], batch[{rival}])`.",
            about,
            is_doubtful=True,
        )


def _is_label(value: Any, rows: int | None) -> bool:
    """Whether an element of a batch could be its labels [B]."""
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    return whole and list(value.shape) in ([rows], [rows, 1])


def sample_index(batch: Any) -> Tensor | None:
    """The rows' positions in the data set, if the batch carries them: from the key ``index`` or ``data.Indexed``."""
    index = batch.get("index") if isinstance(batch, Mapping) else getattr(batch, "index", None)
    known = isinstance(batch, Mapping | IndexedSample)
    return index if known and isinstance(index, Tensor) and not index.is_floating_point() else None


def sample_weights(batch: Any) -> Tensor | None:
    """The samples' weights in the training loss [B], if the batch is a mapping with the key ``weight``.

    Raises:
        InputError: A weight is negative or not finite, or the number of weights is not the number of samples.

    Example:
        >>> sample_weights({"input": torch.zeros(2, 3), "weight": torch.tensor([1.0, 0.5])})
        tensor([1.0000, 0.5000])
    """
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.dtype == torch.bool:
        got = f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"`weight` of a batch must be numbers [B], one per sample, but it is {got}.")
    usable = weight.isfinite() & (weight >= 0)
    if not bool(usable.all()):
        raise InputError(
            f"`weight` of a batch must be finite and at least 0, but it holds {weight[~usable][0].item():g}."
        )
    return weight


def known_sample_index(batch: Any, argument: str) -> Tensor:
    """The samples' positions in the data set; the error for a batch without positions names ``argument``.

    Raises:
        InputError: The batch has no positions.
    """
    index = sample_index(batch)
    if index is None:
        raise InputError(
            f"{argument} needs the samples' positions, but the training batches have none. Wrap the training set as "
            "`lightning_uq.data.Indexed(dataset)`, or give the batch a key `index`."
        )
    return index


def num_rows(x: Any, y: Any = None) -> int | None:
    """Number of rows of a batch: of the input's first tensor, else of the target. None if neither has rows, as for a lone graph.

    Example:
        >>> num_rows([torch.zeros(3, 2)]), num_rows(object(), torch.zeros(4)), num_rows(object())
        (3, 4, None)
    """
    for leaf in torch.utils._pytree.tree_leaves([dict(x) if isinstance(x, Mapping) else x, y]):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    return None


def own_batch(batch: Any) -> Any:
    """A copy of a batch with its own containers, objects and tensors. Two references to one tensor stay one tensor.

    Raises:
        InputError: The batch holds something that cannot be copied.

    Example:
        >>> batch = {"x": torch.ones(2), "name": ["a", "b"]}
        >>> own = own_batch(batch)
        >>> own.pop("x").zero_()
        tensor([0., 0.])
        >>> batch["x"]
        tensor([1., 1.])
    """
    # `deepcopy` of a tensor slice would copy the whole storage.
    leaves = torch.utils._pytree.tree_leaves(batch)
    clones = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)}
    try:
        return copy.deepcopy(batch, clones)
    except Exception as error:
        raise InputError(
            f"A batch of type {type(batch).__name__} cannot be copied: {without_period(error)}. The copy protects it from steps that "
            "change it in place. Return tensors in plain containers from the data set, or define `__deepcopy__`."
        ) from error


def check_not_empty(trainer: Trainer, stage: str) -> None:
    """Raise an error for an empty loader at the end of a stage (``"fit"``, ``"validate"``, ``"test"``, ``"predict"``).

    Lightning itself ends such a stage silently. Iterable data sets on several ranks are not checked, because a rank may have
    no rows.

    Raises:
        InputError: No loader of the stage yielded a batch.
    """
    loop: Any
    argument, limit, numbers, loop = {
        "fit": ("train_dataloaders", trainer.limit_train_batches, [trainer.num_training_batches], trainer.fit_loop),
        "validate": ("dataloaders", trainer.limit_val_batches, trainer.num_val_batches, trainer.validate_loop),
        "test": ("dataloaders", trainer.limit_test_batches, trainer.num_test_batches, trainer.test_loop),
        "predict": ("dataloaders", trainer.limit_predict_batches, trainer.num_predict_batches, trainer.predict_loop),
    }[stage]
    if stage == "fit":  # there may have been no epoch, as with max_epochs=0
        read = loop.epoch_loop.batch_progress.total.ready or not loop.epoch_progress.total.ready
    else:
        read = loop.batch_progress.current.ready
    if limit != 0 and (not any(numbers) or (trainer.world_size == 1 and not read)):
        raise InputError(f"`{argument}` must hold samples, but it is empty.")


def sampler_of(loader: Any) -> Any:
    """The sampler of a loader's rows, or None."""
    return getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)


def distributed_rows(loader: Any, batch_idx: int, size: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Positions [size] of a batch's rows in the data set, and a mask of the rows that are not padding.

    Lightning's evaluation sampler repeats rows until all ranks have the same number: 5 samples on 2 ranks count as 6. Row j of
    rank r has position r + j R in the data set, so it is a repeat if that is at least the set's length. The sampler itself is
    not changed, so ranks keep equal numbers of batches and a user's own collectives still match.

    Returns:
        ``(position, keep)``, or ``(None, None)`` for a loader without a distributed sampler.
    """
    sampler = sampler_of(loader)
    if not isinstance(sampler, DistributedSampler):
        return None, None
    per_batch = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    if per_batch is None:
        raise InputError(
            "The loader has no batch size, so padded rows cannot be recognised. Use a DataLoader with `batch_size`."
        )
    drawn = min(per_batch, max(0, len(sampler) - batch_idx * per_batch))
    if size != drawn:
        raise InputError(
            f"A batch of {drawn} samples gave {size} rows, so the padding rows of the distributed sampler cannot be recognised. Split the "
            "data between ranks yourself, with `Trainer(use_distributed_sampler=False)`."
        )
    position = sampler.rank + (batch_idx * per_batch + torch.arange(size)) * sampler.num_replicas
    return position, position < len(sampler.dataset)  # type: ignore[arg-type]


def unpadded_rows(loader: Any, batch_idx: int, size: int) -> Tensor | None:
    """Mask [size] of the rows that are not padding of a distributed sampler; None if all rows count."""
    _, keep = distributed_rows(loader, batch_idx, size)
    return None if keep is None or bool(keep.all()) else keep
