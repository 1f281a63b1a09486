"""EnsembleModule: saved, loaded, resumed, converted, and collected from members trained apart."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_uq.data.indexed import Indexed
from lightning_uq.errors import InputError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory
from lightning_uq.tasks import Classification

M = 3
EXECUTIONS = ("loop", "stacked", "vmap")
LINEAR = Factory("torch.nn.Linear", {"in_features": 4, "out_features": 3})


def dropping():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def dataset(n=40):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))


class Noisy(Dataset):
    """Augments with every random generator there is."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = dataset()[i]
        return x + 0.1 * torch.randn(4) + random.random() + np.random.rand(), y  # noqa: NPY002


def loader(data=None, **kwargs):
    return DataLoader(dataset() if data is None else data, batch_size=8, **kwargs)


def states(ensemble):
    return [copy.deepcopy(ensemble.network.member_state_dict(i)) for i in range(ensemble.network.num_indices)]


def assert_same(states, expected, **tolerance):
    for state, other in zip(states, expected, strict=True):
        assert state.keys() == other.keys()
        for name in state:
            torch.testing.assert_close(state[name], other[name], **tolerance)


# ---------------------------------------------------------------------- reload


def test_a_checkpoint_of_an_importable_factory_loads_bare(make_trainer, tmp_path):
    ensemble = EnsembleModule(
        LINEAR, num_members=M, bootstrap="poisson", adversarial_epsilon=0.1, loss=None, execution="loop"
    )
    trainer = make_trainer()
    trainer.fit(ensemble, loader(Indexed(dataset())), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert_same(states(again), states(ensemble), rtol=0, atol=0)
    assert again.seed == ensemble.seed
    assert (again.bootstrap, again.adversary.epsilon, again.network.execution) == ("poisson", 0.1, "loop")
    assert torch.equal(again.adversary.input_range, ensemble.adversary.input_range)
    assert again.hparams == ensemble.hparams
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "adversary.input_range" in state
    assert f"network.members.{M - 1}.weight" in state
    assert make_trainer().test(ensemble, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)


def test_a_lambda_has_to_be_passed_again(make_trainer, tmp_path):
    ensemble = EnsembleModule(lambda: nn.Linear(4, 3), num_members=M, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"does not hold argument `network`: a .*Pass it to"):
        EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(InputError, match=r"argument `optimizer`: a"):
        EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", network=lambda: nn.Linear(4, 3), weights_only=True)
    again = EnsembleModule.load_from_checkpoint(
        tmp_path / "a.ckpt", network=lambda: nn.Linear(4, 3), optimizer=torch.optim.SGD, weights_only=True
    )
    assert_same(states(again), states(ensemble), rtol=0, atol=0)


def test_priors_and_running_statistics_are_in_the_state(make_trainer, tmp_path):
    def normed():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    ensemble = EnsembleModule(normed, num_members=M, prior_network=normed, prior_scale=2.0)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EnsembleModule.load_from_checkpoint(
        tmp_path / "a.ckpt", network=normed, prior_network=normed, execution="loop", weights_only=True
    )
    x = dataset().tensors[0]
    torch.testing.assert_close(again.eval()(x), ensemble.eval()(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("saved", ["validation end", "epoch end", "fit end"])
def test_resuming_gives_what_the_uninterrupted_training_gives(saved, execution, make_trainer, tmp_path):
    """Shuffling, dropout and augmentation included: the random state goes on where it stopped."""

    def fit(seed, epochs, path=None, **kwargs):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        ensemble = EnsembleModule(
            dropping,
            num_members=M,
            optimizer=lambda p: torch.optim.Adam(p, 0.01),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
            adversarial_epsilon=0.01,
            execution=execution,
            seed=seed,
        )
        trainer = make_trainer(max_epochs=epochs, **kwargs)
        trainer.fit(ensemble, loader(Noisy(), shuffle=True), loader(), ckpt_path=path, weights_only=path and True)
        return ensemble, trainer

    whole, _ = fit(0, 4)
    if saved == "fit end":
        _, trainer = fit(0, 2)
        path = tmp_path / "half.ckpt"
        trainer.save_checkpoint(path)
    else:
        keep = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=saved == "epoch end")
        fit(0, 4, callbacks=[keep], enable_checkpointing=True)
        (path,) = tmp_path.glob("epoch=1-*.ckpt")
    resumed, trainer = fit(99, 4, path)
    assert resumed.seed == 0
    assert trainer.global_step == 20
    assert torch.equal(resumed.adversary.input_range, whole.adversary.input_range)
    assert_same(states(resumed), states(whole), rtol=0, atol=0)


def test_the_range_is_not_taken_again_on_resuming_but_is_for_other_data(make_trainer, tmp_path):
    x, y = dataset().tensors
    ensemble = EnsembleModule(LINEAR, num_members=2, adversarial_epsilon=0.1)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    wider = loader(TensorDataset(5 * x, y))
    resumed = EnsembleModule(LINEAR, num_members=2, adversarial_epsilon=0.1)
    make_trainer(max_epochs=2).fit(resumed, wider, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(resumed.adversary.input_range, ensemble.adversary.input_range)
    again = EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    make_trainer().fit(again, wider)
    torch.testing.assert_close(again.adversary.input_range, 5 * ensemble.adversary.input_range)


def test_loading_for_a_test_leaves_the_random_state_alone(make_trainer, tmp_path):
    ensemble = EnsembleModule(LINEAR, num_members=2)
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(8)
    before = torch.get_rng_state()
    make_trainer().validate(ensemble, loader(generator=torch.Generator()), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    EnsembleModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # by SequentialLR of torch 2.6
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("scheduler", [None, "cosine", "plateau"])
@pytest.mark.parametrize(
    ("first", "second"), [("loop", "stacked"), ("stacked", "loop"), ("vmap", "stacked"), ("vmap", "loop")]
)
def test_resuming_under_another_execution(first, second, scheduler, optimizer, make_trainer, tmp_path):
    kinds = {
        "adam": lambda p: torch.optim.Adam(p, 0.02, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    }
    schedulers = {
        None: None,
        "cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=1), torch.optim.lr_scheduler.CosineAnnealingLR(o, 3)],
            milestones=[1],
        ),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=0.5),
    }

    def fit(execution, epochs, path=None):
        ensemble = EnsembleModule(
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
            num_members=M,
            optimizer=kinds[optimizer],
            lr_scheduler=schedulers[scheduler],
            execution=execution,
            seed=0,
        )
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(ensemble, loader(), loader(), ckpt_path=path, weights_only=path and True)
        return ensemble, trainer

    _, trainer = fit(first, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    same, _ = fit(first, 4, tmp_path / "half.ckpt")
    other, trainer = fit(second, 4, tmp_path / "half.ckpt")
    assert_same(states(other), states(same), rtol=1e-4, atol=1e-5)
    rates = [{group["lr"] for group in e.optimizers().param_groups} for e in (same, other)]
    assert rates[0] == rates[1]
    assert len(other.optimizers().param_groups) == (M if second == "loop" else 1)


def test_an_optimizer_state_that_cannot_be_converted(make_trainer, tmp_path):
    class Apart(EnsembleModule):
        def optimized_parameters(self):
            return [{**group, "lr": 0.1 * (i + 1)} for i, group in enumerate(super().optimized_parameters())]

    trainer = make_trainer()
    trainer.fit(Apart(LINEAR, num_members=2, optimizer=torch.optim.SGD, execution="loop"), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    ensemble = EnsembleModule(LINEAR, num_members=2, optimizer=torch.optim.SGD, execution="stacked")
    with pytest.raises(
        InputError, match="members share all settings.*Resume with the `execution` that wrote the checkpoint"
    ):
        make_trainer(max_epochs=2).fit(ensemble, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


# ---------------------------------------------------------------------- members trained apart


class Lit(LightningModule):
    def __init__(self, width=8, seed=0):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Manual(Lit):
    def __init__(self, width=8):
        super().__init__(width)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def train_apart(make, make_trainer, tmp_path, n=3):
    modules, paths = [], []
    for i in range(n):
        torch.manual_seed(i)
        module, trainer = make(), make_trainer()
        trainer.fit(module, loader())
        path = tmp_path / f"{i}.ckpt"
        trainer.save_checkpoint(path)
        modules.append(module.eval())
        paths.append(path)
    return modules, paths


def expected_output(modules, x):
    return torch.stack([module(x) for module in modules])


@pytest.mark.parametrize("make", [Lit, Manual])
@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_networks_from_lightning_checkpoints(execution, make, make_trainer, tmp_path):
    modules, paths = train_apart(make, make_trainer, tmp_path)
    ensemble = EnsembleModule.from_checkpoints(paths, network, execution=execution).eval()
    x = dataset().tensors[0]
    torch.testing.assert_close(ensemble(x), expected_output(modules, x))
    assert ensemble.network.num_indices == 3
    make_trainer().test(ensemble, loader(), verbose=False)


def test_lightning_modules_from_their_checkpoints(make_trainer, tmp_path):
    modules, paths = train_apart(lambda: Lit(width=6), make_trainer, tmp_path)
    x = dataset().tensors[0]
    for given in ({"network": lambda: Lit(width=6)}, {"module_class": Lit}):
        ensemble = EnsembleModule.from_checkpoints(paths, **given).eval()
        assert isinstance(ensemble.network.member(0), Lit)
        assert torch.equal(ensemble(x), expected_output(modules, x))
    trainer = make_trainer()
    trainer.fit(ensemble.train(), loader())
    trainer.save_checkpoint(tmp_path / "ensemble.ckpt")
    again = EnsembleModule.load_from_checkpoint(tmp_path / "ensemble.ckpt", network=lambda: Lit(6), weights_only=True)
    assert torch.equal(again.eval()(x), ensemble.eval()(x))


def test_modules_that_optimize_by_hand_can_be_collected(make_trainer, tmp_path):
    modules, paths = train_apart(Manual, make_trainer, tmp_path)
    ensemble = EnsembleModule.from_checkpoints(paths, module_class=Manual)
    (result,) = make_trainer().test(ensemble, loader(), verbose=False)
    x, y = dataset().tensors
    probs = expected_output(modules, x).softmax(2).mean(0)
    assert result["ensemble/test_nll"] == pytest.approx(F.nll_loss(probs.log(), y).item(), rel=1e-5)
    with pytest.raises(InputError, match="Manual must leave optimization to Lightning"):
        make_trainer().fit(ensemble, loader())


def test_deterministic_modules_say_what_they_are(make_trainer, tmp_path):
    task = Classification(num_classes=3, class_weights=(1.0, 2.0, 3.0))
    modules, paths = train_apart(lambda: DeterministicModule(LINEAR, task=task), make_trainer, tmp_path)
    x = dataset().tensors[0]
    for given in ({}, {"module_class": DeterministicModule}, {"network": LINEAR, "task": task}):
        ensemble = EnsembleModule.from_checkpoints(paths, **given).eval()
        torch.testing.assert_close(ensemble(x), torch.cat([module(x) for module in modules]))
        assert ensemble.task == task
        assert ensemble.network.execution == "stacked"


def test_state_dicts_of_one_start_need_no_warning(tmp_path):
    start = network().state_dict()

    def pretrained():
        built = network()
        built.load_state_dict(start)
        return built

    trained = [network() for _ in range(2)]
    for i, member in enumerate(trained):
        torch.save(member.state_dict(), tmp_path / f"{i}.pt")
    ensemble = EnsembleModule.from_checkpoints([tmp_path / f"{i}.pt" for i in range(2)], pretrained)
    assert_same(states(ensemble), [member.state_dict() for member in trained], rtol=0, atol=0)


class Payload:
    """An object that a pickle would build; `weights_only` must not."""


def test_files_that_hold_no_member(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(network().state_dict(), good)

    def collect(name, content, **given):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        return EnsembleModule.from_checkpoints([good, path], network, **given)

    for name, content in {
        "missing.pt": None,
        "text.pt": b"not a checkpoint",
        "empty.pt": b"",
        "truncated.pt": good.read_bytes()[:200],
        "pickle.pt": {"state_dict": network().state_dict(), "hyper_parameters": {"x": Payload()}},
    }.items():
        with pytest.raises(InputError, match=rf"`checkpoints` must name checkpoints, but .*{name} cannot be read: .+"):
            collect(name, content)
    for name, content in {"list.pt": [1, 2], "number.pt": 3, "bare.pt": {"epoch": 3}}.items():
        with pytest.raises(InputError, match=rf"'.*{name}' must hold a state dict, alone or under `state_dict`"):
            collect(name, content)
    with pytest.raises(InputError, match=r"does not hold the weights of Sequential: it lacks 2\.bias, and has nothing"):
        collect("lacks.pt", {k: v for k, v in network().state_dict().items() if k != "2.bias"})
    with pytest.raises(InputError, match=r"lacks nothing, and has 3\.weight that Sequential lacks"):
        collect("more.pt", {**network().state_dict(), "3.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"lacks 0\.bias, 0\.weight, 2\.bias and 1 more, and has conv\.weight"):
        collect("foreign.pt", {"conv.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"size mismatch for 0\.weight"):
        collect("shape.pt", nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict())


def test_files_without_a_network(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(network().state_dict(), path)
    with pytest.raises(
        InputError, match=r"'.*a\.pt' does not say which network.* Pass argument `network`.*or `module_class`"
    ):
        EnsembleModule.from_checkpoints([path])
    for nothing in ([], str(path)):
        with pytest.raises(InputError, match="`checkpoints` must be a list of files, but it is"):
            EnsembleModule.from_checkpoints(nothing, network)


class Activated(LightningModule):
    def __init__(self, act: str = "ReLU", lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 5), getattr(nn, act)(), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x)


def test_files_of_members_built_differently_are_not_built_alike(tmp_path):
    def save(name, module):
        torch.save(
            {
                "state_dict": module.state_dict(),
                "hyper_parameters": dict(module.hparams),
                "pytorch-lightning_version": "2.6.6",
            },
            tmp_path / name,
        )
        return tmp_path / name

    relu, tanh = save("a.ckpt", Activated()), save("b.ckpt", Activated("Tanh"))
    with pytest.raises(InputError, match=r"'.*a.ckpt' and '.*b.ckpt' were built with different values of act"):
        EnsembleModule.from_checkpoints([relu, tanh], module_class=Activated)
    with pytest.raises(InputError, match="Arguments `network` and `module_class` exclude each other"):
        EnsembleModule.from_checkpoints([relu], Activated, module_class=Activated)
    with pytest.raises(InputError, match="Leave out argument `num_members`"):
        EnsembleModule.from_checkpoints([relu], Activated, num_members=1)
    slower = Activated(lr=0.2)
    ensemble = EnsembleModule.from_checkpoints([relu, save("c.ckpt", slower)], Activated)  # a factory settles it
    x = torch.randn(3, 4)
    torch.testing.assert_close(ensemble.network.member(1)(x), slower(x))
    ours = [
        save(f"{act}.ckpt", DeterministicModule(Factory("lightning_uq.networks.MLP", {**sizes, "activation": act})))
        for sizes in [{"in_features": 4, "out_features": 3}]
        for act in ("relu", "silu")
    ]
    with pytest.raises(InputError, match="built with different values of network"):
        EnsembleModule.from_checkpoints(ours)


def test_another_number_of_members_is_named(make_trainer, tmp_path):
    def network():
        return nn.Linear(4, 3)

    trainer = make_trainer()
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), batch_size=4)
    trainer.fit(EnsembleModule(network, num_members=2), data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    for load in (
        lambda path: EnsembleModule.load_from_checkpoint(path, network=network, num_members=3, weights_only=True),
        lambda path: make_trainer().fit(
            EnsembleModule(network, num_members=3), data, ckpt_path=path, weights_only=True
        ),
    ):
        with pytest.raises(InputError, match=r"holds 2 members, but the ensemble has 3 \(argument `num_members`\)"):
            load(tmp_path / "two.ckpt")
