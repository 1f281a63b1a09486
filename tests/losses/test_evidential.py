import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from torch.distributions import Dirichlet, kl_divergence

from lightning_uq import losses
from lightning_uq.errors import InputError
from lightning_uq.functional import dirichlet

FUNCTIONS = {
    "evidential": lambda e, y, **k: losses.evidential_loss(e, y, 0.5, **k),
    "nll": lambda e, y, **k: losses.evidential_loss(e, y, 0.5, risk="nll", **k),
    "cross_entropy": lambda e, y, **k: losses.evidential_loss(e, y, 0.5, risk="cross_entropy", **k),
    "maxnorm": lambda e, y, **k: losses.maxnorm_loss(e, y, 0.5, **k),
    "maxnorm_paper": lambda e, y, **k: losses.maxnorm_loss(e, y, 0.5, p_norm=2.5, fisher="paper", **k),
    "relaxed": lambda e, y, **k: losses.relaxed_evidential_loss(e, y, 0.5, **k),
    "fisher": lambda e, y, **k: losses.fisher_evidential_loss(e, y, 0.5, **k),
    "mse_part": losses.dirichlet_mse_loss,
    "nll_part": losses.dirichlet_nll_loss,
    "cross_entropy_part": losses.dirichlet_cross_entropy_loss,
    "kl_part": losses.uniform_dirichlet_kl,
    "pnorm_part": losses.dirichlet_pnorm_loss,
    "fisher_part": losses.dirichlet_fisher_regularizer,
}
NEED_ONE_CLASS = {"nll", "maxnorm", "maxnorm_paper", "nll_part", "pnorm_part", "fisher_part"}
MODULES = [losses.EvidentialLoss, losses.MaxNormLoss, losses.RelaxedEvidentialLoss, losses.FisherEvidentialLoss]
every_loss = pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS.keys())
# All losses read their rows in one place, which knows two kinds: those that take soft targets, and those that need one class.
# `make test-slow` runs the others.
each_kind = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(loss, id=name, marks=[] if name in ("evidential", "maxnorm") else pytest.mark.slow)
        for name, loss in FUNCTIONS.items()
    ],
)


def evidence_of(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).mul(1.5).exp()


def labels(*shape, classes, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- definitions


def test_squared_error_is_the_expectation_under_the_dirichlet():
    evidence, target = evidence_of(3, 4), torch.tensor([0, 2, 3])
    p = Dirichlet(evidence + 1).sample((200_000,))
    expected = (p - torch.eye(4, dtype=torch.float64)[target]).square().sum(-1).mean(0)
    value = losses.dirichlet_mse_loss(evidence, target, "none")
    torch.testing.assert_close(value, expected, rtol=5e-3, atol=0)


def test_likelihood_and_cross_entropy_are_expectations_under_the_dirichlet():
    evidence, target = evidence_of(3, 4), torch.tensor([0, 2, 3])
    p = Dirichlet(evidence + 1).sample((200_000,))[:, torch.arange(3), target]
    torch.testing.assert_close(losses.dirichlet_nll_loss(evidence, target, "none"), -p.mean(0).log(), rtol=1e-2, atol=0)
    value = losses.dirichlet_cross_entropy_loss(evidence, target, "none")
    torch.testing.assert_close(value, -p.log().mean(0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("p_norm", [1, 2, 4, 2.5, 100])
def test_pnorm_holds_the_moments_of_beta_distributions(p_norm):
    evidence, target = evidence_of(3, 4), torch.tensor([0, 2, 3])
    alpha, total = evidence + 1, (evidence + 1).sum(1)

    def moment(a, b):  # E[x^p] of Beta(a, b)
        return torch.exp(
            torch.lgamma(a + p_norm) + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(a + b + p_norm)
        )

    each = moment(alpha, total.unsqueeze(1) - alpha)
    right = alpha.gather(1, target.unsqueeze(1)).squeeze(1)
    value = each.sum(1) - each.gather(1, target.unsqueeze(1)).squeeze(1) + moment(total - right, right)
    torch.testing.assert_close(
        losses.dirichlet_pnorm_loss(evidence, target, p_norm, "none"), value ** (1 / p_norm), rtol=1e-9, atol=0
    )


def test_an_integer_power_is_the_limit_of_those_beside_it():
    evidence, target = evidence_of(5, 3), labels(5, classes=3)
    beside = losses.dirichlet_pnorm_loss(evidence, target, 4 + 1e-9)
    torch.testing.assert_close(losses.dirichlet_pnorm_loss(evidence, target, 4), beside, rtol=1e-8, atol=0)


def test_kl_is_torch_s():
    evidence, target = evidence_of(6, 5), labels(6, classes=5)
    alpha = (evidence + 1).scatter(1, target.unsqueeze(1), 1.0)
    expected = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha)))
    torch.testing.assert_close(losses.uniform_dirichlet_kl(evidence, target, "none"), expected)


