"""Temperatures against the original's grid, scipy, brute force and closed forms, on logits made to break Newton."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import expected_calibration_error
from lightning_uq.functional import temperature_search as module
from lightning_uq.functional.entropy import mean_log_probs
from lightning_uq.functional.temperature import (
    calibrated_nll,
    fit_ensemble_temperature,
    fit_shared_temperature,
    fit_temperature,
)

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("ddu_temperature_*.npz"))
REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "logits" / "nncal_densenet40_cifar10.npz"


def load(case):
    return {key: torch.as_tensor(value) for key, value in np.load(REFERENCE / f"{case}.npz").items()}


def rows(seed, n=80, c=4, signal=2.0, scale=3.0, z=None):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(c, (n,), generator=generator)
    logits = torch.randn(z or 1, n, c, generator=generator, dtype=torch.float64)
    logits[:, torch.arange(n), target] += signal
    logits = scale * logits
    return (logits if z else logits[0]), target


def slope(logits, target, temperature):
    """dNLL / dlog T by autograd."""
    u = torch.log(torch.as_tensor(float(temperature), dtype=torch.float64)).requires_grad_()
    members = logits if logits.ndim == 3 else logits[None]
    loss = torch.nn.functional.nll_loss(mean_log_probs(members.double() / u.exp()), target)
    return torch.autograd.grad(loss, u)[0].item()


def pooled_nll(logits, target, temperature):
    return torch.nn.functional.nll_loss(mean_log_probs(logits / temperature), target).item()


# --- the original's numbers


@pytest.mark.parametrize("case", CASES)
def test_the_grid_is_the_originals(case):
    data = load(case)
    logits, target = data["logits"], data["labels"]
    for objective, index in (("nll", 0), ("ece", 1)):
        found = fit_temperature(logits, target, objective, "grid")
        assert float(found) == pytest.approx(float(data[f"T_{objective}"]), abs=1e-9)
        log_probs = torch.log_softmax(logits.double() / found, 1)
        value = (
            torch.nn.functional.nll_loss(log_probs, target)
            if index == 0
            else expected_calibration_error(log_probs.exp(), target)
        )
        assert float(value) == pytest.approx(float(data[f"after_{objective}"][index]), abs=1e-5)
    grid, temperature = [], 0.1
    for _ in range(100):
        grid.append(temperature)
        temperature += 0.1
    assert np.array_equal(data["grid"].numpy(), np.array(grid))


@pytest.mark.parametrize("case", CASES)
def test_newton_finds_the_continuous_optimum(case):
    data = load(case)
    logits, target = data["logits"], data["labels"]
    found = fit_temperature(logits, target)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert float(found) == pytest.approx(float(data["T_continuous"]), rel=1e-7)
    assert abs(slope(logits, target, found)) < 1e-9


@pytest.mark.skipif(not REAL.exists(), reason="the shared logits are not beside this checkout")
def test_a_real_network_of_known_calibration():
    data = np.load(REAL)
    found = fit_temperature(torch.tensor(data["val_logits"]), torch.tensor(data["val_labels"]).long())
    assert float(found) == pytest.approx(2.883, abs=6e-4)
    logits, target = torch.tensor(data["test_logits"]).double(), torch.tensor(data["test_labels"]).long()
    for temperature, ece, nll in ((1.0, 0.05500, 0.43006), (found, 0.00946, 0.22509)):
        probs = (logits / temperature).softmax(1)
        assert float(expected_calibration_error(probs, target)) == pytest.approx(ece, abs=6e-6)
        assert float(-probs.log().gather(1, target[:, None]).mean()) == pytest.approx(nll, abs=6e-6)


# --- the optimum


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.3, 3), st.floats(1e-3, 1e3))
def test_the_slope_vanishes_and_no_other_temperature_is_better(seed, c, signal, scale):
    logits, target = rows(seed, c=c, signal=signal, scale=scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit_temperature(logits, target)
    assume(not caught)  # a draw all right or below chance
    assert abs(slope(logits, target, found)) < 1e-9
    best = pooled_nll(logits[None], target, found)
    for other in torch.logspace(-3, 3, 61, dtype=torch.float64) * found:
        assert best <= pooled_nll(logits[None], target, other) + 1e-12


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1e-3, 500.0, 1e6]), st.floats(-50, 50))
def test_temperatures_scale_with_logits_and_ignore_shifts_order_and_duplicates(seed, factor, shift):
    logits, target = rows(seed)
    base = fit_temperature(logits, target)
    torch.testing.assert_close(fit_temperature(factor * logits, target), factor * base, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit_temperature(logits + shift, target), base, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit_temperature(torch.log_softmax(logits, 1), target), base, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit_temperature(logits.flip(0), target.flip(0)), base, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit_temperature(logits.repeat(2, 1), target.repeat(2)), base, rtol=1e-7, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(fit_temperature(logits[:, order.argsort()], order[target]), base, rtol=1e-7, atol=0)


def test_a_closed_form():
    # Logit m, share q right: T = m / log(q / (1 - q)).
    target = torch.tensor([0] * 9 + [1])
    for m in (1e-8, 2.0, 4000.0):
        found = fit_temperature(torch.tensor([[m, 0.0]] * 10, dtype=torch.float64), target)
        assert float(found) == pytest.approx(m / math.log(9), rel=1e-9)


def test_saturated_logits_on_which_newton_from_one_has_no_curvature():
    # All probabilities are 0 or 1 in float64, and one row is wrong.
    logits = torch.tensor([[5000.0, 0.0]] * 49 + [[0.0, 5000.0]])
    found = fit_temperature(logits, torch.zeros(50, dtype=torch.long))
    assert float(found) == pytest.approx(5000 / math.log(49), rel=1e-9)
    assert logits.double().softmax(1).unique().tolist() == [0, 1]


def test_one_row_of_huge_logits_among_small_ones():
    logits, target = rows(0)
    logits[0] *= 1e7
    found = fit_temperature(logits, target)
    assert found.isfinite()
    assert abs(slope(logits, target, found)) < 1e-9


def test_a_single_barely_wrong_row_puts_the_optimum_near_zero():
    logits = torch.tensor([[1.0, 0.0]] * 30 + [[-1e-6, 0.0]], dtype=torch.float64)
    found = fit_temperature(logits, torch.zeros(31, dtype=torch.long))
    assert 0 < float(found) < 0.1
    assert abs(slope(logits, torch.zeros(31, dtype=torch.long), found)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["newton", "grid"])
def test_half_precision_is_upcast(dtype, method):
    logits, target = rows(1)
    logits = logits.to(dtype).requires_grad_()
    found = fit_temperature(logits, target, method=method)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.equal(found, fit_temperature(logits.double(), target, method=method))


def test_chunks_change_nothing(monkeypatch):
    logits, target = rows(2, z=3)
    expected = fit_shared_temperature(logits, target)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 40)
    torch.testing.assert_close(fit_shared_temperature(logits, target), expected, rtol=1e-9, atol=0)


def test_pixels_are_rows():
    logits, target = rows(3, n=60)
    image = logits.reshape(5, 12, 4).movedim(-1, 1).reshape(5, 4, 3, 4)
    for method in ("newton", "grid"):
        a = fit_temperature(image, target.reshape(5, 3, 4), method=method)
        torch.testing.assert_close(a, fit_temperature(logits, target, method=method), rtol=1e-9, atol=0)


# --- no finite optimum


def test_every_row_right_is_smoothed_and_said():
    logits, target = rows(4, n=20, signal=20.0)
    with pytest.warns(
        UserWarning, match=r"every row is classified correctly, .*the targets were smoothed \(T = "
    ) as record:
        found = fit_temperature(logits, target)
    assert len(record) == 1
    # The smoothed objective, written out.
    mixed = (20 * torch.nn.functional.one_hot(target, 4).double() + 1 / 4) / 21
    u = found.log().requires_grad_()
    loss = -(mixed * torch.log_softmax(logits / u.exp(), 1)).sum(1).mean()
    assert abs(torch.autograd.grad(loss, u)[0].item()) < 1e-9
    assert 0 < float(found) < math.inf


def test_ties_with_the_true_class_count_as_right():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    with pytest.warns(UserWarning, match="every row is classified correctly"):
        assert 0 < float(fit_temperature(logits, torch.tensor([0, 1]))) < math.inf


def test_below_chance_ends_near_uniform_and_keeps_the_labels():
    logits, target = rows(5, signal=-3.0)
    with pytest.warns(UserWarning, match=r"hardly better than chance.*nearly uniform"):
        found = fit_temperature(logits, target)
    tempered = (logits / found).float().softmax(1)
    assert (tempered - 0.25).abs().max() < 0.01
    assert torch.equal(tempered.argmax(1), logits.argmax(1))
    assert pooled_nll(logits[None], target, found) == pytest.approx(math.log(4), abs=1e-2)


@pytest.mark.parametrize("logits", [torch.zeros(5, 3), torch.full((5, 3), 7.0), torch.randn(5, 1)])
def test_logits_that_say_nothing_leave_one(logits):
    for fit, x in ((fit_temperature, logits), (fit_shared_temperature, logits.expand(2, *logits.shape))):
        with pytest.warns(UserWarning, match=r"equal \(or there is one class\).*T was set to 1"):
            assert fit(x, torch.zeros(5, dtype=torch.long)) == 1


def test_rows_of_one_class_alone_are_no_special_case():
    logits, _ = rows(6)
    target = torch.full((80,), 2)
    logits[:, 2] += 4
    assert abs(slope(logits, target, fit_temperature(logits, target))) < 1e-9


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.floats(-1e12, 1e12), min_size=3, max_size=3), min_size=1, max_size=6),
    st.integers(0, 2),
    st.booleans(),
)
def test_whatever_comes_the_temperature_is_finite_and_positive(values, label, shared):
    logits = torch.tensor(values, dtype=torch.float64)
    target = torch.full((len(values),), label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        members = torch.stack([logits, logits.flip(1)])
        found = fit_shared_temperature(members, target) if shared else fit_temperature(logits, target)
        grid = fit_temperature(logits, target, method="grid")
    assert 0 < float(found) < math.inf
    assert 0.1 <= float(grid) <= 10


def test_a_probability_of_zero_is_read_as_the_smallest_number():
    logits, target = rows(7)
    masked = logits.clone()
    masked[torch.arange(80), (target + 1) % 4] = -math.inf
    floor = masked.amax(1, keepdim=True) + math.log(torch.finfo(torch.float32).tiny)
    expected = fit_temperature(torch.where(masked == -math.inf, floor, masked), target)
    assert torch.equal(fit_temperature(masked, target), expected)
    masked[0, target[0]] = -math.inf  # the true class itself
    assert fit_temperature(masked, target).isfinite()


# --- ensembles


@settings(max_examples=15)
@example(249, 4, 1.0)  # its votes at T = 0 are better than its minimum at a small T
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0.01, 100))
def test_a_shared_temperature_is_the_global_minimum(seed, z, scale):
    logits, target = rows(seed, n=30, z=z, signal=1.0, scale=scale)
    logits[0] *= 20  # a member far more confident than the others
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit_shared_temperature(logits, target)
    # Where members' votes at T = 0 are best, the objective has its targets smoothed.
    smoothed = 1 / 31 if caught and "were smoothed" in str(caught[0].message) else 0.0

    def objective(temperature):
        log_probs = mean_log_probs(logits / temperature)
        mixed = (1 - smoothed) * torch.nn.functional.one_hot(target, 4) + smoothed / 4
        return -torch.special.xlogy(mixed, log_probs.exp()).sum(1).mean().item()

    best = objective(found)
    uniform = 1.05 if caught and not smoothed else 1 + 1e-9  # below chance it ends near the limit, not at it
    for other in torch.logspace(-3, 3, 200, dtype=torch.float64) * scale:
        assert best <= uniform * objective(other)


def two_minima(both_wrong):
    """A timid member and a loud one that is wrong 200 times more in 1,000: each likes a temperature of its own."""
    timid, loud = torch.zeros(1000, 2, dtype=torch.float64), torch.zeros(1000, 2, dtype=torch.float64)
    timid[:, 0], loud[:, 0] = 0.01, 1.0
    timid[:both_wrong] *= -1
    loud[: both_wrong + 200] *= -1
    return torch.stack([timid, loud]), torch.zeros(1000, dtype=torch.long)


@pytest.mark.parametrize(("both_wrong", "lower"), [(100, 0), (200, 1)])
def test_of_two_minima_the_lower_is_taken(both_wrong, lower):
    logits, target = two_minima(both_wrong)
    grid = torch.logspace(-6, 3, 400, dtype=torch.float64)
    values = torch.tensor([pooled_nll(logits, target, t) for t in grid])
    minima = [i for i in range(1, 399) if values[i] < min(values[i - 1], values[i + 1])]
    assert len(minima) == 2
    assert values[minima].argmin() == lower
    found = float(fit_shared_temperature(logits, target))
    assert grid[minima[lower] - 1] < found < grid[minima[lower] + 1]
    assert abs(slope(logits, target, found)) < 1e-9


def test_with_equal_members_all_scopes_agree():
    logits, target = rows(8)
    members = logits.expand(3, -1, -1)
    base = fit_temperature(logits, target)
    for scope in ("pooled", "shared"):
        torch.testing.assert_close(fit_ensemble_temperature(members, target, scope), base, rtol=1e-8, atol=0)
    found = fit_ensemble_temperature(members, target, "member")
    assert found.shape == (3,)
    torch.testing.assert_close(found, base.expand(3), rtol=1e-8, atol=0)
    torch.testing.assert_close(fit_shared_temperature(logits[None], target), base, rtol=1e-8, atol=0)


def test_scopes_are_their_definitions():
    logits, target = rows(9, z=3)
    logits[1] *= 5
    pooled = fit_ensemble_temperature(logits, target)
    assert abs(slope(mean_log_probs(logits), target, pooled)) < 1e-9
    shared = fit_ensemble_temperature(logits, target, "shared")
    assert abs(slope(logits, target, shared)) < 1e-9
    members = fit_ensemble_temperature(logits, target, "member")
    for temperature, member in zip(members, logits, strict=True):
        assert abs(slope(member, target, temperature)) < 1e-9
    assert len({round(float(t), 6) for t in (pooled, shared, *members)}) == 5
    order = [2, 0, 1]
    for scope in ("pooled", "shared"):
        permuted = fit_ensemble_temperature(logits[order], target, scope)
        torch.testing.assert_close(permuted, fit_ensemble_temperature(logits, target, scope), rtol=1e-8, atol=0)
    torch.testing.assert_close(fit_ensemble_temperature(logits[order], target, "member"), members[order])


@pytest.mark.parametrize("objective", ["nll", "ece"])
def test_the_grid_of_every_scope(objective):
    logits, target = rows(10, z=2, scale=2.0)
    grid = np.cumsum(np.full(100, 0.1))

    def score(log_probs):
        if objective == "ece":
            return float(expected_calibration_error(log_probs.exp(), target))
        return float(torch.nn.functional.nll_loss(log_probs, target))

    tempered = {
        "pooled": lambda t: torch.log_softmax(mean_log_probs(logits) / t, 1),
        "shared": lambda t: mean_log_probs(logits / t),
    }
    for scope, log_probs in tempered.items():
        values = [score(log_probs(t)) for t in grid]
        found = float(fit_ensemble_temperature(logits, target, scope, objective, "grid"))
        assert score(log_probs(found)) == pytest.approx(min(values), abs=1e-12)
        assert found == pytest.approx(grid[int(np.argmin(values))], abs=1e-9)
    member = fit_ensemble_temperature(logits, target, "member", objective, "grid")
    assert float(member[0]) == float(fit_temperature(logits[0], target, objective, "grid"))


def test_members_that_together_are_always_right_are_smoothed():
    logits, target = rows(11, n=25, z=3, signal=30.0)
    with pytest.warns(
        UserWarning, match=r"largest as T falls to 0, where members only vote; the targets were smoothed"
    ):
        found = fit_shared_temperature(logits, target)
    mixed = (25 * torch.nn.functional.one_hot(target, 4).double() + 1 / 4) / 26
    u = found.log().requires_grad_()
    loss = -(mixed * mean_log_probs(logits / u.exp())).sum(1).mean()
    assert abs(torch.autograd.grad(loss, u)[0].item()) < 1e-9


def test_members_below_chance():
    logits, target = rows(12, z=3, signal=-5.0)
    with pytest.warns(UserWarning, match="hardly better than chance"):
        found = fit_shared_temperature(logits, target)
    assert pooled_nll(logits, target, found) == pytest.approx(math.log(4), abs=1e-2)


# --- monitor


def test_the_calibrated_loss_is_the_loss_at_the_optimum_and_silent():
    logits, target = rows(13)
    expected = pooled_nll(logits[None], target, fit_temperature(logits, target))
    assert float(calibrated_nll(logits, target)) == pytest.approx(expected, rel=1e-12)
    for factor in (1e-3, 500.0):
        assert float(calibrated_nll(factor * logits, target)) == pytest.approx(expected, rel=1e-9)
    right, classes = rows(14, signal=30.0)  # warnings are errors here
    assert 0 <= float(calibrated_nll(right, classes)) < 0.1
    assert float(calibrated_nll(*rows(15, signal=-3.0))) == pytest.approx(math.log(4), abs=1e-2)


# --- misuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: fit_temperature(x, y, "brier"), "`objective` must be one of 'nll', 'ece', but it is 'brier'"),
        (
            lambda x, y: fit_temperature(x, y, method="lbfgs"),
            "`method` must be one of 'newton', 'grid', but it is 'lbfgs'",
        ),
        (lambda x, y: fit_temperature(x, y, "ece"), "`method` must be 'grid' with objective='ece', but it is 'newton'"),
        (
            lambda x, y: fit_ensemble_temperature(x[None], y, "each"),
            "`scope` must be one of 'pooled', 'shared', 'member'",
        ),
        (lambda x, y: fit_ensemble_temperature(x, y), r"`logits` must be a floating-point tensor \[Z, N, C, ...\]"),
        (
            lambda x, y: fit_temperature(x.long(), y),
            r"floating-point tensor \[N, C, ...\], but it is torch.int64",
        ),
        (lambda x, y: fit_temperature(x, y[:3]), r"`target` must have shape \[80\], but its shape is \[3\]"),
        (
            lambda x, y: fit_temperature(x, y.double()),
            "class indices of an integer dtype, but its dtype is torch.float64",
        ),
        (lambda x, y: fit_temperature(x, y + 1), r"class indices in \[0, 4\), but it holds 4"),
        (lambda x, y: fit_temperature(x[:0], y[:0]), r"`logits` must hold at least one row, but its shape is \[0, 4\]"),
        (lambda x, y: fit_temperature(x.fill_(math.nan), y), "hold no NaN, .* but it holds nan"),
        (lambda x, y: fit_temperature(x.fill_(math.inf), y), "no positive infinity .* but it holds inf"),
        (lambda x, y: fit_temperature(x.fill_(-math.inf), y), "no row with only minus infinity, but it holds -inf"),
    ],
)
def test_bad_arguments_are_named(call, message):
    logits, target = rows(16)
    with pytest.raises(InputError, match=message):
        call(logits, target)
