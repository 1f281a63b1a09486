"""Samples that carry their position, as a bootstrap needs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from lightning_uq.errors import InputError


class IndexedSample(NamedTuple):
    """A sample with its position, or, when collated, a batch of them. The third item of any other tuple is never read as a position."""

    input: Any
    target: Any
    index: Any


class Indexed(Dataset[Any]):
    """A data set whose items carry their position: ``(x, y)`` becomes an :class:`IndexedSample`, and a mapping gains ``index``.

    Wrap the whole data set before it is split or shuffled, so that a sample keeps its number.

    Args:
        dataset: A map-style data set of ``(x, y)`` or of mappings.

    Raises:
        InputError: ``dataset`` has no length, or an item is neither a pair nor a mapping without ``index``.

    Example:
        >>> Indexed([("a", 0), ("b", 1)])[1]
        IndexedSample(input='b', target=1, index=1)
        >>> Indexed([{"input": "a", "target": 0}])[0]
        {'input': 'a', 'target': 0, 'index': 0}
    """

    def __init__(self, dataset: Any) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise InputError(
                f"`dataset` must be map-style, with a length and items by position, but it is a "
                f"{type(dataset).__name__}. For a stream, yield the index with the samples."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        position = int(index) % len(self)
        if isinstance(item, Mapping) and "index" not in item:
            return {**item, "index": position}
        if isinstance(item, list | tuple) and len(item) == 2:
            return IndexedSample(item[0], item[1], position)
        raise InputError(
            f"The items of `dataset` must be `(x, y)`, or mappings without the key `index`, but item {position} is "
            f"{_describe(item)}."
        )


def _describe(item: object) -> str:
    if isinstance(item, list | tuple):
        return f"a {type(item).__name__} of length {len(item)}"
    return "a mapping with `index`" if isinstance(item, Mapping) else f"a {type(item).__name__}"
