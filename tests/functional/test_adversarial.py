import copy
import math

import pytest
import torch
from torch import nn

from lightning_uq.functional.adversarial import adversarial_loss, fgsm
from lightning_uq.networks.held_buffers import held_buffers


def test_fgsm_moves_along_the_sign_alone():
    x = torch.tensor([1.0, 1.0, 1.0, 1.0])
    gradient = torch.tensor([1e-30, -1e30, 0.0, math.nan])
    assert torch.equal(fgsm(x, gradient, 0.25), torch.tensor([1.25, 0.75, 1.0, 1.0]))


def test_fgsm_takes_a_step_per_dimension():
    x = torch.zeros(2, 3, 2)
    step = torch.tensor([0.5, 0.0])
    assert torch.equal(fgsm(x, torch.ones_like(x), step), step.expand(2, 3, 2))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def test_gradient_is_that_of_the_two_losses_with_the_second_input_held_fixed():
    model, x = network().double(), torch.randn(7, 3, dtype=torch.float64)

    def loss(inputs):
        return model(inputs).square().mean()

    leaf = x.clone().requires_grad_()
    shifted = x + 0.1 * torch.autograd.grad(loss(leaf), leaf)[0].sign()
    intended = 0.5 * loss(x) + 0.5 * loss(shifted)
    expected = torch.autograd.grad(intended, list(model.parameters()))

    value = adversarial_loss(loss, x, list(model.parameters()), 0.1)
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert not x.requires_grad
    value.backward()
    assert value.item() == pytest.approx(intended.item(), abs=1e-15)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


def test_the_returned_loss_scales_like_any_other():
    """As accumulation and gradient scaling do it."""
    model, x = network(), torch.randn(7, 3)

    def loss(inputs):
        return model(inputs).square().mean()

    once = torch.autograd.grad(adversarial_loss(loss, x, list(model.parameters()), 0.1), list(model.parameters()))
    scaled = torch.autograd.grad(
        adversarial_loss(loss, x, list(model.parameters()), 0.1, loss_scale=1024.0) * 8, list(model.parameters())
    )
    for one, eight in zip(once, scaled, strict=True):
        torch.testing.assert_close(8 * one, eight)


def test_every_parameter_is_accumulated_once_per_backward():
    """DDP counts on it: a hook that fires twice would reduce a half-finished gradient."""
    model, x = network(), torch.randn(7, 3)
    calls = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    value = adversarial_loss(lambda inputs: model(inputs).square().mean(), x, list(model.parameters()), 0.1)
    assert calls == []
    value.backward()
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


def test_frozen_and_unused_parameters_are_left_alone():
    model, unused = network(), nn.Linear(1, 1)
    model[0].requires_grad_(False)
    parameters = [*model.parameters(), *unused.parameters()]
    adversarial_loss(lambda x: model(x).square().mean(), torch.randn(4, 3), parameters, 0.1).backward()
    assert [p.grad is not None for p in parameters] == [False, False, True, True, False, False]


def test_an_input_that_the_loss_ignores_stays():
    weight = torch.ones(1, requires_grad=True)
    value = adversarial_loss(lambda x: (3 * weight).sum(), torch.ones(2), [weight], 0.1)
    value.backward()
    assert (value.item(), weight.grad.item()) == (3.0, 3.0)


def test_loss_scale_keeps_a_half_precision_backward_from_underflow():
    weight = torch.ones(4, requires_grad=True)

    def loss(x):
        return ((weight.half() * x).sum() * 1e-4).float() * 1e-4

    x = torch.ones(4, dtype=torch.float16)
    plain = torch.autograd.grad(adversarial_loss(loss, x, [weight], 0.0), weight)[0]
    scaled = (
        torch.autograd.grad(adversarial_loss(loss, x, [weight], 0.0, loss_scale=2.0**16) * 2**16, weight)[0] / 2**16
    )
    assert torch.allclose(scaled, torch.full((4,), 1e-8), rtol=1e-2, atol=0)
    assert not torch.allclose(plain, scaled, rtol=1e-2, atol=0)


def test_the_second_pass_runs_inside_its_context():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), torch.randn(8, 3)
    once = copy.deepcopy(model)
    once(x)
    loss = adversarial_loss(
        lambda inputs: model(inputs).square().mean(),
        x,
        list(model.parameters()),
        0.1,
        second_pass=held_buffers(model),
    )
    loss.backward()
    for (name, value), expected in zip(model.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(value, expected), name
    assert model[1].num_batches_tracked == 1


def test_held_buffers_still_normalise_by_the_batch_and_come_back_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval())
    x = 5 + torch.randn(16, 3)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with held_buffers(model):
        torch.testing.assert_close(model[0](x).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(model[2](x), x / math.sqrt(1 + 1e-5))

    def stop():
        with held_buffers(model):
            model[0](x)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0], name
        assert torch.equal(buffer, before[name][1]), name
    model[0](x)
    assert model[0].num_batches_tracked == 1
