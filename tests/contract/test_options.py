"""Every module and callback under the Trainer's options, and with loaders of other kinds."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_uq.modules import EnsembleModule
from tests.contract.cases import UsersModule, dataset, loader
from tests.contract.running import TEST, TRAIN, VAL, assert_finite, assert_sound

KIND = "classification"
# What so little data gives rise to, rightly.
FEW = pytest.mark.filterwarnings(
    "ignore:.*alpha=0.1 needs 9 rows",
    "ignore:.*ConformalRiskControl puts all labels",
    "ignore:.*it needs 20 rows per target",
    "ignore:.*fewer than 20 per class",
    "ignore:.*is rank-deficient",
    "ignore:.*no finite positive temperature",
)
BAREBONES = pytest.mark.filterwarnings("ignore:.*You are trying to `self.log")


class Stream(IterableDataset):
    """Rows one after the other, and no length."""

    def __init__(self, task, num, seed=0):
        self.rows = dataset(task, num, seed)

    def __iter__(self):
        return iter(self.rows)


def stream(task, num, seed=0):
    return DataLoader(Stream(task, num, seed), batch_size=8)


def fit_and_test(trainer, module, train, val, test):
    trainer.fit(module, train, val)
    return trainer.test(module, test, verbose=False)


# ---------------------------------------------------------------------- options

CLIP = 0.01


class GradientNorms(Callback):
    """The norm of all gradients that each step was taken with."""

    def __init__(self):
        self.norms, self.steps = [], 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.steps:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(torch.cat(gradients).norm().item())
        self.steps = trainer.global_step


@pytest.mark.axis("options")
def test_modules_with_options(make_trainer, module_case):
    gradients = GradientNorms()
    trainer = make_trainer(
        callbacks=[gradients],
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=CLIP,
        limit_train_batches=3,
        limit_val_batches=0.5,
        limit_test_batches=2,
    )
    module = module_case.build()
    trainer.fit(module, loader(module_case.task, TRAIN, shuffle=True), loader(module_case.task, VAL, 1))
    # Three batches an epoch, two to a step: the rest of an epoch makes a step of its own.
    assert trainer.global_step in (4, 4 * len(trainer.optimizers))
    # All of these gradients were larger. An ensemble clips each member's by itself.
    norm = CLIP * math.sqrt(module.network.num_indices if isinstance(module, EnsembleModule) else 1)
    assert len(gradients.norms) == 4
    assert gradients.norms == pytest.approx([norm] * 4, rel=1e-2)
    (tested,) = trainer.test(module, loader(module_case.task, TEST, 2), verbose=False)
    assert_finite(tested)
    first = DataLoader(Subset(dataset(module_case.task, TEST, 2), range(16)), batch_size=8)
    assert tested == pytest.approx(make_trainer().test(module, first, verbose=False)[0], rel=1e-5)


@pytest.mark.axis("options")
def test_accumulating_two_batches_is_one_of_twice_the_size(make_trainer, module_case):
    """Where training draws nothing at random; the others are held to running alone."""
    weights = []
    for batch_size, accumulate in ((8, 2), (16, 1)):
        torch.manual_seed(0)
        module = module_case.build()
        rows = DataLoader(dataset(module_case.task, 32), batch_size=batch_size)
        trainer = make_trainer(accumulate_grad_batches=accumulate, precision="64-true")
        trainer.fit(module, rows)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert weights[0].isfinite().all()
    if module.network.num_indices is not None:
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


@FEW
@pytest.mark.axis("options")
def test_callbacks_with_options(make_trainer, callback_case):
    callback = callback_case.build()
    trainer = make_trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        limit_train_batches=4,
        limit_val_batches=7,
        limit_test_batches=2,
        callbacks=[callback],
    )
    module = UsersModule()
    (tested,) = fit_and_test(
        trainer, module, loader(KIND, TRAIN, shuffle=True), loader(KIND, VAL, 1), loader(KIND, TEST, 2)
    )
    assert_finite(tested)
    if callback_case.fits:  # to the rows that the Trainer was limited to
        num, seed = (32, 0) if callback_case.fits_on == "train" else (56, 1)
        expected = callback_case.build().fit(
            module, DataLoader(Subset(dataset(KIND, TRAIN if seed == 0 else VAL, seed), range(num)), 8)
        )
        for name, value in expected.state_dict()["tensors"].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(callback.state_dict()["tensors"][name], value, msg=name)


# ---------------------------------------------------------------------- loaders


@pytest.mark.axis("loaders")
def test_modules_with_several_loaders(make_trainer, module_case):
    task = module_case.task
    module, trainer = module_case.build(), make_trainer()
    several = [loader(task, VAL, 1), loader(task, TEST, 2)]
    trainer.fit(module, loader(task, TRAIN, shuffle=True), several)
    validated = trainer.validate(module, several, verbose=False)
    tested = trainer.test(module, several, verbose=False)
    # Each loader's metrics are those it has when it is alone.
    for number, single in enumerate(several):
        (alone,) = make_trainer().test(module, single, verbose=False)
        suffix = f"/dataloader_idx_{number}"
        assert {k.removesuffix(suffix): v for k, v in tested[number].items()} == pytest.approx(alone, rel=1e-5)
        assert_finite(validated[number])
    predictions = trainer.predict(module, several)
    for number, rows in enumerate((VAL, TEST)):
        assert_sound(type(predictions[number][0]).cat(predictions[number]), rows)


@pytest.mark.axis("loaders")
def test_callbacks_with_several_loaders(make_trainer, callback_case):
    callback = callback_case.build()
    trainer, module = make_trainer(callbacks=[callback]), UsersModule()
    several = [loader(KIND, VAL, 1), loader(KIND, TEST, 2)]
    if callback_case.fits_on == "val":
        with pytest.raises(Exception, match="dataloader"):  # which of the two, it has to be told
            trainer.fit(module, loader(KIND, TRAIN, shuffle=True), several)
        callback = callback_case.build(dataloader=several[0])
        trainer = make_trainer(callbacks=[callback])
    first, second = fit_and_test(trainer, module, loader(KIND, TRAIN, shuffle=True), several, several)
    assert_finite({**first, **second})
    if callback_case.fits:
        assert callback.fitted


# ---------------------------------------------------------------------- iterable


@pytest.mark.axis("iterable")
def test_modules_with_iterable_data(make_trainer, module_case):
    task = module_case.task
    module, trainer = module_case.build(), make_trainer()
    (streamed,) = fit_and_test(trainer, module, stream(task, TRAIN), stream(task, VAL, 1), stream(task, TEST, 2))
    (listed,) = make_trainer().test(module, loader(task, TEST, 2), verbose=False)
    assert streamed == pytest.approx(listed, rel=1e-5)
    predictions = trainer.predict(module, stream(task, TEST, 2))
    assert_sound(type(predictions[0]).cat(predictions), TEST)


@pytest.mark.axis("iterable")
def test_callbacks_with_iterable_data(make_trainer, callback_case):
    callback, module = callback_case.build(), UsersModule()
    trainer = make_trainer(callbacks=[callback])
    (tested,) = fit_and_test(trainer, module, stream(KIND, TRAIN), stream(KIND, VAL, 1), stream(KIND, TEST, 2))
    assert_finite(tested)
    if callback_case.fits:
        rows = loader(KIND, TRAIN) if callback_case.fits_on == "train" else loader(KIND, VAL, 1)
        listed = callback_case.build().fit(module, rows).state_dict()["tensors"]
        for name, value in callback.state_dict()["tensors"].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, listed[name], msg=name)


# ---------------------------------------------------------------------- fast_dev_run, barebones


@BAREBONES
@pytest.mark.axis("fast_dev_run")
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"fast_dev_run": 2}, {"barebones": True}], ids=str)
def test_modules_in_a_hurry(make_trainer, module_case, options):
    module = module_case.build()
    quiet = {"enable_progress_bar": None, "enable_model_summary": None} if "barebones" in options else {}
    trainer = make_trainer(**options, **quiet, limit_train_batches=2)
    task = module_case.task
    trainer.fit(module, loader(task, TRAIN), loader(task, VAL, 1))
    trainer.test(module, loader(task, TEST, 2), verbose=False)
    predictions = trainer.predict(module, loader(task, TEST, 2))
    assert_sound(type(predictions[0]).cat(predictions), sum(len(p) for p in predictions))


@FEW
@BAREBONES
@pytest.mark.axis("fast_dev_run")
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"fast_dev_run": 3}, {"barebones": True}], ids=str)
def test_callbacks_in_a_hurry(make_trainer, callback_case, options, tmp_path):
    module = UsersModule()
    quiet = {"enable_progress_bar": None, "enable_model_summary": None} if "barebones" in options else {}
    callback = callback_case.build()
    trainer = make_trainer(**options, **quiet, callbacks=[callback])
    trainer.fit(module, loader(KIND, TRAIN), loader(KIND, VAL, 1))
    trainer.test(module, loader(KIND, TEST, 2), verbose=False)
    assert not callback_case.fits or callback.fitted
    assert not list(tmp_path.rglob("*.ckpt"))
