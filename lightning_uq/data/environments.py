"""The distributions of the Neural Testbed's problems: inputs, a random teacher, and a Gaussian process.

Source: Osband et al., "The Neural Testbed: Evaluating Joint Predictions", NeurIPS 2022 (arXiv 2110.04629), and their code
(``neural_testbed.generative``), whose random numbers other libraries cannot reproduce.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError

Inputs = Literal["polyadic", "gaussian", "weibull"]

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
    """Inputs [S, tau, d] in which each draw repeats kappa anchors: tau choices among them, with replacement.

    Labels of equal inputs are dependent, which marginals cannot represent. These inputs therefore show the value of a joint prediction in
    any dimension d, where tau independent inputs would hardly be related.

    Source: Osband et al., "Evaluating High-Order Predictive Distributions in Deep Learning", UAI 2022 (arXiv 2202.13509).

    Example:
        >>> x = polyadic_inputs(1, tau=10, input_dim=4)
        >>> len(x[0].unique(dim=0)) <= 2
        True
    """
    anchors = torch.randn(num_draws, kappa, input_dim, generator=generator)
    chosen = torch.randint(kappa, (num_draws, tau), generator=generator)
    return anchors.gather(1, chosen.unsqueeze(2).expand(-1, -1, input_dim))


def weibull_inputs(num_draws: int, tau: int, input_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Inputs [S, tau, d] around one Gaussian anchor per draw: the anchor itself, then tau - 1 inputs at Weibull distances from it.

    Each is the anchor plus r times standard normal noise, where P(r > t) = 10^(-t^k) with k = log10(log2(10)). Half of the r
    are below 0.1, and 90 % are below 1, so a draw contains both near repetitions and independent inputs.

    Source: ``make_weibull_sampler`` of ``neural_testbed.generative``.

    Example:
        >>> x = weibull_inputs(1000, tau=2, input_dim=50, generator=torch.Generator().manual_seed(0))
        >>> radius = (x[:, 1] - x[:, 0]).square().mean(1).sqrt()
        >>> print(f"{(radius < 0.1).float().mean():.1f} {(radius < 1).float().mean():.1f}")
        0.5 0.9
    """
    anchor = torch.randn(num_draws, 1, input_dim, generator=generator)
    survival = 1 - torch.rand(num_draws, tau, 1, generator=generator)  # in (0, 1]
    survival[:, 0] = 1
    radius = (-survival.log10()) ** (1 / math.log10(math.log2(10)))
    return anchor + radius * torch.randn(num_draws, tau, input_dim, generator=generator)


def draw_inputs(
    inputs: Inputs,
    num_draws: int,
    tau: int,
    input_dim: int,
    kappa: int = 2,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Inputs [S, tau, d] of one of the three kinds; ``kappa`` is for the polyadic ones.

    Raises:
        InputError: ``inputs`` is unknown.

    Example:
        >>> draw_inputs("weibull", 3, tau=2, input_dim=4).shape
        torch.Size([3, 2, 4])
    """
    if inputs == "polyadic":
        return polyadic_inputs(num_draws, tau, input_dim, kappa, generator=generator)
    if inputs not in ("gaussian", "weibull"):
        raise InputError(f"`inputs` must be 'polyadic', 'gaussian' or 'weibull', but it is {inputs!r}.")
    draw = gaussian_inputs if inputs == "gaussian" else weibull_inputs
    return draw(num_draws, tau, input_dim, generator=generator)


# ---------------------------------------------------------------------- a teacher


def draw_teacher(
    input_dim: int, num_classes: int = 2, hidden_size: int = 50, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Weights of a random MLP with two hidden ReLU layers: ``gen/linear{,_1,_2}/{w,b}``, w as [in, out].

    Weights are normal with standard deviation 1 / sqrt(fan_in), truncated at two standard deviations; the first bias is normal with standard
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
        weights: The result of :func:`draw_teacher`, or the arrays of a stored problem.
        x: [..., d].
        temperature: T; lower values make the labels less random.

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


# ---------------------------------------------------------------------- a Gaussian process


def nngp_kernel(x: Tensor, other: Tensor | None = None, num_hidden: int = 2) -> Tensor:
    """Covariance of the outputs of an infinitely wide ReLU MLP: the prior that the testbed draws functions from.

    K_0 = (x . x' + 1) / d. Every hidden layer maps K to sqrt(K(x, x) K(x', x')) (sin t + (pi - t) cos t) / (2 pi),
    where cos t = K(x, x') / sqrt(K(x, x) K(x', x')). This corresponds to weights of variance 1 / fan_in, and a bias of variance 1 / d
    only in the first layer.

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
    """The exact posterior of a Gaussian process with :func:`nngp_kernel`, given n noisy values.

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


def draw_from_gp(
    x: Tensor, num_functions: int = 1, ridge: float = 1e-6, *, generator: torch.Generator | None = None
) -> Tensor:
    """Values [N, F] of F independent functions at inputs [N, d], drawn from a Gaussian process with :func:`nngp_kernel`.

    Args:
        x: [N, d], in float64 if N is large.
        num_functions: F.
        ridge: Number added to the kernel's diagonal, which would otherwise be singular up to rounding.
        generator: Source of randomness; None uses torch's global generator.

    Example:
        >>> draw_from_gp(torch.zeros(5, 2), num_functions=3).shape
        torch.Size([5, 3])
    """
    kernel = nngp_kernel(x)
    kernel.diagonal().add_(ridge)
    noise = torch.randn(len(x), num_functions, generator=generator, dtype=x.dtype)
    values: Tensor = torch.linalg.cholesky(kernel) @ noise
    return values
