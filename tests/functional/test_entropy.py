import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_uq.functional import entropy
from tests.counting import operators
from tests.no_float64 import device_without_float64


def members(seed: int, z: int = 4, b: int = 5, c: int = 3, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(z, b, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([0.1, 3.0, 100.0]))
def test_the_decomposition_adds_up_and_is_recomputed_from_its_definition(seed, z, scale):
    logits = members(seed, z=z, scale=scale)
    probs = logits.softmax(2)
    mean = probs.mean(0)
    h_mean = -torch.special.xlogy(mean, mean).sum(1)
    h_members = -torch.special.xlogy(probs, probs).sum(2).mean(0)
    torch.testing.assert_close(entropy.predictive_entropy(logits), h_mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(entropy.expected_entropy(logits), h_members, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(entropy.mutual_information(logits), h_mean - h_members, rtol=1e-7, atol=1e-12)
    assert (entropy.mutual_information(logits) >= 0).all()


@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_member_order_duplicates_and_shifts_change_nothing(seed):
    logits = members(seed)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        score = getattr(entropy, name)
        expected = score(logits)
        torch.testing.assert_close(score(logits.flip(0)), expected)
        torch.testing.assert_close(score(torch.cat([logits, logits])), expected)
        torch.testing.assert_close(score(logits + torch.randn(4, 5, 1, dtype=torch.float64)), expected)


def test_saturated_and_infinite_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-math.inf, 0.0, -math.inf]]])
    assert entropy.predictive_entropy(logits).isfinite().all()
    torch.testing.assert_close(entropy.mutual_information(logits), torch.tensor([math.log(2)]))
    assert entropy.expected_entropy(logits).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("z", [1, 3, 7, 30])
def test_members_that_agree_to_the_last_bit_have_no_mutual_information(z):
    logits = members(5, z=1, b=200).expand(z, -1, -1)
    assert (entropy.mutual_information(logits) == 0).all()
    assert torch.equal(entropy.mean_log_probs(logits), logits[0].log_softmax(1))


@pytest.mark.parametrize("case", ["finite", "excluded by one", "excluded by all", "equal"])
def test_the_mean_has_the_same_bits_with_and_without_a_graph(case):
    values = members(7).log_softmax(2)
    values[:1, 0, 0] = -math.inf if case == "excluded by one" else values[0, 0, 0]
    if case == "excluded by all":
        values[:, 1, 2] = -math.inf
    if case == "equal":
        values = values[:1].expand(4, -1, -1)
    bare = entropy.log_mean_exp(values)
    followed = entropy.log_mean_exp(values.clone().requires_grad_())
    assert torch.equal(bare, followed)
    torch.testing.assert_close(bare, torch.logsumexp(values, 0) - math.log(4))
    followed.where(followed.isfinite(), 0).sum().backward()


def test_a_class_that_all_members_exclude_has_a_gradient_of_zero():
    """By the tape, with other batches beside it, and forward."""
    values = torch.tensor([[0.0, -math.inf, 1.0], [0.5, -math.inf, -math.inf]], dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda v: entropy.log_mean_exp(v).exp(), values)
    assert expected.isfinite().all()
    assert (expected[:, :, 1] == 0).all()
    torch.testing.assert_close(torch.func.jacfwd(lambda v: entropy.log_mean_exp(v).exp())(values), expected)
    mapped = values[:, :, None].clone().requires_grad_()
    torch.vmap(entropy.log_mean_exp, in_dims=1)(mapped).exp().sum().backward()
    torch.testing.assert_close(mapped.grad[:, :, 0], expected.sum(0))


def test_a_single_member_has_no_mutual_information():
    assert entropy.mutual_information(members(0, z=1)).abs().max() < 1e-12


def test_agreeing_confident_members_in_float32_are_not_negative():
    logits = members(1, z=1, b=2000).float().repeat(10, 1, 1)
    information = entropy.mutual_information(logits)
    assert (information >= 0).all()
    assert information.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    logits = members(2).to(dtype)
    score = entropy.predictive_entropy(logits)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, entropy.predictive_entropy(logits.float()))


def test_a_segmentation_map_keeps_its_axes():
    logits = torch.randn(2, 3, 4, 5, 6)
    score = entropy.mutual_information(logits)
    assert score.shape == (3, 5, 6)
    torch.testing.assert_close(score[:, 1, 2], entropy.mutual_information(logits[:, :, :, 1, 2]))


def nearly_agreeing(spread, z=20, b=50, c=10):
    generator = torch.Generator().manual_seed(0)
    return members(3, z=1, b=b, c=c) + spread * torch.randn(z, b, c, generator=generator, dtype=torch.float64)