@pytest.mark.parametrize("fisher", ["original", "paper"])
def test_fisher_regularizer(fisher):
    evidence, target = evidence_of(6, 5), labels(6, classes=5)
    alpha = evidence + 1
    expected = torch.zeros(6, dtype=torch.float64)
    for i, y in enumerate(target.tolist()):
        wrong = [alpha[i, j] for j in range(5) if j != y]
        total = sum(wrong) + (alpha[i, y] if fisher == "original" else 1)
        expected[i] = sum((a - 1) ** 2 * (torch.polygamma(1, a) - torch.polygamma(1, total)) for a in wrong) / 2
    torch.testing.assert_close(losses.dirichlet_fisher_regularizer(evidence, target, "none", fisher), expected)


def test_the_paper_s_fisher_does_not_see_the_true_class():
    evidence, target = evidence_of(4, 3), torch.zeros(4, dtype=torch.long)
    more = evidence + torch.tensor([[7.0, 0.0, 0.0]])
    paper = [losses.dirichlet_fisher_regularizer(e, target, fisher="paper") for e in (evidence, more)]
    original = [losses.dirichlet_fisher_regularizer(e, target) for e in (evidence, more)]
    assert torch.equal(*paper)
    assert not torch.isclose(*original)


def test_fisher_information_s_determinant():
    alpha = evidence_of(4, 3) + 0.5
    matrices = torch.diag_embed(torch.polygamma(1, alpha)) - torch.polygamma(1, alpha.sum(1))[:, None, None]
    torch.testing.assert_close(dirichlet.dirichlet_log_det_fisher(alpha), torch.linalg.slogdet(matrices).logabsdet)


def test_relaxed_and_fisher_weighted_losses():
    evidence, target = evidence_of(6, 5), labels(6, classes=5)
    y = torch.eye(5, dtype=torch.float64)[target]
    relaxed = evidence + 0.3
    expected = (y - relaxed / relaxed.sum(1, keepdim=True)).square().sum(1)
    kl = losses.uniform_dirichlet_kl(evidence, target, "none")
    value = losses.relaxed_evidential_loss(evidence, target, 0.7, prior=0.3, reduction="none")
    torch.testing.assert_close(value, expected + 0.7 * kl)
    alpha = evidence + 1
    total = alpha.sum(1, keepdim=True)
    mean = alpha / total
    weighted = (((y - mean) ** 2 + mean * (1 - mean) / (total + 1)) * torch.polygamma(1, alpha)).sum(1)
    value = losses.fisher_evidential_loss(evidence, target, 0.7, fisher_factor=0.2, reduction="none")
    torch.testing.assert_close(value, weighted - 0.2 * dirichlet.dirichlet_log_det_fisher(alpha) + 0.7 * kl)


# ---------------------------------------------------------------------- shapes, targets, reductions


