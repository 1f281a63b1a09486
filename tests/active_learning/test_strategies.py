"""Strategies beside their definitions, computed anew without their shortcuts."""

import itertools
import math

import pytest
import torch

from lightning_uq import InputError
from lightning_uq.active_learning import (
    STRATEGIES,
    badge,
    batch_bald,
    core_set,
    epig,
    select,
    select_randomly,
)
from lightning_uq.functional import mutual_information


def members(num_inputs, num_members=5, num_classes=3, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_inputs, num_members, num_classes, generator=generator, dtype=torch.float64)
    return logits.log_softmax(2)


def entropy(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


# ------------------------------------------------------------------ EPIG


def test_epig_is_the_mean_mutual_information_of_two_labels():
    pool, targets = members(4), members(3, seed=1)
    for i, j in itertools.product(range(4), range(3)):
        p, q = pool[i].exp(), targets[j].exp()
        joint = [[float((p[:, a] * q[:, b]).mean()) for b in range(3)] for a in range(3)]
        first, second = [sum(row) for row in joint], [sum(column) for column in zip(*joint, strict=True)]
        expected = sum(joint[a][b] * math.log(joint[a][b] / (first[a] * second[b])) for a in range(3) for b in range(3))
        assert float(epig(pool, targets[[j]])[i]) == pytest.approx(expected, abs=1e-12)
    together = torch.stack([epig(pool, targets[[j]]) for j in range(3)]).mean(0)
    torch.testing.assert_close(epig(pool, targets), together)


def test_epig_of_a_target_that_names_the_member_is_the_mutual_information():
    pool = members(6, num_members=3, num_classes=3)
    named = torch.eye(3, dtype=torch.float64)[None].log()
    torch.testing.assert_close(epig(pool, named), mutual_information(pool.transpose(0, 1)))


def test_epig_ignores_what_no_target_depends_on_and_survives_zeros():
    certain = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).log()
    doubtful = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).log()
    assert epig(doubtful, certain).tolist() == [0.0]
    assert float(epig(doubtful, doubtful)) == pytest.approx(math.log(2))


def test_epig_does_not_depend_on_how_the_pool_is_split():
    pool, targets = members(50, num_classes=10), members(300, num_classes=10, seed=1)
    torch.testing.assert_close(
        epig(pool, targets), torch.cat([epig(part, targets) for part in pool.split(1)]), rtol=1e-12, atol=1e-14
    )


def test_epig_names_shapes_that_do_not_fit():
    with pytest.raises(
        InputError, match=r"\[P, Z, C\] and `targets` \[T, Z, C\], but they are \[2, 5, 3\] and \[2, 4, 3\]"
    ):
        epig(members(2), members(2, num_members=4))


# ------------------------------------------------------------------ BatchBALD


def joint_information(probs):
    """I(y_1, ..., y_k; z) of inputs [k, Z, C], by enumeration."""
    size, num_members, num_classes = probs.shape
    joint = []
    for labels in itertools.product(range(num_classes), repeat=size):
        of_members = [math.prod(float(probs[i, z, c]) for i, c in enumerate(labels)) for z in range(num_members)]
        joint.append(sum(of_members) / num_members)
    conditional = sum(entropy(probs[i, z].tolist()) for i in range(size) for z in range(num_members)) / num_members
    return entropy(joint) - conditional


def greedy(log_probs, num):
    chosen = []
    for _ in range(num):
        left = [i for i in range(len(log_probs)) if i not in chosen]
        chosen.append(max(left, key=lambda i: joint_information(log_probs[[*chosen, i]].exp())))
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_batch_bald_is_greedy_in_the_joint_information(seed):
    log_probs = members(7, num_members=4, num_classes=3, seed=seed)
    assert batch_bald(log_probs, 4).tolist() == greedy(log_probs, 4)


def test_a_sample_of_combinations_estimates_the_joint_entropy():
    from lightning_uq.active_learning.strategies.batch_bald import _extended, _joint_entropy

    probs = members(6, num_members=4, num_classes=4).exp()

    def joint_entropy(num_samples):
        joint, proposal = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for i in range(5):  # 1,024 combinations
            joint, proposal = _extended(joint, proposal, probs[i], num_samples, generator)
        return float(_joint_entropy(joint, proposal, probs[[5]]))

    # 512 of each 2,048: the standard deviation over 20 seeds is .02 of 4.6 nats.
    assert joint_entropy(512) == pytest.approx(joint_entropy(2000), abs=0.15)


def test_batch_bald_does_not_take_copies_and_single_scores_do():
    doubtful = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.95, 0.05], [0.05, 0.95]])
    other = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    log_probs = torch.stack([doubtful, doubtful, other]).log()
    assert batch_bald(log_probs, 2).tolist() == [0, 2]
    assert select(mutual_information(log_probs.transpose(0, 1)), 2).tolist() == [0, 1]


# ------------------------------------------------------------------ BADGE


