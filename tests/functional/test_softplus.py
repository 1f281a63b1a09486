import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional.softplus import inverse_softplus, inverse_softplus_exp, log_softplus


@settings(max_examples=50)
@given(st.floats(-30, 1e4))
def test_it_inverts_softplus_in_float64(raw):
    x = torch.tensor(raw, dtype=torch.float64)
    torch.testing.assert_close(inverse_softplus(torch.logaddexp(x, torch.zeros_like(x))), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        inverse_softplus_exp(log_softplus(x.clamp_max(70))), x.clamp_max(70), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    x = torch.tensor([1e-3, 1.0, 50.0], dtype=dtype)
    for function in (inverse_softplus, inverse_softplus_exp, log_softplus):
        assert function(x).dtype == torch.float32
        assert torch.equal(function(x), function(x.float()))


def test_what_would_underflow_or_overflow_is_finite_and_has_a_gradient():
    raw = torch.tensor([-1e4, -200.0, -15.0, 0.0, 50.0, 1e4], requires_grad=True)
    for output in (log_softplus(raw), inverse_softplus_exp(raw)):
        (gradient,) = torch.autograd.grad(output.sum(), raw)
        assert output.isfinite().all()
        assert gradient.isfinite().all()
    assert inverse_softplus(torch.tensor(0.0)) == -torch.inf
    assert inverse_softplus_exp(torch.tensor(torch.nan)).isnan()


def test_both_branches_meet():
    around = torch.tensor([-15.0001, -14.9999], dtype=torch.float64)
    assert (log_softplus(around).diff() - around.diff()).abs() < 3e-7
    assert (inverse_softplus_exp(around).diff() - around.diff()).abs() < 3e-7


def test_gradient():
    x = torch.tensor([-20.0, -1.0, 0.5, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_softplus, x)
    assert torch.autograd.gradcheck(inverse_softplus_exp, x)


def test_integers_are_refused():
    with pytest.raises(InputError, match="`value` must be floating point, but its dtype is torch.int64"):
        inverse_softplus(torch.ones(2, dtype=torch.long))
