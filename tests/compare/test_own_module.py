"""Unmodified LightningModules, of either package, as rows of a comparison."""

import json

import pytest
import torch

from lightning_uq.compare import Configuration, Recipe, compare
from lightning_uq.compare.planning.plan import make_plan
from lightning_uq.compare.problem import make_problem
from lightning_uq.compare.training.monitor import best_monitor, find_monitor
from lightning_uq.errors import InputError

USERS = "tests.compare.users_modules"
CLASS_ROWS = ["temperature", "vector", "matrix", "laplace", "density", "knn", "vim"]


def run(module, epochs=1, **arguments):
    return compare(
        Configuration(module=f"{USERS}:{module}", seeds=1, recipe=Recipe(max_epochs=epochs), **arguments)
    ).results()


def config_file(tmp_path, **content):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


def plan(module, **arguments):
    return make_plan(Configuration(module=f"{USERS}:{module}", seeds=1, **arguments))


def rows(results):
    return {row["method"]: row for row in results["rows"]}


def test_a_classifier_of_lightnings_documentation_has_a_row_for_each_callback():
    results = run("LitClassifier", epochs=2)
    assert list(results["methods"]) == ["module", *(f"module_{name}" for name in CLASS_ROWS), "module_ensemble"]
    assert results["left_out"] == {}
    assert {one["best_by"] for one in results["methods"].values()} == {"val_loss"}
    found = rows(results)
    assert found["module_temperature"]["nll"]["mean"] < found["module"]["nll"]["mean"] - 0.1
    assert found["module_temperature"]["accuracy"] == found["module"]["accuracy"]
    assert found["module_density"]["nll"] == found["module"]["nll"]
    assert found["module_density"]["ood_auroc"] != found["module"]["ood_auroc"]
    assert found["module_ensemble"]["parameters"]["mean"] == 5 * found["module"]["parameters"]["mean"]


def test_the_row_is_what_the_module_trained_alone_gives():
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_uq.compare.training.training import seeded
    from tests.compare.users_modules import LitClassifier

    done = compare(
        Configuration(
            module=f"{USERS}:LitClassifier", methods=("module",), seeds=1, seed=3, recipe=Recipe(max_epochs=2)
        )
    )
    data = make_problem(done.configuration, 3).data
    with seeded(3):
        module = LitClassifier()
        Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            callbacks=[ModelCheckpoint(monitor="val_loss")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        ).fit(module, datamodule=data)
    x, y = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(module.eval()(x), y)
    assert done.rows[0]["nll"]["mean"] == pytest.approx(nll.item(), rel=1e-5)


def test_mappings_hooks_of_the_data_and_arguments_of_a_file(tmp_path):
    config = config_file(tmp_path, data={"init_args": {"batch_size": 15, "num": 60}})
    rows = ("module", "module_ensemble")
    results = run("LitLetters", data_module=f"{USERS}:LettersData", config=config, methods=rows)
    assert results["problem"]["sizes"] == {"train": 30, "val": 15, "test": 15, "ood": 0}
    assert results["problem"]["name"] == "LettersData"
    assert results["data"] == f"{USERS}:LettersData"
    assert results["configuration"]["contents"] == {"data": {"init_args": {"batch_size": 15, "num": 60}}}
    assert results["methods"]["module"]["best_by"] == "val/loss"
    assert "module_ensemble" in results["methods"]
    assert f"--config {config}" in results["command"]


