"""``lightning-uq active``: what is run, written, resumed and refused."""

import json
import math

import pytest
import torch
from scipy import stats

from lightning_uq.cli import main
from lightning_uq.compare.active import (
    ActiveConfiguration,
    ActiveResult,
    ActiveTraining,
    first_labels,
    open_pool,
    paired_t_test,
    run_active,
)
from lightning_uq.errors import InputError
from lightning_uq.report import learning_figure

QUICK = [
    "active",
    "--score",
    "random,margin,density_then_entropy@ddu",
    "--seeds",
    "2",
    "--initial",
    "20",
    "--num",
    "15",
    "--until",
    "50",
    "--epochs",
    "1",
    "--samples",
    "64",
    "--method",
    "softmax",
]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as the command line does
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("lightning-uq: error: ")


def rounds(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("round-*.json"))}


def test_a_run_writes_curves_tests_and_rounds(workplace, capsys):
    assert main([*QUICK, "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "Wrote results.json, learning_curves.png and rounds/ to run" in out
    results = json.loads((workplace / "run" / "results.json").read_text())
    assert results["labels"] == [20, 35, 50]
    assert [row["method"] for row in results["rows"]] == ["random", "margin", "density_then_entropy@ddu"]
    curve = results["curves"]["margin"]["accuracy"]
    areas = [(a / 2 + b + c / 2) / 2 for a, b, c in curve]
    assert results["rows"][1]["area"]["mean"] == pytest.approx(sum(areas) / 2)
    base = [(a / 2 + b + c / 2) / 2 for a, b, c in results["curves"]["random"]["accuracy"]]
    test = results["gain_over_random"]["margin"]
    assert test["p"] == pytest.approx(stats.ttest_rel(areas, base).pvalue, abs=1e-6)
    found = rounds(workplace / "run" / "rounds")
    assert len(found) == 3 * 2 * 3
    starts = {
        json.loads(text)["labelled"].__repr__() for name, text in found.items() if name.endswith("0/round-0.json")
    }
    assert len(starts) == 1  # a seed's strategies start alike


def test_an_interrupted_run_ends_as_a_whole_one(workplace, capsys):
    assert main([*QUICK, "--out", "whole"]) == 0
    assert main([*QUICK, "--out", "part"]) == 0
    part = workplace / "part" / "rounds"
    for path in [
        part / "softmax" / "margin" / "0" / "round-2.json",
        part / "softmax" / "margin" / "0" / "round-1.json",
    ]:
        path.unlink()
    for path in (part / "softmax" / "random" / "1").iterdir():
        path.unlink()
    (workplace / "part" / "results.json").unlink()
    assert "holds rounds already. Pass --resume" in fails(capsys, *QUICK, "--out", "part")
    assert main([*QUICK, "--out", "part", "--resume"]) == 0
    assert rounds(part) == rounds(workplace / "whole" / "rounds")
    assert (workplace / "part" / "results.json").read_text() == (workplace / "whole" / "results.json").read_text()


def test_a_resumed_run_may_be_longer_but_not_another(workplace, capsys):
    short = [*QUICK[:-2], "--method", "softmax", "--out", "run"]
    assert main([*short, "--score", "random", "--seeds", "1", "--until", "35"]) == 0
    assert main([*short, "--score", "random,margin", "--seeds", "1", "--resume"]) == 0
    assert json.loads((workplace / "run" / "results.json").read_text())["labels"] == [20, 35, 50]
    line = fails(capsys, *short, "--epochs", "2", "--resume")
    assert "holds rounds with another value of epochs" in line


def test_areas_and_curves_by_hand():
    def run(values):
        return [{"labelled": [0] * (10 * (i + 1)), "metrics": {"accuracy": v}} for i, v in enumerate(values)]

    result = ActiveResult(
        ActiveConfiguration(scores=("random", "margin"), seeds=2),
        {
            "random": [run([0.2, 0.4, 0.6]), run([0.3, 0.5, 0.7])],
            "margin": [run([0.2, 0.6, 0.6]), run([0.3, 0.7, 0.9])],
        },
        (),
    )
    assert result.labels == [10, 20, 30]
    torch.testing.assert_close(result.area("random"), torch.tensor([0.4, 0.5], dtype=torch.float64))
    gain = result.results()["gain_over_random"]["margin"]
    expected = [0.1, 0.15]
    assert gain["mean"] == pytest.approx(0.125)
    assert gain["p"] == pytest.approx(stats.ttest_1samp(expected, 0.0).pvalue, abs=1e-6)


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.4, -0.1], [0.3, 0.31], [1e-3, -2e-3, 5e-4]])
def test_the_paired_test_is_that_of_scipy(values):
    found, expected = paired_t_test(torch.tensor(values, dtype=torch.float64)), stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue, abs=1e-6)
    assert (found["lower"], found["upper"]) == pytest.approx((interval.low, interval.high), rel=1e-5)