def test_badge_follows_distances_of_gradients():
    generator = torch.Generator().manual_seed(0)
    errors, features = torch.randn(30, 4, generator=generator), torch.randn(30, 6, generator=generator)
    embedding = torch.einsum("nc,nd->ncd", errors, features).flatten(1).double()
    first = int(embedding.norm(dim=1).argmax())
    distance = (embedding - embedding[first]).square().sum(1)
    expected = distance / distance.sum()
    draws = 4000
    second = torch.tensor([int(badge(errors, features, 2, generator)[1]) for _ in range(draws)])
    counts = torch.bincount(second, minlength=30) / draws
    assert int(badge(errors, features, 1, generator)) == first
    assert counts[first] == 0
    error = (expected * (1 - expected) / draws).sqrt()
    assert bool(((counts - expected).abs() <= 4.5 * error + 1e-12).all())


def test_badge_takes_everything_once_even_of_copies():
    errors, features = torch.tensor([[0.5, -0.5]] * 5), torch.ones(5, 3)
    assert sorted(badge(errors, features, 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(badge(torch.zeros(4, 2), torch.zeros(4, 3), 4).tolist()) == [0, 1, 2, 3]


def test_a_batch_of_badge_covers_clusters():
    errors = torch.tensor([[0.5, -0.5]]).repeat(40, 1)
    features = torch.eye(4).repeat_interleave(10, 0)
    found = badge(errors, features, 4, torch.Generator().manual_seed(0))
    assert sorted((found // 10).tolist()) == [0, 1, 2, 3]


# ------------------------------------------------------------------ core set


def test_a_core_set_covers_within_twice_the_optimum():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        pool, labelled = torch.randn(9, 2, generator=generator), torch.randn(2, 2, generator=generator)

        def radius(centres, pool=pool, labelled=labelled):
            return float(torch.cdist(pool, torch.cat([labelled, pool[list(centres)]])).amin(1).max())

        optimum = min(radius(centres) for centres in itertools.combinations(range(9), 3))
        assert radius(core_set(pool, labelled, 3).tolist()) <= 2 * optimum + 1e-6


def test_a_core_set_takes_the_farthest_first_and_no_copy_twice():
    pool = torch.tensor([[0.0], [9.0], [9.0], [4.0]])
    assert core_set(pool, torch.tensor([[0.0]]), 4).tolist()[:2] == [1, 3]
    assert sorted(core_set(pool, torch.tensor([[0.0]]), 4).tolist()) == [0, 1, 2, 3]


# ------------------------------------------------------------------ random selections


@pytest.mark.parametrize(
    ("selection", "weights"),
    [
        ("power", [0.2**2, 0.5**2, 0.3**2, 0.0]),
        ("softmax", [math.exp(2 * s) for s in (0.2, 0.5, 0.3, 0.0)]),
        ("softrank", [3**-2.0, 1.0, 2**-2.0, 4**-2.0]),
    ],
)
def test_a_random_selection_has_its_distribution(selection, weights):
    scores, generator, draws = torch.tensor([0.2, 0.5, 0.3, 0.0]), torch.Generator().manual_seed(0), 8000
    pairs = [tuple(select_randomly(scores, 2, selection, 2.0, generator=generator).tolist()) for _ in range(draws)]
    total = sum(weights)
    for first, second in itertools.permutations(range(4), 2):
        expected = weights[first] / total * weights[second] / (total - weights[first]) if weights[first] else 0.0
        found = pairs.count((first, second)) / draws
        assert abs(found - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws) + 1e-12, (first, second)


def test_a_sharp_selection_is_the_top_and_a_flat_one_uniform():
    scores = torch.linspace(0.01, 1, 50)
    for selection in ("power", "softmax", "softrank"):
        sharp = select_randomly(scores, 5, selection, 1e6)
        assert sharp.tolist() == select(scores, 5).tolist()
        flat = torch.stack([select_randomly(scores, 5, selection, 0.0) for _ in range(400)])
        assert abs(float(flat.double().mean()) - 24.5) < 4 * 14.4 / math.sqrt(2000)
    assert select_randomly(scores, 5, "top").tolist() == select(scores, 5).tolist()


def test_a_random_selection_takes_each_once_and_refuses_negative_scores():
    assert sorted(select_randomly(torch.zeros(6), 6, "power").tolist()) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="not negative, but the lowest is -1"):
        select_randomly(torch.tensor([-1.0, 2.0]), 1, "power")
    with pytest.raises(InputError, match="`beta` must be finite and at least 0, but it is nan"):
        select_randomly(torch.ones(2), 1, beta=math.nan)
    with pytest.raises(InputError, match="`selection` must be one of"):
        select_randomly(torch.ones(2), 1, "best")


def test_too_few_inputs_are_an_error():
    with pytest.raises(InputError, match="at least 3"):
        badge(torch.ones(2, 2), torch.ones(2, 2), 3)
    with pytest.raises(InputError, match="at least 3"):
        core_set(torch.ones(2, 2), torch.ones(1, 2), 3)
    with pytest.raises(InputError, match="P of at least 3"):
        batch_bald(members(2), 3)


def test_every_strategy_says_its_cost():
    for make in STRATEGIES.values():
        assert "Cost: " in make.__doc__
