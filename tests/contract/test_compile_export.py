"""A compiled network trains to the same numbers; what was trained leaves Python as one graph, and gives the same numbers."""

import logging
import re
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_uq import DriftMonitor, OODAlarm, TemperatureScaling, load_fitted, save_fitted
from lightning_uq.cli import main
from lightning_uq.errors import UnsupportedError
from lightning_uq.modules import DeterministicModule, EnsembleModule
from lightning_uq.networks import EpistemicNetwork
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.fitted_predictor import FittedPredictor
from tests.contract.cases import CLASSIFIERS, MODULES, UsersModule, loader, network, rows
from tests.contract.running import TEST, TRAIN, VAL, density, run_all
from tests.trainers import quiet_trainer
from tests.versions import ONNX_EXPORT, TORCH_2_6, VMAP_EXPORT, skip_on_torch_2_6

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no finite positive temperature"
)  # of a network that has hardly learned
KIND = "classification"
X = rows(TEST, 2)[0]
PAGE = Path(__file__).parents[2] / "docs" / "export.md"
BATCH = ({0: torch.export.Dim("batch")},)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- torch.compile


def compiled(factory, backend):
    """What a factory makes, its network compiled; a user compiles what lies inside of the LightningModule."""
    made = factory()
    if isinstance(made, LightningModule):
        made.net = torch.compile(made.net, backend=backend)
        return made
    return torch.compile(made, backend=backend)


def with_compiled_network(case, backend):
    """The case's module, built from a factory of compiled networks; or f(x, z) compiled, where it has no such network."""
    factory, *rest = case.build.args
    with torch.random.fork_rng():
        whole = isinstance(factory(), EpistemicNetwork) or getattr(case.build().network, "is_stacked", False)
    if whole:
        return in_place(case.build(), backend)
    return case.build.func(partial(compiled, factory, backend), *rest, **case.build.keywords)


def in_place(module, backend):
    """f(x, z) compiled as a whole, which leaves its names as they are."""
    for part in module.network.modules():
        if isinstance(part, EpistemicNetwork):
            part.compile(backend=backend)
    return module


def trained(trainer, case, make):
    torch.manual_seed(0)
    return run_all(trainer, case, make())


def assert_same_run(found, expected):
    ours = {name.replace("_orig_mod.", ""): value for name, value in found["module"].state_dict().items()}
    theirs = expected["module"].state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(ours[name], value)
    for part in ("validated", "tested"):
        assert found[part] == pytest.approx(expected[part], rel=1e-5)
    predicted = found["prediction"].to_dict()
    for name, value in expected["prediction"].to_dict().items():
        if isinstance(value, torch.Tensor):
            assert_close(predicted[name], value)


@pytest.mark.axis("compile")
def test_a_module_with_a_compiled_network(make_trainer, module_case, tmp_path):
    counter, trainer = CompileCounterWithBackend("aot_eager"), make_trainer()
    found = trained(trainer, module_case, lambda: with_compiled_network(module_case, counter))
    assert_same_run(found, trained(make_trainer(), module_case, module_case.build))
    assert counter.frame_count or module_case.name in WEIGHTS_ARE_MADE
    # What one has learned, the other takes.
    trainer.save_checkpoint(tmp_path / "compiled.ckpt", weights_only=True)
    plain = module_case.build()
    rows = loader(module_case.task, TEST, 2)
    (tested,) = make_trainer().test(plain, rows, ckpt_path=tmp_path / "compiled.ckpt", weights_only=True, verbose=False)
    assert tested == pytest.approx(found["tested"], rel=1e-5)
    again = with_compiled_network(module_case, "eager")
    again.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert_close(again.eval()(X), plain.eval()(X))


WEIGHTS_ARE_MADE = {case.name for case in MODULES if case.name.startswith(("Hypermodel", "Bayes by backprop"))}
"""Their network is called with weights that another made, past what was compiled of it."""
MAPPED = {*WEIGHTS_ARE_MADE, "Ensemble, vmap"}
"""They run under ``torch.vmap``."""
STACKED = {"Ensemble, stacked", "Ensemble, priors", "Ensemble, regression", "Categorical regression"}
"""Their members run in one batched product."""