@each_kind
@pytest.mark.parametrize("shape", [(1, 2), (4, 3, 1), (2, 3, 4, 5), (3, 4, 2, 2, 2)])
def test_maps_are_rows(loss, shape):
    evidence = evidence_of(*shape)
    target = labels(shape[0], *shape[2:], classes=shape[1])
    value = loss(evidence, target, reduction="none")
    assert value.shape == target.shape
    rows = loss(evidence.movedim(1, -1).reshape(-1, shape[1]), target.flatten(), reduction="none")
    torch.testing.assert_close(value.flatten(), rows)
    torch.testing.assert_close(loss(evidence, target), value.mean())
    torch.testing.assert_close(loss(evidence, target, reduction="sum"), value.sum())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_one_hot_targets_are_indices(loss, dtype):
    evidence, target = evidence_of(5, 3, 2), labels(5, 2, classes=3)
    hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).to(dtype)
    torch.testing.assert_close(loss(evidence, hot, reduction="none"), loss(evidence, target, reduction="none"))


@every_loss
def test_ignored_positions_reach_neither_loss_nor_gradient(loss):
    target = torch.tensor([[0, -100], [2, 1]])
    evidence = evidence_of(2, 3, 2)
    evidence[0, :, 1] = torch.nan
    for validate in (True, False):
        leaf = evidence.clone().requires_grad_()
        value = loss(leaf, target, validate_args=validate)
        value.backward()
        kept = evidence.movedim(1, -1).reshape(-1, 3)[[0, 2, 3]].requires_grad_()
        expected = loss(kept, torch.tensor([0, 2, 1]))
        expected.backward()
        torch.testing.assert_close(value, expected)
        assert (leaf.grad[0, :, 1] == 0).all()
        torch.testing.assert_close(leaf.grad.movedim(1, -1).reshape(-1, 3)[[0, 2, 3]], kept.grad)
        assert loss(evidence, target, reduction="none", validate_args=validate)[0, 1] == 0
    other = loss(evidence, target.where(target >= 0, 7), ignore_index=7)
    torch.testing.assert_close(other, expected.detach())
    assert loss(evidence[:1, :, 1:], target[:1, 1:]).isnan()  # a mean over nothing, as nn.CrossEntropyLoss has it


@every_loss
def test_class_weights_are_those_of_cross_entropy(loss):
    evidence, target = evidence_of(6, 3), torch.tensor([0, 1, 2, 1, -100, 0])
    weight = torch.tensor([1.0, 5.0, 0.5])
    rows = loss(evidence, target, reduction="none")
    each = weight[target.clamp_min(0)].double() * (target >= 0)
    torch.testing.assert_close(loss(evidence, target, reduction="none", weight=weight), rows * each)
    torch.testing.assert_close(loss(evidence, target, weight=weight), (rows * each).sum() / each.sum())
    torch.testing.assert_close(loss(evidence, target, reduction="sum", weight=weight), (rows * each).sum())


def test_reductions_are_those_of_torch_s_cross_entropy():
    # With rows that are -log p, the type-II loss is the cross-entropy of log alpha.
    evidence, target = evidence_of(6, 3), torch.tensor([0, 1, 2, 1, -100, 0])
    for weight, reduction in itertools.product((None, torch.tensor([1.0, 5.0, 0.5]).double()), ("none", "mean", "sum")):
        expected = torch.nn.functional.cross_entropy((evidence + 1).log(), target, weight, reduction=reduction)
        value = losses.dirichlet_nll_loss(evidence, target, reduction, weight=weight)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_soft_targets_where_they_have_a_meaning(name):
    evidence, soft = evidence_of(4, 3), evidence_of(4, 3, seed=1)
    soft = soft / soft.sum(1, keepdim=True)
    if name in NEED_ONE_CLASS:
        with pytest.raises(InputError, match="class indices or one-hot rows, but its rows are soft"):
            FUNCTIONS[name](evidence, soft)
        return
    value = FUNCTIONS[name](evidence, soft, reduction="none")
    assert value.shape == (4,)
    if name == "cross_entropy_part":  # linear in y
        hard = torch.stack([FUNCTIONS[name](evidence, torch.full((4,), c), reduction="none") for c in range(3)], 1)
        torch.testing.assert_close(value, (soft * hard).sum(1))


# ---------------------------------------------------------------------- gradients


