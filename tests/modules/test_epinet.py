import copy
import dataclasses
import functools
import io
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.cli import main
from lightning_uq.compare.testbed import AGENTS, AgentSetting, agent_network, epinet_for_resnet, epinet_for_testbed
from lightning_uq.compare.training.evaluation import num_weights
from lightning_uq.errors import InputError
from lightning_uq.functional.joint import joint_log_loss
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.networks.epinet.head import EpinetHead
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.priors.additive import mlp_prior
from lightning_uq.tasks import Classification

X = torch.randn(46, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TARGET = X[:, :1] + 0.1 * X[:, 1:2]
BASE = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 3, "hidden_sizes": [16, 8]})
ADAM = functools.partial(torch.optim.Adam, lr=0.01)


def loader(y: torch.Tensor = Y, batch_size: int = 8, **kwargs) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size=batch_size, **kwargs)


class Data(LightningDataModule):
    """What the command line trains on."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def train_dataloader(self):
        return DataLoader(TensorDataset(*torch.load(self.path, weights_only=True)), batch_size=8)


def hidden(network, depth):
    """What comes out of the base's first layers."""
    return nn.Sequential(*list(network.base)[:depth])(X)


class Untraceable(nn.Module):
    """Its forward asks for a value, and it takes a mapping: its structure says nothing without data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x if float(x.sum()) > -1e9 else -x
        return {"logits": self.head(self.body(x))}


def logits(out):
    return out["logits"]


def test_it_learns_and_hypotheses_differ(make_trainer):
    module = EpinetModule(BASE, optimizer=ADAM)
    trainer = make_trainer(max_epochs=20)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    assert result["test_accuracy"] > 0.8
    module.eval()
    with torch.no_grad():
        output = module(X)
    assert output.shape == (100, 46, 3)
    assert output.std(0).mean() > 0.3
    assert result["test_joint_log_loss"] == pytest.approx(float(joint_log_loss(output, Y)), rel=1e-5)
    assert torch.equal(output, module(X))  # two evaluations are one


def test_the_base_runs_once_whatever_the_number_of_indices():
    module = EpinetModule(BASE)
    calls = []
    module.network.base.register_forward_hook(lambda *_: calls.append(1))
    module(X)
    assert len(calls) == 1


def test_the_output_is_the_base_plus_epinet_plus_prior_recomputed():
    module = EpinetModule(BASE).eval()
    network, z = module.network, torch.randn(5, 8)
    features = hidden(network, 4)
    learned, prior = network.epinet(features, z)
    torch.testing.assert_close(network(X, z), network.base(X) + learned + prior)

    def head(part):  # by the definition: one z and one input at a time
        rows = torch.empty(5, 46, 3)
        for i in range(5):
            h = torch.cat([z[i].expand(46, -1), features], 1)
            for layer in part.layers[:-1]:
                h = nn.functional.linear(h, layer.weight, layer.bias).relu()
            last = part.layers[-1]
            rows[i] = nn.functional.linear(h, last.weight, last.bias).reshape(46, 3, 8) @ z[i]
        return rows

    torch.testing.assert_close(learned, head(network.epinet.learned), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior, head(network.epinet.prior), rtol=1e-4, atol=1e-5)


def test_the_first_batch_makes_the_prior_scale_a_spread_in_logits():
    for scale in (0.5, 1.0, 3.0):
        network = EpinetModule(BASE, head=EpinetHead(prior_scale=scale)).network
        with torch.no_grad():
            network.base[0].weight.mul_(100.0)  # features of any size
        _, prior = network.learned_and_prior(X, network.sample_index(2000))
        assert prior.var(0).mean().sqrt().item() == pytest.approx(scale, rel=0.15)
        spread = network.epinet.prior_scale.running_spread.clone()
        network.learned_and_prior(100 * X, network.sample_index(8))
        assert torch.equal(network.epinet.prior_scale.running_spread, spread)  # never again


def test_features_are_standardised():
    network = EpinetModule(BASE).network
    seen = []
    network.epinet.learned.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network.base[0].bias.add_(7.0)
        network.base[0].weight.mul_(30.0)
    network(X, network.sample_index(1))
    alive = seen[0].var(0) > 0
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert alive.any()
    assert seen[0].var(0, unbiased=False).max().item() == pytest.approx(1.0, abs=1e-3)
    frozen = network.epinet.scaler.running_mean.clone()
    network.eval()(X + 5, network.sample_index(1))
    assert torch.equal(network.epinet.scaler.running_mean, frozen)


def test_a_rare_feature_does_not_explode():
    network = EpinetModule(nn.Linear(2, 3)).network
    x = torch.cat([torch.randn(32, 1), torch.zeros(32, 1)], 1)
    network(x, network.sample_index(4))
    out = network.eval()(torch.tensor([[0.0, 1.0]]), network.sample_index(100))
    assert out.abs().max() < 1000
    constant = EpinetModule(nn.Linear(2, 3)).network
    assert torch.isfinite(constant(torch.ones(8, 2), constant.sample_index(4))).all()


def test_no_gradient_of_the_epinet_reaches_the_base():
    network = EpinetModule(BASE).network
    z = network.sample_index(3)
    network.base.requires_grad_(True)
    learned, prior = network.epinet(network._base(X)[1], z)
    assert not prior.requires_grad
    gradient = torch.autograd.grad(learned.sum(), list(network.base.parameters()), allow_unused=True)
    assert all(g is None for g in gradient)
    # The base learns by its own path: its gradient is that of its own logits.
    (network(X, z) ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.base.parameters())


@pytest.mark.parametrize("options", [{}, {"freeze_base": True}, {"head": EpinetHead(include_inputs=True)}])
def test_in_evaluation_the_gradient_of_an_input_is_that_of_the_whole_function(options):
    """In training it is the base's alone, since the head does not train what lies before it."""
    module = EpinetModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), num_eval_samples=3, **options)
    module = module.double().eval()
    x = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    module(x)  # which builds the head
    assert torch.autograd.gradcheck(module.double(), x)
    network, z = module.network.train(), module.network.sample_index(3).double()
    if options != {"freeze_base": True}:
        (found,) = torch.autograd.grad(network(x, z)[0].sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(network.base(x).sum(), x)[0])


