"""The Neural Testbed's problems: environments with known probabilities, for training and judging agents.

A problem is a flat mapping of arrays, which :func:`save_problem` writes to a file:

- ``x_train`` [n, d] and ``y_train`` [n, 1], the only data for training;
- ``x_test_tau{k}`` [S, k, d], ``y_test_tau{k}`` [S, k, 1] and ``true_ll_tau{k}`` [S]: draws of k inputs with their labels,
  and the labels' joint log-likelihood under the environment;
- ``true_*`` and ``gen/*``: the environment itself;
- ``meta``: a JSON text with the temperature (or the noise's standard deviation) and the number of classes.

Source: Osband et al., "The Neural Testbed: Evaluating Joint Predictions", NeurIPS 2022 (arXiv 2110.04629), and their code
(``neural_testbed.generative``), whose random numbers other libraries cannot reproduce. Stored problems replace them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_uq.data.environments import (
    Inputs,
    draw_from_gp,
    draw_inputs,
    draw_teacher,
    gaussian_inputs,
    teacher_logits,
)
from lightning_uq.data.testbed_module import Arrays
from lightning_uq.errors import InputError
from lightning_uq.writing import replacing

_MAX_ROUNDS = 30


def classification_problem(
    input_dim: int = 2,
    num_train: int = 10,
    temperature: float = 0.1,
    num_classes: int = 2,
    *,
    inputs: Inputs = "polyadic",
    kappa: int = 2,
    rejected_classes: int = 0,
    reject_prob: float = 1.0,
    taus: Sequence[int] = (1, 10),
    num_test: int = 1000,
    seed: int = 0,
) -> Arrays:
    """A random teacher, labels drawn from it, and joint draws for judging. ``input_dim=2`` is the testbed's 2-D problem.

    With ``rejected_classes``, the training data are shifted: some randomly drawn classes are rare or absent in them, but have their
    usual frequency in the test data. (The original draws those classes with replacement, so there may be fewer of them.)

    Args:
        input_dim: d; the testbed has 2, 10 and 100.
        num_train: n; the testbed has 1, 10, 100 and 1,000 times d (in 2-D, 1 to 1,000).
        temperature: T; the testbed has 0.01, 0.1 and 0.5.
        num_classes: C; the testbed has 2.
        inputs: Test inputs; training inputs are always Gaussian.
        kappa: Number of anchors of the polyadic inputs.
        rejected_classes: Number of classes that the shift removes from the training data.
        reject_prob: Probability that a training sample of such a class is rejected and replaced by another draw.
        taus: Numbers of labels drawn together.
        num_test: Number S of draws for each tau.
        seed: Seed of everything; the global random state does not change.

    Raises:
        InputError: A number is out of range, or nearly all draws of the teacher are rejected.

    Example:
        >>> problem = classification_problem(input_dim=10, num_train=100, num_test=50)
        >>> problem["x_train"].shape, problem["x_test_tau10"].shape, problem["true_ll_tau10"].shape
        ((100, 10), (50, 10, 10), (50,))
        >>> shifted = classification_problem(num_classes=3, rejected_classes=1, num_test=50, temperature=0.5)
        >>> len(np.unique(shifted["y_train"])), len(np.unique(shifted["y_test_tau10"]))
        (2, 3)
    """
    _check_positive(input_dim=input_dim, num_train=num_train, temperature=temperature, kappa=kappa, num_test=num_test)
    _check_positive(num_classes=num_classes - 1, tau=min(taus, default=0))
    if not 0 <= rejected_classes < num_classes:
        raise InputError(f"`rejected_classes` must be in [0, {num_classes}), but it is {rejected_classes}.")
    if not 0 <= reject_prob <= 1:
        raise InputError(f"`reject_prob` must be in [0, 1], but it is {reject_prob}.")
    generator = torch.Generator().manual_seed(seed)
    weights = draw_teacher(input_dim, num_classes, generator=generator)
    meta: dict[str, Any] = {"temperature": temperature, "num_classes": num_classes, "inputs": inputs, "seed": seed}

    def logits_at(x: Tensor) -> Tensor:
        return teacher_logits(weights, x, temperature)

    if rejected_classes:
        rejected = torch.randperm(num_classes, generator=generator)[:rejected_classes]
        meta |= {"rejected_classes": sorted(rejected.tolist()), "reject_prob": reject_prob}
        x, y = _shifted(logits_at, rejected, reject_prob, num_train, input_dim, generator)
    else:
        x = gaussian_inputs(1, num_train, input_dim, generator=generator)[0]
        y = _draw_labels(logits_at(x), generator)
    tensors = {"x_train": x, "y_train": y.int(), "true_probs_train": logits_at(x).softmax(-1)}
    for tau in taus:
        x = draw_inputs(inputs, num_test, tau, input_dim, kappa, generator=generator)
        tensors |= _labelled_draws(tau, x, logits_at(x), generator)
    return _as_problem({**tensors, **weights}, input_dim=input_dim, num_train=num_train, **meta)


def gp_classification_problem(
    input_dim: int = 2,
    num_train: int = 10,
    temperature: float = 0.1,
    num_classes: int = 2,
    *,
    taus: Sequence[int] = (1, 10),
    num_test: int = 1000,
    num_inputs: int = 1000,
    ridge: float = 1e-6,
    seed: int = 0,
) -> Arrays:
    """Labels drawn from the softmax of one function per class, each from the Gaussian process of an infinitely wide MLP.

    Test inputs are drawn, with replacement, from Gaussian inputs at which the functions were drawn jointly with the training logits.

    Args:
        input_dim: d.
        num_train: n.
        temperature: T, by which the functions are divided.
        num_classes: C.
        taus: Numbers of labels drawn together.
        num_test: Number S of draws for each tau.
        num_inputs: Number of inputs from which test draws choose.
        ridge: Number added to the kernel's diagonal, as in the original.
        seed: Seed of everything; the global random state does not change.

    Raises:
        InputError: A number is out of range.

    Source: ``GPClassificationEnvLikelihood`` of ``neural_testbed.generative``.

    Example:
        >>> problem = gp_classification_problem(num_train=20, num_test=50, num_inputs=100)
        >>> problem["y_train"].shape, problem["y_test_tau10"].shape
        ((20, 1), (50, 10, 1))
    """
    _check_positive(input_dim=input_dim, num_train=num_train, temperature=temperature, ridge=ridge, num_test=num_test)
    _check_positive(num_inputs=num_inputs, num_classes=num_classes - 1, tau=min(taus, default=0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_train + num_inputs, input_dim, generator=generator, dtype=torch.float64)
    logits = draw_from_gp(x, num_classes, ridge, generator=generator) / temperature
    y = _draw_labels(logits[:num_train], generator)
    tensors = {"x_train": x[:num_train], "y_train": y.int(), "true_probs_train": logits[:num_train].softmax(-1)}
    for tau in taus:
        chosen = num_train + torch.randint(num_inputs, (num_test, tau), generator=generator)
        tensors |= _labelled_draws(tau, x[chosen], logits[chosen], generator)
    meta = {"temperature": temperature, "num_classes": num_classes, "seed": seed}
    return _as_problem(tensors, input_dim=input_dim, num_train=num_train, **meta)


def regression_problem(
    input_dim: int = 1,
    num_train: int = 10,
    noise_std: float = 0.1,
    *,
    taus: Sequence[int] = (1, 10),
    num_test: int = 1000,
    num_inputs: int = 1000,
    ridge: float = 1e-5,
    seed: int = 0,
) -> Arrays:
    """A function drawn from the Gaussian process of an infinitely wide MLP, and noisy values of it.

    Test inputs are drawn, with replacement, from Gaussian inputs at which the function was drawn jointly with the training values.
    ``true_mean_tau{k}`` [S, k] is the function at the test inputs, and ``true_ll_tau{k}`` is the noise's log-density.

    Args:
        input_dim: d; the testbed has 1, 10 and 100.
        num_train: n; the testbed has 1, 10 and 100 times d.
        noise_std: The noise's standard deviation; the testbed has 0.01, 0.1 and 1.
        taus: Numbers of values drawn together.
        num_test: Number S of draws for each tau.
        num_inputs: Number of inputs from which test draws choose.
        ridge: Number added to the kernel's diagonal, as in the original.
        seed: Seed of everything; the global random state does not change.

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
    values = draw_from_gp(x, 1, ridge, generator=generator).squeeze(1)

    def noise(*shape: int) -> Tensor:
        return noise_std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"x_train": x[:num_train], "y_train": (values[:num_train] + noise(num_train)).unsqueeze(1)}
    for tau in taus:
        chosen = num_train + torch.randint(num_inputs, (num_test, tau), generator=generator)
        error = noise(num_test, tau)
        log_density = -0.5 * ((error / noise_std).square() + math.log(2 * math.pi)) - math.log(noise_std)
        tensors |= {f"x_test_tau{tau}": x[chosen], f"y_test_tau{tau}": (values[chosen] + error).unsqueeze(2)}
        tensors |= {f"true_mean_tau{tau}": values[chosen], f"true_ll_tau{tau}": log_density.sum(1)}
    return _as_problem(tensors, input_dim=input_dim, num_train=num_train, noise_std=noise_std, seed=seed)