@every_loss
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_gradients(loss, shape):
    evidence = (evidence_of(*shape) + 0.01).requires_grad_()
    target = labels(shape[0], *shape[2:], classes=shape[1])
    target.view(-1)[0] = -100
    assert torch.autograd.gradcheck(lambda e: loss(e, target, reduction="none"), (evidence,))


@every_loss
def test_second_derivatives(loss):
    evidence, target = (evidence_of(3, 3) + 0.01).requires_grad_(), torch.tensor([0, 2, 1])
    assert torch.autograd.gradgradcheck(lambda e: loss(e, target, reduction="none"), (evidence,))


@every_loss
def test_zero_evidence_has_a_finite_gradient(loss):
    evidence = torch.zeros(3, 4, requires_grad=True)
    loss(evidence, torch.tensor([0, 1, 2])).backward()
    assert evidence.grad.isfinite().all()


@every_loss
@settings(max_examples=15)
@given(
    size=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e2, 1e4, 22026.0]),
    classes=st.integers(2, 12),
    where=st.integers(0, 11),
    seed=st.integers(0, 99),
)
def test_float32_is_float64_on_any_evidence(loss, size, classes, where, seed):
    evidence = evidence_of(3, classes, dtype=torch.float32, seed=seed) * 0.1
    evidence[:, where % classes] = size
    target = torch.tensor([0, classes - 1, where % classes])
    single = evidence.clone().requires_grad_()
    double = evidence.double().requires_grad_()
    value, truth = loss(single, target, reduction="none"), loss(double, target, reduction="none")
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-6)
    value.sum().backward()
    truth.sum().backward()
    scale = double.grad.abs().amax(1, keepdim=True).clamp_min(1e-9)
    torch.testing.assert_close(single.grad.double() / scale, double.grad / scale, rtol=1e-4, atol=1e-4)


@every_loss
@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_the_order_of_classes_and_samples_does_not_matter(loss, seed):
    generator = torch.Generator().manual_seed(seed)
    evidence, target = evidence_of(5, 4, seed=seed), labels(5, classes=4, seed=seed)
    classes, rows = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    value = loss(evidence, target, reduction="none")
    torch.testing.assert_close(loss(evidence[rows], target[rows], reduction="none"), value[rows])
    torch.testing.assert_close(loss(evidence[:, classes], classes.argsort()[target], reduction="none"), value)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), more=st.floats(0.1, 100))
def test_evidence_for_the_right_class_lowers_the_risks_and_misleading_evidence_raises_the_kl(seed, more):
    evidence, target = evidence_of(1, 4, seed=seed), torch.tensor([0])
    right, wrong = evidence.clone(), evidence.clone()
    right[0, 0] += more
    wrong[0, 1] += more
    for risk in ("sse", "nll", "cross_entropy"):
        before, after = (losses.evidential_loss(e, target, risk=risk) for e in (evidence, right))
        assert after < before
    assert torch.equal(losses.uniform_dirichlet_kl(right, target), losses.uniform_dirichlet_kl(evidence, target))
    assert losses.uniform_dirichlet_kl(wrong, target) > 0


# ---------------------------------------------------------------------- dtypes


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_first(loss, dtype):
    evidence, target = evidence_of(5, 3).to(dtype), labels(5, classes=3)
    value = loss(evidence, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(evidence.float(), target), rtol=0, atol=0)


