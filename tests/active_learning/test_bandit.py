"""Thompson sampling, held to a plain re-computation of each of its parts."""

import functools
import itertools

import pytest
import torch
from torch import nn

from lightning_uq import (
    BayesByBackpropModule,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    Factory,
    HypermodelModule,
    InputError,
)
from lightning_uq.active_learning import Bandit, thompson_sampling
from lightning_uq.active_learning.bandit import _Replay
from lightning_uq.compare.testbed import epinet_for_testbed
from lightning_uq.compare.testbed.uniform import UniformModule
from lightning_uq.data.environments import draw_teacher, teacher_logits
from lightning_uq.losses import BootstrapNoise
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks import EnsembleIndexer, EpistemicNetwork

LINEAR = Factory("torch.nn.Linear", {"in_features": 2, "out_features": 2})
ADAM = functools.partial(torch.optim.Adam, lr=0.01)


def network():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


class Fixed(EpistemicNetwork):
    """Two hypotheses: the log-odds of an action are its first coordinate, or minus that."""

    def __init__(self):
        super().__init__(EnsembleIndexer(2))
        self.asked = []

    def sample_index(self, num_samples, generator=None):
        index = super().sample_index(num_samples, generator)
        self.asked.append(index)
        return index

    def forward(self, x, index):
        sign = 1.0 - 2 * index[:, None]
        return torch.stack([torch.zeros(len(index), len(x)), sign * x[:, 0]], 2)


# ------------------------------------------------------------------ the environment


def test_the_bandit_is_the_testbeds_teacher():
    bandit = Bandit(input_dim=3, num_actions=20, temperature=0.2, seed=4)
    generator = torch.Generator().manual_seed(4)
    teacher = draw_teacher(3, 2, generator=generator)
    actions = torch.randn(20, 3, generator=generator)
    assert torch.equal(bandit.actions, actions)
    probs = torch.softmax(teacher_logits(teacher, actions, 0.2), 1)[:, 1]
    torch.testing.assert_close(bandit.probs, probs)
    _, regret = bandit.pull(7)
    assert regret == pytest.approx(float(probs.max() - probs[7]))


def test_rewards_come_with_their_probability():
    bandit = Bandit(temperature=1.0)
    action = int((bandit.probs - 0.5).abs().argmin())
    share = sum(bandit.pull(action)[0] for _ in range(4000)) / 4000
    assert share == pytest.approx(float(bandit.probs[action]), abs=0.03)


def test_a_bandit_follows_its_seed_alone():
    one, other = Bandit(seed=3), Bandit(seed=3)
    torch.manual_seed(99)
    assert [one.pull(5) for _ in range(20)] == [other.pull(5) for _ in range(20)]
    assert not torch.equal(one.actions, Bandit(seed=4).actions)


def test_all_agents_have_the_same_luck():
    """A better action is rewarded wherever a worse one is."""
    best, worst = Bandit(temperature=1.0, seed=1), Bandit(temperature=1.0, seed=1)
    high, low = int(best.probs.argmax()), int(best.probs.argmin())
    pairs = [(best.pull(high)[0], worst.pull(low)[0]) for _ in range(200)]
    assert all(good >= bad for good, bad in pairs)
    assert any(good > bad for good, bad in pairs)


