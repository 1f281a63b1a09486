"""EnsembleModule around plain networks."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_uq.modules.ensemble
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.data.indexed import Indexed, IndexedSample
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.bootstrap import bootstrap_weights, member_seed
from lightning_uq.losses.gaussian import gaussian_nll_loss, split_gaussian
from lightning_uq.method import Setting
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.priors.members import NetworkWithPrior
from lightning_uq.predictions import GaussianMixturePrediction
from lightning_uq.tasks import Classification, Segmentation

EXECUTIONS = ("loop", "stacked", "vmap")
M = 3


def mlp(d_in=4, d_out=3):
    return nn.Sequential(nn.Linear(d_in, 16), nn.Tanh(), nn.Linear(16, d_out))


def normed():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))


def dataset(n=50):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 3, generator=generator)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x @ weights).argmax(1))


def loader(n=50, data=None, **kwargs):
    return DataLoader(dataset(n) if data is None else data, batch_size=8, **kwargs)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def states(ensemble):
    return [ensemble.network.member_state_dict(i) for i in range(ensemble.network.num_indices)]


def assert_same(states, expected, **tolerance):
    for state, other in zip(states, expected, strict=True):
        assert state.keys() == other.keys()
        for name in state:
            torch.testing.assert_close(state[name], other[name], **tolerance)


# ---------------------------------------------------------------------- building


def test_members_are_built_under_seeds_of_their_own():
    torch.manual_seed(3)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    ensemble = EnsembleModule(mlp, num_members=M, seed=11)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    for i, state in enumerate(states(ensemble)):
        torch.manual_seed(member_seed(11, i))
        assert_same([state], [mlp().state_dict()], rtol=0, atol=0)
    assert_same(states(EnsembleModule(mlp, num_members=M, seed=11)), states(ensemble), rtol=0, atol=0)
    other = states(EnsembleModule(mlp, num_members=M, seed=12))
    assert all(not torch.equal(a["0.weight"], b["0.weight"]) for a in other for b in states(ensemble))


def test_without_a_seed_one_draw_of_the_global_generator_decides():
    torch.manual_seed(3)
    first = EnsembleModule(mlp, num_members=M)
    following = torch.rand(1)
    torch.manual_seed(3)
    second = EnsembleModule(mlp, num_members=7)
    assert torch.rand(1) == following
    assert first.seed == second.seed == first.hparams.seed
    assert_same(states(second)[:M], states(first), rtol=0, atol=0)
    assert EnsembleModule(mlp, num_members=M).seed != first.seed


def test_bare_parameters_differ_too():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.w

    a, b = states(EnsembleModule(Bare, num_members=2))
    assert not torch.equal(a["w"], b["w"])


def test_an_instance_is_no_factory():
    with pytest.raises(InputError, match="`network` must be a factory that builds a new network at each call"):
        EnsembleModule(mlp())


def test_one_instance_twice():
    network = mlp()
    with pytest.raises(
        InputError, match="must build a new network at each call, but call 2 returned the same Sequential"
    ):
        EnsembleModule(lambda: network, num_members=2)


def test_a_shared_trainable_part():
    body = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"call 2 returned the same parameter '0.weight' as an earlier call"):
        EnsembleModule(lambda: nn.Sequential(body, nn.Linear(4, 3)), num_members=2)
    body.requires_grad_(False)
    ensemble = EnsembleModule(lambda: nn.Sequential(body, nn.Linear(4, 3)), num_members=2)
    assert ensemble.network.execution == "loop"


def test_members_that_start_alike():
    start = mlp().state_dict()

    def pretrained():
        network = mlp()
        network.load_state_dict(start)
        return network

    with pytest.warns(UserWarning, match="All 2 members start from the same weights"):
        EnsembleModule(pretrained, num_members=2)


def test_constant_weights_are_no_accident():
    def zeros():
        network = nn.Linear(4, 3)
        nn.init.zeros_(network.weight)
        nn.init.ones_(network.bias)
        return network

    EnsembleModule(zeros, num_members=2)


def test_factories_of_other_things():
    with pytest.raises(InputError, match="The factory in `network` must return a torch.nn.Module"):
        EnsembleModule(lambda: 3, num_members=2)
    with pytest.raises(InputError, match="or LightningModules of your own, but it built a DeterministicModule"):
        EnsembleModule(lambda: DeterministicModule(mlp()), num_members=2)

    class Lit(LightningModule):
        def training_step(self, batch):
            return None

    kinds = iter([Lit, mlp])
    with pytest.raises(InputError, match="built both LightningModules and plain networks"):
        EnsembleModule(lambda: next(kinds)(), num_members=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_members": 0}, "`num_members` must be an integer of at least 1, but it is 0"),
        ({"num_members": 2.5}, "`num_members` must be an integer of at least 1, but it is 2.5"),
        ({"bootstrap": "jackknife"}, "`bootstrap` must be one of .* but it is 'jackknife'"),
        ({"adversarial_epsilon": -0.1}, "`adversarial_epsilon` must be a finite number of at least 0, but it is -0.1"),
        (
            {"adversarial_epsilon": float("nan")},
            "`adversarial_epsilon` must be a finite number of at least 0, but it is nan",
        ),
        ({"adversarial_epsilon": "a"}, "`adversarial_epsilon` must be a finite number of at least 0, but it is 'a'"),
        ({"prior_scale": float("inf")}, "`prior_scale` must be a finite number of at least 0, but it is inf"),
        ({"num_members": True}, "`num_members` must be an integer of at least 1, but it is True"),
        ({"seed": 1.5}, "`seed` must be an integer of at least 0, but it is 1.5"),
        ({"adversarial_scale": "relative"}, r"`adversarial_scale` must be one of \('range', 'absolute'\)"),
        (
            {"prior_scale": 1.0},
            "`prior_network` and `prior_scale` must be given together.*prior_scale=1.0 comes without a prior network",
        ),
        (
            {"prior_network": mlp},
            "`prior_network` and `prior_scale` must be given together.*prior_scale=0.0 comes with a prior network",
        ),
        ({"prior_network": mlp(), "prior_scale": 1.0}, "`prior_network` must be a factory"),
        ({"execution": "parallel"}, "`execution` must be 'loop', 'stacked', 'vmap' or 'auto', but it is 'parallel'"),
        ({"task": "ranking"}, "`task` must be a Task, or one of .* but it is 'ranking'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        EnsembleModule(mlp, **{"num_members": 2, **arguments})


def test_the_comparison_knows_it():
    method = methods()["ensemble"]
    task = Classification(num_classes=3)
    setting = Setting(
        data="digits",
        task=task,
        input_shape=(4,),
        num_targets=3,
        num_train=100,
        backbone=lambda num_outputs: mlp(),
        optimizer=sgd,
    )
    built = method.build(setting)
    assert method.ood_score == built.ood_score == EnsembleModule.preferred_ood_scores[0] == "mutual_information"
    assert (built.network.num_indices, built.task, built.optimizer) == (5, task, sgd)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    ids=str,
)
def test_a_member_ends_as_it_would_alone(options, execution, make_trainer):
    ensemble = EnsembleModule(mlp, num_members=M, optimizer=sgd, seed=0, execution=execution)
    start = copy.deepcopy(states(ensemble))
    make_trainer(max_epochs=3, **options).fit(ensemble, loader())
    for i, state in enumerate(start):
        network = mlp()
        network.load_state_dict(state)
        single = DeterministicModule(network, optimizer=sgd)
        make_trainer(max_epochs=3, **options).fit(single, loader())
        assert_same([states(ensemble)[i]], [network.state_dict()], rtol=1e-4, atol=1e-6)
        assert not torch.equal(network.state_dict()["0.weight"], state["0.weight"])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_loss_is_the_sum_and_the_mean_is_logged(execution, make_trainer):
    ensemble = EnsembleModule(
        mlp, num_members=M, optimizer=lambda p: torch.optim.SGD(p, 0.0), seed=0, execution=execution
    )
    x, y = dataset(8).tensors
    losses = [F.cross_entropy(ensemble.network.member(i)(x), y).item() for i in range(M)]
    assert ensemble.training_loss(x, y, (x, y)).item() == pytest.approx(sum(losses), rel=1e-6)
    trainer = make_trainer()
    trainer.fit(ensemble, loader(8), loader(8))
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(np.mean(losses), rel=1e-6)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_losses_of_segmentation_and_of_your_own():
    ensemble = EnsembleModule(lambda: nn.Conv2d(2, 3, 1), num_members=M, task="segmentation")
    x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4, 5, 5))
    expected = torch.stack([F.cross_entropy(member, y) for member in ensemble(x)])
    torch.testing.assert_close(ensemble.index_losses(ensemble(x), y), expected)
    for arguments in ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, {"task": Segmentation(label_smoothing=0.1)}):
        smooth = EnsembleModule(lambda: nn.Conv2d(2, 3, 1), num_members=M, **{"task": "segmentation", **arguments})
        expected = torch.stack([F.cross_entropy(member, y, label_smoothing=0.1) for member in smooth(x)])
        torch.testing.assert_close(smooth.index_losses(smooth(x), y), expected)

    class Own(Segmentation):
        def sample_losses(self, output, target, progress=None):
            return output.sum((1, 2, 3)), torch.ones(len(output))

    for arguments in ({"loss": lambda output, y: output.sum((1, 2, 3))}, {"task": Own()}):
        own = EnsembleModule(lambda: nn.Conv2d(2, 3, 1), num_members=M, **{"task": "segmentation", **arguments})
        torch.testing.assert_close(own.index_losses(own(x), y), own(x).sum((2, 3, 4)).mean(1))
    total = EnsembleModule(
        lambda: nn.Conv2d(2, 3, 1), num_members=M, task="segmentation", loss=lambda output, y: output.sum()
    )
    torch.testing.assert_close(total.index_losses(total(x), y), total(x).sum((1, 2, 3, 4)))


def test_losses_of_half_precision_are_taken_in_float32():
    ensemble = EnsembleModule(mlp, num_members=2)
    output, y = torch.randn(2, 8, 3).bfloat16(), torch.randint(3, (8,))
    losses = ensemble.index_losses(output, y)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.stack([F.cross_entropy(member.float(), y) for member in output]))


def test_learning_rate_schedule_and_one_group_a_member(make_trainer):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    ensemble = EnsembleModule(mlp, num_members=M, optimizer=sgd, lr_scheduler=schedule, execution="loop")
    make_trainer(max_epochs=2).fit(ensemble, loader(8))
    assert [group["lr"] for group in ensemble.optimizers().param_groups] == [0.025] * M
    assert len(EnsembleModule(mlp, num_members=M, execution="stacked").optimized_parameters()) == 1


# ---------------------------------------------------------------------- execution


def test_auto_says_once_what_it_chose_and_why(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr(lightning_uq.modules.ensemble, "rank_zero_info", said.append)
    ensemble = EnsembleModule(mlp, num_members=M)
    for _ in range(2):
        make_trainer().fit(ensemble, loader(8))
    assert said == ["Ensemble of 3 runs stacked: its members are alike, and one batched product serves them all."]
    make_trainer().fit(EnsembleModule(convolutional, num_members=2, execution="loop"), loader(data=images(8)))
    assert len(said) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.NAdam, torch.optim.LBFGS])
def test_optimizers_that_may_mix_slices_use_the_loop(optimizer, make_trainer):
    ensemble = EnsembleModule(mlp, num_members=M, optimizer=optimizer)
    assert ensemble.network.execution == "loop"
    assert f"{optimizer.__name__} may not act entry by entry" in ensemble.network.execution_reason
    with pytest.raises(UnsupportedError, match=rf"execution='stacked' does not support {optimizer.__name__}"):
        EnsembleModule(mlp, num_members=M, optimizer=optimizer, execution="stacked")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizers_that_act_entry_by_entry_may_stack(optimizer):
    assert EnsembleModule(mlp, num_members=M, optimizer=lambda p: optimizer(p, lr=0.1)).network.execution == "stacked"


# ---------------------------------------------------------------------- adversarial training


def images(n=24):
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(n, 2, 5, 5, generator=generator) * torch.tensor([1.0, 8.0]).view(2, 1, 1) - 3
    return TensorDataset(x, torch.randint(3, (n,), generator=generator))


def intended(member, x, y, step, loss=F.cross_entropy):
    """Gradient and value of 0.5 l(x) + 0.5 l(x'), recomputed."""
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(member(leaf), y), leaf)[0]
    value = 0.5 * loss(member(x), y) + 0.5 * loss(member(x + step * gradient.sign()), y)
    return value, torch.autograd.grad(value, list(member.parameters()))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("network", [mlp, normed])