@pytest.mark.slow
@pytest.mark.axis("compile")
def test_a_module_whose_f_is_compiled_as_a_whole(make_trainer, module_case):
    counter = CompileCounterWithBackend("aot_eager")
    found = trained(make_trainer(), module_case, lambda: in_place(module_case.build(), counter))
    assert counter.frame_count or module_case.name == "Ensemble of a user's modules"  # whose steps are its members'
    assert_same_run(found, trained(make_trainer(), module_case, module_case.build))


@pytest.mark.slow
@pytest.mark.axis("compile")
def test_inductor(make_trainer):
    (case,) = (case for case in MODULES if case.name == "Epinet")
    found = trained(make_trainer(), case, lambda: with_compiled_network(case, "inductor"))
    assert_same_run(found, trained(make_trainer(), case, case.build))


@pytest.mark.parametrize("execution", ["stacked", "vmap"])
def test_members_that_run_at_once_are_compiled_as_one(execution):
    factory = partial(compiled, network, "eager")
    with pytest.raises(
        UnsupportedError, match=r"OptimizedModule is compiled; .* `network.compile\(\)`. Use execution='loop'"
    ):
        EnsembleModule(factory, num_members=3, execution=execution)
    module = EnsembleModule(factory, num_members=3)
    assert module.network.execution == "loop"
    assert "is compiled" in module.network.execution_reason


def test_members_from_the_checkpoints_of_compiled_modules(make_trainer, tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(2)]
    modules = [DeterministicModule(partial(compiled, network, "eager")) for _ in paths]
    for path, module in zip(paths, modules, strict=True):
        trainer = make_trainer()
        trainer.fit(module, loader(KIND, TRAIN))
        trainer.save_checkpoint(path)
    ensemble = EnsembleModule.from_checkpoints(paths, network)
    with torch.no_grad():
        assert_close(ensemble.eval()(X), torch.cat([module.eval()(X) for module in modules]))


@pytest.mark.axis("compile")
def test_callbacks_of_a_module_whose_network_is_compiled(make_trainer, callback_case, tmp_path):
    runs = []
    for counter in (None, CompileCounterWithBackend("aot_eager")):
        torch.manual_seed(0)
        module, callback = UsersModule(batchnorm=True), callback_case.build()
        if counter is not None:
            module.net = torch.compile(module.net, backend=counter)
        checkpoint = ModelCheckpoint(tmp_path, filename=str(counter is None), monitor="val_loss")
        trainer = make_trainer(max_epochs=2, callbacks=[callback, checkpoint], enable_checkpointing=True)
        trainer.fit(module, loader(KIND, TRAIN, shuffle=True), loader(KIND, VAL, 1))
        (tested,) = trainer.test(module, loader(KIND, TEST, 2), ckpt_path="best", weights_only=True, verbose=False)
        runs.append((module, callback, tested, counter))
    (plain, expected, metrics, _), (compiled_module, found, again, counter) = runs
    assert counter.frame_count
    assert again == pytest.approx(metrics, rel=1e-5)
    if not callback_case.fits:
        return
    for name, value in expected.state_dict()["tensors"].items():
        if isinstance(value, torch.Tensor):
            assert_close(found.state_dict()["tensors"][name], value)
        else:
            assert found.state_dict()["tensors"][name] == value
    learned = {name.replace("_orig_mod.", ""): value for name, value in compiled_module.state_dict().items()}
    plain.load_state_dict(learned)
    found.check_fitted(plain)  # weights are known by what they are, not by what compiling calls them


# ---------------------------------------------------------------------- torch.export and ONNX


LAYERS = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Flatten()
    ),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 3)),
    "MaxPool1d": lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten()),
}


@pytest.mark.axis("export")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_layers_take_any_batch_size_in_a_graph(layer, execution):
    skip_on_torch_2_6(VMAP_EXPORT, execution == "vmap")
    module = EnsembleModule(LAYERS[layer], num_members=3, seed=0, execution=execution)
    with torch.no_grad():
        module.train().network(X)  # so that statistics are no longer 0 and 1
    assert_exports(module.eval())


