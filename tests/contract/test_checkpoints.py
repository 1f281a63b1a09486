"""What a checkpoint gives back: the module, its predictions, and what was fitted on its weights."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_uq import load_fitted
from tests.contract.cases import UsersModule, loader, rows
from tests.contract.running import TEST, TRAIN, VAL, assert_equal_states

BEST = "epoch=0.ckpt"


class FirstEpochIsBest(Callback):
    """Logs what a ModelCheckpoint may take for the best, so that the best weights are not the last."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("merit", float(trainer.current_epoch == 0))


def checkpointing(directory, **kwargs):
    """Options of a Trainer that keeps every epoch, the latest also as ``last.ckpt``."""
    options = {"monitor": "merit", "mode": "max", "save_top_k": -1, "save_last": True, **kwargs}
    checkpoint = ModelCheckpoint(directory, filename="{epoch}", **options)
    return {"callbacks": [FirstEpochIsBest(), checkpoint], "enable_checkpointing": True}


def read(path):
    return torch.load(path, weights_only=True)


def predictions(make_trainer, module, task="classification", **kwargs):
    found = make_trainer(**kwargs).predict(module, loader(task, TEST, 2))
    return type(found[0]).cat(found).to_dict() if hasattr(found[0], "to_dict") else {"output": torch.cat(found)}


@pytest.mark.axis("reload")
@pytest.mark.parametrize("save_weights_only", [False, True])
def test_modules_load_bare(make_trainer, module_case, tmp_path, save_weights_only):
    trainer = make_trainer(max_epochs=2, **checkpointing(tmp_path, save_weights_only=save_weights_only))
    module = module_case.build()
    trainer.fit(module, loader(module_case.task, TRAIN, shuffle=True), loader(module_case.task, VAL, 1))
    before = torch.get_rng_state()
    last = predictions(make_trainer, module, module_case.task)
    best, final = read(tmp_path / BEST)["state_dict"], read(tmp_path / "last.ckpt")["state_dict"]
    assert_equal_states(final, dict(module.state_dict()))
    assert any(not torch.equal(best[name], final[name]) for name in best)
    # Nothing but the path: predictions under a Trainer and without one.
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal_states(predictions(make_trainer, again, module_case.task), last)
    x = rows(TEST, 2)[0]
    module.eval()
    assert_equal_states(again.eval().predict(x).to_dict(), module.predict(x).to_dict())
    # The weights alone, as torch reads them, into a module that was built elsewhere.
    built = module_case.build()
    built.load_state_dict(best)
    of_best = predictions(make_trainer, type(module).load_from_checkpoint(tmp_path / BEST), module_case.task)
    assert_equal_states(predictions(make_trainer, built, module_case.task), of_best)
    assert str(of_best) != str(last)
    torch.set_rng_state(before)


@pytest.mark.axis("reload")
def test_modules_are_tested_with_the_best_or_the_last_weights(make_trainer, module_case, tmp_path):
    trainer = make_trainer(max_epochs=2, **checkpointing(tmp_path))
    module = module_case.build()
    trainer.fit(module, loader(module_case.task, TRAIN, shuffle=True), loader(module_case.task, VAL, 1))

    def test(module, trainer, **kwargs):
        (found,) = trainer.test(module, loader(module_case.task, TEST, 2), verbose=False, **kwargs)
        return found

    by_name = {name: test(module, trainer, ckpt_path=name) for name in ("best", "last")}
    assert by_name["best"] != by_name["last"]
    for name, found in by_name.items():
        path = tmp_path / {"best": BEST, "last": "last.ckpt"}[name]
        assert test(type(module).load_from_checkpoint(path), make_trainer()) == found
        assert test(module_case.build(), make_trainer(), ckpt_path=path, weights_only=True) == found


@pytest.mark.axis("reload")
@pytest.mark.parametrize("weights", ["best", "last"])
def test_what_callbacks_fitted_lies_beside_the_weights(make_trainer, fitting_case, tmp_path, weights):
    def build():
        return fitting_case.build(weights=weights, attach=True)

    def numbers(module, callback, **kwargs):
        """The callback's outputs for the test rows: in float64, where two batch shapes are compared below."""
        test = loader("classification", TEST, 2)
        found = make_trainer(callbacks=[callback], precision="64-true").predict(module, test, **kwargs)
        return type(found[0]).cat(found).to_dict()

    fitted, options = build(), checkpointing(tmp_path)
    trainer = make_trainer(max_epochs=2, **{**options, "callbacks": [*options["callbacks"], fitted]})
    trainer.fit(UsersModule(), loader("classification", TRAIN), loader("classification", VAL, 1))
    name, of = ("epoch=0-uq.ckpt", BEST) if weights == "best" else ("uq-last.ckpt", "last.ckpt")
    written = tmp_path / name
    assert Path(fitted.uq_ckpt_path) == written
    assert {path.name for path in tmp_path.iterdir()} == {BEST, "epoch=1.ckpt", "last.ckpt", name}
    content = read(written)
    assert_equal_states(content["state_dict"], read(tmp_path / of)["state_dict"])
    assert_equal_states(content["callbacks"][fitted.state_key], fitted.state_dict())
    # As a process that knows nothing: from the file itself, and, beside which it lies, from that of the best weights.
    module, fresh = UsersModule(), build()
    found = numbers(module, fresh, ckpt_path=written, weights_only=True)
    assert_equal_states(fresh.state_dict(), fitted.state_dict())
    if weights == "best":
        assert_equal_states(numbers(UsersModule(), build(), ckpt_path=tmp_path / of, weights_only=True), found)
    # Without a Trainer.
    outputs = load_fitted(written, task=fitted.logits.given_task).double()(rows(TEST, 2)[0].double())
    results = {
        "log_density",
        "ood_score",
        "ood_p_value",
        "ood_alarm",
        "prediction_set",
        "answered",
        "conformal_lower",
        "probs",
        "variance",
    } & set(found)
    assert results <= set(outputs) <= set(found)
    for name, values in outputs.items():
        torch.testing.assert_close(values, found[name], rtol=1e-9, atol=1e-9)


@pytest.mark.axis("stopping")
def test_modules_stop_early(make_trainer, module_case):
    # No improvement is ever large enough after the first epoch's.
    stopping = EarlyStopping("val_loss", patience=2, min_delta=1e9, check_finite=True)
    trainer, module = make_trainer(max_epochs=9, callbacks=[stopping]), module_case.build()
    trainer.fit(module, loader(module_case.task, TRAIN, shuffle=True), loader(module_case.task, VAL, 1))
    assert trainer.current_epoch == 3
    assert stopping.stopped_epoch == 2


@pytest.mark.axis("stopping")
def test_callbacks_work_after_an_early_stop(make_trainer, callback_case, tmp_path):
    callback = callback_case.build()
    options = checkpointing(tmp_path)
    stopping = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    trainer = make_trainer(max_epochs=9, **{**options, "callbacks": [stopping, *options["callbacks"], callback]})
    module = UsersModule()
    trainer.fit(module, loader("classification", TRAIN), loader("classification", VAL, 1))
    assert trainer.current_epoch == 2
    (tested,) = trainer.test(module, loader("classification", TEST, 2), ckpt_path="best", verbose=False)
    assert tested["test_loss"] > 0
    if callback_case.fits:
        module.load_state_dict(read(tmp_path / BEST)["state_dict"])
        callback.check_fitted(module)  # on the best weights, not on those of the epoch that stopped it
