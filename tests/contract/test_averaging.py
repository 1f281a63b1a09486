"""Averages of the weights: what is trained, tested, saved and fitted under them is the average, and never half of it."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_uq.errors import InputError, NotFittedError, UnsupportedError
from lightning_uq.modules import DeterministicModule, EnsembleModule, EpinetModule
from lightning_uq.networks.epinet.head import EpinetHead
from tests.contract.cases import UsersModule, loader, network
from tests.contract.running import TEST, TRAIN, VAL, assert_finite, assert_sound
from tests.versions import SWA_FILES, skip_on_torch_2_6

KIND = "classification"
DECAY, EPOCHS = 0.8, 3
LAST = EPOCHS * TRAIN // 8 - 1  # step; SWA adds an epoch that trains nothing, for BatchNorm


def ema():
    return EMAWeightAveraging(decay=DECAY)


def swa():
    return StochasticWeightAveraging(0.02, swa_epoch_start=2)


AVERAGES = [
    pytest.param(ema, id="EMA", marks=pytest.mark.axis("ema")),
    pytest.param(swa, id="SWA", marks=pytest.mark.axis("swa")),
]


class Recorded(Callback):
    """The weights after each step, and those with which each epoch began, as float64 where they are floats."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(tensors(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(tensors(pl_module))

    def ema(self):
        """The average that EMAWeightAveraging documents: of parameters and buffers, the first of them as it is."""
        found = dict(self.steps[0])
        for step in self.steps[1:]:
            found = {k: DECAY * v + (1 - DECAY) * step[k] if v.is_floating_point() else v for k, v in found.items()}
        return found

    def swa(self, parameters):
        """The mean of the parameters with which the epochs began, from the second one on; buffers are the last ones."""
        begun = self.epochs[1:EPOCHS]
        return {
            k: torch.stack([epoch[k] for epoch in begun]).mean(0) if k in parameters else v
            for k, v in self.steps[-1].items()
        }


def tensors(module):
    """Parameters and buffers by name; those of metrics, which come with the first validation, are none of the module's."""
    named = [*module.named_parameters(), *module.named_buffers()]
    kept = {name: t.detach().clone() for name, t in named if "_metrics." not in name}
    return {name: t.double() if t.is_floating_point() else t for name, t in kept.items()}


def fit(trainer, module, task=KIND):
    trainer.fit(module, loader(task, TRAIN, shuffle=True), loader(task, VAL, 1))
    return module


def run_test(trainer, module, task=KIND, **kwargs):
    return trainer.test(module, loader(task, TEST, 2), verbose=False, **kwargs)[0]


def best(folder, monitor="val_loss"):
    return ModelCheckpoint(folder, filename="best", monitor=monitor, mode="min")


# ---------------------------------------------------------------------- modules


@pytest.mark.parametrize("average", AVERAGES)
def test_a_module_ends_with_its_average(make_trainer, module_case, average, tmp_path):
    module, recorded, task = module_case.build(), Recorded(), module_case.task
    before = tensors(module)
    every = ModelCheckpoint(tmp_path, filename="last")
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[recorded, average(), every], enable_checkpointing=True)
    fit(trainer, module, task)
    found = tensors(module)
    parameters = {name for name, _ in module.named_parameters()}
    expected = recorded.ema() if average is ema else recorded.swa(parameters)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        else:  # a count, which an average leaves among those that there were
            assert any(torch.equal(value, step[name]) for step in recorded.steps), name
    # What training leaves alone, a frozen prior, an average leaves alone.
    still = [n for n in before if all(torch.equal(step[n], before[n]) for step in recorded.steps)]
    for name in still:
        torch.testing.assert_close(found[name], before[name], rtol=1e-6, atol=0, msg=name)
    moved = [name for name in parameters if not torch.equal(found[name], recorded.steps[-1][name])]
    assert moved

    tested = run_test(trainer, module, task)
    assert_finite(tested)
    predictions = trainer.predict(module, loader(task, TEST, 2))
    assert_sound(type(predictions[0]).cat(predictions), TEST)
    if average is ema:  # which saves its average; SWA saves what trains
        again = run_test(make_trainer(), module_case.build(), task, ckpt_path=every.best_model_path, weights_only=True)
        assert again == pytest.approx(tested, rel=1e-5)