def test_adversarial_gradient_is_the_intended_one(network, execution):
    ensemble = EnsembleModule(
        network, num_members=M, adversarial_epsilon=0.1, adversarial_scale="absolute", execution=execution, seed=0
    )
    x, y = dataset(16).tensors
    members = [copy.deepcopy(ensemble.network.member(i)) for i in range(M)]
    loss = ensemble.training_loss(x, y, (x, y))
    assert all(p.grad is None for p in ensemble.parameters())
    loss.backward()
    gradients = copy.deepcopy(ensemble)
    with torch.no_grad():
        for parameter, own in zip(gradients.parameters(), ensemble.parameters(), strict=True):
            parameter.copy_(own.grad)
    total = 0.0
    for i, member in enumerate(members):
        value, expected = intended(member.train(), x, y, 0.1)
        total += value.item()
        own = dict(gradients.network.member(i).named_parameters())
        for (name, _), gradient in zip(member.named_parameters(), expected, strict=True):
            torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_adversarial_pass_leaves_running_statistics_alone(execution):
    def run(epsilon):
        torch.manual_seed(0)
        ensemble = EnsembleModule(
            normed,
            num_members=M,
            adversarial_epsilon=epsilon,
            adversarial_scale="absolute",
            execution=execution,
            seed=0,
        )
        x, y = dataset(16).tensors
        ensemble.training_loss(x, y, (x, y)).backward()
        return [{k: v for k, v in state.items() if "running" in k or "num" in k} for state in states(ensemble)]

    clean = run(None)
    assert_same(run(0.5), clean, rtol=0, atol=0)
    assert clean[0]["1.num_batches_tracked"] == 1