@every_loss
def test_autocast_changes_nothing(loss):
    evidence, target = evidence_of(5, 3, dtype=torch.float32), labels(5, classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(evidence, target)
    torch.testing.assert_close(value, loss(evidence, target), rtol=1e-6, atol=0)


@every_loss
def test_memory_and_cost_do_not_pair_samples(loss):
    evidence, target = evidence_of(20_000, 3, dtype=torch.float32), labels(20_000, classes=3)
    assert loss(evidence, target, reduction="none").shape == (20_000,)  # [N, N] would be 1.6 GB


# ---------------------------------------------------------------------- errors

EVIDENCE, TARGET = torch.ones(4, 3), torch.tensor([0, 1, 2, 0])


@each_kind
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EVIDENCE - 2, TARGET), "`evidence` must be non-negative, but it holds -1. Apply `clamped_exp`"),
        ((EVIDENCE * torch.nan, TARGET), "`evidence` must be non-negative, but it holds NaN"),
        (
            (EVIDENCE.long(), TARGET),
            r"`evidence` must be a floating-point tensor \[N, C, d1, ..., dk\], but it is torch.int64",
        ),
        ((EVIDENCE[0], TARGET), r"floating-point tensor \[N, C, d1, ..., dk\], but it is torch.float32 of shape \[3\]"),
        ((EVIDENCE, [0, 1, 2, 0]), "`target` must be a tensor, but it is a list"),
        ((EVIDENCE, TARGET[:3]), r"indices of shape \[4\] or one-hot rows of shape \[4, 3\], but its shape is \[3\]"),
        ((EVIDENCE, TARGET[:, None]), r"but its shape is \[4, 1\]"),
        ((EVIDENCE, TARGET.float()), "class indices of an integer dtype, but its dtype is torch.float32"),
        ((EVIDENCE, TARGET + 1), r"class indices in \[0, 3\), but it holds 3"),
        ((EVIDENCE, TARGET - 1), r"class indices in \[0, 3\), but it holds -1"),
        ((EVIDENCE, torch.ones(4, 3)), "sum to one over the class axis"),
    ],
)
def test_bad_input(loss, arguments, message):
    with pytest.raises(InputError, match=message):
        loss(*arguments)


