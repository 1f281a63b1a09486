import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq.compat.haiku import load_haiku, read_haiku
from lightning_uq.errors import InputError
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.epinet.network import EpinetNetwork


def test_layers_are_matched_by_number_not_by_spelling():
    network = nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)])
    names = ["linear"] + [f"linear_{i}" for i in range(1, 12)]
    load_haiku(
        network,
        {f"{name}/{leaf}": np.full((1, 1)[: 2 - (leaf == "b")], i) for i, name in enumerate(names) for leaf in "wb"},
    )
    assert [int(layer.weight) for layer in network] == list(range(12))


def test_a_convolution_is_hwio():
    convolution = nn.Conv2d(2, 3, (4, 5))
    weight = torch.randn(4, 5, 2, 3)
    load_haiku(convolution, {"conv": {"w": weight, "b": torch.zeros(3)}})
    assert torch.equal(convolution.weight[1, 0, 2, 3], weight[2, 3, 0, 1])


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="plain arrays"):
        read_haiku(tmp_path / "a.npz")
    with pytest.raises(InputError, match="plain arrays"):
        read_haiku(tmp_path / "missing.npz")
    np.savez(tmp_path / "b.npz", **{"linear/w": np.eye(2)})
    assert torch.equal(read_haiku(tmp_path / "b.npz")["linear/w"], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"a/w": np.zeros((2, 3)), "a/b": np.zeros(3), "b/w": np.zeros((3, 1))},
            "1 layers for Linear, but it holds 2: a, b",
        ),
        (
            {"a/w": np.zeros((3, 2)), "a/b": np.zeros(3)},
            r"'a/w' must match .* \[3, 2\] of a Linear, but its shape is \[2, 3\]",
        ),
        ({"a/w": np.zeros((2, 3))}, "The bias of a Linear and 'a/b' cannot be combined: there is none"),
        ({}, "but it holds 0"),
    ],
)
def test_what_does_not_fit_is_reported(params, message):
    with pytest.raises(InputError, match=message):
        load_haiku(nn.Linear(2, 3), params)


def test_members_and_heads_have_to_be_there():
    with pytest.raises(InputError, match="2 members on axis 0"):
        load_haiku(EnsembleNetwork([nn.Linear(2, 3) for _ in range(2)]), {"a/w": np.zeros((3, 2, 3))})
    unbuilt = EpinetNetwork(nn.Identity(), feature_layers="<output>")
    with pytest.raises(InputError, match="head is not built yet. Call"):
        load_haiku(unbuilt, {})
