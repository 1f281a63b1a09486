"""A stored problem of the Neural Testbed, with its data for training and for judging."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_uq.data.arrays import ArrayDataModule
from lightning_uq.data.npz import read_npz
from lightning_uq.errors import InputError, without_period

TAUS = (1, 10, 100)
"""The numbers of labels that the testbed predicts together."""

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class JointDraws:
    """Draws for judging a model's joint predictions.

    Attributes:
        x: Inputs [S, tau, d].
        y: Labels [S, tau].
        true_log_likelihood: The log-likelihood of each draw's labels under the environment [S].
    """

    x: Tensor
    y: Tensor
    true_log_likelihood: Tensor


class TestbedDataModule(ArrayDataModule):
    """A stored classification problem of the testbed.

    Training uses only ``x_train`` and ``y_train``, and T and C from ``meta``, which the testbed tells its agents. The
    environment (``gen/*``, ``true_*``) is never read, except for ``true_ll_tau{k}``, which :meth:`joint_draws` reads for the
    evaluation. There are no validation data. The test data are the draws of single labels.

    An epoch is ``num_steps`` batches, taken from consecutive shuffles of the data, so a batch may be larger than
    the data.

    Args:
        path: The ``.npz`` file; its arrays are those of :mod:`lightning_uq.data.testbed`.
        seed: Seed of the order of the training samples.
        batch_size: Samples per training batch.
        num_steps: Training batches per epoch.

    Raises:
        InputError: From ``setup`` on: the file cannot be read, or an array is missing or invalid; the message names both.

    Example:
        >>> import tempfile
        >>> from lightning_uq.data import classification_problem, save_problem
        >>> path = Path(tempfile.mkdtemp()) / "problem.npz"
        >>> save_problem(classification_problem(input_dim=3, num_train=20, num_test=50), path)
        >>> data = TestbedDataModule(str(path))
        >>> data.num_features, data.num_classes, data.num_train, data.temperature
        (3, 2, 20, 0.1)
        >>> len(data.train_dataloader()), data.joint_draws(10).x.shape
        (1000, torch.Size([50, 10, 3]))
    """

    __test__ = False  # pytest would collect it because of its name
    name = "testbed"

    def __init__(self, path: str, seed: int = 0, batch_size: int = 100, num_steps: int = 1000) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        if num_steps < 1:
            raise InputError(f"`num_steps` must be at least 1, but it is {num_steps}.")
        self.path = Path(path)
        self.num_steps = num_steps
        self._meta: dict[str, Any] = {}
        self._num_classes = 0

    def load_arrays(self) -> tuple[Tensor, Tensor]:
        """The training inputs [n, d] and labels [n]."""
        self._read_meta()
        arrays = read_npz(self.path, ("x_train", "y_train"))
        return self._labelled(arrays, "x_train", "y_train", ndim=2)

    def setup(self, stage: str | None = None) -> None:
        """Load and check the file, once."""
        if self._parts:
            return
        x, y = self.load_arrays()
        self._task = "classification"
        self._classes = tuple(range(self._num_classes))
        tau = min(self.taus)
        draws = read_npz(self.path, (f"x_test_tau{tau}", f"y_test_tau{tau}"))
        x_test, y_test = self._labelled(draws, *draws, ndim=3)
        self._check_dimension(f"x_test_tau{tau}", x_test, x.shape[1])
        # Only the first of several joint labels is a test sample.
        parts = {"train": (x, y), "val": (x[:0], y[:0]), "test": (x_test[:, 0], y_test[:, 0]), "ood": (x[:0], y[:0])}
        for tau in self.taus:  # to raise errors before the training rather than after it
            self._read_draws(tau, x.shape[1])
        self._test_rows = torch.arange(len(x_test))
        self._parts = {part: TensorDataset(*tensors) for part, tensors in parts.items()}

    @property
    def temperature(self) -> float:
        """T, by which the environment's logits are divided."""
        self.setup()
        return self._number("temperature", 0)

    @property
    def taus(self) -> tuple[int, ...]:
        """The numbers of :data:`TAUS` for which the file has draws.

        Raises:
            InputError: The file has no draws.
        """
        found = read_npz(self.path, (), tuple(f"true_ll_tau{tau}" for tau in TAUS))
        if not found:
            raise InputError(
                f"{self.path} must be a testbed problem, with arrays such as x_test_tau1, y_test_tau1 and "
                f"true_ll_tau1 (or of {TAUS[1]} or {TAUS[2]} labels), but it holds none."
            )
        return tuple(tau for tau in TAUS if f"true_ll_tau{tau}" in found)

    def joint_draws(self, tau: int) -> JointDraws:
        """The draws of ``tau`` labels together.

        Raises:
            InputError: The file has none, or their shapes do not match.
        """
        self.setup()
        return self._read_draws(tau, self.num_features)

    def train_dataloader(self) -> DataLoader[Any]:
        """``num_steps`` batches of ``batch_size``, in an order determined by the seed."""
        train = self.dataset("train")
        sampler = _Shuffles(len(train), self.num_steps * self.batch_size, self.seed)
        return DataLoader(train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]  # Lightning takes any collection
        """No loaders, since the testbed's agents stop after a fixed number of steps."""
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """The draws of single labels."""
        return DataLoader(self.dataset("test"), batch_size=max(self.batch_size, 1000))

    def _read_meta(self) -> None:
        text = read_npz(self.path, ("x_train", "y_train", "meta"))["meta"]
        try:
            meta = json.loads(str(text))
        except ValueError as error:
            raise InputError(
                f"Array `meta` of {self.path} must be a JSON text, but: {without_period(error)}."
            ) from error
        if not isinstance(meta, dict):
            raise InputError(f"Array `meta` of {self.path} must be a JSON object, but it is {meta!r}.")
        self._meta = meta
        self._num_classes = int(self._number("num_classes", 2))

    def _number(self, name: str, least: float) -> float:
        value: Any = self._meta.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not (value >= least > 0 or value > least == 0):
            what = "above 0" if least == 0 else f"of at least {least}"
            raise InputError(f"`meta` of {self.path} must have `{name}` as a number {what}, but it is {value!r}.")
        return float(value)

    def _labelled(self, arrays: Arrays, x_name: str, y_name: str, *, ndim: int) -> tuple[Tensor, Tensor]:
        x, y = arrays[x_name], arrays[y_name]
        if x.dtype.kind not in "fiub" or x.ndim != ndim or x.size == 0:
            axes = "[n, d]" if ndim == 2 else "[S, tau, d]"
            raise InputError(
                f"Array `{x_name}` of {self.path} must hold numbers {axes}, but it is {x.dtype} of shape {list(x.shape)}."
            )
        if y.shape == (*x.shape[:-1], 1):
            y = y[..., 0]
        if y.dtype.kind not in "iu" or y.shape != x.shape[:-1]:
            raise InputError(
                f"Array `{y_name}` of {self.path} must hold integer labels {list(x.shape[:-1])}, but it is {y.dtype} of "
                f"shape {list(y.shape)}."
            )
        if int(y.min()) < 0 or int(y.max()) >= self._num_classes:
            raise InputError(
                f"Array `{y_name}` of {self.path} must hold labels in [0, {self._num_classes}), but it holds "
                f"{int(y.min())} to {int(y.max())}."
            )
        features = torch.from_numpy(x.astype(np.float32))
        if not bool(features.isfinite().all()):
            raise InputError(f"Array `{x_name}` of {self.path} must be finite, but it holds NaN or infinity.")
        return features, torch.from_numpy(y.astype(np.int64))

    def _read_draws(self, tau: int, input_dim: int) -> JointDraws:
        names = (f"x_test_tau{tau}", f"y_test_tau{tau}", f"true_ll_tau{tau}")
        arrays = read_npz(self.path, names)
        x, y = self._labelled(arrays, *names[:2], ndim=3)
        self._check_dimension(names[0], x, input_dim)
        log_likelihood = torch.from_numpy(arrays[names[2]])
        if x.shape[1] != tau or log_likelihood.shape != x.shape[:1] or not log_likelihood.is_floating_point():
            raise InputError(
                f"{self.path} must hold {names[0]} of shape [S, {tau}, d] and {names[2]} of shape [S], numbers, but "
                f"its shape is {list(x.shape)} and {list(log_likelihood.shape)}."
            )
        return JointDraws(x, y, log_likelihood)

    def _check_dimension(self, name: str, x: Tensor, input_dim: int) -> None:
        if x.shape[-1] != input_dim:
            raise InputError(
                f"Array `{name}` of {self.path} must hold inputs of dimension {input_dim}, as x_train does, but it holds "
                f"{x.shape[-1]}."
            )


class _Shuffles(Sampler[int]):
    """The positions of consecutive shuffles of n samples, ``length`` in total."""

    def __init__(self, num_rows: int, length: int, seed: int) -> None:
        self.num_rows = num_rows
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.length
        while left > 0:
            yield from torch.randperm(self.num_rows, generator=generator)[:left].tolist()
            left -= self.num_rows