# One of a kind is fast enough for every run; all of them are run by `make contract`.
ONE_OF_A_KIND = {
    "Deterministic", "Ensemble, loop", "Ensemble, stacked", "Epinet", "Dropout, shared masks", "Evidential",
    "Deterministic, regression",
}  # fmt: skip


def some(cases, fast=ONE_OF_A_KIND):
    """The cases, those that are like another marked as slow."""
    return [
        pytest.param(case, id=case.name.replace(" ", "_"), marks=[pytest.mark.slow] * (case.name not in fast))
        for case in cases
    ]


def trained_module(make_trainer, case):
    module = case.build()
    trainer = make_trainer()
    trainer.fit(module, loader(case.task, TRAIN, shuffle=True), loader(case.task, VAL, 1))
    return module.eval()


def with_all_fitted(make_trainer, module, folder, *callbacks):
    """The network with what was fitted inside, from its file alone."""
    checkpoint = ModelCheckpoint(folder, filename="best", monitor="val_loss")
    trainer = make_trainer(callbacks=[*callbacks, checkpoint], enable_checkpointing=True)
    trainer.fit(module, loader(KIND, TRAIN), loader(KIND, VAL, 1))
    return load_fitted(callbacks[-1].uq_ckpt_path, module, task=callbacks[-1].logits.given_task)


def exported(model):
    return torch.export.export(model, (X[:7],), dynamic_shapes=BATCH, strict=False)


def assert_exports(model):
    assert_graph_is_right(model, exported(model))


def assert_graph_is_right(model, program):
    graph = program.module()
    for num in (1, 2, 7, TEST):
        with torch.no_grad():
            assert_close(graph(X[:num]), model(X[:num]))


def assert_onnx_runs(model, source, folder):
    """The graph that torch.onnx makes of a source, which is the model or its program of torch.export."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = folder / "model.onnx"
    named = isinstance(model, FittedNetwork | FittedPredictor)
    if named:
        model(X[:7])  # which tells the names
    names = model.output_names if named else None
    given = {"args": (X[:7],), "dynamic_shapes": BATCH} if source is model else {}
    torch.onnx.export(source, f=path, dynamo=True, verbose=False, output_names=names, **given)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    if named:
        assert [output.name for output in session.get_outputs()] == names
    for num in (1, 2, 7, TEST):
        with torch.no_grad():
            expected = model(X[:num])
        found = session.run(None, {given.name: X[:num].numpy()})
        for one, other in zip(found, expected.values() if named else [expected], strict=True):
            assert_close(torch.as_tensor(one), other)


@pytest.mark.axis("export")
def test_a_modules_forward_exports(make_trainer, module_case):
    skip_on_torch_2_6(VMAP_EXPORT, module_case.name in MAPPED)
    assert_exports(trained_module(make_trainer, module_case))


@pytest.mark.axis("onnx")
@pytest.mark.parametrize("exported_case", some(MODULES))
def test_a_modules_forward_runs_as_onnx(make_trainer, exported_case, tmp_path):
    skip_on_torch_2_6(VMAP_EXPORT, exported_case.name in MAPPED)
    skip_on_torch_2_6(ONNX_EXPORT, exported_case.name in STACKED)
    assert_onnx_runs(module := trained_module(make_trainer, exported_case), module, tmp_path)


@pytest.fixture(scope="module")
def all_fitted(tmp_path_factory):
    """A case's network with its temperature and density, and its graph of torch.export, once for all tests."""

    @cache
    def export(name):
        (case,) = (case for case in CLASSIFIERS if case.name == name)
        torch.manual_seed(0)
        module, folder = case.build(), tmp_path_factory.mktemp("fitted")
        make_trainer = partial(quiet_trainer, folder)
        fitted = with_all_fitted(make_trainer, module, folder, *density(module), TemperatureScaling())
        return fitted, exported(fitted)

    return export


