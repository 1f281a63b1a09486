"""``lightning-uq bandit``: what is played, what is written, and what is refused."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from lightning_uq.active_learning import Bandit, thompson_sampling
from lightning_uq.cli import main
from lightning_uq.compare import Progress
from lightning_uq.compare.bandit import ALL_AGENTS, COLUMNS, BanditConfiguration, BanditResult, play, write
from lightning_uq.compare.testbed import AGENTS, DEFAULT_AGENTS
from lightning_uq.compare.training.training import seeded
from lightning_uq.errors import InputError
from lightning_uq.modules.epinet import EpinetModule

QUICK = ("bandit", "--methods", "softmax,uniform", "--seeds", "2", "--steps", "4")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as the command line does
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def fails(capsys, *arguments):
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("lightning-uq: error: ")


# ------------------------------------------------------------------ what is played


def test_every_agent_plays():
    result = play(BanditConfiguration(methods=ALL_AGENTS, seeds=1, steps=2))
    assert list(result.regret) == list(ALL_AGENTS)
    for regret in result.regret.values():
        assert regret.shape == (1, 2)
        assert regret.dtype == torch.float64
        assert bool((regret.diff() >= 0).all())
    assert BanditConfiguration().methods == DEFAULT_AGENTS
    assert set(ALL_AGENTS) <= set(AGENTS)


def test_agents_are_those_of_the_testbed():
    configuration = BanditConfiguration(input_dim=3, temperature=0.25)
    epinet = configuration.make_agent("epinet")
    assert isinstance(epinet, EpinetModule)
    assert epinet.network.head.additive_prior_scale == pytest.approx(0.3 / 0.25)
    ensemble, prior = (configuration.make_agent(name) for name in ("ensemble", "ensemble_prior"))
    assert ensemble.network.num_indices == prior.network.num_indices == 10
    assert prior.hparams["prior_scale"] == pytest.approx(3 / math.sqrt(0.25))
    assert configuration.make_agent("dropout").network.network[0].weight.shape == (100, 3)
    assert configuration.make_bandit(0).actions.shape == (150, 3)


@pytest.mark.parametrize(("method", "factor"), [("softmax", 1.0), ("epinet", 0.2)])
def test_a_run_is_thompson_sampling_with_the_originals_l2(method, factor):
    configuration = BanditConfiguration(methods=(method,), seeds=2, seed=3, steps=5, temperature=0.2)
    result = play(configuration)
    for row, seed in enumerate((3, 4)):
        with seeded(seed):
            agent = configuration.make_agent(method)
            alone = list(thompson_sampling(agent, Bandit(2, 100, 0.2, seed=seed), 5, l2=2 * 0.2 * factor))
        assert result.regret[method][row].tolist() == pytest.approx(torch.tensor(alone).double().cumsum(0).tolist())


def test_runs_repeat_and_do_not_depend_on_the_others():
    alone = play(BanditConfiguration(methods=("dropout",), seeds=1, seed=1, steps=6)).regret["dropout"]
    torch.manual_seed(77)
    together = play(BanditConfiguration(methods=("softmax", "dropout"), seeds=2, seed=0, steps=6)).regret["dropout"]
    assert torch.equal(alone[0], together[1])


def test_rows_are_means_and_standard_errors_over_seeds():
    regret = torch.arange(1, 41, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [6.0]])
    configuration = BanditConfiguration(methods=("softmax",), seeds=3, steps=40)
    (row,) = BanditResult(configuration, {"softmax": regret}, {"softmax": [1.0, 1.0, 4.0]}).rows()
    assert row["regret"] == {"mean": 120.0, "se": pytest.approx(40 * statistics.stdev([1, 2, 6]) / 3**0.5)}
    assert row["regret_at_end"]["mean"] == pytest.approx(3.0)
    assert row["seconds"]["mean"] == 2.0
    single = BanditResult(configuration, {"softmax": regret[:1, :1]}, {"softmax": [1.0]})
    assert single.rows()[0]["regret"] == {"mean": 1.0, "se": None}


def test_curves_end_with_the_run():
    for steps, count in ((4, 4), (250, 100)):
        configuration = BanditConfiguration(methods=("uniform",), seeds=2, seed=7, steps=steps)
        result = play(configuration)
        found = result.results()
        assert len(found["curve_steps"]) == count == len(set(found["curve_steps"]))
        assert (found["curve_steps"][0], found["curve_steps"][-1]) == (1, steps)
        assert found["seeds"] == [7, 8]
        for curve, regret in zip(found["curves"]["uniform"], result.regret["uniform"], strict=True):
            assert curve == [regret[step - 1] for step in found["curve_steps"]]
        assert found["configuration"]["num_actions"] == 100


def test_progress_is_told_of_every_run_and_step():
    class Log(Progress):
        def __init__(self):
            self.told = []

        def start(self, trainings, epochs, done):
            assert done == 0
            self.told.append((trainings, epochs))

        def training(self, method, seed):
            self.told.append((method, seed))

        def epoch(self, method, seed):
            self.told.append("step")

        def trained(self, method, seed, epochs, seconds):
            self.told.append(epochs)

    log = Log()
    play(BanditConfiguration(methods=("uniform",), seeds=2, steps=2), log)
    assert log.told == [(2, 2), ("uniform", 0), "step", "step", 2, ("uniform", 1), "step", "step", 2]


# ------------------------------------------------------------------ the command


def test_it_prints_a_table_and_writes_two_files(capsys, workplace):
    threads = torch.get_num_threads()
    assert main([*QUICK, "--seed", "3", "--num-actions", "7", "--fresh-actions", "--out", "there"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["Method", "Regret", "Median", "At", "end", "Seconds"]
    assert [line.split()[0] for line in lines if re.match("[a-z]", line)] == ["softmax", "uniform"]
    assert lines[-1] == "Wrote results.json and regret.png to there"
    assert re.fullmatch(r"(\d/4 \w+, seed [34]: 4 steps in \d+\.\d s(, about \d+ s left)?\n){4}", err)
    assert sorted(path.name for path in Path("there").iterdir()) == ["regret.png", "results.json"]
    assert [path.name for path in workplace.iterdir()] == ["there"]
    assert Path("there/regret.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(Path("there/results.json").read_text())
    assert results["configuration"] == {
        "methods": ["softmax", "uniform"],
        "seeds": 2,
        "seed": 3,
        "steps": 4,
        "input_dim": 2,
        "num_actions": 7,
        "temperature": 0.1,
        "fresh_actions": True,
    }
    assert [set(row) for row in results["rows"]] == [{"method", *(column.key for column in COLUMNS)}] * 2
    for row in results["rows"]:
        ends = [curve[-1] for curve in results["curves"][row["method"]]]
        assert row["regret"]["mean"] == pytest.approx(sum(ends) / 2)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "softmax,magic"],
            "--methods must hold names among epinet, .*, hypermodel, but it holds 'magic'",
        ),
        (["--methods", "evidential"], "but it holds 'evidential'"),
        (["--methods", ""], "but it holds none"),
        (["--seeds", "0"], "--seeds must be at least 1, but it is 0"),
        (["--seed", "-1"], r"--seed must lie in \[0, 2\^32 - 2\], but it is -1"),
        (["--steps", "0"], "--steps must be at least 1, but it is 0"),
        (["--steps", "few"], "--steps must be a whole number, but it is 'few'"),
        (["--num-actions", "1"], "--num-actions must be an integer of at least 2, but it is 1"),
        (["--input-dim", "0"], "--input-dim must be an integer of at least 1, but it is 0"),
        (["--temperature", "0"], "--temperature must be positive and finite, but it is 0.0"),
        (["--frobnicate"], "[Uu]nrecognized arguments: --frobnicate"),
        (["--out", "file"], "file is a file, not a directory"),
    ],
)
def test_it_refuses_in_one_line(capsys, workplace, arguments, message):
    Path("file").touch()
    assert re.search(message, fails(capsys, *QUICK, *arguments))
    assert [path.name for path in workplace.iterdir()] == ["file"]


@pytest.mark.parametrize("cut", ["play", "write"])
def test_an_interruption_leaves_nothing_or_the_earlier_result(monkeypatch, cut):
    assert main([*QUICK, "--out", "there"]) == 0
    before = {path.name: path.read_bytes() for path in Path("there").iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    target = {"play": "lightning_uq.compare.bandit.thompson_sampling", "write": "lightning_uq.compare.bandit.to_png"}
    monkeypatch.setattr(target[cut], interrupt)
    assert main([*QUICK, "--seed", "9", "--out", "there"]) == 130
    assert {path.name: path.read_bytes() for path in Path("there").iterdir()} == before
    assert main([*QUICK, "--out", "else/where"]) == 130
    assert not Path("else").exists()


def test_a_refused_configuration_says_why():
    with pytest.raises(InputError, match="`steps` must be at least 1"):
        BanditConfiguration(steps=0)


def test_a_written_result_is_whole(workplace):
    write(play(BanditConfiguration(methods=("uniform",), seeds=1, steps=1)), workplace)
    found = json.loads((workplace / "results.json").read_text())
    assert found["rows"][0]["regret"]["se"] is None
    assert found["curve_steps"] == [1]


def test_help_lists_the_command_and_its_options(capsys):
    assert main(["--help"]) == 0
    assert "\n  bandit " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["bandit", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "methods",
        "seeds",
        "seed",
        "steps",
        "input-dim",
        "num-actions",
        "temperature",
        "fresh-actions",
        "out",
    ):
        assert f"--{option} " in text
    assert f"(default:{','.join(DEFAULT_AGENTS)};" in "".join(
        text.split()
    )  # without the line breaks of a narrow terminal