def test_priors_are_buffers_that_nothing_moves(make_trainer):
    module = EpinetModule(
        BASE,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=1.0),
        prior=functools.partial(mlp_prior, in_features=4, num_outputs=3, index_dim=8),
    )
    assert not any("prior" in name for name, _ in module.named_parameters())
    before = {name: value.clone() for name, value in module.state_dict().items() if ".prior." in name}
    before |= {n: v.clone() for n, v in module.state_dict().items() if "additive_prior" in n}
    assert len(before) == 6 + 8 * 6
    make_trainer(max_epochs=2).fit(module, loader())
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_frozen_base_stays_as_it_is(make_trainer):
    base = Untraceable()
    module = EpinetModule(base, feature_layers="head", freeze_base=True, optimizer=ADAM, output=logits)
    before = copy.deepcopy(base.state_dict())
    trainer = make_trainer(max_epochs=3)
    trainer.fit(module, loader(), loader())
    assert not any(m.training for m in base.modules())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in module.network.epinet.parameters()}
    # The statistics are those of the training set, taken once.
    with torch.no_grad():
        features = base.body(X)
    scaler = module.network.epinet.scaler
    assert int(scaler.running_batches) == 6
    torch.testing.assert_close(scaler.running_mean, features[:40].mean(0), atol=0.3, rtol=0.3)
    module.train()
    assert not base.training
    assert not module.network.base.body[1].training


def test_other_modules_in_eval_mode_are_still_told(make_trainer):
    module = EpinetModule(BASE, freeze_base=True)
    module.network.epinet.learned.eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        make_trainer().fit(module, loader())


def test_what_the_structure_does_not_tell_is_built_on_the_first_batch(make_trainer):
    module = EpinetModule(Untraceable, optimizer=ADAM, output=logits)
    assert not module.network.is_initialized
    with pytest.raises(InputError, match="not built yet"):
        module.configure_optimizers()
    state = copy.deepcopy(module.network.base.body[1].state_dict())
    module.network.initialize(X)
    assert module.network.layers == ["head"]
    assert module.network.epinet.learned.layers[0].in_features == 8 + 6
    new = module.network.base.body[1].state_dict()
    assert all(torch.equal(state[name], new[name]) for name in state)  # it only looked
    assert module.network.base.training

    other = EpinetModule(Untraceable, optimizer=ADAM, output=logits)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(other, loader(), loader())
    assert any("epinet" in n for n, _ in other.named_parameters())
    third = EpinetModule(Untraceable, output=logits)
    third.load_state_dict(other.state_dict())
    assert torch.equal(third.eval()(X), other.eval()(X))


def test_a_head_that_is_built_while_it_is_tested_can_be_trained(make_trainer):
    module = EpinetModule(Untraceable, optimizer=ADAM, output=logits)
    make_trainer().test(module, loader(), verbose=False)  # in inference mode, whose tensors no gradient may meet
    assert module.network.is_initialized
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    make_trainer().fit(module.train(), loader())