@pytest.mark.axis("ema")
def test_a_module_resumes_its_average(make_trainer, module_case, tmp_path):
    def run(seed, *callbacks, **kwargs):
        torch.manual_seed(seed)
        module, task = module_case.build(), module_case.task
        trainer = make_trainer(max_epochs=3, callbacks=[ema(), *callbacks], enable_checkpointing=bool(callbacks))
        trainer.fit(module, loader(task, TRAIN, shuffle=True), loader(task, VAL, 1), **kwargs)
        return module.state_dict()

    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = run(1, every), run(2, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


class Untraceable(nn.Sequential):
    """What torch.fx cannot look through: an epinet around it has no head before its first batch."""

    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_head_that_is_built_on_the_first_batch_is_averaged_too(make_trainer, average, tmp_path):
    skip_on_torch_2_6(SWA_FILES, average is swa)
    module = EpinetModule(Untraceable(*network()), head=EpinetHead(hidden_sizes=(6,)), num_eval_samples=5)
    assert not module.network.is_initialized
    recorded, every = Recorded(), ModelCheckpoint(tmp_path, filename="last")
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[recorded, average(), every], enable_checkpointing=True)
    fit(trainer, module)
    found = tensors(module)
    expected = recorded.ema() if average is ema else recorded.swa(dict(module.named_parameters()))
    assert "network.epinet.learned.layers.0.weight" in found
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    other = EpinetModule(Untraceable(*network()), head=EpinetHead(hidden_sizes=(6,)), num_eval_samples=5)
    again = run_test(make_trainer(), other, ckpt_path=every.best_model_path, weights_only=True)
    if average is ema:
        assert again == pytest.approx(run_test(trainer, module), rel=1e-5)


def norm_network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.axis("swa")
@pytest.mark.parametrize(
    "build",
    [
        lambda: DeterministicModule(norm_network),
        lambda: EnsembleModule(norm_network, num_members=2, seed=0, execution="loop"),
        lambda: EnsembleModule(partial(UsersModule, True), num_members=2, seed=0),
        lambda: EpinetModule(norm_network, head=EpinetHead(hidden_sizes=(6,)), num_eval_samples=5),
    ],
    ids=["Deterministic", "Ensemble, loop", "Ensemble of a user's modules", "Epinet"],
)
def test_batch_statistics_are_those_of_the_average(make_trainer, build):
    """SWA measures them anew, over the training data, in the order in which it came."""
    module = build()
    rows = loader(KIND, TRAIN)
    recorded = Recorded()
    make_trainer(max_epochs=EPOCHS, callbacks=[recorded, swa()]).fit(module, rows, loader(KIND, VAL, 1))
    average = recorded.swa(dict(module.named_parameters()))
    found = tensors(module)
    linear = next(name for name in found if name.endswith("0.weight"))
    torch.testing.assert_close(found[linear], average[linear], rtol=1e-5, atol=1e-6)
    weight, bias = found[linear], found[linear.replace("weight", "bias")]
    means = torch.stack([x.double() @ weight.T + bias for x, _ in rows]).mean(1)
    running = found[linear.replace("0.weight", "1.running_mean")]
    torch.testing.assert_close(running, means.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.axis("swa")
def test_batch_statistics_of_stacked_members_are_out_of_swas_reach(make_trainer):
    module = EnsembleModule(norm_network, num_members=2, seed=0, execution="stacked")
    with pytest.raises(UnsupportedError, match="StochasticWeightAveraging .* BatchNorm .* execution='loop'"):
        fit(make_trainer(max_epochs=EPOCHS, callbacks=[swa()]), module)
    fit(make_trainer(max_epochs=EPOCHS, callbacks=[ema()]), module)  # which averages them with the weights


# ---------------------------------------------------------------------- callbacks


def expected_state(case, module):
    rows = loader(KIND, TRAIN) if case.fits_on == "train" else loader(KIND, VAL, 1)
    return case.build().fit(module, rows).state_dict()


def assert_same(found, expected):
    assert torch.equal(found["fingerprint"], expected["fingerprint"])
    for name, value in expected["tensors"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found["tensors"][name], value, msg=name)
        else:
            assert found["tensors"][name] == value


@pytest.mark.parametrize("average", AVERAGES)
def test_before_the_average_a_callback_is_refused(make_trainer, fitting_case, average):
    callback = fitting_case.build()
    with pytest.raises(
        InputError, match=r"stands before (EMA|Stochastic)WeightAveraging .* not averaged yet. Swap them"
    ):
        fit(make_trainer(max_epochs=EPOCHS, callbacks=[callback, average()]), UsersModule())
    assert not callback.fitted


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("batchnorm", [False, True])
def test_after_the_average_it_is_what_is_fitted(make_trainer, fitting_case, average, batchnorm):
    recorded, callback, module = Recorded(), fitting_case.build(), UsersModule(batchnorm)
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[recorded, average(), callback])
    fit(trainer, module)
    assert not torch.equal(module.net[0].weight.double(), recorded.steps[LAST]["net.0.weight"])
    callback.check_fitted(module)
    assert_same(callback.state_dict(), expected_state(fitting_case, module))
    state = callback.state_dict()
    assert_finite(run_test(trainer, module))  # and it is not fitted again
    assert callback.state_dict()["fingerprint"] is state["fingerprint"]


