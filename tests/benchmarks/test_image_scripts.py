"""The scripts that train image classifiers, on a few generated images."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lightning_uq.active_learning import read_rounds
from tests.data.test_images import write_mnist


def blocks(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, 28, 28], whose class is the place of a bright block, and labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % 10
    x = 0.3 * torch.randn(num, 1, 28, 28, generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        image[0, 4 * (label // 4) : 4 * (label // 4) + 8, 5 * (label % 4) : 5 * (label % 4) + 8] += 3
    return x, y


@pytest.mark.parametrize("module", ["active"], indirect=True)
def test_scores_start_from_the_same_labels_and_a_second_call_trains_nothing(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_mnist(tmp_path)
    options = Namespace(
        root=tmp_path, out=tmp_path / "out", seeds=1, data="mnist", labels=30, step=10, epochs=1, samples=64
    )
    results = {job: call() for job, call in module.jobs(options).items()}
    assert list(results) == [f"mnist-0-{label}" for label in module.SCORES]
    for result in results.values():
        assert result["labels"] == [20, 30]
        assert len(result["accuracy"]) == 2
    firsts, seconds = [], []
    for score in module.SCORES.values():
        strategy, method = score.split("@")
        rounds = read_rounds(options.out / "mnist" / "rounds" / method / strategy / "0")
        firsts.append(rounds[0]["labelled"])
        seconds.append(tuple(rounds[1]["labelled"][20:]))
    assert all(first == firsts[0] for first in firsts)
    assert len(set(seconds)) > 1
    monkeypatch.setattr("lightning_uq.compare.active.running._train", lambda *_: pytest.fail("it trains again"))
    assert {job: call() for job, call in module.jobs(options).items()} == results


@pytest.mark.parametrize("module", ["active"], indirect=True)
def test_the_table_has_standard_errors_over_seeds(module: ModuleType):
    runs = {
        f"dirty_mnist-{seed}-density": {"labels": [20, 60], "accuracy": [0.5, value], "ambiguous": [0.0, 0.25]}
        for seed, value in enumerate((0.6, 0.7, 0.8))
    }
    accuracy, ambiguous = (line for line in module.table(runs).splitlines() if line.startswith("| density"))
    assert accuracy == f"| density | 3 | 50.0 ±0.0 | 70.0 ±{10 / 3**0.5:.1f} |"
    assert ambiguous == "| density | 3 | 0.0 ±0.0 | 25.0 ±0.0 |"
    assert "| density | 1 | 50.0 | 60.0 |" in module.table({"mnist-0-density": runs["dirty_mnist-0-density"]})


class Flat(nn.Sequential):
    """One hidden layer of 8 features."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))


def dirty(module: ModuleType):
    """Blocks and, as ambiguous images, averages of two of them, each with two labels."""

    def part(seed: int):
        x, y = blocks(200, seed)
        averages = (x[:100] + x[101:]) / 2 if len(x[101:]) == 100 else (x[:99] + x[101:]) / 2
        labels = torch.stack([y[: len(averages)], y[101:]], 1).flatten()
        rows = torch.cat([torch.arange(200), 200 + torch.arange(len(averages)).repeat_interleave(2)])
        return torch.cat([x, averages]), torch.cat([y, labels]), rows

    noise = torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(9))
    return module.Data(
        part(0), part(1), 200, {name: (i + 1) * noise for i, name in enumerate(module.OOD_SETS)}, "averages"
    )


@pytest.mark.parametrize("module", ["ddu"], indirect=True)
def test_networks_and_their_ensemble(module: ModuleType, tmp_path: Path, monkeypatch):
    from ddu_plans import Plan

    monkeypatch.setitem(module.CPU, "lenet", Plan(Flat, 8, None, "one hidden layer"))
    options = Namespace(root=tmp_path, out=tmp_path, full=False, networks="lenet", seeds=2, members=2)
    data = dirty(module)
    monkeypatch.setattr(module, "load", lambda root: data)
    results = {job: call() for job, call in module.jobs(options).items()}
    assert list(results) == ["lenet-0", "lenet-1", "lenet-from0"]
    single, ensemble = results["lenet-0"], results["lenet-from0"]
    assert single["before"]["clean"] > 0.9
    assert 0.3 < single["before"]["ambiguous"] < 0.8  # two labels per image
    assert set(single["auroc"]) == {*module.OOD_SETS, "ambiguous against fashion", "digits against ambiguous"}
    assert single["auroc"]["fashion"]["gmm_raw"] > 0.9
    assert ensemble["members"] == 2
    members = [torch.load(tmp_path / f"lenet-{seed}.pt") for seed in range(2)]
    pooled = torch.cat([member["test"] for member in members], 1).softmax(2).mean(1)
    _, y, rows = data.test
    assert ensemble["before"]["clean"] == pytest.approx(float((pooled[:200].argmax(1) == y[:200]).double().mean()))
    log = pooled[rows].log()[torch.arange(len(y)), y]
    assert ensemble["before"]["nll"] == pytest.approx(-float(log.mean()), rel=1e-5)
    for found in single["histograms"].values():
        assert all(sum(shares) == pytest.approx(1) for shares in found["shares"].values())
    assert "| one hidden layer: AUROC |" in module.table(results)