@pytest.mark.parametrize("layers", [["0", "4"], ["2", "<output>"], "4"])
def test_several_feature_layers(layers):
    network = EpinetModule(BASE, feature_layers=layers, head=EpinetHead(include_inputs=True)).network
    network(X, network.sample_index(2))
    base, features = network._base(X)
    inputs = {"0": X, "2": hidden(network, 2), "4": hidden(network, 4), "<output>": base}
    names = [layers] if isinstance(layers, str) else layers
    torch.testing.assert_close(features, torch.cat([inputs[name] for name in names] + [X], 1))
    assert not features.requires_grad


def test_convolutional_features_are_averaged():
    base = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    network = EpinetModule(base, feature_layers="2").network
    x = torch.randn(2, 1, 8, 8)
    assert network(x, network.sample_index(3)).shape == (3, 2, 3)
    torch.testing.assert_close(network._base(x)[1], base[:2](x).mean((2, 3)))


def test_regression(make_trainer):
    base = functools.partial(nn.Sequential, nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    module = EpinetModule(base(), task="regression", optimizer=ADAM, head=EpinetHead(prior_scale=0.3))
    trainer = make_trainer(max_epochs=60)
    trainer.fit(module, loader(TARGET), loader(TARGET))
    prediction = module.predict(X)
    assert prediction.mean.shape == (46, 1)
    assert (prediction.mean - TARGET).square().mean() < 0.2 * TARGET.var()
    assert (prediction.epistemic_variance > 0).all()
    assert module.predict(20 * X).epistemic_variance.mean() > prediction.epistemic_variance.mean()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(make_trainer, precision):
    module = EpinetModule(BASE, optimizer=ADAM)
    trainer = make_trainer(max_epochs=2, precision=precision)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    assert 0 < result["test_nll"] < 3
    scaler = module.network.epinet.scaler
    assert scaler.running_mean.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert module.network.epinet.prior_scale.running_spread.dtype == scaler.running_mean.dtype
    assert (
        module.network.epinet.learned.layers[0].weight.dtype
        == {
            "bf16-mixed": torch.float32,
            "bf16-true": torch.bfloat16,
            "64-true": torch.float64,
        }[precision]
    )


def test_a_checkpoint_remembers_everything(make_trainer, tmp_path):
    module = EpinetModule(BASE, head=EpinetHead(prior_scale=2.0), optimizer=ADAM)
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="val_nll")
    make_trainer(max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True).fit(module, loader(), loader())
    path = tmp_path / "last.ckpt"
    module.trainer.save_checkpoint(path)
    again = EpinetModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(again.eval()(X), module.eval()(X))
    assert again.network.epinet.prior_scale.measured
    spread = again.network.epinet.prior_scale.running_spread.clone()

    resumed = EpinetModule(BASE, head=EpinetHead(prior_scale=2.0), optimizer=ADAM)
    make_trainer(max_epochs=4).fit(resumed, loader(), loader(), ckpt_path=path)
    assert torch.equal(resumed.network.epinet.prior_scale.running_spread, spread)


def test_a_built_network_is_asked_for_again(make_trainer, tmp_path):
    module = EpinetModule(BASE())
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        InputError, match="does not hold argument `network`: a lightning_uq.networks.mlp.MLP cannot be saved"
    ):
        EpinetModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = EpinetModule.load_from_checkpoint(tmp_path / "a.ckpt", network=BASE(), weights_only=True)
    assert torch.equal(again.eval()(X), module.eval()(X))


def test_copies_and_pickles_are_of_their_own(tmp_path):
    module = EpinetModule(BASE)
    module.network(X, module.network.sample_index(1))
    twin = copy.deepcopy(module)
    assert torch.equal(twin.eval()(X), module.eval()(X))
    with torch.no_grad():
        twin.network.base[0].weight.zero_()
    assert not torch.equal(twin(X), module(X))
    buffer = io.BytesIO()
    torch.save(module.network, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    z = module.network.sample_index(3)
    assert torch.equal(loaded(X, z), module.network(X, z))


def test_export_and_compile():
    module = EpinetModule(BASE, num_eval_samples=7).eval()
    program = torch.export.export(module, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), module(X))
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(X), module(X))


def test_a_compiled_network_trains(make_trainer):
    module = EpinetModule(BASE, optimizer=ADAM)
    module.network.compile(backend="aot_eager")
    make_trainer(max_epochs=1).fit(module, loader())
    assert module.network.epinet.prior_scale.running_spread > 0
    assert int(module.network.epinet.scaler.running_batches) == 6


