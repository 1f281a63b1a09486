"""Checks whether a module's own steps call its ``forward`` with the input that is read from their batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_uq._lightning import is_compiled
from lightning_uq.batches import TARGET_NAMES
from lightning_uq.errors import InputError
from lightning_uq.guessing import report_guess
from lightning_uq.running.logits import LogitReader, is_uncertainty_module

_STEPS = 5
"""The number of steps to watch for a call of ``self(...)``, since those of a sanity check may not have one."""


class StepInput:
    """Watches one step of a foreign module, and warns if it calls ``forward`` with an input other than the one that is read.

    A step that scales its input, such as ``self((x - 3) / 10)``, trains a network for scaled inputs. A fit or a score on ``x``
    would not match the user's predictions. A step that does not call ``self(...)`` shows nothing.

    Example:
        >>> watch, x = StepInput(), torch.ones(2, 1)
        >>> network = nn.Linear(1, 3)
        >>> watch.start(network, x, None)
        >>> _ = network(x)
        >>> watch.end(network, "test_step")
    """

    def __init__(self) -> None:
        self._left = _STEPS
        self._hook: RemovableHandle | None = None
        self._read: list[Tensor] = []
        self._target: list[Tensor] = []
        self._matches: list[bool] = []

    def start(self, model: nn.Module, x: Any, target: Any) -> None:
        """Start watching a step, with the input and target read from its batch. Does nothing after a conclusive step, or after the first steps."""
        self.drop()
        if not self._left or is_compiled(model):  # a compiled step would keep the hook
            return
        self._read, self._target = [t.clone() for t in _tensors(x)], _tensors(target)
        if self._read:
            self._hook = model.register_forward_pre_hook(self._compare, with_kwargs=True)

    def start_reading(self, model: nn.Module, batch: Any, reader: LogitReader) -> None:
        """Start watching a step if a reader reads the input of a foreign module directly."""
        if reader.predict_fn is None and not is_uncertainty_module(model):
            try:
                x, target = reader.unpack(model, batch)
            except InputError:  # a later reader of the batch raises the error
                return
            # A step may pass labels on to a network that computes its loss, while `unpack_batch` makes other targets of them.
            labels = [batch.get(name) for name in TARGET_NAMES] if isinstance(batch, Mapping) else []
            # The second of three or more elements is only supposed to be the target. If `forward` takes it, it is an input.
            supposed = isinstance(batch, list | tuple) and len(batch) > 2 and reader.unpack_batch is None
            self.start(model, x, [[] if supposed else target, labels])

    def end(self, model: nn.Module, step: str) -> None:
        """Compare after the step, named ``step``."""
        matches, watched = self._matches, self._hook is not None
        self.drop()
        self._left = 0 if matches else self._left - watched
        if matches and not any(matches):
            name = type(model).__name__
            report_guess(
                f"The `{step}` of {name} calls its `forward` with an input other than the one read from the batch, so fits and "
                f"scores use another input than {name} does. Pass `unpack_batch`, a function that returns that input (several "
                "arguments as a mapping from their names) and the target, or pass `predict_fn`.",
                model,
                is_doubtful=True,
            )

    def drop(self) -> None:
        """Stop watching, for instance after an error in the step."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._read, self._target, self._matches = None, [], [], []

    def _compare(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 and isinstance(args[1], int):  # a strategy calls the step through `forward`
            return
        given = _tensors([args, kwargs])
        rest = [t for t in given if not _has(self._read, t)]
        self._matches.append(all(_has(given, t) for t in self._read) and all(_has(self._target, t) for t in rest))


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of an input; those inside an object, such as a graph, are not found."""
    plain = torch.utils._pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, tree)
    return [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor)]


def _has(tensors: list[Tensor], wanted: Tensor) -> bool:
    """Whether one of the tensors holds the same numbers, in any shape and dtype."""
    return any(
        one.numel() == wanted.numel()
        and torch.allclose(one.flatten().double(), wanted.flatten().to(one.device).double(), 0, 0, equal_nan=True)
        for one in tensors
    )
