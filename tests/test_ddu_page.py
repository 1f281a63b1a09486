"""Run the examples of docs/ddu.md."""

import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.utils import parametrize

from lightning_uq import Factory
from lightning_uq.networks import backbones

TEXT = (Path(__file__).parents[1] / "docs" / "ddu.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)


def bounded_layers(network):
    return [name for name, layer in network.named_modules() if parametrize.is_parametrized(layer, "weight")]


def test_every_example_runs_after_the_one_before(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "ddu.md", "exec"), names)
    assert names["prediction"].log_density.shape == names["prediction"].predictive_entropy.shape == (32,)
    assert len(bounded_layers(names["bounded"])) == 20
    trained, plain, x = names["module"].network.network.eval(), names["plain"], names["x"]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), trained(x))
    assert (len(bounded_layers(trained)), len(bounded_layers(plain))) == (5, 0)
    assert bounded_layers(names["factory"]()) == bounded_layers(trained)


def test_the_configuration_builds_the_network():
    with torch.device("meta"):
        network = Factory(**yaml.safe_load(YAML)["network"]["init_args"])()
    assert isinstance(network, backbones.ResNet)
    assert "fc" not in bounded_layers(network)


def test_the_table_names_the_last_layers():
    rows = re.findall(r"^\| (`.*?`) \| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    assert len(rows) == 5
    for names, last in rows:
        for name in re.findall(r"`(\w+)`", names):
            with torch.device("meta"):
                assert getattr(getattr(backbones, name)(), last).out_features in (2, 10)
