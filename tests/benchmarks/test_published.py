"""The published results: what docs/results.md shows is what the files hold, and a run publishes what it found."""

import json
import math
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "reproduce"
PAGE = (ROOT / "docs" / "results.md").read_text()
NAMES = sorted(path.stem for path in (FOLDER / "published").glob("*.json"))


def test_every_part_of_the_page_is_published():
    assert (
        sorted(line[5:-4] for line in PAGE.splitlines() if line.startswith("<!-- ") and "end of" not in line) == NAMES
    )


@pytest.mark.parametrize(("module", "name"), [(name, name) for name in NAMES], indirect=["module"])
def test_the_page_shows_the_published_results(module: ModuleType, name: str):
    from results import part

    content = json.loads((FOLDER / "published" / f"{name}.json").read_text())
    shown = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    assert shown == part(content, module.table)


@pytest.mark.parametrize("module", ["calibration"], indirect=True)
def test_the_known_answer_is_met(module: ModuleType):
    results = json.loads((FOLDER / "published" / "calibration.json").read_text())["results"]
    found, known = results["nncal_densenet40_cifar10-0"], module.KNOWN
    assert found["temperature"] == pytest.approx(known["temperature"], abs=5e-4)
    for when in ("before", "T"):
        for metric, value in known[when].items():
            assert found[when][metric] == pytest.approx(value, abs=5e-6)


def write_predictions(folder: Path) -> None:
    """Three classes, whose logits are twice too sharp."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 3, generator=generator)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1).numpy()
    folder.mkdir()
    sharp = (2 * logits).numpy()
    np.savez(
        folder / "own.npz", val_logits=sharp[:300], val_labels=y[:300], test_logits=sharp[300:], test_labels=y[300:]
    )
    np.savez(
        folder / "several.npz",
        a_probs=(2 * logits).softmax(1).numpy(),
        a_labels=y,
        b_probs=logits.softmax(1).numpy(),
        b_labels=y,
    )
    np.savez(folder / "of_another_kind.npz", confidences=y)


@pytest.mark.parametrize("module", ["calibration"], indirect=True)
def test_a_run_of_calibrations_is_published(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import results

    write_predictions(tmp_path / "logits")
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- calibration -->\nold\n<!-- end of calibration -->\nafter\n")
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    parser = ArgumentParser()
    parser.add_argument("--root", type=Path)
    parser.add_argument("--splits", type=int)
    arguments = ["--root", str(tmp_path / "logits"), "--splits", "1", "--out", str(tmp_path / "out"), "--publish"]
    results.reproduce("calibration", parser, module.jobs, module.table, about="", argv=arguments)
    content = json.loads((tmp_path / "published" / "calibration.json").read_text())
    assert set(content["results"]) == {"own-0", "several.a-0", "several.b-0"}
    own = content["results"]["own-0"]
    assert 1.5 < own["temperature"] < 2.7
    assert own["T"]["nll"] < own["before"]["nll"]
    assert own["T"]["accuracy"] == own["before"]["accuracy"]
    shown = page.read_text()
    assert shown.startswith("before\n<!-- calibration -->\n")
    assert shown.endswith("<!-- end of calibration -->\nafter\n")
    assert "old" not in shown
    mean = sum(content["results"][f"several.{name}-0"]["T"]["nll"] for name in "ab") / 2
    assert f"{mean:.4f}" in next(line for line in shown.splitlines() if line.startswith("| several |"))
    capsys.readouterr()


@pytest.mark.parametrize("module", ["saved_predictions"], indirect=True)
def test_halves_share_no_row(module: ModuleType):
    rows = (torch.arange(10.0).unsqueeze(1), torch.arange(10))
    for seed in range(3):
        (_, fitted), (_, tested) = module.halves(rows, None, seed)
        assert sorted([*fitted.tolist(), *tested.tolist()]) == list(range(10))
        assert len(fitted) == 5
    parts = ((rows[0][:4], rows[1][:4]), (rows[0][4:], rows[1][4:]))
    assert module.halves(*parts, 0) == parts
    (_, fitted), (_, tested) = module.halves(*parts, 1)
    assert len(fitted) == 4
    assert sorted([*fitted.tolist(), *tested.tolist()]) == list(range(10))


@pytest.mark.parametrize("module", ["conformal"], indirect=True)
def test_the_exact_coverage_is_that_of_ranks(module: ModuleType):
    generator = torch.Generator().manual_seed(0)
    fitted, tested, draws = 24, 30, 20_000
    scores = torch.rand(draws, fitted + tested, generator=generator)
    k = math.ceil((fitted + 1) * (1 - module.ALPHA))
    threshold = scores[:, :fitted].sort(1).values[:, k - 1]
    coverage = (scores[:, fitted:] <= threshold.unsqueeze(1)).double().mean(1)
    found = module.expected(fitted, tested)
    assert found["mean"] == pytest.approx(float(coverage.mean()), abs=4 * float(coverage.std()) / draws**0.5)
    assert found["sd"] == pytest.approx(float(coverage.std()), rel=0.03)


@pytest.mark.parametrize("module", ["conformal"], indirect=True)
def test_a_run_of_resplits(module: ModuleType, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 4, generator=generator)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    found = {"classes-own": module.run_classes((logits, y), 30)}
    x = np.random.RandomState(0).randn(300, 2)
    (tmp_path / "yacht").mkdir()
    np.savetxt(
        tmp_path / "yacht" / "data.txt", np.hstack([x, 5 + 3 * x[:, :1] + np.random.RandomState(1).randn(300, 1)])
    )
    found["numbers-yacht"] = module.run_numbers("yacht", tmp_path, 30)
    for job, kinds in (("classes-own", module.SETS), ("numbers-yacht", module.INTERVALS)):
        exact = found[job]["expected"]
        for kind in kinds:
            assert found[job][kind]["coverage"] == pytest.approx(exact["mean"], abs=0.03)
            assert 0.5 < found[job][kind]["sd"] / exact["sd"] < 2
    lines = module.table(found).splitlines()
    assert [line.count("|") for line in lines if line.startswith("| ")] == [18, 18, 14 + 1, 14 + 1]
