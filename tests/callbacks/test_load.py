"""``load_fitted``: a file alone gives back the predictions that a Trainer would, and no other file passes for it."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.feature_scores import FeatureCallback
from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.isotonic import IsotonicScaling
from lightning_uq.callbacks.knn import FitKNN
from lightning_uq.callbacks.load import load_fitted
from lightning_uq.callbacks.matrix_scaling import MatrixScaling
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.callbacks.vector_scaling import VectorScaling
from lightning_uq.errors import InputError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.modules.epinet import EpinetModule
from lightning_uq.modules.evidential import EvidentialModule
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.fitted import FittedNetwork
from lightning_uq.networks.mlp import MLP
from lightning_uq.predictions import DirichletPrediction

GENERATOR = torch.Generator().manual_seed(1)
X, VAL_X, TEST_X = (torch.randn(n, 4, generator=GENERATOR) for n in (80, 90, 31))


def labels(x):
    noisy = torch.rand(len(x), generator=GENERATOR) < 0.2
    return torch.where(noisy, torch.randint(2, (len(x),), generator=GENERATOR), (x[:, 0] > 0).long())


Y, VAL_Y = labels(X), labels(VAL_X)
TEST = DataLoader(TensorDataset(TEST_X), batch_size=8)
pytestmark = pytest.mark.filterwarnings(
    "ignore:The checkpoint holds what"
)  # where the file's weights alone are compared
NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [6]})
SGD = Factory("torch.optim.SGD", {"lr": 0.5})


def loader(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=8)


class UsersModule(LightningModule):
    def __init__(self, network=None, as_probs: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        self.as_probs = as_probs

    def forward(self, x):
        logits = self.net(x)
        return logits.softmax(1) if self.as_probs else logits

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class WithLoss(UsersModule):
    """Its loss has weights of its own, beside the network's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("class_weights", torch.tensor([1.0, 2.0]))


class Demanding(UsersModule):
    """It cannot be built from its file, for it saves no hyper-parameters."""

    def __init__(self, width):
        super().__init__()


class WithActivation(UsersModule):
    """Its activation is seen in no weight. What it saves of its arguments differs."""

    saved = ()

    def __init__(self, activation="relu", slope=0.1):
        super().__init__()
        if self.saved:
            self.save_hyperparameters(*self.saved)
        self.net[2] = nn.LeakyReLU(slope) if activation == "leaky" else nn.ReLU()


class SavesOne(WithActivation):
    saved = ("activation",)


class SavesAll(WithActivation):
    saved = ("activation", "slope")


class OfAnyArguments(WithActivation):
    def __init__(self, **options):
        super().__init__(**options)


class FitCentre(FeatureCallback):
    """Its score is a function of its own, which no network carries."""

    score_name = "centre_distance"

    def fit_tensors(self, model, loader, trainer):
        features = self.gather_features(model, loader, trainer)
        return {"feature_layer": self.features.resolved, "centre": features.mean(1)}


class Evidential(DeterministicModule):
    def prediction(self, output):
        return DirichletPrediction(1 + output.exp())


def deterministic():
    return DeterministicModule(NETWORK, optimizer=SGD)


def ensemble(**kwargs):
    return EnsembleModule(NETWORK, num_members=3, optimizer=SGD, seed=0, **kwargs)


@pytest.fixture
def write(make_trainer, tmp_path):
    """Train, fit the callbacks, and give back the path of their file and a Trainer that predicts with them in float64."""

    def run(module, *callbacks, before=(), **kwargs):
        keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss")
        trainer = make_trainer(callbacks=[*before, *callbacks, keep], enable_checkpointing=True, max_epochs=4, **kwargs)
        trainer.fit(module, loader(), loader(VAL_X, VAL_Y))
        predicting = make_trainer(callbacks=[*callbacks], **{"precision": "64-true", **kwargs})
        return callbacks[-1].uq_ckpt_path, predicting

    return run


def predicted(trainer, module, path):
    parts = trainer.predict(module, TEST, ckpt_path=path, weights_only=True)
    return type(parts[0]).cat(parts)


def in_float64(fitted):
    """What a fitted module gives for the test rows, which the Trainer predicts in batches of another shape."""
    return fitted.double()(TEST_X.double())


def assert_close(one, other, tol=1e-6):
    torch.testing.assert_close(one.double(), other.double(), rtol=tol, atol=tol)


# ---------------------------------------------------------------------- the numbers are the Trainer's


