"""The bandit: regret of the testbed's agents under Thompson sampling, on the same problems with the same random numbers.

The configuration is that of ``neural_testbed.bandit``: two inputs, 50 actions per dimension, T = 0.1, Adam at 1e-3, one step on 128
samples after each action, and an L2 term 2 T lambda sum p^2 / t that fades as data arrive. Its runs have 10,000 steps.
"""

import functools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_uq.active_learning.bandit import Bandit, thompson_sampling
from lightning_uq.compare.progress.progress import Progress
from lightning_uq.compare.testbed import AGENTS, DEFAULT_AGENTS, AgentSetting, agent_network
from lightning_uq.compare.training.quiet import one_thread
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError
from lightning_uq.functional.standard_error import standard_error
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.report import regret_figure, to_png, write_files
from lightning_uq.report.table import Column
from lightning_uq.tasks import Classification

ALL_AGENTS = (*DEFAULT_AGENTS, "hypermodel")
"""The available agents. A run without named agents uses the first six. Softmax is greedy, and uniform takes random actions."""

LEARNING_RATE = 1e-3
L2 = {"epinet": 0.2}
"""lambda of the L2 term, if it is not 1."""

CURVE_POINTS = 100
LAST = 0.1
"""The share of the last steps over which the regret at the end is averaged."""

_NUM_TRAIN = 100  # the number that the testbed tells a bandit's agent; it has no effect, since the L2 term fades here

COLUMNS = (
    Column("regret", "Regret", "lower", "testbed", lambda value: f"{value:,.2f}", "Regret over all steps"),
    Column(
        "regret_median",
        "Median",
        "lower",
        "testbed",
        lambda value: f"{value:,.2f}",
        "Median of the regret over problems",
    ),
    Column("regret_at_end", "At end", "lower", "testbed", lambda value: f"{value:.4f}", "Regret a step, last tenth"),
    Column("seconds", "Seconds", "lower", "cost", lambda value: f"{value:,.1f}", "Time of a run"),
)


@dataclass(frozen=True)
class BanditConfiguration:
    """Agents, problems and length of a bandit run.

    Attributes:
        methods: Names among :data:`ALL_AGENTS`; None: the default agents of the testbed.
        seeds: Number of problems n; their seeds, and the agents', are ``seed`` ... ``seed + n - 1``.
        seed: The first seed.
        steps: Number of actions per run.
        input_dim: d.
        num_actions: Number of available actions; None: 50 d.
        temperature: T of the problem.
        fresh_actions: Whether every step has new actions.

    Raises:
        InputError: A number is out of range, or a name is unknown.
    """

    methods: Sequence[str] | None = None
    seeds: int = 5
    seed: int = 0
    steps: int = 1000
    input_dim: int = 2
    num_actions: int | None = None
    temperature: float = 0.1
    fresh_actions: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")
        if self.seed < 0 or self.seed + self.seeds > 2**32:
            raise InputError(f"`seed` must lie in [0, 2^32 - {self.seeds}], but it is {self.seed}.")
        names = DEFAULT_AGENTS if self.methods is None else tuple(dict.fromkeys(self.methods))
        unknown = [name for name in names if name not in ALL_AGENTS]
        if unknown or not names:
            raise InputError(
                f"`methods` must hold names among {', '.join(ALL_AGENTS)}, but it holds "
                f"{', '.join(map(repr, unknown)) or 'none'}."
            )
        object.__setattr__(self, "methods", names)  # the dataclass is frozen
        if self.num_actions is None:
            object.__setattr__(self, "num_actions", 50 * self.input_dim)
        self.make_bandit(self.seed)  # raises for arguments that are out of range

    def make_bandit(self, seed: int) -> Bandit:
        """The problem for a seed, before the first action."""
        assert self.num_actions is not None
        return Bandit(self.input_dim, self.num_actions, self.temperature, self.fresh_actions, seed)

    def make_agent(self, method: str) -> UncertaintyModule:
        """An untrained agent with its configuration on the testbed."""
        setting = AgentSetting(
            data="testbed",
            task=Classification(),
            input_shape=(self.input_dim,),
            num_targets=2,
            num_train=_NUM_TRAIN,
            backbone=functools.partial(agent_network, in_features=self.input_dim),
            optimizer=functools.partial(torch.optim.Adam, lr=LEARNING_RATE),
            temperature=self.temperature,
        )
        module = AGENTS[method].make_module(setting)
        assert isinstance(module, UncertaintyModule)
        return module