def test_weight_averaging(make_trainer):
    module = EpinetModule(BASE, optimizer=ADAM)
    average = WeightAveraging(avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p)
    make_trainer(max_epochs=3, callbacks=[average]).fit(module, loader(), loader())
    assert module.network.epinet.prior_scale.running_spread > 0
    assert torch.isfinite(module(X)).all()


def test_a_density_takes_the_features_of_the_base(make_trainer):
    module = EpinetModule(BASE, optimizer=ADAM)
    trainer = make_trainer(max_epochs=1, callbacks=[FitGMM()])
    trainer.fit(module, loader())
    (first, *_) = trainer.predict(module, loader())
    assert torch.isfinite(first.log_density).all()


def test_two_processes_agree(run_script):
    result = run_script(
        """
import json, torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.networks.factory import Factory

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()

def fit(**kwargs):
    seed_everything(0)
    base = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [8]})
    module = EpinetModule(base, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    world = kwargs.get("devices", 1)
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, **kwargs)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=8 // world))
    epinet = module.network.epinet
    return trainer, {
        "spread": float(epinet.prior_scale.running_spread), "mean": epinet.scaler.running_mean.tolist(),
        "weight": epinet.learned.layers[0].weight.flatten()[:5].tolist(),
        "base": module.network.base[0].weight.flatten()[:5].tolist(),
    }

if __name__ == "__main__":
    trainer, two = fit(devices=2, strategy="ddp")
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, two)
    if trainer.global_rank == 0:
        open(out, "w").write(json.dumps(gathered))
"""
    )
    first, second = result
    assert first == second
    assert first["spread"] > 0
    assert first["mean"] != [0.0] * 8


def test_named_configurations():
    module = epinet_for_testbed(10, 2, 100, temperature=0.1)
    assert module.network.additive_scale.scale == pytest.approx(3.0)
    assert module.optimizer.keywords["weight_decay"] == pytest.approx(0.4 * 0.1**0.7)
    assert module.network.epinet.learned.layers[0].in_features == 8 + 10 + 50
    # The original also counts the weights of an epinet prior of scale zero.
    assert sum(p.numel() for p in module.parameters()) == 6264 - 1531
    x = torch.randn(7, 10)
    network = module.network
    z = network.sample_index(3)
    _, prior = network.learned_and_prior(x, z)
    torch.testing.assert_close(prior, 3.0 * network.additive_prior(x, z))
    base = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 100))
    head = epinet_for_resnet(base, "cifar100")
    assert head(torch.randn(2, 3, 32, 32)).shape == (100, 2, 100)
    assert head.network.freeze_base
    assert head.network.additive_scale.scale == head.network.epinet.prior_scale.scale == 0.5
    imagenet = epinet_for_resnet(nn.Sequential(nn.Flatten(), nn.Linear(3, 1000)), "imagenet").network.head
    assert (imagenet.base_scale, imagenet.temperature, imagenet.index_dim) == (1.25, 0.7, 30)
    with pytest.raises(InputError, match="`data`"):
        epinet_for_resnet(base, "mnist")


def test_the_recipe_of_the_testbed_follows_its_options():
    setting = AgentSetting(
        data="testbed",
        task=Classification(),
        input_shape=(10,),
        num_targets=2,
        num_train=100,
        backbone=functools.partial(agent_network, in_features=10),
        optimizer=torch.optim.Adam,
        temperature=0.1,
    )
    epinet, prior, dropout = (AGENTS[name].build(setting) for name in ("epinet", "ensemble_prior", "dropout"))
    assert epinet.network.additive_scale.scale == pytest.approx(3.0)
    assert prior.network.num_indices == 10
    assert prior.hparams["prior_scale"] == pytest.approx(3 / 0.1**0.5)
    assert prior.network.member(0).prior[0].bias.any()
    assert sum(p.numel() for p in prior.parameters()) == 32020
    assert sum(p.numel() for p in dropout.parameters()) == 11402