@pytest.mark.parametrize(
    ("make", "calibration"),
    [
        (deterministic, lambda: TemperatureScaling()),
        (deterministic, lambda: VectorScaling()),
        (deterministic, lambda: MatrixScaling()),
        (ensemble, lambda: MatrixScaling()),
        (deterministic, lambda: IsotonicScaling()),
        (ensemble, lambda: IsotonicScaling()),
        (ensemble, lambda: TemperatureScaling()),
        (ensemble, lambda: TemperatureScaling(scope="shared")),
        (ensemble, lambda: TemperatureScaling(scope="member")),
        (lambda: ensemble(execution="loop"), lambda: TemperatureScaling()),
        (lambda: Evidential(NETWORK, optimizer=SGD), lambda: TemperatureScaling()),
        (lambda: EvidentialModule(NETWORK, optimizer=SGD), lambda: VectorScaling()),
        (lambda: EpinetModule(NETWORK, optimizer=SGD), lambda: TemperatureScaling()),
        (lambda: EpinetModule(NETWORK, optimizer=SGD), lambda: TemperatureScaling(scope="shared")),
    ],
)
def test_it_predicts_what_the_trainer_does(write, make, calibration):
    module = make()
    path, trainer = write(module, FitGMM(feature_transform="raw"), calibration())
    expected = predicted(trainer, module, path)
    given = {"network": make()} if isinstance(module, Evidential) else {}  # a class of the tests need not be importable
    fitted = load_fitted(path, **given)
    assert isinstance(fitted, nn.Module)
    assert not fitted.training
    probs, log_density, ood_score = in_float64(fitted).values()
    assert_close(probs, expected.probs, 1e-9)
    assert_close(log_density, expected.log_density, 1e-9)
    assert torch.equal(ood_score, -log_density)
    trainer.callbacks = []
    module.prediction_transforms.clear()
    assert not torch.allclose(probs.double(), predicted(trainer, module, path).probs.double(), atol=1e-3)


@pytest.mark.parametrize("prefix", ["whole", "inner"])
def test_an_unmodified_module(write, prefix):
    module = UsersModule()
    scaling, gmm = TemperatureScaling(attach=True), FitGMM(attach=True)
    path, trainer = write(module, gmm, scaling)
    expected = predicted(trainer, module, path)
    given = UsersModule() if prefix == "whole" else UsersModule().net
    before = copy.deepcopy(given.state_dict())
    probs, log_density, _ = in_float64(load_fitted(path, given)).values()
    assert_close(log_density, expected.log_density, 1e-9)
    assert_close(probs, expected.probs, 1e-9)
    after = given.state_dict()  # a copy took the weights
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(m.training for m in given.modules())


def test_what_comes_back_depends_on_what_was_fitted(write):
    module = deterministic()
    path, _ = write(module, TemperatureScaling())
    assert list(load_fitted(path)(TEST_X)) == load_fitted(path).output_names == ["probs"]
    path, _ = write(module, FitGMM())
    probs = load_fitted(path)(TEST_X)["probs"]
    weights = DeterministicModule.load_from_checkpoint(path, weights_only=True).eval()
    with torch.no_grad():
        assert_close(probs, weights(TEST_X)[0].softmax(1))


