"""Files that are damaged, foreign, or hold pickled code: one clear error at every entry, and nothing of them is run."""

import os
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_uq import DeterministicModule, EnsembleModule, load_fitted
from lightning_uq.errors import InputError, NotFittedError, UQError
from tests.contract.cases import UsersModule, loader, network
from tests.contract.running import TEST, TRAIN, VAL

DAMAGED = "cannot be read: it is damaged, or torch did not write it"
pytestmark = pytest.mark.axis("bad input")


class Harmful:
    """What makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damage(path, ran):
    """Files made of a good one, and what is said of them."""
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    yield whole[: len(whole) // 2], DAMAGED
    yield b"", DAMAGED
    yield b"\x80text", DAMAGED
    yield (
        {**content, "hyper_parameters": {"x": Harmful(ran)}},
        "cannot be read: it holds .*mkdir.* nothing in it was run",
    )
    yield pickle.dumps({"state_dict": Harmful(ran)}), "cannot be read: (it is damaged|it holds)"
    yield [1, 2], "holds no `state_dict`"


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


def test_modules(make_trainer, module_case, tmp_path):
    module, path, ran = module_case.build(), tmp_path / "good.ckpt", tmp_path / "ran"
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(module, loader(module_case.task, TRAIN), loader(module_case.task, VAL, 1))
    trainer.save_checkpoint(path)
    bad, load = tmp_path / "bad.ckpt", type(module).load_from_checkpoint
    for content, match in damage(path, ran):
        with pytest.raises(InputError, match=rf"`checkpoint_path` must name a checkpoint, but .*bad\.ckpt (?:{match})"):
            load(write(bad, content))
        # What Lightning itself loads is refused in torch's words.
        with pytest.raises(Exception):  # noqa: B017, PT011
            make_trainer().test(module, loader(module_case.task, TEST, 2), ckpt_path=bad, verbose=False)
    assert not ran.exists()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.ckpt")
    # Another's checkpoint, by its hyper-parameters or by its weights.
    make_trainer(fast_dev_run=True).fit(other := UsersModule(batchnorm=True), loader("classification", TRAIN))
    other.trainer.save_checkpoint(bad)
    content = torch.load(path, weights_only=True)
    foreign = {**content, "state_dict": {f"their.{name}": value for name, value in content["state_dict"].items()}}
    for file in (bad, write(tmp_path / "foreign.ckpt", foreign)):
        with pytest.raises(InputError) as caught:
            load(file)
        text = str(caught.value)
        named = f"`checkpoint_path` names {file}, which does not fit {type(module).__name__}: " in text
        own = (
            f"{type(module).__name__} has no argument `batchnorm`" in text
        )  # the base class, which is built by its own name
        assert (
            named or own or "The checkpoint holds 0 members, but the ensemble has 3 (argument `num_members`)." in text
        )
    load(path)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(path)


def test_callbacks(make_trainer, fitting_case, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    trainer = make_trainer(callbacks=[checkpoint, fitting_case.build()], enable_checkpointing=True)
    trainer.fit(UsersModule(), loader("classification", TRAIN), loader("classification", VAL, 1))
    sibling, ran = tmp_path / "best-uq.ckpt", tmp_path / "ran"

    def test(**kwargs):
        callback = fitting_case.build(**kwargs)
        make_trainer(callbacks=[callback]).test(
            UsersModule(), loader("classification", TEST, 2), ckpt_path=tmp_path / "best.ckpt", verbose=False
        )
        return callback

    good = sibling.read_bytes()
    for content, match in damage(sibling, ran):
        write(sibling, content)
        with pytest.raises(NotFittedError, match=rf"best-uq\.ckpt (?:{match})"):
            test()
        with pytest.raises(InputError, match=match):
            load_fitted(sibling, UsersModule())
        assert test(dataloader=loader("classification", VAL, 1)).fitted  # data are at hand: the file is not needed
        sibling.write_bytes(good)
    assert not ran.exists()
    assert test().fitted


def test_members_of_an_ensemble(make_trainer, tmp_path):
    module, path, ran = DeterministicModule(network), tmp_path / "good.ckpt", tmp_path / "ran"
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(module, loader("classification", TRAIN), loader("classification", VAL, 1))
    trainer.save_checkpoint(path)
    for content, match in damage(path, ran):
        bad = write(tmp_path / "bad.ckpt", content)
        with pytest.raises(UQError, match=match.replace("holds no `state_dict`", "must hold a state dict")):
            EnsembleModule.from_checkpoints([path, bad])
    assert not ran.exists()