@dataclass(frozen=True)
class BanditResult:
    """The result of :func:`play`.

    Attributes:
        configuration: The configuration, with all defaults filled in.
        regret: For each method, the regret up to each step, in float64: [seeds, steps].
        seconds: For each method, the time of each run.
    """

    configuration: BanditConfiguration
    regret: dict[str, Tensor]
    seconds: dict[str, list[float]]

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per method: mean and standard error over seeds of each of :data:`COLUMNS`; a median has no error."""
        last = max(1, round(LAST * self.configuration.steps))
        rows = []
        for method, regret in self.regret.items():
            before = regret[:, -last - 1] if regret.shape[1] > last else torch.zeros(len(regret))
            at_end = (regret[:, -1] - before) / last
            total = regret[:, -1].tolist()
            rows.append(
                {
                    "method": method,
                    "regret": _mean_and_error(total),
                    "regret_median": {"mean": statistics.median(total), "se": None},
                    "regret_at_end": _mean_and_error(at_end.tolist()),
                    "seconds": _mean_and_error(self.seconds[method]),
                }
            )
        return rows

    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``: the rows, and each seed's regret at up to :data:`CURVE_POINTS` steps."""
        configuration = self.configuration
        points = torch.linspace(1, configuration.steps, min(CURVE_POINTS, configuration.steps)).round().long()
        curves = {method: regret[:, points - 1].tolist() for method, regret in self.regret.items()}
        seeds = list(range(configuration.seed, configuration.seed + configuration.seeds))
        return {
            "configuration": asdict(configuration),
            "rows": self.rows(),
            "seeds": seeds,
            "curve_steps": points.tolist(),
            "curves": curves,
        }


def play(configuration: BanditConfiguration, progress: Progress | None = None) -> BanditResult:
    """Let every agent play every problem.

    Args:
        configuration: The configuration.
        progress: Gets every run, and every step as an epoch.

    Raises:
        InputError: An agent's training diverged.

    Example:
        >>> result = play(BanditConfiguration(methods=("softmax", "uniform"), seeds=2, steps=3))
        >>> result.regret["softmax"].shape, [row["method"] for row in result.rows()]
        (torch.Size([2, 3]), ['softmax', 'uniform'])
    """
    progress = progress or Progress()
    names, steps = configuration.methods or (), configuration.steps
    progress.start(len(names) * configuration.seeds, steps, 0)
    regret: dict[str, list[Tensor]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with one_thread():
        for seed in range(configuration.seed, configuration.seed + configuration.seeds):
            for name in names:
                progress.training(name, seed)
                start, values = time.perf_counter(), []
                with seeded(seed):
                    agent, bandit = configuration.make_agent(name), configuration.make_bandit(seed)
                    l2 = 2 * configuration.temperature * L2.get(name, 1.0)
                    for value in thompson_sampling(agent, bandit, steps, l2=l2):
                        values.append(value)
                        progress.epoch(name, seed)
                seconds[name].append(time.perf_counter() - start)
                regret[name].append(torch.tensor(values, dtype=torch.float64).cumsum(0))
                progress.trained(name, seed, steps, seconds[name][-1])
    return BanditResult(configuration, {name: torch.stack(runs) for name, runs in regret.items()}, seconds)


def write(result: BanditResult, directory: Path) -> None:
    """Write ``results.json`` and ``regret.png`` into a directory that exists, both or none."""
    configuration = result.configuration
    kind = "fresh actions each step" if configuration.fresh_actions else "actions"
    figure = regret_figure(
        result.regret,
        title=f"{configuration.num_actions} {kind}, d = {configuration.input_dim}, T = {configuration.temperature:g}",
    )
    text = json.dumps(result.results(), indent=1, allow_nan=False) + "\n"
    write_files(directory, {"results.json": text.encode(), "regret.png": to_png(figure)})


def _mean_and_error(values: Sequence[float]) -> Mapping[str, float | None]:
    return {"mean": statistics.mean(values), "se": standard_error(values)}