@pytest.mark.axis("export")
@pytest.mark.parametrize("exported_case", some(CLASSIFIERS))
def test_network_temperature_and_density_export_as_one_graph(all_fitted, exported_case):
    skip_on_torch_2_6(VMAP_EXPORT, exported_case.name in WEIGHTS_ARE_MADE)
    assert_graph_is_right(*all_fitted(exported_case.name))


# One network, members in a loop, members at once, members beside a base. ONNX graphs of the other networks, and their graphs of
# torch.export with all that was fitted, are checked in every run too.
FITTED_IN_ONNX = {"Deterministic", "Ensemble, loop", "Ensemble, stacked", "Epinet"}


@pytest.mark.axis("onnx")
@pytest.mark.parametrize("exported_case", some(CLASSIFIERS, FITTED_IN_ONNX))
def test_network_temperature_and_density_run_as_one_onnx_graph(all_fitted, exported_case, tmp_path):
    skip_on_torch_2_6(VMAP_EXPORT, exported_case.name in WEIGHTS_ARE_MADE)
    assert_onnx_runs(*all_fitted(exported_case.name), tmp_path)


@pytest.mark.parametrize("check", [pytest.param(name, marks=pytest.mark.axis(name)) for name in ("export", "onnx")])
def test_what_a_callback_fitted_leaves_with_the_network(make_trainer, fitting_case, check, tmp_path):
    batchnorm = check == "export" or not TORCH_2_6  # whose ONNX exporter lacks it
    fitted = with_all_fitted(make_trainer, UsersModule(batchnorm), tmp_path, fitting_case.build())
    assert_exports(fitted) if check == "export" else assert_onnx_runs(fitted, fitted, tmp_path)


def score_rows(names, monkeypatch):
    """Run the commands of the page, each on its kind of file; those with a monitor on two files, with an alarm in the checkpoint."""
    x = names["x"]
    pa, csv, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.csv", "pyarrow.parquet"))
    columns = {name: x[:, i].numpy() for i, name in enumerate("abcd")}
    csv.write_csv(pa.table({"customer": np.arange(len(x)), **columns, "bought": np.zeros(len(x))}), "rows.csv")
    parquet.write_table(pa.table(columns), "rows.parquet")
    np.savez("rows.npz", x=x.numpy())
    commands, monitored = re.findall(r"```bash\n(lightning-uq score.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for line in commands.splitlines():
        assert main(line.split()[1:]) == 0
        assert parquet.read_table("scores.parquet").num_rows == len(x)
    model, page = names["model"], ModuleType("page")
    page.network = names["network"]
    monkeypatch.setitem(sys.modules, "page", page)
    save_fitted("model-uq.ckpt", model, [names["gmm"], names["scaling"], OODAlarm().fit(model, names["val_loader"])])
    for month in ("january", "february"):
        csv.write_csv(pa.table(columns), f"{month}.csv")
    for line in monitored.splitlines():
        assert main([*line.split()[1:], "--network", "page:network"]) == 0
    assert DriftMonitor.from_json(Path("monitor.json").read_text()).num_rows == 2 * len(x)


def test_what_the_page_shows_is_run(tmp_path, monkeypatch):
    skip_on_torch_2_6(ONNX_EXPORT)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names = {"__name__": "export"}
    text = PAGE.read_text()
    assert "num_members=5)" in text
    for block in re.findall(r"```python\n(.*?)```", text.replace("num_members=5)", "num_members=2)"), flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["logits"].shape == (2, 256, 3)
    probs = torch.as_tensor(names["logits"]).softmax(-1).mean(0)
    names["many"].prediction_transforms.clear()  # the graph gives raw outputs
    assert_close(probs, names["many"].predict(names["x"]).probs)
    score_rows(names, monkeypatch)
    found, expected = names["exported"].module()(names["x"]), names["fitted"](names["x"])
    assert list(found) == list(expected) == names["fitted"].output_names == ["probs", "log_density", "ood_score"]
    assert_close(found, expected)
    assert expected["ood_score"].shape == (256,)
    assert names["log_density"].shape == (256,)