def test_weights_beside_the_network_are_part_of_the_fingerprint(write, tmp_path):
    path, _ = write(WithLoss(), TemperatureScaling())
    assert list(load_fitted(path, UsersModule().net)(TEST_X)) == ["probs"]
    content = torch.load(path, weights_only=True)
    content["state_dict"]["class_weights"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(
        InputError, match="TemperatureScaling was not fitted on the weights in .*: their fingerprints differ"
    ):
        load_fitted(tmp_path / "other.ckpt", UsersModule().net)


def test_a_compiled_network_and_a_plain_one_are_one(write):
    module = UsersModule()
    module.net = torch.compile(module.net, backend="eager")
    path, _ = write(module, TemperatureScaling())
    plain = load_fitted(path, UsersModule())(TEST_X)["probs"]
    assert_close(load_fitted(path, UsersModule().net)(TEST_X)["probs"], plain)
    compiled = UsersModule()
    compiled.net = torch.compile(compiled.net, backend="eager")
    assert_close(load_fitted(path, compiled)(TEST_X)["probs"], plain)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_files_of_every_precision(write, precision):
    module = deterministic()
    path, trainer = write(module, FitGMM(), TemperatureScaling(), precision=precision)
    expected = predicted(trainer, module, path)
    probs, log_density, _ = load_fitted(path)(TEST_X).values()
    tolerance = 1e-5 if precision == "64-true" else 5e-2
    assert_close(probs, expected.probs, tolerance)
    if precision == "64-true":
        assert_close(log_density, expected.log_density, 1e-4)


def test_after_an_ema_it_is_the_average(write, tmp_path):
    module = deterministic()
    path, _ = write(module, TemperatureScaling(), before=[EMAWeightAveraging(decay=0.5)])
    fitted = load_fitted(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(fitted.network.model.network.network[0].weight, state["network.network.0.weight"])


def test_our_modules_take_their_network_again(write):
    """A lambda is not in the file; what the constructor takes is what is asked for."""
    module = DeterministicModule(MLP(4, 2, hidden_sizes=(6,)), optimizer=SGD)
    path, trainer = write(module, TemperatureScaling())
    expected = predicted(trainer, module, path).probs
    with pytest.raises(InputError, match=r"argument `network`: a .*MLP.* Pass an instance"):
        load_fitted(path)
    network = MLP(4, 2, hidden_sizes=(6,))
    before = network[0].weight.detach().clone()
    for given in (network, DeterministicModule(network), lambda: MLP(4, 2, hidden_sizes=(6,))):
        assert_close(in_float64(load_fitted(path, given))["probs"], expected, 1e-9)
    assert torch.equal(network[0].weight, before)


def test_probabilities_and_what_a_function_reads(write):
    module = UsersModule(as_probs=True)
    path, _ = write(module, TemperatureScaling(output="probs", attach=True))
    plain = UsersModule.load_from_checkpoint(path, weights_only=True).eval()
    T = torch.load(path, weights_only=True)["callbacks"]["TemperatureScaling"]["tensors"]["temperature"]
    with torch.no_grad():
        expected = (plain.net(TEST_X) / T).softmax(1)
    assert_close(load_fitted(path, UsersModule(as_probs=True))(TEST_X)["probs"], expected, 1e-5)

    def read(out):
        return out.log()

    path, _ = write(UsersModule(as_probs=True), TemperatureScaling(output=read))
    with pytest.raises(InputError, match="fitted with a function as `output`: pass it"):
        load_fitted(path, UsersModule(as_probs=True))
    assert load_fitted(path, UsersModule(as_probs=True), output=read)(TEST_X)["probs"].shape == (31, 2)


def test_a_predict_fn_is_asked_for_again(write):
    def predict(model, x):
        return 2 * model.net(x)

    path, _ = write(UsersModule(), FitGMM(predict_fn=predict), TemperatureScaling(predict_fn=predict))
    with pytest.raises(InputError, match="was fitted with a `predict_fn`: pass it as argument `predict_fn`"):
        load_fitted(path, UsersModule())
    T = torch.load(path, weights_only=True)["callbacks"]["TemperatureScaling"]["tensors"]["temperature"]
    plain = UsersModule.load_from_checkpoint(path, weights_only=True).eval()
    with torch.no_grad():
        probs, log_density, _ = load_fitted(path, UsersModule(), predict_fn=predict)(TEST_X).values()
        assert_close(probs, (2 * plain.net(TEST_X) / T).softmax(1))
    assert log_density.shape == (31,)


# ---------------------------------------------------------------------- it is a module like any other


@pytest.fixture
def fitted(write):
    path, _ = write(ensemble(), FitGMM(), TemperatureScaling(scope="member"))
    return load_fitted(path)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the tap's own, which it undoes
@pytest.mark.parametrize(
    "remake",
    [
        copy.deepcopy,
        lambda fitted: pickle.loads(pickle.dumps(fitted)),
        lambda fitted: torch.compile(fitted, backend="aot_eager", fullgraph=True),
        lambda fitted: torch.export.export(fitted, (TEST_X[:7],), dynamic_shapes=BATCH, strict=False).module(),
        lambda fitted: torch.export.export(fitted, (TEST_X[:7],), dynamic_shapes=BATCH, strict=True).module(),
    ],
    ids=["deepcopy", "pickle", "compile", "export", "strict export"],
)
def test_it_copies_compiles_and_exports(fitted, remake):
    expected = fitted(TEST_X)
    again = remake(fitted)
    assert list(again(TEST_X)) == fitted.output_names == ["probs", "log_density", "ood_score"]
    torch.testing.assert_close(again(TEST_X), expected)
    assert again(TEST_X[:3])["log_density"].shape == (3,)


BATCH = ({0: torch.export.Dim("batch", min=2)},)


@pytest.mark.parametrize(
    "make",
    [
        UsersModule,
        lambda: EvidentialModule(NETWORK, optimizer=SGD),
        lambda: EpinetModule(NETWORK, optimizer=SGD),
    ],
)
def test_other_modules_export_too(write, make):
    path, _ = write(make(), FitGMM(), TemperatureScaling())
    fitted = load_fitted(path, make())
    exported = torch.export.export(fitted, (TEST_X[:7],), dynamic_shapes=BATCH, strict=False).module()
    torch.testing.assert_close(exported(TEST_X), fitted(TEST_X))


def test_onnx_runs_it(fitted, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "fitted.onnx"
    names = fitted.output_names
    torch.onnx.export(fitted, (TEST_X,), path, dynamo=True, dynamic_shapes=BATCH, output_names=names)
    session = runtime.InferenceSession(path)
    for name, value in fitted(TEST_X).items():
        (found,) = session.run([name], {session.get_inputs()[0].name: TEST_X.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), value, rtol=1e-4, atol=1e-5)


def test_temperature_and_density_keep_their_precision_in_a_cast(fitted):
    half = copy.deepcopy(fitted).bfloat16()
    assert half.temperature == fitted.temperature
    assert half.feature_score.densities[0].whitening.dtype == torch.float64
    probs, log_density, _ = half(TEST_X.bfloat16()).values()
    assert (probs.dtype, log_density.dtype) == (torch.float32, torch.float64)
    assert_close(probs, fitted(TEST_X)["probs"], 2e-2)
    assert "temperature=" in repr(fitted)
    assert "FeatureDensity of" in repr(fitted)


@pytest.mark.parametrize("make", [VectorScaling, MatrixScaling, IsotonicScaling])
def test_a_calibration_of_classes_exports_and_keeps_its_precision_in_a_cast(write, make):
    path, _ = write(deterministic(), make())
    fitted = load_fitted(path)
    exported = torch.export.export(fitted, (TEST_X[:7],), dynamic_shapes=BATCH, strict=False).module()
    torch.testing.assert_close(exported(TEST_X), fitted(TEST_X))
    assert make.tensor_name in repr(fitted)
    assert getattr(copy.deepcopy(fitted).bfloat16().calibration, make.tensor_name).dtype == torch.float64


def test_calibrations_exclude_each_other_and_densities_need_layers():
    network = EnsembleNetwork([nn.Linear(2, 2)])
    with pytest.raises(InputError, match="`temperature` and `class_scaling` cannot be combined"):
        FittedNetwork(network, temperature=torch.tensor(1.0), class_scaling=torch.ones(2, 2))
    with pytest.raises(InputError, match="`class_matrix` and `class_curves` cannot be combined"):
        FittedNetwork(network, class_matrix=torch.ones(5, 2), class_curves=torch.ones(2, 2, 3))
    with pytest.raises(
        InputError, match="one layer per member of `feature_score`, but there are 1 layers and 0 members"
    ):
        FittedNetwork(network, layers=["members.0"])
    assert "nothing fitted" in repr(FittedNetwork(network))


# ---------------------------------------------------------------------- other files


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "missing.ckpt cannot be read"),
        (b"no checkpoint", "cannot be read"),
        ([1, 2], "holds no `state_dict`"),
        ({"weight": torch.ones(1)}, "holds no `state_dict`"),
        ({"state_dict": {}}, "holds no state of a fitted callback"),
        ({"state_dict": {}, "callbacks": {"FitGMM": {"version": 2}}}, "holds no state"),
        ({"state_dict": {}, "callbacks": {"X": slice(1)}}, "cannot be read"),  # no plain data
    ],
)
def test_other_files_are_named(tmp_path, content, match):
    path = tmp_path / "missing.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=match):
        load_fitted(path, MLP(4, 2))