@pytest.mark.parametrize("module", ["ddu"], indirect=True)
def test_an_image_counts_once_per_sample(module: ModuleType):
    data = dirty(module)
    data = replace(
        data, test=(data.test[0][:3], torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 2, 2])), num_clean=2
    )
    inside, outside = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 3.0])
    found = {"test": {"score": inside}, **{name: {"score": outside} for name in module.OOD_SETS}}
    columns = module.aurocs(found, data)
    assert columns["fashion"]["score"] == pytest.approx(
        3 / 8
    )  # samples 0, 2, 4, 4: 1 is above one of them, 3 above two
    assert columns["ambiguous against fashion"]["score"] == 0
    assert columns["digits against ambiguous"]["score"] == 1


@pytest.mark.parametrize("module", ["ddu_plans"], indirect=True)
@pytest.mark.parametrize("name", ["lenet", "vgg16", "resnet18_sn"])
def test_the_networks_for_a_cpu_are_the_full_ones_with_fewer_channels(module: ModuleType, name: str):
    narrow, full = (plan.build() for plan in (module.CPU[name], module.FULL[name]))
    assert narrow(torch.zeros(2, 1, 28, 28)).shape == full(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    factor = 1 if name == "lenet" else 8
    widths = [
        [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        for network in (narrow, full)
    ]
    assert [factor * width for width in widths[0]] == widths[1]


@pytest.mark.parametrize("module", ["cifar"], indirect=True)
def test_every_backbone_has_the_last_layer_that_stays_unbounded(module: ModuleType):
    for build, last in module.BACKBONES.values():
        for modified in (False, True):
            with torch.device("meta"):
                network = build(modified=modified)
            assert getattr(network, last).out_features == 10


@pytest.mark.parametrize("module", ["cifar"], indirect=True)
def test_jobs_of_cifar(module: ModuleType):
    options = Namespace(networks="plain,sn", seeds=2, members=5, root="", limit=None)
    assert list(module.jobs(options)) == ["plain-0", "sn-0", "plain-1", "sn-1", "ensemble-0"]
    with pytest.raises(SystemExit, match="unknown wide"):
        module.jobs(Namespace(**{**vars(options), "networks": "plain,wide"}))


@pytest.mark.filterwarnings("ignore:The likelihood has no finite")  # so short a training says nothing of a temperature
@pytest.mark.parametrize("module", ["cifar"], indirect=True)
def test_a_network_of_cifar(module: ModuleType, tmp_path: Path, monkeypatch):
    """One short training; a second call takes the fitted checkpoint and finds the same."""
    from cifar_data import Images
    from small_resnet import SmallResNet

    def coloured(num: int, seed: int) -> Images:
        x, y = blocks(num, seed)
        images = (40 * x.clamp(0, 5) + 20).to(torch.uint8)
        return Images(nn.functional.pad(images.expand(-1, 3, -1, -1), (2, 2, 2, 2)), y, "cpu")

    monkeypatch.setitem(module.BACKBONES, "small", (lambda modified: SmallResNet(widths=(8, 16)), "fc"))
    data = {name: coloured(100, i) for i, name in enumerate(("train", "val", "test", *module.OOD_SETS))}
    data["train"] = coloured(400, 10)
    options = Namespace(out=tmp_path, members=2, backbone="small", epochs=1)
    result = module.run("plain", 0, lambda: data, options)
    again = module.run("plain", 0, lambda: data, options)
    assert "seconds of training and fitting" in result
    assert "seconds of training and fitting" not in again
    assert again["ood"] == result["ood"]
    assert again["temperature"] == result["temperature"]
    assert result["training images"] == 400
    shown = module.table({"plain-0": result})
    assert "The network is SMALL" in shown
    assert f"{100 * result['ood']['mnist']['knn']['auroc']:.2f} / " in shown
    assert "89.73" in next(line for line in shown.splitlines() if line.startswith("| knn |"))


@pytest.mark.parametrize("module", ["active"], indirect=True)
def test_the_figure_shows_means_and_errors(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from docs.figures import active

    results = {
        f"{name}-{seed}-{label}": {"labels": [20, 60], "accuracy": [0.5, 0.6 + 0.2 * seed], "ambiguous": [0.0, 0.4]}
        for name in module.DATA
        for seed in range(2)
        for label in module.SCORES
    }
    path = tmp_path / "active.json"
    path.write_text(json.dumps({"results": results}))
    monkeypatch.setattr(active, "PUBLISHED", path)
    for axes, last in zip(active.draw().axes, (70, 70, 40), strict=True):
        assert [line.get_label() for line in axes.lines] == list(module.SCORES)
        assert axes.lines[0].get_xydata().tolist()[1] == pytest.approx([60, last])
    band = active.draw().axes[0].collections[0].get_datalim(active.draw().axes[0].transData)
    assert (band.y0, band.y1) == pytest.approx((50, 80))  # the standard error of 60 and 80 is 10