def test_range_is_taken_over_the_training_data(make_trainer):
    x = torch.stack(
        [torch.linspace(-1, 3, 20), torch.full((20,), 5.0), torch.linspace(0, 0.5, 20), -torch.arange(20.0)], 1
    )
    ensemble = EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1, seed=0)
    assert ensemble.adversary.input_range is None
    data = TensorDataset(x, torch.randint(3, (20,)))
    seen = []
    original = ensemble.network.forward_each
    ensemble.network.forward_each = lambda xs: (seen.append(xs.detach().clone()), original(xs))[1]
    make_trainer().fit(ensemble, loader(data=data, shuffle=True, drop_last=True))
    torch.testing.assert_close(ensemble.adversary.input_range, torch.tensor([4.0, 0.0, 0.5, 19.0]))
    clean, moved = seen[0], seen[1]
    steps = (moved - clean).abs()
    assert torch.all(steps[..., 1] == 0)
    torch.testing.assert_close(steps.flatten(0, 1).amax(0), torch.tensor([0.4, 0.0, 0.05, 1.9]), rtol=1e-4, atol=1e-5)


def test_range_of_images_is_per_channel(make_trainer):
    ensemble = EnsembleModule(convolutional, num_members=2, adversarial_epsilon=0.01)
    make_trainer().fit(ensemble, loader(data=images()))
    x = images().tensors[0].transpose(0, 1).flatten(1)
    expected = (x.amax(1) - x.amin(1)).view(2, 1, 1)
    torch.testing.assert_close(ensemble.adversary.input_range, expected)


