"""A bandit with Thompson sampling: what joint predictions are good for, as regret.

Thompson sampling acts on one hypothesis at a time: it draws an index z, takes the action that is best under f(x, z), and learns
from the reward. What it explores is what its hypotheses disagree on, and disagreement between actions is what a joint
prediction has beyond its marginals: one hypothesis for ever is a greedy agent, which may stay with its first luck.

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
    """An environment: actions x ~ N(0, I) in d dimensions, whose reward is 1 with a probability that a random MLP gives.

    The teacher is the Neural Testbed's (:func:`~lightning_uq.data.environments.draw_teacher`), at temperature T, and a reward is
    its class 1. Everything follows from the seed, the rewards too: whoever takes the same actions gets the same ones.

    Args:
        input_dim: d.
        num_actions: Actions to choose among at each step.
        temperature: T; the lower, the less random the rewards.
        fresh_actions: Whether each step offers other actions, drawn anew: a contextual bandit. Else they stay the same.
        seed: Seed of teacher, actions and rewards.

    Attributes:
        actions: Those that are offered now [A, d].
        probs: Their probabilities of a reward [A], which no agent may look at.

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
        """The reward of an action, 0 or 1, and its regret: how much less probable a reward was than of the best action."""
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
    """The regret of each step of an agent that learns as it goes.

    Each step draws one index z, takes the action with the highest log-odds of a reward under it (of equal ones any), keeps
    action and reward, and trains on a batch drawn from all that was kept, with replacement. That is the module's own
    ``training_loss`` and the optimizer of its ``configure_optimizers``, in a plain loop: a Trainer for every single step would
    take longer than all else, and so no hook of a Trainer's training is called. What draws (indices, batches, masks) follows
    the global random state.

    Args:
        module: A classifier of two classes, of which 1 is a reward; it is trained in place, on its device.
        bandit: What to play.
        num_steps: Actions to take.
        l2: An L2 term that fades as data come: l2 sum p^2 / t at step t, by the optimizer's ``weight_decay`` of twice that;
            None: the optimizer's own stays as it is.
        steps_per_action: Training steps after each action.
        batch_size: Samples a training step.
        capacity: Samples kept; then the oldest is forgotten.

    Yields:
        The regret of each step: the probability of a reward of the best action, minus that of the chosen one.

    Raises:
        InputError: A number is out of range, or the module does not fit.

    Source: ``ThompsonEnnBandit`` of ``neural_testbed.bandit``, which compares probabilities: those of sure hypotheses are
    equal in single precision where their log-odds are not.

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
        raise InputError(f"`module` must be a classifier of ours, but it is a {type(module).__name__}.")
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
            group["weight_decay"] = 2 * l2 / step  # type: ignore[operator]  # it is not None here
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
    """The module's own; None where there is nothing to train."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    optimizer = module.configure_optimizers()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError("`module` must have one optimizer and no `lr_scheduler`: no epoch ends here.")
    fades = "weight_decay" in optimizer.defaults and not isinstance(optimizer, torch.optim.AdamW)
    if l2 is not None and not fades:
        raise InputError(
            f"`l2` needs an optimizer whose `weight_decay` is an L2 term, such as Adam, but "
            f"{type(optimizer).__name__} has none."
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
        """A batch, whose samples know their step, as a bootstrap needs it."""
        capacity = len(self._targets)
        slot = torch.randint(min(self._added, capacity), (self._batch_size,))
        last = self._added - 1
        return {"input": self._inputs[slot], "target": self._targets[slot], "index": last - (last - slot) % capacity}
