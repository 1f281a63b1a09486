from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_uq.errors import InputError
from lightning_uq.losses import gaussian_nll_loss, split_gaussian
from lightning_uq.networks import MLP, TabularNetwork, build_ensemble, load_deep_ensembles_state

REFERENCE = Path(__file__).parents[1] / "reference" / "ensembles.npz"
REGRESSORS = {
    "net/in3out2M3h8d3": {"in_features": 3, "out_features": 2, "hidden_features": 8, "depth": 3},
    "net/in1out1M5h16d2": {"in_features": 1, "out_features": 1, "hidden_features": 16, "depth": 2},
}


@pytest.fixture(scope="module")
def reference():
    """Numbers of deep-ensembles-pytorch 0.1.2, the members' arrays stacked on axis 0."""
    with np.load(REFERENCE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def part(reference, prefix):
    """Arrays below ``prefix`` as the original's state dict."""
    return {
        f"members.{i}.{name.removeprefix(prefix)}": value
        for name, stacked in reference.items()
        if name.startswith(prefix)
        for i, value in enumerate(stacked)
    }


def ensemble_of(reference, case, execution):
    if case.startswith("clf"):
        members = [
            TabularNetwork(5, reference[f"{case}/logits"].shape[-1], hidden_features=8, depth=3, heads=None)
            for _ in range(4)
        ]
    else:
        members = [TabularNetwork(**REGRESSORS[case]) for _ in range(len(reference[f"{case}/sample_mean"]))]
    ensemble = build_ensemble(members, execution)
    load_deep_ensembles_state(ensemble, part(reference, f"{case}/state/"))
    return ensemble


def renamed(state):
    """The original's names in ours."""
    return {
        name.replace(".g", ".weight").replace("log_var_head", "variance_head").replace(".net.", ".backbone."): value
        for name, value in state.items()
    }


def gradients(ensemble):
    """The gradients by the members' names, whatever the execution."""
    for p in ensemble.parameters():
        p.data = p.grad
    return ensemble.state_dict()


EXECUTIONS = ["loop", "stacked", "vmap"]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", list(REGRESSORS))
def test_regression_members_give_the_original_s_numbers(reference, case, execution):
    ensemble = ensemble_of(reference, case, execution)
    mean, variance = split_gaussian(ensemble(reference[f"{case}/X"]))
    torch.testing.assert_close(mean, reference[f"{case}/sample_mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.log(), reference[f"{case}/sample_log_var"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", list(REGRESSORS))
def test_regression_loss_and_gradients_are_the_original_s(reference, case, execution):
    ensemble = ensemble_of(reference, case, execution)
    mean, variance = split_gaussian(ensemble(reference[f"{case}/X"]))
    loss = gaussian_nll_loss(mean, variance, reference[f"{case}/y"])  # the original averages over members too
    torch.testing.assert_close(loss, reference[f"{case}/train_advFalse/loss"], rtol=1e-5, atol=0)
    loss.backward()
    expected = renamed(part(reference, f"{case}/grad/"))
    actual = gradients(ensemble)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("epsilon", [0.01, 0.1])
@pytest.mark.parametrize("case", list(REGRESSORS))
def test_input_gradients_give_the_original_s_adversarial_inputs(reference, case, epsilon, execution):
    ensemble = ensemble_of(reference, case, execution)
    x, y = reference[f"{case}/X"], reference[f"{case}/y"]
    xs = x.expand(ensemble.num_indices, *x.shape).clone().requires_grad_()
    losses = gaussian_nll_loss(*split_gaussian(ensemble.forward_each(xs)), y, reduction="none").mean((1, 2))
    (gradient,) = torch.autograd.grad(losses.sum(), xs)
    torch.testing.assert_close(
        x + epsilon * gradient.sign(), reference[f"{case}/x_adv/{epsilon}"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", ["clf/C2", "clf/C3"])
def test_classifiers_give_the_original_s_numbers(reference, case, execution):
    ensemble = ensemble_of(reference, case, execution)
    logits = ensemble(reference[f"{case}/X"])
    torch.testing.assert_close(logits, reference[f"{case}/logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.softmax(-1).mean(0), reference[f"{case}/probs"], rtol=1e-5, atol=1e-7)
    target = reference[f"{case}/target"].expand(4, -1)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, reference[f"{case}/loss"], rtol=1e-5, atol=0)
    loss.backward()
    actual = gradients(ensemble)
    for name, value in renamed(part(reference, f"{case}/grad/")).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_rms_norm_is_the_original_s(reference):
    norm = TabularNetwork(6, 1, hidden_features=6).backbone[1]
    norm.load_state_dict({"weight": reference["rmsnorm/g"]})
    torch.testing.assert_close(norm(reference["rmsnorm/x"]), reference["rmsnorm/y"], rtol=1e-5, atol=1e-7)


def test_rms_norm_keeps_small_inputs_and_survives_zero():
    norm = TabularNetwork(6, 1, hidden_features=6).backbone[1]
    small = torch.randn(4, 6) * 1e-3
    expected = nn.functional.normalize(small, dim=-1) * 6**0.5
    torch.testing.assert_close(norm(small), expected, rtol=1e-5, atol=1e-6)
    assert norm(torch.zeros(1, 6)).eq(0).all()


def test_one_member_s_state_and_a_trainer_s_file_load_too(reference):
    case = "net/in3out2M3h8d3"
    state = part(reference, f"{case}/state/")
    member = TabularNetwork(3, 2, hidden_features=8)
    alone = {name.removeprefix("members.1."): value for name, value in state.items() if name.startswith("members.1.")}
    load_deep_ensembles_state(member, alone)
    mean, _ = split_gaussian(member(reference[f"{case}/X"]))
    torch.testing.assert_close(mean, reference[f"{case}/sample_mean"][1], rtol=1e-5, atol=1e-6)
    ensemble = build_ensemble([TabularNetwork(3, 2, hidden_features=8) for _ in range(3)])
    load_deep_ensembles_state(ensemble, {"step": 3, "model": state})
    torch.testing.assert_close(ensemble.member_state_dict(1)["mean_head.weight"], alone["mean_head.weight"])


def test_a_state_that_does_not_fit_is_reported(reference):
    state = part(reference, "net/in3out2M3h8d3/state/")
    with pytest.raises(
        InputError,
        match=r"(?s)`state` does not match the network: .*size mismatch for members\.0\.backbone\.0\.weight",
    ):
        load_deep_ensembles_state(build_ensemble([TabularNetwork(3, 2, hidden_features=9) for _ in range(3)]), state)
    with pytest.raises(InputError, match=r"(?s)Missing key.*members\.3\.backbone\.0\.weight"):
        load_deep_ensembles_state(build_ensemble([TabularNetwork(3, 2, hidden_features=8) for _ in range(4)]), state)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", ["gaussian", None])
@pytest.mark.parametrize("norm", [True, False])
def test_depth_counts_the_linear_layers_on_the_way(depth, heads, norm):
    network = TabularNetwork(3, 2, hidden_features=8, depth=depth, norm=norm, heads=heads)
    assert network(torch.randn(4, 3)).shape == (4, 4 if heads else 2)
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == depth + (1 if heads else 0)
    hidden = depth - 2 if heads else depth - 1
    assert sum(isinstance(m, nn.SiLU) for m in network.modules()) == max(hidden, 0)
    assert sum(isinstance(m, nn.RMSNorm) for m in network.modules()) == (max(hidden, 0) if norm else 0)


@pytest.mark.parametrize("norm", [None, "rms", "layer", "batch"])
@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "gelu"])
def test_mlp_layers(norm, activation):
    network = MLP(3, 2, hidden_sizes=(5, 4), activation=activation, norm=norm, dropout=0.25)
    names = [type(m).__name__ for m in network]
    layer = ["Linear", *([{"rms": "RMSNorm", "layer": "LayerNorm", "batch": "BatchNorm1d"}[norm]] if norm else [])]
    layer += [{"relu": "ReLU", "silu": "SiLU", "tanh": "Tanh", "gelu": "GELU"}[activation], "Dropout"]
    assert names == [*layer, *layer, "Linear"]
    assert network(torch.randn(6, 3)).shape == (6, 2)


def test_mlp_without_hidden_layers_is_linear():
    assert [type(m) for m in MLP(3, 2, hidden_sizes=())] == [nn.Linear]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MLP(0, 2), "`in_features` must be an integer of at least 1, but it is 0"),
        (lambda: MLP(1, 2, hidden_sizes=(2.5,)), "`hidden_sizes` must be an integer of at least 1, but it is 2.5"),
        (lambda: MLP(1, 2, hidden_sizes=(3, 0)), "`hidden_sizes` must be an integer of at least 1, but it is 0"),
        (lambda: MLP(1, 2, activation="sine"), "`activation` must be one of .* but it is 'sine'"),
        (lambda: MLP(1, 2, norm="group"), "`norm` must be None or one of .* but it is 'group'"),
        (lambda: MLP(1, 2, dropout=1.0), r"`dropout` must lie in \[0, 1\), but it is 1.0"),
        (lambda: TabularNetwork(1, 1, depth=0), "`depth` must be an integer of at least 1, but it is 0"),
        (lambda: TabularNetwork(1, 1, heads="mean"), "`heads` must be 'gaussian' or None, but it is 'mean'"),
    ],
)
def test_bad_arguments_are_reported(make, text):
    with pytest.raises(InputError, match=text):
        make()