def test_range_of_a_subset_is_the_subsets_and_draws_nothing(make_trainer):
    rows = [3, 7, 11, 20]
    data = dataset(50)

    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, i):
            return data[i][0] + 0 * torch.rand(4), data[i][1]

    ensemble = EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1, seed=0)
    make_trainer().fit(ensemble, loader(data=Random(), sampler=SubsetRandomSampler(rows)))
    x = data.tensors[0][rows]
    torch.testing.assert_close(ensemble.adversary.input_range, x.amax(0) - x.amin(0))
    given = EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1, seed=0)
    make_trainer().fit(given, loader(data=Subset(data, rows)))
    torch.testing.assert_close(given.adversary.input_range, x.amax(0) - x.amin(0))


def test_the_range_does_not_move_the_random_stream(make_trainer):
    def run(**kwargs):
        torch.manual_seed(5)
        ensemble = EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.0, seed=0, **kwargs)
        make_trainer().fit(ensemble, loader(shuffle=True))
        return states(ensemble)

    assert_same(run(adversarial_scale="range"), run(adversarial_scale="absolute"), rtol=0, atol=0)


class Augmenting(EnsembleModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] * (100 if self.trainer.training else 1), batch[1])


def test_range_is_of_the_data_before_augmentation_on_the_device(make_trainer):
    ensemble = Augmenting(mlp, num_members=2, adversarial_epsilon=0.1)
    make_trainer().fit(ensemble, loader())
    x = dataset().tensors[0]
    torch.testing.assert_close(ensemble.adversary.input_range, x.amax(0) - x.amin(0))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*dataset(20).tensors, strict=True))


