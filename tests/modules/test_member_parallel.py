"""MemberParallelStrategy: the same weights, optimizer states and checkpoints as one process, without any traffic of gradients."""

import re

import pytest
import torch
from torch import nn

from lightning_uq import InputError, MemberParallelStrategy, UnsupportedError
from lightning_uq.modules.member_parallel.states import narrowed
from lightning_uq.networks.ensemble import EnsembleNetwork, StackedEnsembleNetwork

COMMON = """
import json, os, sys
from functools import partial
from pathlib import Path
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning_uq import EnsembleModule, FitGMM, Indexed, MemberParallelStrategy, TemperatureScaling

RANK = int(os.environ.get("LOCAL_RANK", 0))
FOLDER = Path(out).parent
generator = torch.Generator().manual_seed(5)
x, y = torch.randn(53, 4, generator=generator), torch.randint(3, (53,), generator=generator)
DATA = TensorDataset(x, y)
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
adam = partial(torch.optim.AdamW, lr=1e-2)
step_lr = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normalized():
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class Traffic(Callback):
    '''Counts the bytes that leave this process during the training steps.'''

    def __init__(self):
        self.bytes, self.steps, self.calls = 0, 0, {}

    def on_train_batch_start(self, trainer, *_):
        assert type(trainer.strategy.model) is EnsembleModule  # DistributedDataParallel would send gradients that no Python sees
        for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "barrier"):
            self.calls[name] = getattr(distributed, name)
            setattr(distributed, name, partial(self.count, name))

    def count(self, name, *arguments, **kwargs):
        first = arguments[0] if arguments else None
        self.bytes += first.numel() * first.element_size() if isinstance(first, torch.Tensor) else 10**9
        return self.calls[name](*arguments, **kwargs)

    def on_train_batch_end(self, *_):
        self.steps += 1
        for name, call in self.calls.items():
            setattr(distributed, name, call)


def trainer_for(name, devices, *, strategy=None, epochs=3, callbacks=(), **options):
    return Trainer(
        accelerator="cpu", devices=devices, strategy=(strategy or MemberParallelStrategy()) if devices > 1 else "auto",
        logger=False, max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
        callbacks=[ModelCheckpoint(FOLDER / f"{name}-{devices}", save_last=True, monitor="val_nll"), *callbacks], **options,
    )


def run(name, network, devices, *, data=DATA, callbacks=(), epochs=3, ckpt=None, trainer=None, **kwargs):
    seed_everything(1, verbose=False)
    module = EnsembleModule(network, num_members=5, **{"seed": 0, "execution": "loop", **kwargs})
    trainer = trainer or trainer_for(name, devices, epochs=epochs, callbacks=callbacks)
    trainer.fit(module, DataLoader(data, 8, shuffle=True), DataLoader(DATA, 8), ckpt_path=ckpt)
    return module, trainer


def content(name, devices):
    '''What a checkpoint holds, apart from counters and paths.'''
    saved = torch.load(FOLDER / f"{name}-{devices}" / "last.ckpt", weights_only=True)
    parts = {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "ensemble")
             if key in saved}
    return parts | {"average": saved.get("current_model_state")}


def flat(value, path=""):
    if isinstance(value, dict):
        return {key: one for name, part in value.items() for key, one in flat(part, f"{path}/{name}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), path)
    return {path: value.double().flatten().tolist() if isinstance(value, torch.Tensor) else value}
"""

CHECKPOINTS = (
    COMMON
    + """
results = {}
for name, network, options in [
    ("sgd", mlp, {"optimizer": sgd}),
    ("adam", normalized, {"optimizer": adam, "lr_scheduler": step_lr}),
    ("adversarial", mlp, {"optimizer": adam, "adversarial_epsilon": 0.01, "bootstrap": "poisson", "data": Indexed(DATA)}),
    ("stacked", normalized, {"optimizer": adam, "lr_scheduler": step_lr, "execution": "stacked"}),
    ("vmap", mlp, {"optimizer": sgd, "execution": "vmap"}),
]:
    traffic = Traffic()
    callbacks = [EMAWeightAveraging(decay=0.9)] if name in ("adam", "stacked") else []
    module, trainer = run(name, network, DEVICES, callbacks=[*callbacks, traffic], **options)
    results[name] = {"saved": flat(content(name, DEVICES)), "bytes": traffic.bytes / traffic.steps}
    trainer.save_checkpoint(FOLDER / f"{name}-{DEVICES}" / "after.ckpt")
    if RANK == 0:
        after, last = (torch.load(FOLDER / f"{name}-{DEVICES}" / f"{file}.ckpt", weights_only=True) for file in ("after", "last"))
        results[name]["after"] = flat(after["optimizer_states"]) == flat(last["optimizer_states"])
    results[name]["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    results[name]["weights"] = torch.cat([p.detach().flatten() for p in module.network.parameters()]).tolist()
# A training of two epochs that another number of processes continues.
for execution in ("loop", "stacked"):
    run(f"begun-{execution}", normalized, DEVICES, epochs=2, optimizer=adam, lr_scheduler=step_lr, execution=execution)
if RANK == 0:
    json.dump(results, open(out, "w"))
"""
)