def save_problem(problem: Mapping[str, np.ndarray[Any, Any]], path: str | Path) -> None:
    """Write a problem to a file for :class:`TestbedDataModule` and ``lightning-uq compare --data testbed --problem``.

    Args:
        problem: The result of :func:`classification_problem` or another function of this module.
        path: An ``.npz`` file. A missing folder is created, and an existing file is replaced.

    Raises:
        InputError: The suffix is another one, or ``problem`` is invalid.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "problem.npz"
        >>> save_problem(classification_problem(temperature=0.5, num_test=50, seed=7), path)
        >>> path.exists()
        True
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"`path` must be an .npz file, but it is {path}.")
    missing = [name for name in ("x_train", "y_train", "meta") if name not in problem]
    if missing:
        raise InputError(f"`problem` must be a testbed problem, but it lacks {', '.join(missing)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **problem)  # type: ignore[arg-type]  # numpy's stub reads the names as its options


def _draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Labels [..., 1] drawn from logits [..., C]."""
    probs = logits.softmax(-1)
    return torch.multinomial(probs.flatten(0, -2), 1, generator=generator).reshape(*probs.shape[:-1], 1)


def _labelled_draws(tau: int, x: Tensor, logits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """A problem's arrays for draws of ``tau`` labels."""
    y = _draw_labels(logits, generator)
    log_likelihood = F.log_softmax(logits.double(), -1).gather(-1, y).sum((1, 2))
    arrays = {"x_test": x, "y_test": y.int(), "true_ll": log_likelihood, "true_logits": logits}
    arrays["true_probs"] = logits.softmax(-1)
    return {f"{name}_tau{tau}": value for name, value in arrays.items()}


def _shifted(
    logits_at: Callable[[Tensor], Tensor],
    rejected: Tensor,
    reject_prob: float,
    num_train: int,
    input_dim: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Training inputs [n, d] and labels [n, 1], after mostly rejecting those of ``rejected`` classes."""
    kept_x, kept_y = [], []
    for _ in range(_MAX_ROUNDS):
        x = gaussian_inputs(1, 2 * num_train, input_dim, generator=generator)[0]
        y = _draw_labels(logits_at(x), generator)
        unlucky = torch.rand(len(x), generator=generator) < reject_prob
        keep = ~(torch.isin(y.squeeze(1), rejected) & unlucky)
        kept_x.append(x[keep])
        kept_y.append(y[keep])
        if sum(map(len, kept_x)) >= num_train:
            return torch.cat(kept_x)[:num_train], torch.cat(kept_y)[:num_train]
    raise InputError(
        f"`rejected_classes` and `reject_prob` must leave {num_train} training samples, but of "
        f"{2 * _MAX_ROUNDS * num_train} drawn ones, with classes {rejected.tolist()} rejected, only {sum(map(len, kept_x))} were left. "
        "Use another `seed`."
    )


def _as_problem(tensors: Mapping[str, Tensor], **meta: Any) -> Arrays:
    # Stored problems are in single precision.
    single = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return {**{name: value.numpy() for name, value in single.items()}, "meta": np.array(json.dumps(meta))}


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0 or not math.isfinite(number):
            least = "at least 2" if name == "num_classes" else "above 0"
            raise InputError(f"`{name}` must be {least}, but it is {number + (name == 'num_classes')}.")
