"""``lightning-uq bandit``."""

from pathlib import Path

from lightning_uq.cli.options import Names
from lightning_uq.cli.output import make_console, output_directory


def bandit(
    *,
    methods: Names | None = None,
    seeds: int = 5,
    seed: int = 0,
    steps: int = 1000,
    input_dim: int = 2,
    num_actions: int | None = None,
    temperature: float = 0.1,
    fresh_actions: bool = False,
    out: Path = Path("runs/bandit"),
) -> None:
    """Let the agents of the Neural Testbed play the same bandits by Thompson sampling.

    At each step an agent draws a hypothesis, takes the best action under this hypothesis, and learns from the reward. The
    command prints the regret of each agent, and writes results.json and regret.png.

    Args:
        methods: Agents, such as epinet,softmax (default: epinet,ensemble_prior,ensemble,dropout,softmax,uniform; hypermodel
            is also available). The agent uniform takes random actions.
        seeds: Number of problems, each with its own seed.
        seed: First seed.
        steps: Number of actions per run.
        input_dim: Dimension D of an action.
        num_actions: Number of actions to choose from (default: 50 D).
        temperature: Temperature of the rewards. Higher values make rewards more random.
        fresh_actions: Offer new actions at each step.
        out: Directory to write to.
    """
    console = make_console()
    from lightning_uq.compare.bandit import COLUMNS, BanditConfiguration, play, write
    from lightning_uq.compare.progress.terminal import TerminalProgress
    from lightning_uq.report import print_table

    configuration = BanditConfiguration(methods, seeds, seed, steps, input_dim, num_actions, temperature, fresh_actions)
    with output_directory(out):
        with TerminalProgress(make_console(stderr=True), "steps") as progress:
            result = play(configuration, progress)
        write(result, out)
    print_table(result.rows(), console, columns=COLUMNS)
    console.print(f"Wrote results.json and regret.png to {out}", highlight=False, soft_wrap=True)