def test_predictions_pass_the_hooks_of_the_data_module():
    from tests.compare.users_modules import LettersData

    seen = []

    class Spy(LettersData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append(self.trainer.state.fn.value)
            return super().on_after_batch_transfer(batch, dataloader_idx)

    from lightning.pytorch import Trainer

    from lightning_uq.compare.training.reading import Loader, data_for
    from lightning_uq.running.foreign_data import ForeignDataModule
    from tests.compare.users_modules import LitLetters

    data = ForeignDataModule(Spy())
    data.setup()
    module = LitLetters()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    Trainer(**quiet).predict(module, datamodule=data_for(module, Loader(data, data.val_dataloader())))
    assert seen
    assert set(seen) == {"predict"}


def test_nested_classes_in_a_file_are_built_as_lightning_cli_builds_them(tmp_path):
    net = {"class_path": "torch.nn.Identity"}
    config = config_file(tmp_path, module={"init_args": {"net": net}}, data={"init_args": {"num": 45}})
    with pytest.raises(InputError, match=r"The outputs of `module` LitLetters cannot be read.*one logit per position"):
        plan("LitLetters", data_module=f"{USERS}:LettersData", config=config)


def test_a_regressor_of_means_gets_distributions_from_callbacks():
    found = rows(run("LitRegressor", data="diabetes", methods=("gaussian",)))
    assert "nll" not in found["module"]
    assert {"nll", "crps", "coverage_90"} <= set(found["module_variance"])
    assert "coverage_90" in found["module_conformal"]
    assert set(found) == {
        "module",
        *(f"module_{name}" for name in ("laplace", "knn", "conformal", "variance", "recalibrated", "ensemble")),
        "gaussian",
    }


def test_a_module_of_pytorch_lightning_around_timm(tmp_path):
    pytest.importorskip("timm")
    config = config_file(tmp_path, data={"init_args": {"flatten": False, "ood_classes": [8, 9]}})
    names = ("module", "module_density", "module_ensemble")
    results = run("PlClassifier", data_module="lightning_uq.data:DigitsDataModule", config=config, methods=names)
    assert list(results["methods"]) == list(names)
    assert results["methods"]["module"]["best_by"] == "valid_accuracy"
    assert results["problem"]["sizes"]["ood"] > 0


def test_without_a_validation_metric_the_last_weights_are_kept():
    results = run("LitSilent", methods=("module",))
    assert results["methods"]["module"]["best_by"] == "last"


def test_a_forward_that_fails_is_told_without_hints_on_the_task():
    with pytest.raises(InputError) as raised:
        plan("LitClassifier", data="diabetes")
    text = str(raised.value)
    assert text.startswith(
        "The `forward` of `module` LitClassifier failed on inputs [32, 10]: RuntimeError: mat1 and mat2"
    )
    assert "`task`" not in text


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("LitFlat", {"data": "diabetes"}, r"methods: module cannot run on diabetes .* Using a target size"),
        ("Nothing", {}, r"`module` must be the import path of a LightningModule, but it is"),
        ("LitClassifier", {"methods": ("module_none",)}, r"unknown for classification: 'module_none'"),
    ],
)
def test_contradictions_are_found_before_any_training(module, arguments, message):
    with pytest.raises(InputError, match=message):
        plan(module, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, r"holds model, but it may only hold module, data"),
        ({"module": {"hidden": 3}}, r"module of .* holds hidden"),
        ({"module": {"init_args": {"hiden": 3}}}, r"`config` does not match LitClassifier.*hiden"),
        ({"module": {"init_args": {"hidden": "many"}}}, r"`config` does not match LitClassifier.*hidden"),
        ({"module": {"class_path": "other.Module"}}, r"`module` is .* but module.class_path of `config` is"),
        ({"data": {"init_args": {"num": 3}}}, r"data='digits' takes no argument `num`"),
        ({"module": {"task": "binary"}}, r"The outputs of `module` LitClassifier cannot be read for the data's task, classification"),
        ({"module": {"monitor": "val_auc"}}, r"`monitor` of module is 'val_auc', but its validation logs val_acc, val_loss"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        plan("LitClassifier", config=config_file(tmp_path, **content))


def test_arguments_of_a_file_reach_every_row(tmp_path):
    config = config_file(
        tmp_path, module={"init_args": {"hidden": 4}, "monitor": "val_acc", "mode": "max", "output": "logits"}
    )
    found = plan("LitClassifier", config=config, methods=("module", "module_ensemble"))
    problem = found.problem
    assert found.monitors["module"] == ("val_acc", "max")
    assert [find_monitor(one, problem.setting, problem.data) for one in found.chosen.values()] == [
        ("val_acc", "max")
    ] * 2
    assert found.chosen["module"].make_module(problem.setting).l1.out_features == 4
    assert found.chosen["module_ensemble"].make_module(problem.setting).members.modules[4].l1.out_features == 4


@pytest.mark.parametrize(
    ("logged", "found"),
    [
        (["val_acc", "val_loss", "val_nll"], ("val_nll", "min")),
        (["val/loss_epoch", "val/loss"], ("val/loss", "min")),
        (["validation-MSE"], ("validation-MSE", "min")),
        (["valid_mAP"], ("valid_mAP", "max")),
        (["member_0/val_loss", "ensemble/val_nll"], None),
        (["glossary", "lr"], None),
        ([], None),
    ],
)
def test_the_metric_that_judges_an_epoch(logged, found):
    assert best_monitor(logged) == found
