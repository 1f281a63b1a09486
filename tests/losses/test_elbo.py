from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.losses import categorical_log_likelihood, elbo_loss, gaussian_noise_log_likelihood

with np.load(Path(__file__).parents[1] / "reference" / "enn_losses_vi.npz") as file:
    DATA = {name: torch.from_numpy(file[name]) for name in file.files}
LABELS = DATA["y_cls"][:, 0].long()


def check(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_they_are_the_originals():
    log_likelihood = categorical_log_likelihood(DATA["cls_out"], LABELS)
    check(log_likelihood, DATA["elbo/categorical_ll"])
    check(gaussian_noise_log_likelihood(DATA["reg_out"], DATA["y_reg"], 0.7), DATA["elbo/awgn_ll_sigma0.7"])
    kl = torch.tensor(0.9)
    check(elbo_loss(log_likelihood, kl, 1), DATA["elbo/loss"])
    check(elbo_loss(log_likelihood, kl, 1, temperature=0.25, input_dim=3), DATA["elbo/loss_temp"])


def test_an_index_alone_is_the_first_of_all():
    check(categorical_log_likelihood(DATA["cls_out"][0], LABELS), DATA["elbo/categorical_ll"][0])
    check(gaussian_noise_log_likelihood(DATA["reg_out"][0], DATA["y_reg"], 0.7), DATA["elbo/awgn_ll_sigma0.7"][0])


def test_the_divergence_is_divided_by_the_number_of_samples():
    for n in (1, 10, 1e6):
        assert elbo_loss(torch.tensor(-2.0), torch.tensor(7.0), n).item() == pytest.approx(2 + 7 / n)
    per_index = elbo_loss(torch.tensor([-1.0, -3.0]), torch.tensor([4.0, 8.0]), 4)
    assert per_index.tolist() == [2.0, 5.0]


def test_half_precision_and_extreme_logits():
    logits = torch.tensor([[1e4, -1e4]], dtype=torch.bfloat16)
    assert categorical_log_likelihood(logits, torch.tensor([0])) == 0
    value = categorical_log_likelihood(logits, torch.tensor([1]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(-2e4, rel=1e-2)
    assert gaussian_noise_log_likelihood(torch.full((1, 1), 1e4).half(), torch.zeros(1, 1), 1.0) == -5e7


def test_bad_arguments():
    zero = torch.tensor(0.0)
    with pytest.raises(InputError, match="`num_train` must be positive and finite, but it is 0"):
        elbo_loss(zero, zero, 0)
    for lone in ({"temperature": 0.1}, {"input_dim": 3}):
        with pytest.raises(InputError, match="`temperature` and `input_dim` go together"):
            elbo_loss(zero, zero, 1, **lone)
    with pytest.raises(InputError, match="`temperature` must be positive and finite, but it is -1"):
        elbo_loss(zero, zero, 1, temperature=-1, input_dim=3)
    with pytest.raises(InputError, match=r"and \[B\], but their shapes are \[4, 3\] and \[4, 1\]"):
        categorical_log_likelihood(torch.zeros(4, 3), torch.zeros(4, 1).long())
    with pytest.raises(InputError, match=r"and \[B, D\], but their shapes are \[4, 1\] and \[4\]"):
        gaussian_noise_log_likelihood(torch.zeros(4, 1), torch.zeros(4), 1.0)
    with pytest.raises(InputError, match="`noise_std` must be positive and finite, but it is 0"):
        gaussian_noise_log_likelihood(torch.zeros(4, 1), torch.zeros(4, 1), 0.0)