def test_equal_runs_have_no_gain():
    assert paired_t_test(torch.zeros(3))["p"] == 1.0
    assert paired_t_test(torch.full((3,), 0.5))["p"] == 0.0


def test_first_labels_are_balanced_and_follow_the_seed():
    data = open_pool("digits", 0)
    found = first_labels(data, 20, 0)
    assert torch.bincount(data.labels[found]).tolist() == [2] * 10
    assert found.tolist() != first_labels(data, 20, 1).tolist()
    with pytest.raises(InputError, match="`initial` must be a multiple of the 10 classes, but it is 15"):
        first_labels(data, 15, 0)


def test_a_table_of_ones_own_is_a_pool(workplace, capsys):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=generator)
    lines = ["a,b,kind", *(f"{a:.4f},{b:.4f},{'high' if a > 0 else 'low'}" for a, b in x.tolist())]
    (workplace / "own.csv").write_text("\n".join(lines) + "\n")
    arguments = "active --data own.csv --target kind --score random,badge --seeds 1 --initial 4 --num 4 --until 8 --epochs 1 --samples 32"
    assert main([*arguments.split(), "--method", "softmax", "--out", "own"]) == 0
    assert json.loads((workplace / "own" / "results.json").read_text())["labels"] == [4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score", "bold"], "`name` must be one of"),
        (["--score", "random@nothing"], "The method must be one of softmax"),
        (["--until", "10"], "--until must be at least --initial, 20, but it is 10"),
        (["--seeds", "0"], "--seeds must be at least 1, but it is 0"),
        (["--data", "diabetes"], "accuracy of classes, but --data diabetes is a regression"),
        (["--data", "nowhere"], "--data must be"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, capsys, workplace):
    assert message in fails(capsys, "active", *arguments, "--out", "run")
    assert not list(workplace.iterdir())


def test_ambiguous_samples_are_counted(tmp_path, monkeypatch):
    from dataclasses import replace

    from lightning_uq.compare.active import running

    data = open_pool("digits", 0)
    marked = replace(data, is_ambiguous=torch.arange(len(data.labels)) % 2 == 1)
    monkeypatch.setattr(running, "open_pool", lambda *arguments, **options: marked)
    configuration = ActiveConfiguration(
        scores=("random",), method="softmax", seeds=1, until=40, training=ActiveTraining(1, 32)
    )
    result = run_active(configuration, tmp_path)
    first, second = result.rounds["random"][0]
    assert first["metrics"]["ambiguous"] == 0.0
    share = sum(position % 2 for position in second["labelled"]) / 40
    assert second["metrics"]["ambiguous"] == pytest.approx(share)
    assert 0 < share < 1
    assert result.rows()[0]["ambiguous"]["mean"] == pytest.approx(share)


def test_the_figure_draws_each_strategy_and_refuses_other_lengths():
    figure = learning_figure(
        [20, 40], {"random": torch.tensor([[0.5, 0.7]]), "badge": torch.tensor([[0.5, 0.8]])}, baseline="random"
    )
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["random", "badge"]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    with pytest.raises(InputError, match=r"`curves` must hold runs \[S, 3\]"):
        learning_figure([1, 2, 3], {"random": torch.tensor([[0.5, 0.7]])})
    assert not math.isnan(lines[1].get_ydata()[-1])


def test_the_legend_breaks_a_long_name_before_its_method():
    names = ["predictive_entropy@softmax", "log_density@ddu"]
    figure = learning_figure([20, 40], dict.fromkeys(names, torch.tensor([[0.5, 0.7]])))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "predictive_entropy\n@softmax",
        "log_density@ddu",
    ]
