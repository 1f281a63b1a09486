"""The Neural Testbed's problems: environments whose every probability is known, to draw from and to be judged by.

A problem is a flat mapping of arrays, which ``np.savez(path, **problem)`` keeps:

- ``x_train`` [n, d] and ``y_train`` [n, 1], all that training may see;
- ``x_test_tau{k}`` [S, k, d], ``y_test_tau{k}`` [S, k, 1] and ``true_ll_tau{k}`` [S]: draws of k inputs with their labels,
  and the labels' joint log-likelihood under the environment;
- ``true_*`` and ``gen/*``: the environment itself;
- ``meta``: a JSON text with the temperature (or the noise's standard deviation) and the number of classes.

Source: Osband et al., "The Neural Testbed: Evaluating Joint Predictions", NeurIPS 2022 (arXiv 2110.04629), and their code
(``neural_testbed.generative``), whose random numbers no other library can repeat: stored problems stand in for them.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_uq.data.arrays import ArrayDataModule, read_npz
from lightning_uq.errors import InputError

TAUS = (1, 10)
"""Numbers of labels that the testbed predicts together."""

Arrays = dict[str, np.ndarray[Any, Any]]
Inputs = Literal["polyadic", "gaussian"]

_LAYERS = ("linear", "linear_1", "linear_2")


# ---------------------------------------------------------------------- inputs


def gaussian_inputs(num_draws: int, tau: int, input_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal inputs [S, tau, d].

    Example:
        >>> gaussian_inputs(3, tau=2, input_dim=4).shape
        torch.Size([3, 2, 4])
    """
    return torch.randn(num_draws, tau, input_dim, generator=generator)


def polyadic_inputs(
    num_draws: int, tau: int, input_dim: int, kappa: int = 2, *, generator: torch.Generator | None = None
) -> Tensor:
    """Inputs [S, tau, d] of which each draw repeats kappa anchors: tau choices among them, with replacement.

    Labels of one input go together, which marginals cannot tell: so these inputs show a joint prediction's worth in any
    dimension d, where tau independent ones would hardly be related.

    Source: Osband et al., "Evaluating High-Order Predictive Distributions in Deep Learning", UAI 2022 (arXiv 2202.13509).

    Example:
        >>> x = polyadic_inputs(1, tau=10, input_dim=4)
        >>> len(x[0].unique(dim=0)) <= 2
        True
    """
    anchors = torch.randn(num_draws, kappa, input_dim, generator=generator)
    chosen = torch.randint(kappa, (num_draws, tau), generator=generator)
    return anchors.gather(1, chosen.unsqueeze(2).expand(-1, -1, input_dim))


# ---------------------------------------------------------------------- classification