@every_loss
def test_bad_options(loss):
    with pytest.raises(InputError, match="`reduction` must be one of 'mean', 'sum', 'none', but it is None"):
        loss(EVIDENCE, TARGET, reduction=None)
    with pytest.raises(InputError, match=r"`weight` must have shape \[3\], but its shape is \[2\]"):
        loss(EVIDENCE, TARGET, weight=torch.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.evidential_loss(EVIDENCE, TARGET, -1.0), "`reg_factor` must be at least 0, but it is -1.0"),
        (lambda: losses.evidential_loss(EVIDENCE, TARGET, risk="mse"), "`risk` must be one of 'sse', 'nll'"),
        (lambda: losses.maxnorm_loss(EVIDENCE, TARGET, p_norm=0.5), "`p_norm` must be a finite number of at least 1"),
        (
            lambda: losses.dirichlet_pnorm_loss(EVIDENCE, TARGET, math.inf),
            "`p_norm` must be a finite number of at least 1",
        ),
        (lambda: losses.maxnorm_loss(EVIDENCE, TARGET, fisher="probly"), "`fisher` must be one of 'original', 'paper'"),
        (
            lambda: losses.relaxed_evidential_loss(EVIDENCE, TARGET, prior=0.0),
            "`prior` must be positive and finite, but it is 0.0",
        ),
        (lambda: losses.clamped_exp(EVIDENCE, 0.0), "`clamp` must be positive and finite, but it is 0.0"),
        (lambda: losses.EvidentialLoss("sigmoid"), "`evidence` must be one of 'clamped_exp', 'softplus', 'relu'"),
        (lambda: losses.EvidentialLoss(reg_factor=-1.0), "`reg_factor` must be at least 0"),
        (lambda: losses.EvidentialLoss(risk="mse"), "`risk` must be one of"),
        (lambda: losses.MaxNormLoss(p_norm=0), "`p_norm` must be a finite number"),
        (lambda: losses.MaxNormLoss(fisher="x"), "`fisher` must be one of"),
        (lambda: losses.RelaxedEvidentialLoss(prior=-1), "`prior` must be positive"),
        (lambda: losses.EvidentialLoss(reduction="batchmean"), "`reduction` must be one of"),
        (lambda: losses.EvidentialLoss(validate_args="no"), "`validate_args` must be True or False"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


@every_loss
def test_without_validation_values_are_not_looked_at(loss):
    bad = torch.tensor([[1.0, 2.0, 0.5], [0.3, -0.2, 0.1]])
    assert loss(bad, torch.tensor([0, 1]), validate_args=False).isfinite()
    with pytest.raises(InputError):  # shapes always are
        loss(bad, torch.tensor([0]), validate_args=False)


# ---------------------------------------------------------------------- modules


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("evidence", ["clamped_exp", "softplus", "relu"])
def test_modules_stand_where_cross_entropy_stood(kind, evidence):
    logits, target = torch.randn(4, 3, 5, requires_grad=True), labels(4, 5, classes=3)
    for arguments in ({}, {"weight": [1.0, 2.0, 3.0]}, {"reduction": "none"}, {"ignore_index": 1}):
        loss = kind(evidence, reg_factor=0.3, **arguments)
        plain = torch.nn.CrossEntropyLoss(**{k: torch.tensor(v) if k == "weight" else v for k, v in arguments.items()})
        assert loss(logits, target).shape == plain(logits, target).shape
    loss(logits, target).sum().backward()
    assert logits.grad.isfinite().all()


def test_modules_are_their_functions_of_evidence():
    logits, target = torch.randn(4, 3), labels(4, classes=3)
    e = losses.clamped_exp(logits)
    weight = torch.tensor([1.0, 2.0, 3.0])
    pairs = [
        (losses.EvidentialLoss(reg_factor=0.3), losses.evidential_loss(e, target, 0.3)),
        (
            losses.EvidentialLoss(risk="nll", weight=weight),
            losses.evidential_loss(e, target, risk="nll", weight=weight),
        ),
        (
            losses.MaxNormLoss(p_norm=3, fisher="paper", reg_factor=1),
            losses.maxnorm_loss(e, target, 1, 3, fisher="paper"),
        ),
        (losses.RelaxedEvidentialLoss("clamped_exp", prior=0.2), losses.relaxed_evidential_loss(e, target, prior=0.2)),
        (losses.FisherEvidentialLoss("clamped_exp"), losses.fisher_evidential_loss(e, target)),
        (losses.EvidentialLoss(torch.exp), losses.evidential_loss(logits.exp(), target)),
    ]
    for module, expected in pairs:
        torch.testing.assert_close(module(logits, target), expected)
    module = losses.EvidentialLoss(reg_factor=0.3)
    torch.testing.assert_close(module(logits, target, 0.0), losses.evidential_loss(e, target))
    torch.testing.assert_close(module.concentration(logits), e + 1)
    torch.testing.assert_close(
        losses.RelaxedEvidentialLoss(prior=0.2).concentration(logits), logits.exp().log1p() + 0.2
    )


def test_weights_move_with_the_module_and_save():
    loss = losses.EvidentialLoss(weight=[1.0, 2.0])
    assert list(loss.state_dict()) == ["weight"]
    assert loss.double().weight.dtype == torch.float64


@pytest.mark.parametrize("kind", MODULES)
def test_it_learns(kind):
    # Two classes on a line: with any of the losses, gradient descent separates them and makes evidence.
    x = torch.linspace(-1, 1, 40).unsqueeze(1)
    y = (x[:, 0] > 0).long()
    network, loss = torch.nn.Linear(1, 2), kind("clamped_exp")
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(network(x), y, 0.01).backward()
        optimizer.step()
    alpha = loss.concentration(network(x))
    assert (alpha.argmax(1) == y).float().mean() > 0.95
    assert alpha[0].sum() > 2 * alpha.shape[1] * loss.prior


def test_a_command_line_sets_the_common_options_of_each_loss():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=losses.EvidenceLoss)
    for kind in MODULES:
        chosen = f"--loss=lightning_uq.losses.{kind.__name__}"
        found = parser.parse_args([chosen, "--loss.reduction=sum", "--loss.weight=[1.0,2.0]"]).loss.init_args
        assert (found.reduction, found.weight) == ("sum", [1.0, 2.0])
        with pytest.raises(ArgumentError, match="frobnicate"):
            parser.parse_args([chosen, "--loss.frobnicate=1"])
