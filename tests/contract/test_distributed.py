"""Two gloo processes give what one gives: every metric, every fitted state, at numbers of rows that do not divide by two."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks import PredictionWriter, read_predictions
from tests.contract.cases import CALLBACKS, MODULES, Measured, UsersModule, loader
from tests.contract.running import TEST, VAL
from tests.contract.two_ranks import ODD, slug
from tests.metrics.cases import ROWS

ROOT = Path(__file__).parents[2]
# A process that is spawned imports everything anew, some ten seconds a case: all of them are run by `make contract`.
ALSO_SPAWNED_IN_FAST_TESTS = {"Ensemble, loop", "FitGMM"}

SHARDED = {
    "Epinet, frozen base",
    "FitGMM",
    "FitGMM, raw features",
    "FitGMM, tied covariance",
    "FitLaplace",
    "TemperatureScaling",
    "OODDetection",
}


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def run_spawned(preloaded, folder: Path, name: str) -> None:
    """Run a case in a process that spawns its ranks, which import everything anew."""
    run_two_ranks(preloaded, folder, ["ddp_spawn", str(folder), name])


def run_two_ranks(preloaded, folder: Path, arguments: list[str]) -> None:
    script = ROOT / "tests/contract/two_ranks.py"
    status, said = preloaded.run(script, ENVIRONMENT, folder, 500, arguments)
    assert status == 0, said[-4000:]


def shared_run(tmp_path_factory, preloaded, strategy: str) -> Path:
    """Where every case was run under a strategy: once, whatever the number of pytest's workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / f"two_ranks_{strategy}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            run_two_ranks(preloaded, folder, [strategy, str(folder)])
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def ddp(tmp_path_factory, preloaded) -> Path:
    return shared_run(tmp_path_factory, preloaded, "ddp")


@pytest.fixture(scope="session")
def fsdp2(tmp_path_factory, preloaded) -> Path:
    return shared_run(tmp_path_factory, preloaded, "fsdp2")


def result(folder: Path, case) -> dict:
    found = torch.load(folder / f"{slug(case.name)}.pt", weights_only=True)
    assert "error" not in found, found["error"]
    return found


def alone(make_trainer, **kwargs):
    return make_trainer(precision="64-true", **kwargs)


def load(module, path):
    module.double().load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6, abs=1e-9)


@pytest.mark.axis("ddp")
@pytest.mark.every_case
def test_modules(ddp, module_case, make_trainer, tmp_path):
    compare_module(result(ddp, module_case), module_case, make_trainer, ddp, tmp_path)


def compare_module(two, case, make_trainer, folder, tmp_path):
    assert two["ranks_agree"]
    module, task = load(case.build(), two["best"]), case.task
    (validated,) = alone(make_trainer).validate(module, loader(task, VAL, 1), verbose=False)
    (tested,) = alone(make_trainer).test(module, loader(task, TEST, 2), verbose=False)
    for found, expected in ((two["validated"], validated), (two["tested"], tested)):
        # What a user's own module logs counts padded rows twice; ours never does.
        assert_same({k: v for k, v in found.items() if k.startswith("ensemble/")} or found, expected)
    # A file a rank, and together each row once.
    written = folder / f"{slug(case.name)}-predictions"
    assert {file.name for file in written.iterdir()} == {
        f"predictions-rank{rank}.{case.file_format}" for rank in (0, 1)
    }
    writer = PredictionWriter(tmp_path / "alone", case.file_format)
    alone(make_trainer, callbacks=[writer]).predict(module, loader(task, TEST, 2))
    columns, expected = read_predictions(written), read_predictions(tmp_path / "alone")
    assert columns["index"].tolist() == list(range(TEST))
    assert columns.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.axis("ddp")
@pytest.mark.every_case
def test_callbacks(ddp, callback_case, make_trainer):
    compare_callback(result(ddp, callback_case), callback_case, make_trainer)


