"""Detection scores against scikit-learn, reference numbers and brute force, with ties throughout."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_uq.errors import InputError
from lightning_uq.functional import auroc, average_precision, fpr_at_tpr
from lightning_uq.functional import ood as module

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "ddu_auroc.npz")


def random_scores(seed, rows=200, levels=20, dtype=torch.float64):
    """Scores on a coarse grid, so that most rows are tied."""
    generator = torch.Generator().manual_seed(seed)
    is_ood = torch.rand(rows, generator=generator) < 0.4
    is_ood[0], is_ood[1] = True, False
    score = (levels * torch.rand(rows, generator=generator) + 3 * is_ood).floor().to(dtype)
    return score, is_ood


@pytest.mark.parametrize("levels", [1, 3, 20, 10**6])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_scikit_learn(seed, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    score, is_ood = random_scores(seed, levels=levels)
    assert auroc(score, is_ood).item() == pytest.approx(metrics.roc_auc_score(is_ood, score), abs=1e-14)
    for positive, label, value in (("out", is_ood, score), ("in", ~is_ood, -score)):
        expected = metrics.average_precision_score(label, value)
        assert average_precision(score, is_ood, positive).item() == pytest.approx(expected, abs=1e-14)
        false, true, _ = metrics.roc_curve(label, value, drop_intermediate=False)
        expected = false[np.argmax(true >= 0.95)]
        assert fpr_at_tpr(score, is_ood, 0.95, positive).item() == pytest.approx(expected, abs=1e-14)
    false, true, _ = metrics.roc_curve(is_ood, score, drop_intermediate=False)
    ours = module.roc_curve(score, is_ood)
    np.testing.assert_allclose(np.stack([false, true]), torch.stack(ours), atol=1e-14)


@pytest.mark.parametrize("name", ["entropy", "logsumexp", "confidence", "ties_entropy", "ties_logsumexp"])
def test_reference(name):
    """The original scores the density and the confidence with in-distribution rows as the positive kind."""
    inside, outside = (torch.tensor(REFERENCE[f"{name}_scores_{kind}"]) for kind in ("in", "ood"))
    score, is_ood = torch.cat([inside, outside]), torch.tensor([False] * len(inside) + [True] * len(outside))
    positive = "out" if "entropy" in name else "in"
    score = score if positive == "out" else -score
    expected = REFERENCE[f"{name}_auroc_auprc"]
    assert auroc(score, is_ood).item() == pytest.approx(expected[0], abs=1e-7)
    assert average_precision(score, is_ood, positive).item() == pytest.approx(expected[1], abs=1e-7)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_against_the_definitions(rows):
    score = torch.tensor([float(s) for s, _ in rows])
    is_ood = torch.tensor([o for _, o in rows])
    outside, inside = score[is_ood].tolist(), score[~is_ood].tolist()
    if not outside or not inside:
        assert auroc(score, is_ood).isnan()
        assert average_precision(score, is_ood).isnan()
        assert average_precision(score, is_ood, "in").isnan()
        assert fpr_at_tpr(score, is_ood).isnan()
        return
    wins = sum((o > i) + 0.5 * (o == i) for o in outside for i in inside)
    assert auroc(score, is_ood).item() == pytest.approx(wins / (len(outside) * len(inside)))
    precision = 0.0
    for t in sorted(set(outside)):
        flagged = sum(s >= t for s in score.tolist())
        precision += outside.count(t) / len(outside) * sum(o >= t for o in outside) / flagged
    assert average_precision(score, is_ood).item() == pytest.approx(precision)
    for tpr in (0.5, 0.95):
        accepted = min(t for t in score.tolist() if sum(i <= t for i in inside) / len(inside) >= tpr)
        expected = sum(o <= accepted for o in outside) / len(outside)
        assert fpr_at_tpr(score, is_ood, tpr, "in").item() == pytest.approx(expected)
        flagged = max(t for t in score.tolist() if sum(o >= t for o in outside) / len(outside) >= tpr)
        expected = sum(i >= flagged for i in inside) / len(inside)
        assert fpr_at_tpr(score, is_ood, tpr, "out").item() == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.95, 0.9, 0.5, 0.99, 1 / 3])
def test_the_least_count_is_exact(share):
    """19 of 20 are 95 %, though 0.95 is no binary fraction."""
    exact = Fraction(share).limit_denominator(1000)
    for total in [*range(1, 500), 10**6, 10**6 + 1]:
        counts = torch.arange(1, total + 1)
        found = module.fpr_of_counts(counts, counts, share) * total
        assert round(found.item()) == -(-exact * total // 1)


@pytest.mark.parametrize("transform", [lambda s: 3 * s - 7, torch.exp, lambda s: s.bfloat16(), lambda s: s.half()])
def test_invariant_to_a_monotone_transform_and_to_dtype(transform):
    score, is_ood = random_scores(3, levels=8)
    for metric in (auroc, average_precision, fpr_at_tpr):
        value = metric(score, is_ood)
        assert value.dtype == torch.float64
        assert torch.equal(metric(transform(score), is_ood), value)


def test_constants_and_infinities():
    is_ood = torch.tensor([0, 0, 0, 1, 1])
    constant = torch.zeros(5)
    assert auroc(constant, is_ood) == 0.5
    assert average_precision(constant, is_ood).item() == pytest.approx(0.4)
    assert average_precision(constant, is_ood, "in").item() == pytest.approx(0.6)
    assert fpr_at_tpr(constant, is_ood) == 1
    infinite = torch.tensor([-torch.inf, 0.0, 1.0, torch.inf, torch.inf])
    assert auroc(infinite, is_ood) == 1
    assert fpr_at_tpr(infinite, is_ood) == 0
    assert auroc(-infinite, is_ood) == 0


def test_swapping_the_kinds_and_the_sign_changes_nothing():
    score, is_ood = random_scores(5)
    assert auroc(-score, ~is_ood).item() == pytest.approx(auroc(score, is_ood).item(), abs=1e-15)
    assert torch.equal(average_precision(-score, ~is_ood, "in"), average_precision(score, is_ood, "out"))
    assert torch.equal(fpr_at_tpr(-score, ~is_ood, positive="out"), fpr_at_tpr(score, is_ood, positive="in"))


def test_large_counts_are_exact():
    """At 10^6 rows the number of pairs is beyond float32, and a float32 sum of precisions would drift."""
    score = torch.arange(10**6, dtype=torch.float32)
    is_ood = torch.zeros(10**6, dtype=torch.bool)
    is_ood[::2] = True
    assert auroc(score, is_ood).item() == pytest.approx(0.5 - 1 / 10**6, abs=1e-12)


@pytest.mark.parametrize(
    ("score", "is_ood", "message"),
    [
        (torch.tensor([0.1, float("nan")]), torch.tensor([0, 1]), "`score` must hold numbers, but it holds NaN"),
        (
            torch.tensor([0, 1]),
            torch.tensor([0, 1]),
            r"`score` must be a floating-point tensor \[N\], but it is torch.int64",
        ),
        (torch.zeros(2, 1), torch.zeros(2, 1).bool(), r"`score` must be a floating-point tensor \[N\].* \[2, 1\]"),
        ([0.1], torch.tensor([0]), r"`score` must be a tensor \[N\], but it is a list"),
        (torch.zeros(2), torch.zeros(3).bool(), r"`is_ood` must have shape \[2\], but its shape is \[3\]"),
        (
            torch.zeros(2),
            torch.zeros(2),
            "`is_ood` must be of dtype bool or an integer dtype, but its dtype is torch.float32",
        ),
        (torch.zeros(2), torch.tensor([0, 2]), "`is_ood` must hold only 0 and 1"),
        (torch.zeros(2), [0, 1], r"`is_ood` must be a tensor \[2\], but it is a list"),
    ],
)
def test_bad_values(score, is_ood, message):
    for metric in (auroc, average_precision, fpr_at_tpr):
        with pytest.raises(InputError, match=message):
            metric(score, is_ood)


@pytest.mark.parametrize("tpr", [0, 1, 1.5, True, "a"])
def test_bad_options(tpr):
    score, is_ood = random_scores(0)
    with pytest.raises(InputError, match=r"`tpr` must be a number in \(0, 1\)"):
        fpr_at_tpr(score, is_ood, tpr)
    with pytest.raises(InputError, match="`positive` must be one of 'out', 'in', but it is 'ood'"):
        average_precision(score, is_ood, "ood")
    with pytest.raises(InputError, match="`positive` must be one of"):
        fpr_at_tpr(score, is_ood, positive="ood")