def definition(logits):
    """H[mean p] - mean H[p], in float64."""
    probs = logits.double().softmax(2)
    return torch.special.entr(probs.mean(0)).sum(1) - torch.special.entr(probs).sum(2).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
def test_members_that_nearly_agree_keep_their_digits(dtype, spread):
    logits = nearly_agreeing(spread).to(dtype)
    information = entropy.mutual_information(logits)
    assert information.dtype == torch.float32
    torch.testing.assert_close(information.double(), definition(logits), rtol=1e-6, atol=1e-14)


def test_members_that_nearly_agree_without_float64(monkeypatch):
    logits = nearly_agreeing(1e-2).float()
    expected = definition(logits)
    with device_without_float64(monkeypatch):
        information = entropy.mutual_information(logits)
    torch.testing.assert_close(information.double(), expected, rtol=1e-3, atol=0.0)


def test_the_mutual_information_of_a_large_batch_is_that_of_its_parts(monkeypatch):
    logits = members(4, z=3, b=7)
    whole = entropy.mutual_information(logits)
    monkeypatch.setattr(entropy, "_CHUNK_CPU", 20)
    assert torch.equal(entropy.mutual_information(logits), whole)
    assert entropy.mutual_information(logits[:, :0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_one_pass_gives_all_parts(dtype):
    logits = torch.cat([members(3, z=3, b=7), members(4, z=3, b=2, scale=1000.0)], 1).to(dtype)
    logits[0, :3, 0] = -math.inf
    parts = entropy.decompose(logits)
    wide = logits.double()
    assert {part.dtype for part in parts} == {torch.float64 if dtype == torch.float64 else torch.float32}
    torch.testing.assert_close(parts.mean_log_probs, entropy.mean_log_probs(wide).to(parts[0].dtype))
    torch.testing.assert_close(parts.expected_entropy, entropy.expected_entropy(wide).to(parts[0].dtype))
    divergence = entropy.mean_divergence(wide.log_softmax(2)).sum(1)
    torch.testing.assert_close(parts.mutual_information, divergence.to(parts[0].dtype))


def test_the_gradient_of_the_mutual_information():
    logits = nearly_agreeing(0.5, z=3, b=4, c=3).requires_grad_()
    assert torch.autograd.gradcheck(entropy.mutual_information, logits)
    torch.testing.assert_close(
        *(torch.autograd.grad(f(logits).sum(), logits)[0] for f in (entropy.mutual_information, definition))
    )


@pytest.mark.parametrize("spread", [1e-6, 1e-8])
def test_members_that_all_but_agree_have_the_variance_of_their_logits(spread):
    """To second order, the information is half the mean variance of the logits over members."""
    noise = torch.randn(20, 50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = torch.full((10,), 0.1, dtype=torch.float64)
    centred = noise - noise.mean(2, keepdim=True)
    expected = 0.5 * spread**2 * (probs * centred.var(0, correction=0)).sum(1)
    torch.testing.assert_close(entropy.mutual_information(spread * noise), expected, rtol=1e-4, atol=0.0)


def test_pooling_takes_two_exponentials_of_each_number():
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.exp, torch.ops.aten.expm1, torch.ops.aten.where):
                counted.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Count():
        entropy.decompose(members(0, z=64, b=8, c=4))
    assert sum(counted) < 2.1 * 64 * 8 * 4


@pytest.mark.parametrize("num_classes", [2, 10, 15, 16, 40])
def test_a_softmax_of_few_classes_does_not_run_over_the_last_axis(num_classes):
    logits = torch.randn(3, 7, num_classes, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 0] = -torch.inf
    logits.requires_grad_()
    axes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._log_softmax.default:
                axes.append(args[1] % args[0].ndim)
            return func(*args, **(kwargs or {}))

    with Record():
        found = entropy.log_softmax(logits, 2)
    assert axes == [1 if num_classes < 16 else 2]
    expected = torch.log_softmax(logits, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(expected.shape)[1:]
    gradients = [torch.autograd.grad((log_probs[1:] * weights).sum(), logits)[0] for log_probs in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_one_member_is_its_own_mean():
    logits = torch.tensor([[[0.3, -1.0, -math.inf], [2.0, 2.0, 2.0]]], requires_grad=True)
    one = entropy.mean_log_probs(logits)
    assert torch.equal(one, entropy.mean_log_probs(torch.cat([logits, logits])))
    assert operators(lambda: entropy.mean_log_probs(logits)) <= 5  # 11 for several members
    one[:, 1:].sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 2] == 0