def test_a_truncated_file_is_named(write, tmp_path):
    path, _ = write(deterministic(), TemperatureScaling())
    whole = Path(path).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.ckpt cannot be read"):
        load_fitted(tmp_path / "cut.ckpt")


def test_weights_of_another_training_do_not_pass(write, tmp_path):
    path, _ = write(deterministic(), FitGMM(), TemperatureScaling())
    content = torch.load(path, weights_only=True)
    content["state_dict"]["network.network.0.weight"][0, 0] += 1e-6
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="their fingerprints differ"):
        load_fitted(tmp_path / "other.ckpt")


def test_networks_that_do_not_fit_are_named(write, tmp_path):
    path, _ = write(UsersModule(), TemperatureScaling())
    with pytest.raises(InputError, match=r"does not fit the weights in .*: the file lacks \['.*'\]"):
        load_fitted(path, MLP(4, 2))
    wide = UsersModule()
    wide.net[0] = nn.Linear(5, 6)
    with pytest.raises(InputError, match="size mismatch for net.0.weight"):
        load_fitted(path, wide)
    with pytest.raises(InputError, match=r"the network lacks \['net.1.bias'"):
        load_fitted(path, nn.ModuleDict({"net": nn.ModuleDict({"0": nn.Linear(4, 6)})}))
    with pytest.raises(InputError, match="the network lacks|the file lacks"):
        load_fitted(path, nn.Identity())
    with pytest.raises(InputError, match="must be a torch.nn.Module, but its type is function"):
        load_fitted(path, lambda: UsersModule())


