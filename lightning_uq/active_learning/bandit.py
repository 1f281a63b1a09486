"""A bandit with Thompson sampling, which measures the value of joint predictions as regret.

Thompson sampling acts on one hypothesis at a time: it draws an index z, takes the best action under f(x, z), and learns from the
reward. It explores actions on which its hypotheses disagree, and disagreement across actions is part of a joint prediction, not
of its marginals. An agent with a single hypothesis is greedy, and may never leave the first action that paid off.

Source: Thompson, Biometrika 1933; Wen et al., "From Predictions to Decisions: The Importance of Joint Predictive Distributions"
(arXiv 2107.09224); ``neural_testbed.bandit``.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_uq.data.environments import draw_teacher, teacher_logits
from lightning_uq.errors import InputError
from lightning_uq.functional.validation import check_bool, check_integer, check_positive
from lightning_uq.modules.base import UncertaintyModule


class Bandit:
    """An environment: actions x ~ N(0, I) in d dimensions, and rewards of 1 with a probability that a random MLP computes.

    The teacher is the Neural Testbed's (:func:`~lightning_uq.data.environments.draw_teacher`), at temperature T, and a reward is
    its class 1. The seed determines everything, including the rewards: agents that take the same actions get the same rewards.

    Args:
        input_dim: d.
        num_actions: Number of actions to choose from at each step.
        temperature: T; a lower T makes the rewards less random.
        fresh_actions: Whether each step draws new actions (a contextual bandit) or keeps them.
        seed: Seed of teacher, actions and rewards.

    Attributes:
        actions: The actions on offer [A, d].
        probs: Their probabilities of a reward [A], which agents must not read.

    Raises:
        InputError: A number is out of range.

    Example:
        >>> bandit = Bandit(input_dim=2, num_actions=5)
        >>> reward, regret = bandit.pull(int(bandit.probs.argmax()))
        >>> reward in (0, 1), regret
        (True, 0.0)
    """

    def __init__(
        self,
        input_dim: int = 2,
        num_actions: int = 100,
        temperature: float = 0.1,
        fresh_actions: bool = False,
        seed: int = 0,
    ) -> None:
        check_integer("input_dim", input_dim, 1)
        check_integer("num_actions", num_actions, 2)
        check_integer("seed", seed, 0)
        check_bool("fresh_actions", fresh_actions)
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.fresh_actions = fresh_actions
        self._generator = torch.Generator().manual_seed(seed)
        self._teacher = draw_teacher(input_dim, 2, generator=self._generator)
        self.actions = torch.empty(num_actions, input_dim)
        self._offer()

    def pull(self, action: int) -> tuple[int, float]:
        """The reward of an action, 0 or 1, and its regret: the best action's probability of a reward minus this action's."""
        luck = torch.rand((), generator=self._generator)
        reward = int(luck < self.probs[action])
        regret = float(self.probs.max() - self.probs[action])
        if self.fresh_actions:
            self._offer()
        return reward, regret

    def _offer(self) -> None:
        self.actions = torch.randn(self.actions.shape, generator=self._generator)
        self.probs = teacher_logits(self._teacher, self.actions, self.temperature).softmax(1)[:, 1]


def thompson_sampling(
    module: UncertaintyModule,
    bandit: Bandit,
    num_steps: int,
    *,
    l2: float | None = None,
    steps_per_action: int = 1,
    batch_size: int = 128,
    capacity: int = 10_000,
) -> Iterator[float]:
    """The regret of each step of an agent that learns during the run.

    Each step draws one index z, takes the action with the highest log-odds of a reward under it (ties are broken arbitrarily),
    stores action and reward, and trains on a batch drawn with replacement from the stored ones. Training uses the module's
    ``training_loss`` and the optimizer of its ``configure_optimizers`` in a plain loop, because starting a Trainer for every step
    would dominate the run time. No training hooks of a Trainer are called. Random draws (indices, batches, masks) come from the
    global random state.

    Args:
        module: A classifier with two classes, of which class 1 is a reward. It is trained in place, on its device.
        bandit: The environment.
        num_steps: Number of actions to take.
        l2: Factor of an L2 term that fades with the data: l2 sum p^2 / t at step t, set as the optimizer's ``weight_decay`` of twice
            that. None keeps the optimizer's own.
        steps_per_action: Number of training steps after each action.
        batch_size: Number of samples per training step.
        capacity: Number of samples kept; the oldest are dropped.

    Yields:
        The regret of each step: the best action's probability of a reward, minus that of the chosen action.

    Raises:
        InputError: A number is out of range, or the module does not fit.

    Source: ``ThompsonEnnBandit`` of ``neural_testbed.bandit``, which compares probabilities. In single precision, confident
    hypotheses give equal probabilities but different log-odds.

    Example:
        >>> from torch import nn
        >>> from lightning_uq import EnsembleModule
        >>> module = EnsembleModule(lambda: nn.Linear(2, 2), num_members=3, seed=0)
        >>> regret = torch.tensor(list(thompson_sampling(module, Bandit(), num_steps=5))).cumsum(0)
        >>> regret.shape, bool((regret.diff() >= 0).all())
        (torch.Size([5]), True)
    """
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size), ("capacity", capacity)):
        check_integer(name, value, 1)
    check_integer("steps_per_action", steps_per_action, 0)
    if l2 is not None and not 0 <= l2 < math.inf:
        raise InputError(f"`l2` must be finite and at least 0, but it is {l2}.")
    if not isinstance(module, UncertaintyModule) or not module.task.has_classes:
        raise InputError(f"`module` must be an UncertaintyModule that classifies, but it is a {type(module).__name__}.")
    optimizer = _optimizer(module, l2)
    return _play(module, bandit, num_steps, optimizer, l2, steps_per_action, _Replay(bandit, batch_size, capacity))


def _play(
    module: UncertaintyModule,
    bandit: Bandit,
    num_steps: int,
    optimizer: torch.optim.Optimizer | None,
    l2: float | None,
    steps_per_action: int,
    replay: "_Replay",
) -> Iterator[float]:
    for step in range(1, num_steps + 1):
        action = _choose(module, bandit.actions)
        taken = bandit.actions[action]
        reward, regret = bandit.pull(action)
        replay.add(taken, reward)
        yield regret
        if optimizer is None:
            continue
        module.train()
        for group in optimizer.param_groups if l2 is not None else ():
            group["weight_decay"] = 2 * l2 / step  # type: ignore[operator]  # l2 is not None here
        for _ in range(steps_per_action):
            batch = {name: value.to(module.device) for name, value in replay.sample().items()}
            optimizer.zero_grad()
            torch.autograd.backward(module.training_loss(batch["input"], batch["target"], batch))
            optimizer.step()


@torch.no_grad()
def _choose(module: UncertaintyModule, actions: Tensor) -> int:
    """The best action under one index."""
    module.eval()
    index = module.network.sample_index(1)
    logits = module.network(actions.to(module.device), index if module.network.num_indices else index.to(module.device))
    if logits.shape != (1, len(actions), 2):
        raise InputError(f"`module` must have outputs of shape [Z, B, 2], but their shape is {list(logits.shape)}.")
    odds = logits[0, :, 1] - logits[0, :, 0]
    if not bool(odds.isfinite().all()):
        raise InputError("`module` must predict finite numbers, but its training has diverged.")
    best = (odds == odds.max()).nonzero().flatten()
    return int(best[torch.randint(len(best), ())])


def _optimizer(module: UncertaintyModule, l2: float | None) -> torch.optim.Optimizer | None:
    """The module's own optimizer; None if there is nothing to train."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    optimizer = module.configure_optimizers()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError("`module` must have one optimizer and no `lr_scheduler`, because there are no epochs here.")
    fades = "weight_decay" in optimizer.defaults and not isinstance(optimizer, torch.optim.AdamW)
    if l2 is not None and not fades:
        raise InputError(
            f"`l2` needs an optimizer whose `weight_decay` is an L2 term, such as Adam, but it is "
            f"{type(optimizer).__name__}."
        )
    return optimizer


class _Replay:
    """The last actions and their rewards."""

    def __init__(self, bandit: Bandit, batch_size: int, capacity: int) -> None:
        self._inputs = bandit.actions.new_empty(capacity, bandit.actions.shape[1])
        self._targets = torch.empty(capacity, dtype=torch.long)
        self._batch_size, self._added = batch_size, 0

    def add(self, action: Tensor, reward: int) -> None:
        slot = self._added % len(self._targets)
        self._inputs[slot], self._targets[slot] = action, reward
        self._added += 1

    def sample(self) -> dict[str, Tensor]:
        """A batch of samples with the positions of their steps, which a bootstrap needs."""
        capacity = len(self._targets)
        slot = torch.randint(min(self._added, capacity), (self._batch_size,))
        last = self._added - 1
        return {"input": self._inputs[slot], "target": self._targets[slot], "index": last - (last - slot) % capacity}