RESUMED = (
    COMMON
    + """
results = {"after": True}
for execution in ("loop", "stacked"):
    options = {"optimizer": adam, "lr_scheduler": step_lr, "execution": execution, "ckpt": FOLDER / f"begun-{execution}-BEFORE" / "last.ckpt"}
    name = f"resumed-{execution}-BEFORE"  # a folder of its own: in one with another run's file, Lightning names the next last-v1.ckpt
    _, trainer = run(name, normalized, DEVICES, epochs=3, **options)
    results[execution] = flat(content(name, DEVICES))
    assert trainer.global_step == 3 * 7
    trainer.save_checkpoint(FOLDER / "after.ckpt")
    if RANK == 0:  # a checkpoint after the training is that of its end
        after, last = (torch.load(path, weights_only=True) for path in (FOLDER / "after.ckpt", FOLDER / f"{name}-DEVICES" / "last.ckpt"))
        results["after"] &= flat(after["optimizer_states"]) == flat(last["optimizer_states"])
if RANK == 0:
    json.dump(results, open(out, "w"))
"""
)


def check_close(found, expected, name, rel=1e-4):
    """Tensors, as lists, up to rounding; everything else exactly."""
    assert found.keys() == expected.keys(), name
    for key, value in expected.items():
        close = pytest.approx(value, rel=rel, abs=1e-5) if isinstance(value, list) else value
        assert found[key] == close, (name, key)


