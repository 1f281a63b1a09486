"""`lightning-uq report` makes pages from what runs have left, and says what is wrong with a directory that is none."""

import json
import shutil

import numpy as np
import pytest
import torch

from lightning_uq.cli import main
from lightning_uq.compare.directory.index import find_runs, make_index
from lightning_uq.compare.directory.reading import read_run
from lightning_uq.compare.pages.drawing import draw
from lightning_uq.compare.pages.page import make_report
from lightning_uq.compare.records import Record
from lightning_uq.compare.uncertainty_report.results import make_own_results
from lightning_uq.report import csv_table, marks
from lightning_uq.tasks import Classification


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A small comparison."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    quick = ["--seeds", "1", "--max-epochs", "1", "--format", "csv"]
    assert main(["compare", "--methods", "softmax,energy", *quick, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A comparison in which three methods read one network."""
    folder = tmp_path_factory.mktemp("shared") / "digits"
    quick = ["--seeds", "1", "--max-epochs", "1", "--format", "csv"]
    assert main(["compare", "--methods", "softmax,energy,knn,ensemble", *quick, "--out", str(folder)]) == 0
    return folder


def fails(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("lightning-uq: error: ")


def test_the_page_is_that_of_the_run(run_dir, tmp_path, capsys):
    results = (run_dir / "results.json").read_bytes()
    assert main(["report", str(run_dir), "--out", str(tmp_path / "again"), "--format", "csv"]) == 0
    rows = json.loads(results)["rows"]
    assert capsys.readouterr().out.strip() == csv_table(rows).strip()
    again = tmp_path / "again"
    assert (again / "report.html").read_bytes() == (run_dir / "report.html").read_bytes()
    assert {path.name for path in again.glob("*.png")} == {path.name for path in run_dir.glob("*.png")} != set()
    assert not (again / "results.json").exists()
    (run_dir / "report.html").unlink()
    assert main(["report", str(run_dir)]) == 0
    assert (run_dir / "report.html").exists()
    assert (run_dir / "results.json").read_bytes() == results


def test_what_is_no_run(run_dir, tmp_path, capsys):
    assert fails(capsys, "report", tmp_path / "gone").endswith("gone does not exist. A run is a directory.")
    assert "is not a run and contains no runs" in fails(capsys, "report", tmp_path)
    path = tmp_path / "results.json"
    path.write_text("{")
    assert "is not valid JSON" in fails(capsys, "report", tmp_path)
    assert "is not valid JSON" in fails(capsys, "report", path)
    path.write_text("{}")
    assert "does not hold the results of a run" in fails(capsys, "report", tmp_path)
    assert "is not the JSON file of an evaluation" in fails(capsys, "report", path)
    path.write_text('{"format": 99}')
    assert "has format 99, but this version reads format 2" in fails(capsys, "report", tmp_path)
    path.write_text('{"format": 2, "rows": []}')
    assert "lacks methods, problem" in fails(capsys, "report", tmp_path)
    shutil.copy(run_dir / "results.json", path)
    assert "has no records of softmax, energy" in fails(capsys, "report", tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_tuned_settings_and_methods_left_out_are_on_the_page(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    settings = [{"learning_rate": 0.00123, "weight_decay": 0.0}, {"learning_rate": 0.004, "weight_decay": 0.0}]
    results |= {"tuned": {"softmax": settings}, "left_out": {"laplace": "it ran out of <memory>"}}
    (folder / "results.json").write_text(json.dumps(results))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "learning_rate = 0.00123, 0.004; weight_decay = 0" in page
    assert "Left out: laplace" in page
    assert "it ran out of &lt;memory&gt;" in page


def test_methods_without_a_description_or_detection_say_so(run_dir, tmp_path):
    results, _ = read_run(run_dir)
    results["methods"]["softmax"] |= {"about": "", "num_indices": None, "trained_as": None, "best_by": None}
    assert make_report(results, {}).methods["softmax"] == (
        "OOD score: predictive entropy (nats)",
        results["methods"]["softmax"]["link"],
    )
    results["problem"]["sizes"]["ood"] = 0
    report = make_report(results, {})
    assert report.methods["softmax"] == ("no description", results["methods"]["softmax"]["link"])
    assert all("OOD score" not in text for text, _ in report.methods.values())


@pytest.mark.parametrize(
    ("best", "same", "lines"),
    [("ensemble", [], ["softmax, energy, knn"]), ("softmax", ["energy", "knn"], ["ensemble"])],
)
def test_methods_with_the_same_predictions_share_a_line_and_have_no_difference(shared, best, same, lines):
    results, records = read_run(shared)
    names = [name for name in records if name != best]
    interval = {"difference": 0.0, "lower": -0.01, "upper": 0.01, "over": "rows"}
    results["differences"]["nll"] |= {"best": best, "same": same, "tied": names, "to_best": dict.fromkeys(names, interval)}  # fmt: skip
    axes = draw(results, records)["differences_nll"].axes[0]
    assert [" ".join(label.get_text().split()) for label in axes.get_yticklabels()] == lines
    note = " ".join(" ".join(text.get_text() for text in axes.texts).split())
    assert ("the same values as softmax: energy, knn" in note) == bool(same)
    assert set(make_report(results, {}).intervals["nll"]) == set(names) - set(same)


def test_several_data_sets_are_compared_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--methods", "ensemble", "--seeds", "1", "--max-epochs", "1", "--format", "csv", "--out", "out"]
    assert main(["compare", "--data", "digits,diabetes", *quick]) == 0
    index = (tmp_path / "out" / "report.html").read_text()
    for name, other in (("digits", "diabetes"), ("diabetes", "digits")):
        assert f'href="{name}/report.html"' in index
        page = (tmp_path / "out" / name / "report.html").read_text()
        assert 'href="../report.html"' in page
        assert f'href="../{other}/report.html"' in page
    assert main(["compare", "--data", "a/x.csv,b/x.csv", "--out", "two"]) == 2
    assert not (tmp_path / "two").exists()


def table(path, column):
    x = np.random.default_rng(0).normal(size=(60, 3))
    lines = [f"a,b,{column}", *(f"{a},{b},{c}" for a, b, c in x)]
    path.write_text("\n".join(lines))


def test_a_mistake_in_the_last_data_set_costs_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "one.csv", "price")
    table(tmp_path / "two.csv", "prize")
    quick = ["--target", "price", "--methods", "gaussian", "--seeds", "1", "--max-epochs", "1", "--out", "out"]
    assert main(["compare", "--data", "one.csv,two.csv", *quick]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lightning-uq: error: two.csv: ")
    assert "price" in error
    assert "Nothing was trained" in error
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_fails_later_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--methods", "ensemble", "--seeds", "1", "--max-epochs", "1", "--format", "csv", "--out", "out"]
    (tmp_path / "out" / "digits").mkdir(parents=True)
    (tmp_path / "out" / "digits" / "run.json").write_text("{}")
    assert main(["compare", "--data", "digits,diabetes", *quick]) == 2
    error = capsys.readouterr().err
    assert "digits failed: " in error
    assert error.splitlines()[-1] == (
        "lightning-uq: error: 1 of 2 data sets failed: digits (InputError). See their errors above."
    )
    assert (tmp_path / "out" / "diabetes" / "report.html").is_file()
    assert 'href="diabetes/report.html"' in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------------ several runs


def results_of(data, means, tied=(), key="nll"):
    best = min(means, key=means.get)
    rows = [{"method": name, key: {"mean": mean, "se": None, "seeds": [mean]}} for name, mean in means.items()]
    about = {"about": "it", "link": None}
    return {
        "rows": rows,
        "task": "classification",
        "verdict": [f"{best} is best."],
        "problem": {"name": data},
        "methods": dict.fromkeys(means, about),
        "differences": {key: {"best": best, "tied": list(tied)}},
    }, {}


def ranks(report):
    return {row["method"]: row["mean_rank"]["mean"] for row in report.rows if "mean_rank" in row}


def test_methods_are_ranked_among_those_of_every_data_set():
    runs = {
        "one": results_of("one", {"a": 0.1, "b": 0.2, "c": 0.3, "alone": 0.0}),
        "two": results_of("two", {"a": 9.0, "b": 5.0, "c": 9.0}, tied=["a"]),
    }
    report = make_index(runs)
    assert ranks(report) == {"b": 1.5, "a": (1 + 2.5) / 2, "c": (3 + 2.5) / 2}
    assert [row["method"] for row in report.rows] == ["b", "a", "c", "alone"]
    assert report.verdict[0].startswith(
        "b has the best mean rank over 2 data sets (1.50 of 3; a 1.75), and on 1 of them"
    )
    assert any("no rank test at 5 % can tell two methods apart" in note for note in report.notes)
    assert [page.note for page in report.pages] == ["alone is best.", "b is best."]


def test_runs_on_one_data_set_count_as_one():
    runs = {
        "one": results_of("one", {"a": 0.1, "b": 0.2}),
        "again": results_of("one", {"a": 0.1, "b": 0.2}),
        "more": results_of("one", {"a": 0.1, "b": 0.2}),
        "two": results_of("two", {"a": 0.2, "b": 0.1}),
    }
    report = make_index(runs)
    assert ranks(report) == {"a": 1.5, "b": 1.5}
    assert report.verdict == [
        "a and b share the best mean rank over 2 data sets (1.50 of 2). Ranks of tied methods are meaningless."
    ]
    assert any("count as one data set" in note for note in report.notes)
    assert ranks(make_index({"one": runs["one"], "again": runs["again"]})) == {}


def test_methods_that_share_the_best_rank_are_a_list():
    means = dict.fromkeys("abc", 0.1)
    report = make_index({"one": results_of("one", means), "two": results_of("two", means)})
    assert report.verdict[0].startswith("a, b and c share the best mean rank")


def test_the_index_marks_the_winner_and_drops_methods_without_a_number():
    means = {"a": 0.1234, "b": 0.1233, "c": 0.9}
    runs = {name: results_of(name, means, tied=["a"]) for name in ("one", "two")}
    for results, _ in runs.values():
        results["rows"].append({"method": "none"})
        results["methods"]["none"] = {"about": "", "link": None}
    report = make_index(runs)
    assert [row["method"] for row in report.rows] == ["b", "a", "c"]
    assert "none" not in report.methods
    marked = marks(report.rows, report.columns, report.tied)
    assert {name: marked.get((name, "one")) for name in "abc"} == {
        "a": "best",
        "b": "best",
        "c": None,
    }  # both print 0.123


def save_test(folder, name, shift, ids=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    nll = torch.rand(80, generator=draw).double() + shift
    ids = torch.arange(80) if ids is None else ids
    rows = {"nll": nll, "correct": nll < 0.9, "target": (torch.arange(80) % 3).double(), "ood_score": nll}
    record = Record(name, 0, {}, rows, ids)
    results = make_own_results(record, data="mine", task=Classification(), score="energy", sizes={"test": 80})
    folder.mkdir(parents=True)
    record.save(folder)
    (folder / "results.json").write_text(json.dumps(results))


def test_modules_tested_on_the_same_rows_are_compared(tmp_path, capsys):
    save_test(tmp_path / "runs" / "a", "net", 0.0)
    save_test(tmp_path / "runs" / "b", "better", -0.5)
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert "better is best on mine" in capsys.readouterr().out
    assert 'href="a/report.html"' in (tmp_path / "runs" / "report.html").read_text()


def test_folders_that_are_no_runs_are_named(tmp_path, capsys):
    runs = tmp_path / "runs"
    save_test(runs / "a", "net", 0.0)
    save_test(runs / "b", "better", -0.5)
    save_test(runs / "uci" / "yacht", "net", 0.0)
    for folder in ("logs", ".git"):
        (runs / folder).mkdir()
    assert main(["report", str(runs)]) == 0
    said = capsys.readouterr().err
    assert "Skipped logs: it has no results.json." in said
    assert (
        f"Skipped uci: it has no results.json, but its folders do. Make its own page with `lightning-uq report {runs / 'uci'}`."
        in said
    )
    assert ".git" not in said
    assert "Skipped a" not in said


def test_modules_tested_on_other_rows_are_not(tmp_path, capsys):
    save_test(tmp_path / "runs" / "a", "net", 0.0)
    save_test(tmp_path / "runs" / "b", "better", -0.5, ids=torch.arange(1, 81))
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert "is best" not in capsys.readouterr().out
    assert set(find_runs(tmp_path / "runs")) == {"a", "b"}


def test_runs_of_one_name_are_seeds(tmp_path, capsys):
    for seed in range(5):
        save_test(tmp_path / "runs" / f"net{seed}", "net", 0.0, seed=seed)
        save_test(tmp_path / "runs" / f"better{seed}", "better", -0.5, seed=9 + seed)
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert "for further test rows and trainings (5 seeds)" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs" / "net4")
    assert "all methods need the same number of seeds, but there are better 5, net 4" in fails(
        capsys, "report", tmp_path / "runs"
    )