def test_fresh_actions_have_the_same_teacher():
    bandit, same = Bandit(fresh_actions=True, seed=2), Bandit(seed=2)
    assert torch.equal(bandit.actions, same.actions)
    teacher = draw_teacher(2, 2, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        before = bandit.actions
        bandit.pull(0)
        same.pull(0)
        assert not torch.equal(bandit.actions, before)
        torch.testing.assert_close(bandit.probs, teacher_logits(teacher, bandit.actions, 0.1).softmax(1)[:, 1])
    assert torch.equal(same.actions, Bandit(seed=2).actions)


# ------------------------------------------------------------------ the agent


def test_each_step_asks_one_hypothesis_for_its_best_action():
    network = Fixed()
    module, bandit = UncertaintyModule(network), Bandit(num_actions=6, seed=5)
    first = bandit.actions[:, 0]
    regrets = list(thompson_sampling(module, bandit, 40))
    assert [index.shape for index in network.asked] == [(1,)] * 40
    chosen = {0: int(first.argmax()), 1: int(first.argmin())}
    expected = [float(bandit.probs.max() - bandit.probs[chosen[int(index)]]) for index in network.asked]
    assert regrets == pytest.approx(expected)
    assert len(set(expected)) == 2


def test_of_equal_actions_it_takes_any():
    bandit = Bandit(num_actions=10, seed=1)
    regrets = torch.tensor(list(thompson_sampling(UniformModule(2), bandit, 2000)), dtype=torch.float64)
    assert float(regrets.mean()) == pytest.approx(float((bandit.probs.max() - bandit.probs).mean()), abs=0.03)


def test_its_training_is_the_modules_own_on_what_it_saw(monkeypatch):
    """The weights are those of Adam on training_loss, over batches of what was kept, with the L2 term as the original's."""
    batches = []
    sample = _Replay.sample
    monkeypatch.setattr(_Replay, "sample", lambda self: batches.append(sample(self)) or batches[-1])
    module = DeterministicModule(network, optimizer=ADAM)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    bandit = Bandit(seed=3)
    list(thompson_sampling(module, bandit, 6, l2=0.3, batch_size=16, steps_per_action=2))
    assert len(batches) == 12

    plain = DeterministicModule(network)
    plain.load_state_dict(start)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    for i, batch in enumerate(batches):
        assert batch["input"].shape == (16, 2)
        assert int(batch["index"].max()) <= i // 2
        assert all(bool((bandit.actions == row).all(1).any()) for row in batch["input"])
        adam.zero_grad()
        loss = nn.functional.cross_entropy(plain(batch["input"])[0], batch["target"])
        (loss + 0.3 * sum(p.square().sum() for p in plain.parameters()) / (i // 2 + 1)).backward()
        adam.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_without_l2_the_optimizer_stays_as_it_is(monkeypatch):
    module = DeterministicModule(network, optimizer=functools.partial(ADAM, weight_decay=0.7))
    made = []
    configure = module.configure_optimizers
    monkeypatch.setattr(module, "configure_optimizers", lambda: made.append(configure()) or made[-1])
    list(thompson_sampling(module, Bandit(), 3))
    assert [group["weight_decay"] for group in made[0].param_groups] == [0.7]
    list(thompson_sampling(module, Bandit(), 4, l2=1.0))
    assert [group["weight_decay"] for group in made[1].param_groups] == [0.5]


def dropout_network():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


MODULES = {
    "ensemble": lambda: EnsembleModule(network, num_members=3, optimizer=ADAM),
    "bootstrap": lambda: EnsembleModule(network, num_members=3, optimizer=ADAM, bootstrap="bernoulli"),
    "prior": lambda: EnsembleModule(network, num_members=3, prior_network=network, prior_scale=1.0, execution="loop"),
    "epinet": lambda: EpinetModule(network(), optimizer=ADAM, data_noise=BootstrapNoise("exponential")),
    "testbed": lambda: epinet_for_testbed(2, 2, 100, temperature=0.1),
    "dropout": lambda: DropoutModule(dropout_network(), optimizer=ADAM),
    "softmax": lambda: DeterministicModule(LINEAR, optimizer=functools.partial(torch.optim.SGD, lr=0.1)),
    "hypermodel": lambda: HypermodelModule(network(), optimizer=ADAM),
    "bayes_by_backprop": lambda: BayesByBackpropModule(network(), optimizer=ADAM, num_train=100),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_learns_outside_of_a_trainer(name):
    module = MODULES[name]()
    start = {name: value.clone() for name, value in module.named_parameters()}
    regrets = list(thompson_sampling(module, Bandit(), 4, l2=0.1))
    assert all(0 <= regret <= 1 for regret in regrets)
    for key, value in module.named_parameters():
        assert torch.equal(value, start[key]) != value.requires_grad, key


def test_a_run_repeats_with_its_seed():
    def run(seed):
        torch.manual_seed(seed)
        module = EnsembleModule(network, num_members=3, optimizer=ADAM)
        return list(thompson_sampling(module, Bandit(), 12))

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("seed", [1, 4])
def test_it_finds_the_best_actions(seed):
    torch.manual_seed(seed)
    fast = functools.partial(torch.optim.Adam, lr=0.02)
    module = EnsembleModule(network, num_members=5, prior_network=network, prior_scale=1.0, optimizer=fast)
    # Releases of torch draw other problems from a seed: the next one where most actions are bad.
    bandits = (Bandit(num_actions=20, seed=next_seed) for next_seed in itertools.count(seed))
    bandit = next(b for b in bandits if random_regret(b) > 0.5)
    regrets = list(thompson_sampling(module, bandit, 150, batch_size=32))
    assert sum(regrets[-50:]) / 50 < random_regret(bandit) / 20


def random_regret(bandit):
    """The mean regret of a random action."""
    return float((bandit.probs.max() - bandit.probs).mean())


# ------------------------------------------------------------------ the replay


def test_the_oldest_is_forgotten():
    replay = _Replay(Bandit(), batch_size=200, capacity=4)
    for step in range(11):
        replay.add(torch.full((2,), float(step)), step % 2)
    batch = replay.sample()
    assert sorted(set(batch["index"].tolist())) == [7, 8, 9, 10]
    assert torch.equal(batch["input"][:, 0].long(), batch["index"])
    assert torch.equal(batch["target"], batch["index"] % 2)


def test_only_what_was_seen_is_sampled():
    replay = _Replay(Bandit(), batch_size=50, capacity=10)
    replay.add(torch.ones(2), 1)
    assert bool((replay.sample()["input"] == 1).all())
    assert replay.sample()["index"].tolist() == [0] * 50


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dim": 0}, "`input_dim` must be an integer of at least 1, but it is 0"),
        ({"num_actions": 1}, "`num_actions` must be an integer of at least 2, but it is 1"),
        ({"temperature": 0.0}, "`temperature` must be positive and finite, but it is 0.0"),
        ({"temperature": float("nan")}, "`temperature` must be positive and finite, but it is nan"),
        ({"fresh_actions": "no"}, "`fresh_actions` must be True or False, but it is 'no'"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, but it is -1"),
    ],
)
def test_a_bandit_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        Bandit(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be an integer of at least 1, but it is 0"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"capacity": 0}, "`capacity` must be"),
        ({"steps_per_action": -1}, "`steps_per_action` must be an integer of at least 0, but it is -1"),
        ({"l2": -1.0}, "`l2` must be finite and at least 0, but it is -1.0"),
        ({"module": nn.Linear(2, 2)}, "`module` must be an UncertaintyModule that classifies, but it is a Linear"),
        ({"module": DeterministicModule(LINEAR, task="regression")}, "but it is a DeterministicModule"),
        (
            {"module": DeterministicModule(LINEAR, optimizer=torch.optim.AdamW), "l2": 1.0},
            "`weight_decay` is an L2 term, such as Adam, but it is AdamW",
        ),
        (
            {"module": DeterministicModule(LINEAR, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))},
            "one optimizer and no `lr_scheduler`",
        ),
    ],
)
def test_it_refuses_before_the_first_step(changes, message):
    arguments = {"module": DeterministicModule(LINEAR), "bandit": Bandit(), "num_steps": 1, **changes}
    with pytest.raises(InputError, match=message):
        thompson_sampling(**arguments)


def test_other_outputs_and_divergence_are_reported():
    with pytest.raises(InputError, match=r"outputs of shape \[Z, B, 2\], but their shape is \[1, 100, 3\]"):
        list(thompson_sampling(DeterministicModule(lambda: nn.Linear(2, 3)), Bandit(), 1))
    module = DeterministicModule(LINEAR)
    with torch.no_grad():
        module.network.network.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="its training has diverged"):
        list(thompson_sampling(module, Bandit(), 1))