def test_checkpoints_are_those_of_one_process(run_script, tmp_path):
    one, two, three = (run_script(CHECKPOINTS.replace("DEVICES", str(n)), timeout=300) for n in (1, 2, 3))
    for found in (two, three):
        for name, expected in one.items():
            mine = found[name]
            if name in ("stacked", "vmap"):  # products of fewer members round differently
                check_close(mine["saved"], expected["saved"], name)
            else:
                assert mine["saved"] == expected["saved"], name
            assert mine["weights"] == pytest.approx(expected["weights"], rel=1e-4, abs=1e-5), name
            assert mine["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6), name
            # The only traffic of a step is the mean of the reported loss.
            assert mine["bytes"] == 4, name
            assert mine["after"], name
    found = [
        run_script(RESUMED.replace("DEVICES", str(devices)).replace("BEFORE", str(before)))
        for devices, before in ((1, 2), (3, 2), (2, 1))
    ]
    assert found[0]["loop"] == found[1]["loop"] == found[2]["loop"]
    for other in found[1:]:
        check_close(other["stacked"], found[0]["stacked"], "stacked")
    assert all(one["after"] for one in found)


def test_groups_average_their_gradients(run_script):
    """Two groups of two processes end with the weights of one process that sees the same batches."""
    code = (
        COMMON
        + """
rows = TensorDataset(x[:48], y[:48])
if DEVICES == 1:  # the rows of rank 0 and of rank 1, in the order of Lightning's sampler
    order = [list(DistributedSampler(rows, 2, r, shuffle=False)) for r in (0, 1)]
    rows = TensorDataset(*(t[torch.tensor([i for k in range(0, 24, 4) for one in order for i in one[k:k + 4]])] for t in rows.tensors))
module = EnsembleModule(mlp, num_members=3, seed=0, execution="EXECUTION", optimizer=adam)
trainer = trainer_for("groups", DEVICES, strategy=MemberParallelStrategy(data_parallel_size=2), accumulate_grad_batches=2)
sampler = DistributedSampler(rows, 2, RANK % 2, shuffle=False) if DEVICES > 1 else None  # Lightning would shuffle
trainer.fit(module, DataLoader(rows, 8 if DEVICES == 1 else 4, sampler=sampler), DataLoader(DATA, 8))
if RANK == 0:
    json.dump([flat(content("groups", DEVICES)), {k: float(v) for k, v in trainer.callback_metrics.items()}], open(out, "w"))
"""
    )
    for execution in ("loop", "stacked"):
        one, four = (run_script(code.replace("EXECUTION", execution).replace("DEVICES", str(n))) for n in (1, 4))
        check_close(four[0], one[0], execution, rel=1e-3)
        assert four[1] == pytest.approx(one[1], rel=1e-4)


def test_callbacks_see_all_members_and_dropout_differs_by_process(run_script):
    code = (
        COMMON
        + """
class Noisy(nn.Module):
    '''Keeps the last random number that it drew in training.'''
    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("drawn", torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.drawn.fill_(torch.rand(()))
        return self.inner(x)

callbacks = [TemperatureScaling(weights="last"), FitGMM(weights="last"), EarlyStopping("train_loss", patience=0, min_delta=10.0)]
module, trainer = run("fits", mlp, DEVICES, callbacks=callbacks, optimizer=adam, epochs=5)
fitted = [callback.state_dict() for callback in callbacks[:2]]
noisy, _ = run("noisy", Noisy, DEVICES, optimizer=adam, epochs=1)
tested = trainer.test(module, DataLoader(DATA, 8), verbose=False)[0]
if RANK == 0:
    json.dump({
        "fitted": {k: v for k, v in flat(fitted).items() if isinstance(v, list)}, "epochs": trainer.current_epoch, "tested": tested,
        "drawn": [float(noisy.network.member(i).drawn) for i in range(5)],
    }, open(out, "w"))
"""
    )
    one, two = (run_script(code.replace("DEVICES", str(n))) for n in (1, 2))
    assert one["epochs"] == two["epochs"] == 2
    assert two["tested"] == pytest.approx(one["tested"], rel=1e-4)
    assert len(set(two["drawn"])) == 5
    check_close(two["fitted"], one["fitted"], "fitted")


AVERAGES = (
    COMMON
    + """
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning_uq.losses import L2WeightDecay

class Epochs(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None and epoch_idx >= 1

class Tracked(Callback):
    # The number of batches that each member's BatchNorm has seen, at each validation, and the loss of each batch.
    def __init__(self):
        self.seen, self.losses = [], []
    def on_train_batch_end(self, trainer, *args):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
    def on_validation_start(self, trainer, module):
        self.seen.append([int(module.network.member_tensors(i)["1.num_batches_tracked"]) for i in range(5)])

swa = partial(StochasticWeightAveraging, swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)
results = {}
for name, network, callback, options in [
    ("swa", normalized, swa, {"optimizer": adam, "lr_scheduler": step_lr, "regularizer": L2WeightDecay(0.01)}),
    ("stacked", mlp, swa, {"optimizer": adam, "execution": "stacked"}),
    ("epochs", normalized, Epochs, {"optimizer": adam}),
    ("ema", normalized, partial(EMAWeightAveraging, decay=0.9, update_every_n_steps=3), {"optimizer": adam}),
]:
    module, trainer = run(name, network, DEVICES, callbacks=[callback()], epochs=4, **options)
    saved = torch.load(FOLDER / f"{name}-{DEVICES}" / "last.ckpt", weights_only=True)
    kept = {key: one for key, one in saved["callbacks"].items() if "Averaging" in key or "Epochs" in key}
    assert kept, saved["callbacks"].keys()
    tensors = [tensor for i in range(5) for tensor in module.network.member_tensors(i).values()]
    results[name] = flat([content(name, DEVICES), kept, tensors])
tracked = Tracked()
trainer = trainer_for("tracked", DEVICES, epochs=1, callbacks=[tracked], accumulate_grad_batches=4, val_check_interval=1)
run("tracked", normalized, DEVICES, trainer=trainer, optimizer=adam)
if RANK == 0:
    json.dump([results, tracked.seen, tracked.losses], open(out, "w"))
"""
)


def test_averages_and_statistics_are_those_of_one_process(run_script):
    (one, seen, losses), (two, seen_by_two, losses_of_two) = (
        run_script(AVERAGES.replace("DEVICES", str(n))) for n in (1, 2)
    )
    for name, expected in one.items():
        if name == "stacked":
            check_close(two[name], expected, name)
        else:
            assert two[name] == expected, name
    # A batch that only accumulates gradients updates the statistics of BatchNorm too, and the next validation uses them.
    assert seen_by_two == seen
    assert [2] * 5 in seen
    # The mean loss, on its way during the backward pass, is there when the batch ends.
    assert losses_of_two == pytest.approx(losses, rel=1e-5)
    assert len(set(losses)) == len(losses) > 4


OTHERS = (
    COMMON
    + """
from torch.utils.data import IterableDataset

plain = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

class Zero(Callback):
    # Somebody's own callback on gradients, which sees those of the members that this process trains.
    norms = ()
    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms = [*self.norms, sum(float(g.square().sum()) for g in gradients)]
        for gradient in gradients:
            gradient.zero_()

class Setup(Callback):
    # Builds the training loader before the strategy is set up, as schedules over the steps do.
    def setup(self, trainer, module, stage):
        self.steps = trainer.estimated_stepping_batches

class Unfreeze(Callback):
    def on_train_epoch_start(self, trainer, module):
        for p in module.parameters():
            p.requires_grad_(trainer.current_epoch > 0)

class Rows(IterableDataset):
    def __init__(self, divided):
        self.divided = divided
    def __iter__(self):
        return iter([DATA[i] for i in range(RANK if self.divided else 0, len(DATA), DEVICES if self.divided else 1)])

found = {}
for execution in ("loop", "stacked"):
    before = EnsembleModule(mlp, num_members=5, seed=0, execution=execution).network.state_dict()
    callbacks = [Setup(), Zero()]
    module, trainer = run("zeroed", mlp, DEVICES, callbacks=callbacks, epochs=1, optimizer=plain, execution=execution)
    norms = torch.tensor(callbacks[1].norms)
    norms = [norms] if DEVICES == 1 else [torch.zeros_like(norms) for _ in range(DEVICES)]
    if DEVICES > 1:
        distributed.all_gather(norms, torch.tensor(callbacks[1].norms))
    found[execution] = {
        "steps": [callbacks[0].steps, trainer.global_step],
        "unchanged": all(torch.equal(value, before[key]) for key, value in module.network.state_dict().items()),
        "norms": torch.stack(norms).sum(0).tolist(),
    }

def error(stream, *callbacks, **options):
    module = EnsembleModule(mlp, num_members=5, seed=0, optimizer=sgd, **options)
    try:
        trainer_for("stream", DEVICES, epochs=2, callbacks=callbacks).fit(module, stream, DataLoader(DATA, 8))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found["whole"] = error(DataLoader(Rows(False), 8))
found["divided"] = error(DataLoader(Rows(True), 8))
found["fit"] = error(DataLoader(Rows(False), 8), FitGMM(weights="last"))
found["fit_divided"] = error(DataLoader(Rows(False), 8), FitGMM(weights="last", dataloader=DataLoader(Rows(True), 8)))
found["unfreeze"] = error(DataLoader(DATA, 8), Unfreeze(), execution="stacked")
if RANK == 0:
    json.dump(found, open(out, "w"))
"""
)


def test_callbacks_on_gradients_and_streams(run_script):
    one, two = (run_script(OTHERS.replace("DEVICES", str(n))) for n in (1, 2))
    for execution in ("loop", "stacked"):
        assert two[execution]["unchanged"]
        assert two[execution]["steps"] == one[execution]["steps"]
        assert two[execution]["norms"] == pytest.approx(one[execution]["norms"], rel=1e-4)
    assert one["divided"] is one["fit"] is None
    assert two["whole"] is two["fit_divided"] is None
    assert re.match("InputError: The first batches of the training stream differ", two["divided"])
    assert re.match("InputError: FitGMM would count rows several times", two["fit"])
    assert re.match("UnsupportedError: Stacked members cannot be frozen", two["unfreeze"])


REFUSED = """
import json
from lightning.pytorch import LightningModule, Trainer
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning_uq import DeterministicModule, EnsembleModule, MemberParallelStrategy
from lightning_uq.losses import JointLoss, L2WeightDecay

LOADER = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(3, (8,))), 4)


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Repulsive(EnsembleModule):
    def training_loss(self, x, y, batch):
        return super().training_loss(x, y, batch) - self.network(x).var(0).mean()


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


def linear():
    return nn.Linear(4, 3)


def trainer_for(size=1, **options):
    return Trainer(
        accelerator="cpu", devices=1, strategy=MemberParallelStrategy(size), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1, **options,
    )


def refusal(module, size=1, loader=LOADER, **options):
    trainer = trainer_for(size, **options)
    try:
        trainer.fit(module, loader)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


module, trainer = EnsembleModule(linear, num_members=3), trainer_for()
callbacks = list(trainer.callbacks)
trainer.fit(module, LOADER)
left = [module.trained_network is module.network, trainer.callbacks == callbacks,
        trainer._accelerator_connector.use_distributed_sampler is True]
found = {
    "module": refusal(DeterministicModule(linear())),
    "members": refusal(EnsembleModule(Lit, num_members=2)),
    "size": refusal(EnsembleModule(linear), 2),
    "loss": refusal(EnsembleModule(linear, loss=JointLoss(tau=4))),
    "norm": refusal(EnsembleModule(linear), sync_batchnorm=True),
    "regularizer": refusal(EnsembleModule(linear, regularizer=lambda network, x: network(x).var(0).mean())),
    "override": refusal(Repulsive(linear)),
    "state": refusal(EnsembleModule(lambda: nn.Sequential(nn.Linear(4, 3), Counting()))),
    "rows": refusal(EnsembleModule(linear), loader=DataLoader(LOADER.dataset, 4, sampler=DistributedSampler(LOADER.dataset, 2, 0))),
    "decay": refusal(EnsembleModule(linear, regularizer=L2WeightDecay(0.1))),
}
MemberParallelStrategy.world_size = 6
found["groups"] = refusal(EnsembleModule(linear, num_members=2), 2)
json.dump([left, found], open(out, "w"))
"""


def test_what_cannot_be_split_is_refused_and_a_fit_leaves_nothing_behind(run_script):
    left, found = run_script(REFUSED)
    assert left == [True] * 3
    assert found.pop("decay") is None
    for name, message in {
        "module": "UnsupportedError: MemberParallelStrategy trains the members of an EnsembleModule, but the model is a DeterministicModule.",
        "members": "UnsupportedError: .*the members are LightningModules \\(Lit\\)",
        "size": "InputError: 1 processes cannot be split into groups of data_parallel_size=2",
        "loss": "UnsupportedError: .* needs a loss of a single member",
        "norm": "UnsupportedError: `sync_batchnorm=True`",
        "regularizer": "UnsupportedError: .*sum over members.*sums_members = True",
        "override": "UnsupportedError: .*cannot split `Repulsive.training_loss`",
        "state": "UnsupportedError: .* `Counting` has a state of another kind",
        "rows": "InputError: The training loader's sampler splits the rows into 2 parts.*needs 1",
        "groups": "InputError: 3 groups of processes cannot share 2 members.*data_parallel_size=3 or more",
    }.items():
        assert found[name] is not None, name
        assert re.match(message, found[name]), (name, found[name])


def test_data_parallel_size_is_checked():
    with pytest.raises(InputError, match="data_parallel_size"):
        MemberParallelStrategy(data_parallel_size=0)


@pytest.mark.parametrize("kind", [EnsembleNetwork, StackedEnsembleNetwork])
def test_a_share_lies_on_the_storage_of_the_whole(kind):
    whole = kind([nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(4)]).eval()
    share, x = whole.share(range(1, 3)), torch.randn(5, 4)
    torch.testing.assert_close(share(x), whole(x)[1:3])
    share.train()(x).sum().backward()
    with torch.no_grad():
        for p in share.parameters():
            p += 1
    assert all(p.grad is not None for p in share.parameters())
    torch.testing.assert_close(share.eval()(x), whole.eval()(x)[1:3])
    assert whole.member_tensors(0)["1.num_batches_tracked"] == 0
    assert whole.member_tensors(1)["1.num_batches_tracked"] == 1


def test_states_without_a_row_per_member_are_refused():
    state = {"state": {0: {"step": torch.tensor(3.0), "moment": torch.zeros(7, 2)}}, "param_groups": []}
    with pytest.raises(
        UnsupportedError, match=r"one row for each of 4 stacked members, but 'moment' has shape \[7, 2\]"
    ):
        narrowed(state, range(2), 4)