def compare_callback(two, case, make_trainer):
    module = load(UsersModule(), two["best"])
    kind = "classification"
    if case.fits:
        rows = loader(kind, ODD) if case.fits_on == "train" else loader(kind, VAL, 1)
        assert_same_state(two["state"], case.build().fit(module, rows).state_dict()["tensors"])
        return
    trainer = alone(make_trainer, callbacks=[case.build()])
    (validated,) = trainer.validate(module, loader(kind, VAL, 1), verbose=False)
    (tested,) = trainer.test(module, loader(kind, TEST, 2), verbose=False)
    two = {**two["validated"], **two["tested"]}
    assert_same({k: v for k, v in two.items() if k not in ("val_loss", "test_loss")}, {**validated, **tested})


@pytest.mark.axis("fsdp2")
@pytest.mark.every_case
def test_modules_with_a_sharded_base(fsdp2, module_case, make_trainer, tmp_path):
    two = sharded_result(fsdp2, module_case)
    compare_module(two, module_case, make_trainer, fsdp2, tmp_path)


@pytest.mark.axis("fsdp2")
@pytest.mark.every_case
def test_callbacks_on_a_sharded_model(fsdp2, callback_case, make_trainer):
    compare_callback(sharded_result(fsdp2, callback_case), callback_case, make_trainer)


def sharded_result(folder: Path, case) -> dict:
    """What came of the case; skips one that is refused by name, as is everything that SHARDED does not list."""
    if case.name in SHARDED:
        found = result(folder, case)
        assert found["is_sharded"]
        return found
    found = torch.load(folder / f"{slug(case.name)}.pt", weights_only=True)
    name = type(case.build()).__name__
    assert f"UnsupportedError: {name} does not support ModelParallelStrategy yet" in found["error"]
    pytest.skip("unsupported: refused by name")


@pytest.mark.axis("ddp")
@pytest.mark.every_case
def test_metrics(ddp, metric_case, make_trainer):
    rows = DataLoader(TensorDataset(torch.arange(ROWS)), batch_size=7)
    (one,) = alone(make_trainer).test(Measured(metric_case.key), rows, verbose=False)
    assert_same(result(ddp, metric_case)["tested"], one)


def assert_same_state(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=1e-9)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


SPAWNED = [
    pytest.param(case, id=slug(case.name), marks=[] if case.name in ALSO_SPAWNED_IN_FAST_TESTS else pytest.mark.slow)
    for case in [*MODULES, *CALLBACKS]
]


@pytest.mark.axis("ddp_spawn")
@pytest.mark.parametrize("spawned_case", SPAWNED)
def test_after_a_spawned_fit_everything_comes_from_the_files(spawned_case, request, tmp_path, make_trainer, preloaded):
    run_spawned(preloaded, tmp_path, spawned_case.name)
    two = result(tmp_path, spawned_case)
    task = getattr(spawned_case, "task", "classification")
    if spawned_case in MODULES:
        module = spawned_case.build()
        # The process that started the ranks has what they have learned; where nothing is drawn, what `ddp` learns.
        if module.network.num_indices is not None:
            under_ddp = result(request.getfixturevalue("ddp"), spawned_case)
            torch.testing.assert_close(two["weights"], under_ddp["weights"], rtol=1e-6, atol=1e-9)
        (tested,) = alone(make_trainer).test(
            module, loader(task, TEST, 2), ckpt_path=two["best"], verbose=False, weights_only=True
        )
        assert tested
        assert torch.isfinite(torch.tensor(list(tested.values()))).all()
        return
    assert not two["state"]  # the process that started the ranks has none
    callback, module = spawned_case.build(), UsersModule()
    alone(make_trainer, callbacks=[callback]).test(
        module, loader(task, TEST, 2), ckpt_path=two["best"], verbose=False, weights_only=True
    )
    if spawned_case.fits:
        rows = loader(task, ODD) if spawned_case.fits_on == "train" else loader(task, VAL, 1)
        again = spawned_case.build().fit(load(UsersModule(), two["best"]), rows)
        assert_same_state(callback.state_dict()["tensors"], again.state_dict()["tensors"])