def test_a_class_that_cannot_be_built_asks_for_the_network(write, tmp_path):
    class Local(UsersModule):
        pass

    for module in (Local(), Demanding(3)):
        path, _ = write(module, TemperatureScaling())
        with pytest.raises(InputError, match=r"was written by .*, which cannot be (imported|built).* Pass an instance"):
            load_fitted(path)
        assert load_fitted(path, module)(TEST_X)["probs"].shape == (31, 2)
    content = torch.load(path, weights_only=True)
    for class_path, match in (
        (None, "does not name the class"),
        ("builtins.dict", "which is not a torch.nn.Module"),
        ("torch.nn.Linear", "which cannot be built from the file: it lacks the arguments"),
    ):
        content["lightning_uq_written_by"]["class_path"] = class_path
        torch.save(content, tmp_path / "foreign.ckpt")
        with pytest.raises(InputError, match=match):
            load_fitted(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize(
    ("kind", "lacking"), [(WithActivation, "activation, slope"), (SavesOne, "slope"), (OfAnyArguments, "options")]
)
def test_defaults_do_not_stand_in_for_arguments_that_no_file_holds(write, kind, lacking):
    module = kind(activation="leaky", slope=3.0)
    path, _ = write(module, TemperatureScaling())
    with pytest.raises(InputError, match=rf"it lacks the arguments {lacking}\. Pass an instance"):
        load_fitted(path)
    assert load_fitted(path, module)(TEST_X)["probs"].shape == (31, 2)


@pytest.mark.parametrize("make", [lambda: SavesAll("leaky", 3.0), WithLoss], ids=["all are saved", "it takes none"])
def test_a_users_class_is_built_again(write, make):
    module = make()
    path, _ = write(module, TemperatureScaling())
    assert_close(load_fitted(path)(TEST_X)["probs"], load_fitted(path, module)(TEST_X)["probs"], 0)


def test_which_states_go_inside(write):
    callbacks = [FitGMM(), FitGMM(name="tied", covariance="tied"), FitKNN(k=2), TemperatureScaling()]
    path, _ = write(deterministic(), *callbacks)
    tied = "FitGMM{'name': 'tied'}"
    with pytest.raises(
        InputError, match=r"several states of density: \['FitGMM', .*Pass the key of one of them as `states`"
    ):
        load_fitted(path)
    one, other = (
        load_fitted(path, states=[key, "TemperatureScaling"])(TEST_X)["log_density"] for key in ("FitGMM", tied)
    )
    assert not torch.allclose(one, other)
    assert list(load_fitted(path, states=["TemperatureScaling"])(TEST_X)) == ["probs"]
    assert list(load_fitted(path, states=["FitKNN"])(TEST_X)) == ["probs", "ood_score"]
    for states, came in ((["FitVim"], "FitVim"), ("FitGMM", "'FitGMM'")):
        with pytest.raises(InputError, match=f"`states` must be a list of keys from .*, but it is {came}"):
            load_fitted(path, states=states)
    path, _ = write(deterministic(), FitCentre())
    with pytest.raises(
        InputError, match=r"no state that can be built into a network, but \['FitCentre'\]\. Only these"
    ):
        load_fitted(path)


def test_swapped_arguments_are_named():
    with pytest.raises(
        InputError,
        match=r"`path` must be the path of a checkpoint, but its type is Linear. Call `load_fitted\(path, network\)`",
    ):
        load_fitted(nn.Linear(2, 2), "model-uq.ckpt")