@pytest.mark.axis("ema")
def test_the_best_average_is_fitted_and_its_raw_weights_are_noticed(make_trainer, fitting_case, tmp_path):
    callback, kept = fitting_case.build(), best(tmp_path)
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[ema(), callback, kept], enable_checkpointing=True)
    fit(trainer, UsersModule())
    path = kept.best_model_path
    averaged = UsersModule()
    averaged.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    expected = expected_state(fitting_case, averaged)
    assert_same(callback.state_dict(), expected)
    # On the trainer that fitted, Lightning puts the raw weights of the file into the module.
    for run in (trainer.test, trainer.predict):
        with pytest.raises(NotFittedError, match="Use a Trainer without the averaging callback"):
            run(UsersModule(), loader(KIND, TEST, 2), ckpt_path="best", weights_only=True)
    # It swaps them for the average while it validates.
    trainer.validate(UsersModule(), loader(KIND, VAL, 1), ckpt_path="best", weights_only=True, verbose=False)
    assert_same(callback.state_dict(), expected)
    for file in (path, callback.uq_ckpt_path):
        fresh = fitting_case.build()
        found = run_test(make_trainer(callbacks=[fresh]), UsersModule(), ckpt_path=file, weights_only=True)
        assert_same(fresh.state_dict(), expected)
        assert found["test_loss"] == pytest.approx(run_test(make_trainer(), averaged)["test_loss"], rel=1e-6)


@pytest.mark.axis("swa")
def test_the_best_weights_are_fitted_and_the_average_in_memory_is_noticed(make_trainer, fitting_case, tmp_path):
    """SWA averages once, at the end, and no file of the training holds that average."""
    skip_on_torch_2_6(SWA_FILES)
    callback, kept, module = fitting_case.build(), best(tmp_path), UsersModule()
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[swa(), callback, kept], enable_checkpointing=True)
    fit(trainer, module)
    raw = UsersModule()
    raw.load_state_dict(torch.load(kept.best_model_path, weights_only=True)["state_dict"])
    assert_same(callback.state_dict(), expected_state(fitting_case, raw))
    run_test(trainer, UsersModule(), ckpt_path="best", weights_only=True)
    assert_same(callback.state_dict(), expected_state(fitting_case, raw))
    with pytest.warns(UserWarning, match="fitted on other weights than those in memory"):
        run_test(trainer, module)
    assert_same(callback.state_dict(), expected_state(fitting_case, module))


@pytest.mark.axis("swa")
def test_the_last_weights_are_the_average_and_are_written(make_trainer, fitting_case, tmp_path):
    skip_on_torch_2_6(SWA_FILES)
    callback, module = fitting_case.build(weights="last"), UsersModule()
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[swa(), callback, best(tmp_path)], enable_checkpointing=True)
    fit(trainer, module)
    expected = expected_state(fitting_case, module)
    assert_same(callback.state_dict(), expected)
    fresh, again = fitting_case.build(), UsersModule()
    run_test(make_trainer(callbacks=[fresh]), again, ckpt_path=callback.uq_ckpt_path, weights_only=True)
    assert_same(fresh.state_dict(), expected)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("average", AVERAGES)
def test_what_measures_alone_may_stand_on_either_side(make_trainer, callback_case, average):
    if callback_case.fits:
        return
    found = []
    for order in (lambda *c: c, lambda *c: c[::-1]):
        torch.manual_seed(0)
        module = UsersModule()
        trainer = make_trainer(max_epochs=EPOCHS, callbacks=[*order(average(), callback_case.build())])
        fit(trainer, module)
        validated = {k: float(v) for k, v in trainer.callback_metrics.items()}
        found.append({**validated, **run_test(trainer, module)})
        assert_finite(found[-1])
    assert found[0] == found[1]