def draw_teacher(
    input_dim: int, num_classes: int = 2, hidden_size: int = 50, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Weights of a random MLP with two hidden ReLU layers: ``gen/linear{,_1,_2}/{w,b}``, w as [in, out].

    Weights are normal with standard deviation 1 / sqrt(fan_in), cut at two of them; the first bias is normal with standard
    deviation 1 / sqrt(d), the others are zero.

    Example:
        >>> {name: tuple(value.shape) for name, value in draw_teacher(3).items()}["gen/linear_1/w"]
        (50, 50)
    """
    sizes = [input_dim, hidden_size, hidden_size, num_classes]
    weights: dict[str, Tensor] = {}
    for layer, fan_in, fan_out in zip(_LAYERS, sizes[:-1], sizes[1:], strict=True):
        std = fan_in**-0.5
        w = torch.empty(fan_in, fan_out)
        weights[f"gen/{layer}/w"] = nn.init.trunc_normal_(w, 0.0, std, -2 * std, 2 * std, generator=generator)
        weights[f"gen/{layer}/b"] = torch.zeros(fan_out)
    weights["gen/linear/b"] = torch.randn(hidden_size, generator=generator) * input_dim**-0.5
    return weights


def teacher_logits(weights: Mapping[str, Any], x: Tensor, temperature: float) -> Tensor:
    """The teacher's logits [..., C] at inputs [..., d]: its output, divided by the temperature.

    Args:
        weights: As :func:`draw_teacher` gives them, or a stored problem's arrays.
        x: [..., d].
        temperature: T; the lower, the less random the labels.

    Example:
        >>> teacher_logits(draw_teacher(3), torch.zeros(5, 3), temperature=0.1).shape
        torch.Size([5, 2])
    """
    h = x
    for layer in _LAYERS:
        w, b = (torch.as_tensor(weights[f"gen/{layer}/{name}"]).to(x) for name in "wb")
        h = h @ w + b
        if layer != _LAYERS[-1]:
            h = h.relu()
    return h / temperature


def classification_problem(
    input_dim: int = 2,
    num_train: int = 10,
    temperature: float = 0.1,
    num_classes: int = 2,
    *,
    inputs: Inputs = "polyadic",
    kappa: int = 2,
    taus: Sequence[int] = TAUS,
    num_test: int = 1000,
    seed: int = 0,
) -> Arrays:
    """A random teacher, labels that it draws, and joint draws to be judged by. ``input_dim=2`` is the testbed's 2-D problem.

    Args:
        input_dim: d; the testbed has 2, 10 and 100.
        num_train: n; the testbed has 1, 10, 100 and 1,000 times d (in 2-D, 1 to 1,000).
        temperature: T; the testbed has 0.01, 0.1 and 0.5.
        num_classes: C; the testbed has 2.
        inputs: Test inputs; training inputs are Gaussian always.
        kappa: Anchors of the polyadic ones.
        taus: Numbers of labels drawn together.
        num_test: Number S of draws for each.
        seed: Seed of everything; the global random state is not moved.

    Raises:
        InputError: A number is out of range.

    Example:
        >>> problem = classification_problem(input_dim=10, num_train=100, num_test=50)
        >>> problem["x_train"].shape, problem["x_test_tau10"].shape, problem["true_ll_tau10"].shape
        ((100, 10), (50, 10, 10), (50,))
    """
    _check_positive(input_dim=input_dim, num_train=num_train, temperature=temperature, kappa=kappa, num_test=num_test)
    _check_positive(num_classes=num_classes - 1, tau=min(taus, default=0))
    if inputs not in ("polyadic", "gaussian"):
        raise InputError(f"Expected argument `inputs` to be 'polyadic' or 'gaussian', but got {inputs!r}.")
    generator = torch.Generator().manual_seed(seed)
    weights = draw_teacher(input_dim, num_classes, generator=generator)

    def labelled(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = teacher_logits(weights, x, temperature)
        probs = logits.softmax(-1)
        y = torch.multinomial(probs.flatten(0, -2), 1, generator=generator).reshape(*x.shape[:-1], 1)
        return logits, probs, y, F.log_softmax(logits.double(), -1).gather(-1, y).squeeze(-1)

    x = gaussian_inputs(1, num_train, input_dim, generator=generator)[0]
    _, probs, y, _ = labelled(x)
    tensors = {"x_train": x, "y_train": y.int(), "true_probs_train": probs}
    for tau in taus:
        if inputs == "polyadic":
            x = polyadic_inputs(num_test, tau, input_dim, kappa, generator=generator)
        else:
            x = gaussian_inputs(num_test, tau, input_dim, generator=generator)
        logits, probs, y, log_probs = labelled(x)
        tensors |= {f"x_test_tau{tau}": x, f"y_test_tau{tau}": y.int(), f"true_ll_tau{tau}": log_probs.sum(1).float()}
        tensors |= {f"true_logits_tau{tau}": logits, f"true_probs_tau{tau}": probs}
    meta = {"temperature": temperature, "num_classes": num_classes, "inputs": inputs, "seed": seed}
    return _as_problem({**tensors, **weights}, input_dim=input_dim, num_train=num_train, **meta)


# ---------------------------------------------------------------------- regression


def nngp_kernel(x: Tensor, other: Tensor | None = None, num_hidden: int = 2) -> Tensor:
    """Covariance of the outputs of an infinitely wide ReLU MLP: the prior that the testbed's regression draws from.

    K_0 = (x . x' + 1) / d; every hidden layer makes K = sqrt(K(x, x) K(x', x')) (sin t + (pi - t) cos t) / (2 pi) of it,
    where cos t = K(x, x') / sqrt(K(x, x) K(x', x')). That is weights of variance 1 / fan_in, a bias of variance 1 / d in
    the first layer, and none after it.

    Args:
        x: [N, d].
        other: [M, d]; ``x`` by default.
        num_hidden: Hidden layers.

    Returns:
        [N, M], in the dtype of ``x``.

    Source: Cho & Saul, NIPS 2009, for the arc-cosine map; ``neural_testbed.generative.nt_kernels``.

    Example:
        >>> nngp_kernel(torch.zeros(1, 2), num_hidden=1)  # half of 1 / d: a ReLU drops half of a Gaussian
        tensor([[0.2500]])
    """
    other = x if other is None else other
    kernel = (x @ other.T + 1) / x.shape[1]
    left, right = ((v.square().sum(1) + 1) / v.shape[1] for v in (x, other))
    for _ in range(num_hidden):
        norm = (left.unsqueeze(1) * right.unsqueeze(0)).sqrt()
        cosine = (kernel / norm).clamp(-1, 1)
        angle = cosine.acos()
        kernel = norm * ((1 - cosine.square()).sqrt() + (math.pi - angle) * cosine) / (2 * math.pi)
        left, right = left / 2, right / 2
    return kernel


def gp_posterior(x_train: Tensor, y_train: Tensor, x: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """What a Gaussian process with :func:`nngp_kernel` knows of its function after n noisy values: the exact answer.

    Args:
        x_train: [n, d].
        y_train: [n].
        x: [N, d].
        noise_std: The noise's standard deviation.

    Returns:
        Mean [N] and covariance [N, N] in float64, of the function without noise.

    Example:
        >>> mean, covariance = gp_posterior(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2), noise_std=0.5)
        >>> mean, covariance  # prior variance 1/8, noise 1/4
        (tensor([0.3333], dtype=torch.float64), tensor([[0.0833]], dtype=torch.float64))
    """
    x_train, y_train, x = x_train.double(), y_train.double(), x.double()
    gram = nngp_kernel(x_train)
    gram.diagonal().add_(noise_std**2)
    factor = torch.linalg.cholesky(gram)
    cross = torch.linalg.solve_triangular(factor, nngp_kernel(x_train, x), upper=False)
    white = torch.linalg.solve_triangular(factor, y_train.unsqueeze(1), upper=False)
    return (cross.T @ white).squeeze(1), nngp_kernel(x) - cross.T @ cross


def regression_problem(
    input_dim: int = 1,
    num_train: int = 10,
    noise_std: float = 0.1,
    *,
    taus: Sequence[int] = TAUS,
    num_test: int = 1000,
    num_inputs: int = 1000,
    ridge: float = 1e-5,
    seed: int = 0,
) -> Arrays:
    """A function drawn from the Gaussian process of an infinitely wide MLP, and noisy values of it.

    Test inputs are drawn, with replacement, from Gaussian ones at which the function was drawn with the training values.
    ``true_mean_tau{k}`` [S, k] holds the function there; ``true_ll_tau{k}`` is the noise's log-density.

    Args:
        input_dim: d; the testbed has 1, 10 and 100.
        num_train: n; the testbed has 1, 10 and 100 times d.
        noise_std: The noise's standard deviation; the testbed has 0.01, 0.1 and 1.
        taus: Numbers of values drawn together.
        num_test: Number S of draws for each.
        num_inputs: Number of inputs that test draws choose from.
        ridge: Added to the kernel's diagonal, as in the original.
        seed: Seed of everything; the global random state is not moved.

    Raises:
        InputError: A number is out of range.

    Example:
        >>> problem = regression_problem(num_train=20, num_test=50, num_inputs=100)
        >>> problem["y_train"].shape, problem["y_test_tau10"].shape
        ((20, 1), (50, 10, 1))
    """
    _check_positive(input_dim=input_dim, num_train=num_train, noise_std=noise_std, ridge=ridge)
    _check_positive(num_test=num_test, num_inputs=num_inputs, tau=min(taus, default=0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_train + num_inputs, input_dim, generator=generator, dtype=torch.float64)
    kernel = nngp_kernel(x)
    kernel.diagonal().add_(ridge)
    draw = torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
    values = (torch.linalg.cholesky(kernel) @ draw).squeeze(1)

    def noise(*shape: int) -> Tensor:
        return noise_std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"x_train": x[:num_train], "y_train": (values[:num_train] + noise(num_train)).unsqueeze(1)}
    for tau in taus:
        chosen = num_train + torch.randint(num_inputs, (num_test, tau), generator=generator)
        error = noise(num_test, tau)
        log_density = -0.5 * ((error / noise_std).square() + math.log(2 * math.pi)) - math.log(noise_std)
        tensors |= {f"x_test_tau{tau}": x[chosen], f"y_test_tau{tau}": (values[chosen] + error).unsqueeze(2)}
        tensors |= {f"true_mean_tau{tau}": values[chosen], f"true_ll_tau{tau}": log_density.sum(1)}
    tensors = {name: value.float() for name, value in tensors.items()}
    return _as_problem(tensors, input_dim=input_dim, num_train=num_train, noise_std=noise_std, seed=seed)


# ---------------------------------------------------------------------- a stored problem


@dataclass(frozen=True)
class JointDraws:
    """What a model's joint predictions are judged by.

    Attributes:
        x: Inputs [S, tau, d].
        y: Labels [S, tau].
        true_log_likelihood: Of each draw's labels, under the environment: [S].
    """

    x: Tensor
    y: Tensor
    true_log_likelihood: Tensor


class TestbedDataModule(ArrayDataModule):
    """A stored classification problem of the testbed.

    Training sees ``x_train`` and ``y_train`` alone; of ``meta`` it is told T and C, as the testbed tells its agents. The
    environment (``gen/*``, ``true_*``) is never opened, but for ``true_ll_tau{k}``, which :meth:`joint_draws` reads for the
    evaluation. There is no validation data. The test data are the draws of single labels.

    An epoch is ``num_steps`` batches, cut out of one shuffle of the data after the other, so that a batch may be larger than
    the data.

    Args:
        path: The ``.npz`` file; its arrays are those of :func:`classification_problem`.
        seed: Seed of the order of the training samples.
        batch_size: Samples a training batch.
        num_steps: Training batches an epoch.

    Raises:
        InputError: The file cannot be read, an array is missing or holds what it must not; the message names both.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "problem.npz"
        >>> np.savez(path, **classification_problem(input_dim=3, num_train=20, num_test=50))
        >>> data = TestbedDataModule(str(path))
        >>> data.num_features, data.num_classes, data.num_train, data.temperature
        (3, 2, 20, 0.1)
        >>> len(data.train_dataloader()), data.joint_draws(10).x.shape
        (1000, torch.Size([50, 10, 3]))
    """

    __test__ = False  # its name makes pytest think so
    name = "testbed"

    def __init__(self, path: str, seed: int = 0, batch_size: int = 100, num_steps: int = 1000) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        if num_steps < 1:
            raise InputError(f"Expected argument `num_steps` to be at least 1, but got {num_steps}.")
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
        self._classes = tuple(range(self._num_classes))
        tau = min(self.taus)
        draws = read_npz(self.path, (f"x_test_tau{tau}", f"y_test_tau{tau}"))
        x_test, y_test = self._labelled(draws, *draws, ndim=3)
        self._check_dimension(f"x_test_tau{tau}", x_test, x.shape[1])
        # Of several labels that belong together only the first is a test sample of its own.
        parts = {"train": (x, y), "val": (x[:0], y[:0]), "test": (x_test[:, 0], y_test[:, 0]), "ood": (x[:0], y[:0])}
        self._parts = {part: TensorDataset(*tensors) for part, tensors in parts.items()}

    @property
    def temperature(self) -> float:
        """T: the environment's logits are divided by it."""
        self.setup()
        return self._number("temperature", 0)

    @property
    def taus(self) -> tuple[int, ...]:
        """Which of :data:`TAUS` the file has draws for.

        Raises:
            InputError: None of them.
        """
        found = read_npz(self.path, (), tuple(f"true_ll_tau{tau}" for tau in TAUS))
        if not found:
            raise InputError(
                f"Expected {self.path} to be a testbed problem, with arrays such as x_test_tau1, y_test_tau1 and "
                "true_ll_tau1, but it holds none."
            )
        return tuple(tau for tau in TAUS if f"true_ll_tau{tau}" in found)

    def joint_draws(self, tau: int) -> JointDraws:
        """The draws of ``tau`` labels together.

        Raises:
            InputError: The file has none, or they do not fit together.
        """
        self.setup()
        names = (f"x_test_tau{tau}", f"y_test_tau{tau}", f"true_ll_tau{tau}")
        arrays = read_npz(self.path, names)
        x, y = self._labelled(arrays, *names[:2], ndim=3)
        self._check_dimension(names[0], x, self.num_features)
        log_likelihood = torch.from_numpy(arrays[names[2]])
        if x.shape[1] != tau or log_likelihood.shape != x.shape[:1] or not log_likelihood.is_floating_point():
            raise InputError(
                f"Expected {self.path} to hold {names[0]} of shape [S, {tau}, d] and {names[2]} of shape [S], numbers, but "
                f"got {list(x.shape)} and {list(log_likelihood.shape)}."
            )
        return JointDraws(x, y, log_likelihood)

    def train_dataloader(self) -> DataLoader[Any]:
        """``num_steps`` batches of ``batch_size``, in an order that follows the seed."""
        train = self.dataset("train")
        sampler = _Shuffles(len(train), self.num_steps * self.batch_size, self.seed)
        return DataLoader(train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]  # Lightning takes any collection
        """None: the testbed's agents stop after a fixed number of steps."""
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """The draws of single labels."""
        return DataLoader(self.dataset("test"), batch_size=max(self.batch_size, 1000))

    def _read_meta(self) -> None:
        text = read_npz(self.path, ("x_train", "y_train", "meta"))["meta"]
        try:
            meta = json.loads(str(text))
        except ValueError as error:
            raise InputError(f"Expected array `meta` of {self.path} to be a JSON text, but: {error}.") from error
        if not isinstance(meta, dict):
            raise InputError(f"Expected array `meta` of {self.path} to be a JSON object, but got {meta!r}.")
        self._meta = meta
        self._num_classes = int(self._number("num_classes", 2))

    def _number(self, name: str, least: float) -> float:
        value: Any = self._meta.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not (value >= least > 0 or value > least == 0):
            what = "above 0" if least == 0 else f"of at least {least}"
            raise InputError(f"Expected `meta` of {self.path} to give `{name}` as a number {what}, but got {value!r}.")
        return float(value)

    def _labelled(self, arrays: Arrays, x_name: str, y_name: str, *, ndim: int) -> tuple[Tensor, Tensor]:
        x, y = arrays[x_name], arrays[y_name]
        if x.dtype.kind not in "fiub" or x.ndim != ndim or x.size == 0:
            axes = "[n, d]" if ndim == 2 else "[S, tau, d]"
            raise InputError(
                f"Expected array `{x_name}` of {self.path} to hold numbers {axes}, but got {x.dtype} of shape {list(x.shape)}."
            )
        if y.shape == (*x.shape[:-1], 1):
            y = y[..., 0]
        if y.dtype.kind not in "iu" or y.shape != x.shape[:-1]:
            raise InputError(
                f"Expected array `{y_name}` of {self.path} to hold integer labels {list(x.shape[:-1])}, but got {y.dtype} of "
                f"shape {list(y.shape)}."
            )
        if int(y.min()) < 0 or int(y.max()) >= self._num_classes:
            raise InputError(
                f"Expected array `{y_name}` of {self.path} to hold labels in [0, {self._num_classes}), but got "
                f"{int(y.min())} to {int(y.max())}."
            )
        features = torch.from_numpy(x.astype(np.float32))
        if not bool(features.isfinite().all()):
            raise InputError(f"Expected array `{x_name}` of {self.path} to be finite, but it holds NaN or infinity.")
        return features, torch.from_numpy(y.astype(np.int64))

    def _check_dimension(self, name: str, x: Tensor, input_dim: int) -> None:
        if x.shape[-1] != input_dim:
            raise InputError(
                f"Expected array `{name}` of {self.path} to hold inputs of dimension {input_dim}, as x_train does, but got "
                f"{x.shape[-1]}."
            )


class _Shuffles(Sampler[int]):
    """Positions of one shuffle of n samples after the other, ``length`` in all."""

    def __init__(self, num_samples: int, length: int, seed: int) -> None:
        self.num_samples = num_samples
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.length
        while left > 0:
            yield from torch.randperm(self.num_samples, generator=generator)[:left].tolist()
            left -= self.num_samples


def _as_problem(tensors: Mapping[str, Tensor], **meta: Any) -> Arrays:
    arrays: Arrays = {name: value.numpy() for name, value in tensors.items()}
    return {**arrays, "meta": np.array(json.dumps(meta))}


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0 or not math.isfinite(number):
            least = "at least 2" if name == "num_classes" else "above 0"
            raise InputError(f"Expected argument `{name}` to be {least}, but got {number + (name == 'num_classes')}.")
