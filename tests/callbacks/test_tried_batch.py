"""What cannot be read from a user's batches is an error before the training that names the argument to pass, with its cause."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_uq import ConformalSets, FitGMM, FitKNN, FitLaplace, InputError, Segmentation, TemperatureScaling
from lightning_uq.tasks import Classification

X = torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = (X.flatten(1)[:, 0] > 0).long()
CALLBACKS = [FitGMM, partial(FitKNN, k=1), FitLaplace, TemperatureScaling, ConformalSets]


class Flat(LightningModule):
    """Its steps flatten the input before they call `forward`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)

    def outputs(self, x):
        return self(x.flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.outputs(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.outputs(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pair(Flat):
    """Two inputs, passed on unnamed."""

    def forward(self, *args, **kwargs):
        return self.both(*args, **kwargs)

    def both(self, first, second):
        return self.net(torch.cat([first, second], 1))

    def outputs(self, x):
        return self(*x.flatten(1).split(2, 1))


def halves(batch):
    return batch[0].flatten(1).split(2, 1), batch[1]


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=10)


def refused(make_trainer, module, callback, train=None, val=None):
    """The error of a training, which must not have taken a step."""
    train = loader() if train is None else train
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    with pytest.raises(InputError) as caught:
        trainer.fit(module, train, train if val is None else val)
    assert trainer.global_step == 0
    return caught.value


@pytest.mark.parametrize("kind", CALLBACKS)
def test_an_input_that_the_steps_flatten_is_named(make_trainer, kind):
    error = refused(make_trainer, Flat(), kind())
    assert "Flat failed on the input that is read from the batch, a tensor [10, 1, 2, 2]: RuntimeError: mat1" in str(
        error
    )
    assert "Pass `unpack_batch`" in str(error)
    assert "`predict_fn`" in str(error)
    causes = [error.__cause__, getattr(error.__cause__, "__cause__", None)]
    assert any(type(cause) is RuntimeError for cause in causes)
    make_trainer(callbacks=[kind(unpack_batch=lambda batch: (batch[0].flatten(1), batch[1]))], max_epochs=1).fit(
        Flat(), loader(), loader()
    )


@pytest.mark.filterwarnings("ignore:The likelihood has no finite positive temperature")
@pytest.mark.parametrize("kind", CALLBACKS)
def test_several_arguments_are_named(make_trainer, kind):
    text = str(refused(make_trainer, Pair(), kind(unpack_batch=lambda b: (b[0].flatten(1)[:, :2], b[1]))))
    assert "Pair failed on the input that is read from the batch, a tensor [10, 2]: TypeError: " in text
    assert "missing 1 required positional argument: 'second'" in text
    assert "If `forward` takes several arguments, it returns a mapping from their names." in text
    text = str(refused(make_trainer, Pair(), kind(unpack_batch=halves)))
    assert "a tuple of 2: TypeError" in text
    assert "a mapping from their names, or pass `predict_fn=lambda model, x: model(*x)`" in text
    for functions in (
        {"unpack_batch": lambda batch: (dict(zip(("first", "second"), halves(batch)[0], strict=True)), batch[1])},
        {"unpack_batch": halves, "predict_fn": lambda model, x: model(*x)},
    ):
        make_trainer(callbacks=[kind(**functions)], max_epochs=1).fit(Pair(), loader(), loader())


def test_a_predict_fn_that_fails_is_named(make_trainer):
    error = refused(make_trainer, Flat(), TemperatureScaling(predict_fn=lambda model, x: model.missing(x)))
    assert "`predict_fn` failed on the input that is read from the batch, a tensor" in str(error)
    assert isinstance(error.__cause__, AttributeError)


def test_an_error_after_the_trial_is_raised_as_it_is(make_trainer):
    class Breaks(Flat):
        def forward(self, x):
            if self.trainer.current_epoch and not self.training:
                raise RuntimeError("a bug of my own")
            return super().forward(x.flatten(1))

    with pytest.raises(RuntimeError, match="^a bug of my own$"):
        make_trainer(callbacks=[FitGMM()], max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(
            Breaks(), loader()
        )
    with pytest.raises(RuntimeError, match="^mat1"):
        FitGMM().fit(Flat(), loader())


def test_a_lack_of_memory_is_raised_as_it_is(make_trainer):
    class Large(Flat):
        def forward(self, x):
            raise torch.cuda.OutOfMemoryError("no memory")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="^no memory$"):
        make_trainer(callbacks=[TemperatureScaling()]).fit(Large(), loader(), loader())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize("kind", [FitGMM, partial(FitKNN, k=1, feature_transform="auto")])
@pytest.mark.parametrize("data", ["kept", "stream"])
def test_the_advice_about_held_out_rows_comes_only_if_the_training_data_can_be_read(make_trainer, caplog, kind, data):
    train = loader() if data == "kept" else DataLoader(Stream(), batch_size=10)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        refused(make_trainer, Flat(), kind(), train, loader())
    assert "held_out" not in caplog.text
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        flatten = {"unpack_batch": lambda batch: (batch[0].flatten(1), batch[1])}
        other = DataLoader(TensorDataset(torch.zeros(40, 3), Y), batch_size=10)
        trainer = make_trainer(callbacks=[kind(**flatten)], max_epochs=1, num_sanity_val_steps=0, limit_val_batches=1)
        module = Flat()
        module.validation_step = lambda batch, batch_idx: None
        trainer.fit(module, train, other)
    assert caplog.text.count("scores only the direction and the length of features") == 1
    assert "Flat failed on the input that is read from the batch, a tensor [10, 3]" in caplog.text


class NoForward(Flat):
    forward = LightningModule.forward

    def outputs(self, x):
        return self.net(x.flatten(1))


def outputs(model, x):
    return model.outputs(x)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_attach_needs_a_module_that_lightning_predicts_with(make_trainer, kind):
    text = str(refused(make_trainer, NoForward(), kind(predict_fn=outputs, attach=True)))
    assert "`attach=True` changes what `trainer.predict` returns" in text
    assert (
        "NoForward, which has neither `forward` nor `predict_step`. Define one of them in NoForward, or leave out `attach`"
        in text
    )
    make_trainer(callbacks=[kind(predict_fn=outputs)], max_epochs=1).fit(NoForward(), loader(), loader())


def test_attach_takes_a_module_with_a_predict_step(make_trainer):
    class Predicts(NoForward):
        def predict_step(self, batch, batch_idx):
            return self.outputs(batch[0])

    module, scaling = Predicts(), TemperatureScaling(predict_fn=outputs, attach=True)
    trainer = make_trainer(callbacks=[scaling], max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert trainer.predict(module, loader())[0].probs.shape == (10, 2)


@pytest.mark.parametrize("kind", [FitGMM, TemperatureScaling, ConformalSets])
def test_a_column_of_labels_is_named(make_trainer, kind):
    def flat(batch):
        return batch[0].flatten(1), batch[1]

    text = str(refused(make_trainer, Flat(), kind(unpack_batch=flat), loader(y=Y[:, None]), loader(y=Y[:, None])))
    assert (
        "they have [10, 1]. Remove their axis of size 1: pass `unpack_batch=lambda batch: (batch[0], batch[1].squeeze(1))`"
        in text
    )


def test_masks_with_an_axis_of_channels_are_named():
    outputs = torch.zeros(1, 2, 3, 4, 5)
    for shape, axis in (((2, 1, 4, 5), 1), ((2, 4, 5, 1), 3)):
        with pytest.raises(InputError, match=rf"batch\[1\].squeeze\({axis}\)"):
            Segmentation().check_target(torch.zeros(shape).long(), outputs)
    with pytest.raises(InputError, match="If the network returns features"):
        Segmentation().check_target(torch.zeros(2, 3, 4, 5).long(), outputs)


def test_a_last_axis_of_classes_is_named_with_the_first_error():
    last = r"Pass `task=Segmentation\(\)`, or `task=Segmentation\(class_axis=-1\)` if the last axis holds the classes"
    for shape in ((1, 2, 7, 3), (1, 2, 3, 7), (1, 2, 8, 8, 3)):
        with pytest.raises(InputError, match=last):
            Classification().check_output(torch.zeros(shape))
    with pytest.raises(InputError, match=r"Pass `task=Segmentation\(\)`, or a function"):
        Classification().check_output(torch.zeros(1, 2, 3, 8, 8))