def test_range_of_a_stream(make_trainer):
    ensemble = EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1)
    make_trainer().fit(ensemble, loader(data=Stream()))
    x = dataset(20).tensors[0]
    torch.testing.assert_close(ensemble.adversary.input_range, x.amax(0) - x.amin(0))


def test_a_range_that_cannot_be_had(make_trainer):
    class Several(EnsembleModule):
        def unpack_batch(self, batch):
            return batch["a"]

    ensemble = Several(mlp, num_members=2, adversarial_epsilon=0.1)
    with pytest.raises(InputError, match=r'over one training DataLoader.*Pass `adversarial_scale="absolute"`'):
        make_trainer().fit(ensemble, {"a": loader(), "b": loader()})
    integers = TensorDataset(torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, dtype=torch.long))
    with pytest.raises(InputError, match=r"must be a floating-point tensor, but it is torch\.int64"):
        make_trainer().fit(EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1), loader(data=integers))
    x, y = dataset(8).tensors
    with pytest.raises(InputError, match="The range of the training inputs is unknown: train with a Trainer"):
        EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1).training_loss(x, y, (x, y))
    x[3, 2] = float("nan")
    with pytest.raises(InputError, match="The training inputs must be finite"):
        make_trainer().fit(
            EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1), loader(data=TensorDataset(x, y))
        )
    with pytest.raises(InputError, match="must be a floating-point tensor, but it is a dict"):
        EnsembleModule(mlp, num_members=2, adversarial_epsilon=0.1, adversarial_scale="absolute").training_loss(
            {}, y, None
        )


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "16-mixed"])
def test_adversarial_training_in_every_precision(precision, execution, make_trainer):
    def run(**options):
        ensemble = EnsembleModule(
            mlp,
            num_members=2,
            adversarial_epsilon=0.05,
            optimizer=lambda p: torch.optim.SGD(p, 0.2),
            execution=execution,
            seed=0,
        )
        make_trainer(max_epochs=5, **options).fit(ensemble, loader())
        return states(ensemble)

    plugin = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**12))}
    found = run(**plugin) if precision == "16-mixed" else run(precision=precision)
    loose = {"rtol": 0, "atol": 0.1 if "true" in precision and "bf16" in precision else 0.03}
    float32 = run()
    assert_same([{k: v.float() for k, v in s.items()} for s in found], float32, **loose)
    # A leak of unscaled gradients, or none at all, would be far off.
    assert (
        float32[0]["0.weight"] - states(EnsembleModule(mlp, num_members=2, seed=0))[0]["0.weight"]
    ).abs().max() > 0.2


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = normed()
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        loss = F.cross_entropy(logits, y)
        self.log("seen", float(len(y)), on_epoch=True, on_step=False, reduce_fx="sum")
        return {"loss": loss, "logits": logits.detach()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_adversarial_training_of_lightning_modules(make_trainer):
    ensemble = EnsembleModule(Lit, num_members=2, adversarial_epsilon=0.02, seed=0)
    members = [copy.deepcopy(ensemble.network.member(i)) for i in range(2)]
    trainer = make_trainer()
    trainer.fit(ensemble, loader())
    x = dataset().tensors[0]
    step = 0.02 * (x.amax(0) - x.amin(0))
    for i, member in enumerate(members):
        clean = copy.deepcopy(member.net)
        correct = 0
        for x, y in loader():
            # The clean pass alone is logged, counted and recorded by BatchNorm.
            clean.load_state_dict({**clean.state_dict(), **dict(member.net.named_parameters())})
            correct += (clean(x).argmax(1) == y).sum().item()
            _, gradients = intended(member.net, x, y, step)
            with torch.no_grad():
                for parameter, gradient in zip(member.net.parameters(), gradients, strict=True):
                    parameter.sub_(0.1 * gradient)
        trained = ensemble.network.member(i).net
        for (name, value), expected in zip(trained.named_parameters(), member.net.parameters(), strict=True):
            torch.testing.assert_close(value, expected, msg=name)
        for (name, value), expected in zip(trained.named_buffers(), clean.buffers(), strict=True):
            torch.testing.assert_close(value, expected, msg=name)
        assert trainer.callback_metrics[f"member_{i}/seen"] == 50
        assert trainer.callback_metrics[f"member_{i}/accuracy"].item() == pytest.approx(correct / 50)


def test_adversarial_training_needs_a_loss_of_every_member(make_trainer):
    class Skips(Lit):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(InputError, match="needs a loss for every batch, but `training_step` returned None"):
        make_trainer().fit(EnsembleModule(Skips, num_members=2, adversarial_epsilon=0.1), loader())


# ---------------------------------------------------------------------- bootstrap and priors


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("kind", ["bernoulli", "exponential", "poisson"])
def test_bootstrap_weights_the_samples_of_each_member(kind, execution):
    ensemble = EnsembleModule(mlp, num_members=M, bootstrap=kind, execution=execution, seed=4)
    data = Indexed(dataset(40))
    batch = next(iter(DataLoader(data, batch_size=16, shuffle=True)))
    x, y, index = batch
    loss = ensemble.training_loss(x, y, batch)
    weights = bootstrap_weights(index, M, 4, kind)
    each = [F.cross_entropy(ensemble.network.member(i)(x), y, reduction="none") for i in range(M)]
    expected = sum((weights[i] * each[i]).mean() for i in range(M))
    torch.testing.assert_close(loss, expected)
    mapping = {"input": x, "target": y, "index": index}
    torch.testing.assert_close(ensemble.training_loss(x, y, mapping), expected)


def test_bootstrap_of_regression_and_of_a_loss_of_samples():
    index = torch.arange(6)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    ensemble = EnsembleModule(lambda: mlp(4, 4), num_members=M, task="regression", bootstrap="poisson", seed=1)
    weights = bootstrap_weights(index, M, 1, "poisson")
    output = ensemble.network(x)
    each = gaussian_nll_loss(*split_gaussian(output), y, reduction="none").mean(2)
    torch.testing.assert_close(ensemble.training_loss(x, y, IndexedSample(x, y, index)), (weights * each).mean(1).sum())
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    own = EnsembleModule(mlp, num_members=M, bootstrap="poisson", seed=1, loss=nn.CrossEntropyLoss(reduction="none"))
    plain = EnsembleModule(mlp, num_members=M, bootstrap="poisson", seed=1)
    batch = IndexedSample(x, y, index)
    torch.testing.assert_close(own.training_loss(x, y, batch), plain.training_loss(x, y, batch))
    scalar = EnsembleModule(mlp, num_members=M, bootstrap="poisson", loss=nn.CrossEntropyLoss())
    with pytest.raises(
        InputError, match=r"`loss` returned shape \[\], but samples with weights need one loss each: \[6\]"
    ):
        scalar.training_loss(x, y, batch)


def test_bootstrap_without_positions_is_a_value_error(make_trainer):
    with pytest.raises(ValueError, match=r"bootstrap='poisson'.*lightning_uq\.data\.Indexed\(dataset\).*key `index`"):
        make_trainer().fit(EnsembleModule(mlp, num_members=2, bootstrap="poisson"), loader())
    groups = TensorDataset(*dataset().tensors, torch.zeros(len(dataset()), dtype=torch.long))
    with pytest.raises(ValueError, match=r"lightning_uq\.data\.Indexed"):  # a third item is no position by itself
        make_trainer().fit(EnsembleModule(mlp, num_members=2, bootstrap="poisson"), loader(data=groups))
    make_trainer().fit(EnsembleModule(mlp, num_members=2, bootstrap="none"), loader())
    make_trainer().fit(
        EnsembleModule(mlp, num_members=2, bootstrap="poisson"), loader(data=Indexed(dataset())), loader()
    )


def test_bootstrapped_members_of_one_start_disagree(make_trainer):
    start = mlp().state_dict()

    def same():
        network = mlp()
        network.load_state_dict(start)
        return network

    with pytest.warns(UserWarning, match="members start from the same weights"):
        ensemble = EnsembleModule(same, num_members=2, bootstrap="bernoulli", execution="stacked")
    make_trainer().fit(ensemble, loader(data=Indexed(dataset())))
    a, b = states(ensemble)
    assert not torch.allclose(a["0.weight"], b["0.weight"])


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # a prior always is
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_priors_are_frozen_independent_and_additive(execution, make_trainer):
    ensemble = EnsembleModule(mlp, num_members=M, prior_network=mlp, prior_scale=3.0, execution=execution, seed=0)
    before = copy.deepcopy(states(ensemble))
    priors = [state["prior.0.weight"] for state in before]
    assert not torch.equal(priors[0], priors[1])
    assert not torch.equal(priors[0], before[0]["network.0.weight"])
    make_trainer(max_epochs=2).fit(ensemble, loader())
    x = dataset().tensors[0]
    ensemble.eval()
    for i, (old, new) in enumerate(zip(before, states(ensemble), strict=True)):
        assert all(torch.equal(new[name], old[name]) for name in old if name.startswith("prior."))
        assert not torch.equal(new["network.0.weight"], old["network.0.weight"])
        member = ensemble.network.member(i)
        assert isinstance(member, NetworkWithPrior)
        expected = member.network(x) + 3.0 * member.prior(x)
        torch.testing.assert_close(ensemble(x)[i], expected, rtol=1e-4, atol=1e-5)


def test_one_prior_for_all_is_an_error():
    prior = mlp()
    with pytest.raises(InputError, match="factory in argument `prior_network` must build a new network at each call"):
        EnsembleModule(mlp, num_members=2, prior_network=lambda: prior, prior_scale=1.0)


# ---------------------------------------------------------------------- regression


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_regression(execution, make_trainer):
    x = torch.linspace(-1, 1, 40).unsqueeze(1)
    data = TensorDataset(x, x**2)
    ensemble = EnsembleModule(lambda: mlp(1, 2), num_members=M, task="regression", execution=execution)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(ensemble, loader(data=data), loader(data=data))
    assert {"val_loss", "val_nll", "val_rmse"} <= trainer.callback_metrics.keys()
    prediction = ensemble.eval().predict(x)
    assert isinstance(prediction, GaussianMixturePrediction)
    mean, variance = split_gaussian(ensemble(x))
    torch.testing.assert_close(prediction.mean, mean.mean(0))
    torch.testing.assert_close(prediction.variance, (variance + (mean - mean.mean(0)).square()).mean(0))


def test_a_target_without_its_axis_is_the_same_and_one_of_another_shape_an_error(make_trainer):
    x, y = torch.randn(8, 4), torch.randn(8)
    ensemble = EnsembleModule(lambda: mlp(4, 2), num_members=2, task="regression")
    flat, column = (ensemble.index_losses(ensemble(x), target) for target in (y, y.unsqueeze(1)))
    torch.testing.assert_close(flat, column)
    with pytest.raises(InputError, match=r"targets must have shape \[8, 1\].*they have \[8, 2\]"):
        make_trainer().fit(ensemble, loader(data=TensorDataset(x, torch.randn(8, 2))))


# ---------------------------------------------------------------------- Lightning's own


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precision(precision, execution, make_trainer):
    def run(**options):
        ensemble = EnsembleModule(mlp, num_members=2, optimizer=sgd, execution=execution, seed=0)
        trainer = make_trainer(max_epochs=2, **options)
        trainer.fit(ensemble, loader(), loader(20))
        return states(ensemble), trainer.callback_metrics["val_nll"]

    found, nll = run(precision=precision)
    expected, expected_nll = run()
    assert_same([{k: v.float() for k, v in s.items()} for s in found], expected, rtol=0, atol=0.05)
    assert float(nll) == pytest.approx(float(expected_nll), abs=0.05)


def test_clipping_and_an_optimizer_that_unscales_by_itself(make_trainer):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    ensemble = EnsembleModule(mlp, num_members=2, optimizer=lambda p: torch.optim.Adam(p, fused=True))
    with pytest.raises(UnsupportedError, match="Adam unscales gradients inside its own step"):
        make_trainer(plugins=plugin, gradient_clip_val=0.1).fit(ensemble, loader())
    make_trainer(gradient_clip_val=0.1).fit(ensemble, loader())


@pytest.mark.parametrize("arguments", [{}, {"adversarial_epsilon": 0.01}], ids=str)
def test_weight_averages(arguments, make_trainer, tmp_path):
    averages = []

    class Keep(EMAWeightAveraging):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            averages.append({k: v.clone() for k, v in pl_module.network.state_dict().items()})

    ensemble = EnsembleModule(mlp, num_members=2, seed=0, optimizer=sgd, **arguments)
    trainer = make_trainer(callbacks=[Keep(decay=0.5)], limit_train_batches=4)
    trainer.fit(ensemble, loader(), loader(20))
    expected = averages[0]
    for state in averages[1:]:
        expected = {k: 0.5 * expected[k] + 0.5 * state[k] for k in state}
    assert_same([ensemble.network.state_dict()], [expected])
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    again = EnsembleModule.load_from_checkpoint(
        tmp_path / "averaged.ckpt", network=mlp, optimizer=sgd, weights_only=True
    )
    assert_same([again.network.state_dict()], [expected])
    if arguments:
        torch.testing.assert_close(again.adversary.input_range, ensemble.adversary.input_range)


def test_stochastic_weight_averaging(make_trainer):
    ensemble = EnsembleModule(mlp, num_members=2, seed=0, optimizer=sgd, adversarial_epsilon=0.01)
    make_trainer(max_epochs=4, callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=2)]).fit(ensemble, loader())
    assert ensemble.adversary.input_range is not None


def test_sharding_strategies_are_refused():
    class FakeTrainer:
        from lightning.pytorch.strategies import FSDPStrategy

        strategy = FSDPStrategy.__new__(FSDPStrategy)
        callbacks = ()

    ensemble = EnsembleModule(mlp, num_members=2)
    ensemble._trainer = FakeTrainer()
    with pytest.raises(UnsupportedError, match="EnsembleModule does not support FSDPStrategy yet"):
        ensemble.setup("fit")


def test_factory_with_arguments():
    ensemble = EnsembleModule(Factory("torch.nn.Linear", {"in_features": 4, "out_features": 3}), num_members=2)
    assert ensemble(torch.zeros(5, 4)).shape == (2, 5, 3)