def test_what_a_comparison_counts_leaves_statistics_out():
    module = EpinetModule(BASE)
    head = 2 * sum(p.numel() for p in module.network.epinet.learned.parameters())
    base = sum(p.numel() for p in module.network.base.parameters())
    assert num_weights(module) == base + head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index_dim": 0}, "`index_dim` of an EpinetHead must be at least 1, but it is 0."),
        ({"hidden_sizes": (0,)}, r"`hidden_sizes` of an EpinetHead must hold widths of at least 1, but it is \[0\]."),
        ({"prior_hidden_sizes": [3, -1]}, r"`prior_hidden_sizes` .* but it is \[3, -1\]."),
        ({"prior_scale": -1.0}, "`prior_scale` of an EpinetHead must be finite and at least 0, but it is -1.0."),
        ({"additive_prior_scale": float("inf")}, "`additive_prior_scale` .* but it is inf."),
        ({"temperature": 0.0}, "`temperature` of an EpinetHead must be finite and above 0, but it is 0.0."),
    ],
)
def test_a_head_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        EpinetHead(**arguments)


def test_an_unknown_layer():
    with pytest.raises(InputError, match="it is 'nope'"):
        EpinetModule(BASE, feature_layers="nope")


def test_a_head_is_plain_data():
    head = EpinetHead(hidden_sizes=[6], prior_hidden_sizes=[4, 3])
    assert head == EpinetHead(hidden_sizes=(6,), prior_hidden_sizes=(4, 3))
    assert len({head, dataclasses.replace(head), EpinetHead()}) == 2


def test_a_checkpoint_brings_head_and_prior(make_trainer, tmp_path):
    head = EpinetHead(
        index_dim=3,
        hidden_sizes=[6],
        prior_hidden_sizes=[4],
        additive_prior_scale=0.5,
        base_scale=1.25,
        temperature=0.5,
    )
    prior = functools.partial(mlp_prior, in_features=4, num_outputs=3, index_dim=3, seed=1)
    module = EpinetModule(BASE, head=head, prior=prior, optimizer=ADAM, num_eval_samples=5)
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EpinetModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.network.head == head
    assert torch.equal(again.eval()(X), module.eval()(X))
    other = EpinetModule.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, head=dataclasses.replace(head, temperature=1.0)
    )
    torch.testing.assert_close(other.eval()(X), 0.5 * module(X))
    exported = torch.export.export(module, (X,), strict=False).module()
    torch.testing.assert_close(exported(X), module(X))


def test_the_command_line_builds_a_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {
        "class_path": "lightning_uq.EpinetModule",
        "init_args": {
            "network": {
                "class_path": "lightning_uq.Factory",
                "init_args": {"target": BASE.target, "kwargs": BASE.kwargs},
            },
            "head": {"index_dim": 3, "hidden_sizes": [6], "prior_scale": 2.0},
            "prior": {
                "class_path": "lightning_uq.Factory",
                "init_args": {
                    "target": "lightning_uq.networks.mlp_prior",
                    "kwargs": {"in_features": 4, "num_outputs": 3, "index_dim": 3},
                },
            },
        },
    }
    torch.save((X, Y), tmp_path / "data.pt")
    trainer = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    data = {"class_path": "tests.modules.test_epinet.Data", "init_args": {"path": "data.pt"}}
    Path("epinet.yaml").write_text(
        yaml.safe_dump({"seed_everything": 0, "model": model, "data": data, "trainer": trainer})
    )
    assert main(["fit", "--config", "epinet.yaml", "--model.head.index_dim=3", "--model.head.temperature=0.5"]) == 0
    (path,) = Path().rglob("*.ckpt")
    module = EpinetModule.load_from_checkpoint(path, weights_only=True)
    assert module.network.head == EpinetHead(index_dim=3, hidden_sizes=(6,), prior_scale=2.0, temperature=0.5)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_an_output_that_is_no_row_of_logits():
    module = EpinetModule(nn.Identity(), feature_layers="<output>")
    with pytest.raises(
        InputError, match=r"must have one row per sample \[2, F\], but their shapes are \[\[2, 3, 4\]\]"
    ):
        module(torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match=r"must return \[B, C\], or \[B, H, D\] for a horizon, .* shape \[2\]"):
        EpinetModule(nn.Flatten(0), feature_layers="")(torch.zeros(2, 1))


def test_scale_zero_is_the_softmax_plus_the_epinet():
    module = EpinetModule(BASE, head=EpinetHead(prior_scale=0.0))
    assert module.network.epinet.prior is None
    _, prior = module.network.learned_and_prior(X, module.network.sample_index(2))
    assert not prior.any()
    reference = DeterministicModule(module.network.base)
    with torch.no_grad():
        for p in module.network.epinet.parameters():
            p.zero_()
    torch.testing.assert_close(module(X), reference(X).expand(100, -1, -1))


def test_a_head_of_another_type_is_refused():
    with pytest.raises(InputError, match="`head` must be an EpinetHead, but it is a dict"):
        EpinetModule(nn.Linear(4, 3), head={"index_dim": 4})
