"""`lightning-uq evaluate`: every number recomputed from the networks' own logits and features."""

import inspect
import json
import math
import re
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from lightning_uq import DeterministicModule, EnsembleModule, EvidentialModule, Factory, FitGMM, save_fitted
from lightning_uq.cli import main
from lightning_uq.cli.evaluate import evaluate as command
from lightning_uq.data import DigitsDataModule
from lightning_uq.errors import InputError
from lightning_uq.evaluate import Outputs, Settings, evaluate, load_model, metrics
from lightning_uq.networks import MLP

REFERENCE = Path(__file__).parent / "reference"
DETECTION = [f"{m}_{key}" for m in ("m1", "m2") for key in ("auroc", "auprc", "auprc_in", "auprc_out")]
KEYS = ["accuracy", "ece", *DETECTION, "t_ece", *(f"t_{key}" for key in DETECTION)]
NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 64, "out_features": 8, "hidden_sizes": [24]})
OURS = "lightning_uq.DeterministicModule"
SCORES = {
    "softmax": ("energy", "predictive_entropy"),
    "ensemble": ("mutual_information", "predictive_entropy"),
    "gmm": ("log_density", "posterior_entropy"),
}


def named(model_type, values):
    """Values by the original's keys, and the same by their plain names."""
    plain = {"ece": values["ece"], "ece_after_temperature": values["t_ece"]}
    for m, score in zip(("m1", "m2"), SCORES[model_type], strict=True):
        for kind in ("auroc", "auprc_in", "auprc_out"):
            plain[f"ood_{kind}_{score}"] = values[f"{m}_{kind}"]
            plain[f"ood_{kind}_{score}_after_temperature"] = values[f"t_{m}_{kind}"]
    return {**values, **plain}


USERS_FILE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_uq.data import DigitsDataModule, stratified_split


class Lit(LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8))

    def forward(self, x):
        return self.net(x)


class FixedTest(LightningDataModule):
    '''Its test set is that of seed 0; its seed splits the rest, as the image data modules do.'''

    def __init__(self, seed: int = 0, labelled: bool = True):
        super().__init__()
        self.seed, self.labelled = seed, labelled

    def setup(self, stage):
        digits = DigitsDataModule(seed=0)
        x, y = digits.dataset("train").tensors
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        self.parts = {"val": (x[order[:200]], y[order[:200]]), "train": (x[order[200:]], y[order[200:]])}
        self.parts["test"], self.parts["ood"] = digits.dataset("test").tensors, digits.dataset("ood").tensors

    def loader(self, part, **kwargs):
        tensors = self.parts[part] if self.labelled or part != "val" else self.parts[part][:1]
        return DataLoader(TensorDataset(*tensors), 100, **kwargs)

    def train_dataloader(self):
        return self.loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")

    def ood_dataloaders(self):
        return {"near": self.loader("ood"), "far": [(5 * torch.randn(50, 64),)]}
"""


@pytest.fixture(autouse=True)
def no_columns(monkeypatch):
    """Tables have their own width: another command of this process may have set COLUMNS."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def networks():
    """Three networks that were trained a little, on the splits of seed 0, 0 and 1."""
    trained = []
    for seed, split in ((0, 0), (1, 0), (2, 1)):
        torch.manual_seed(seed)
        network = MLP(64, 8, hidden_sizes=[24])
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        x, y = DigitsDataModule(seed=split).dataset("train").tensors
        for _ in range(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        trained.append(network.eval())
    return trained


@pytest.fixture(autouse=True)
def checkpoints(networks, tmp_path, monkeypatch):
    """The networks' checkpoints 0.ckpt, 1.ckpt and 2.ckpt in a directory of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for i, network in enumerate(networks):
        module = DeterministicModule(NETWORK)
        module.network.network.load_state_dict(network.state_dict())
        save(module, f"{i}.ckpt")
    (tmp_path / "users_file.py").write_text(USERS_FILE)
    yield
    sys.modules.pop("users_file", None)


def save(module, path):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def by_hand(model_type, members, data_of_members, jitter=None):
    """The DDU definitions in numpy and scikit-learn."""
    data = data_of_members[0]
    (x, y), (far, _) = data.dataset("test").tensors, data.dataset("ood").tensors
    with torch.no_grad():
        inside, outside = (np.stack([in_batches(member, part) for member in members]) for part in (x, far))
        validation = [
            (in_batches(member, d.dataset("val").tensors[0]), d.dataset("val").tensors[1].numpy())
            for member, d in zip(members, data_of_members, strict=True)
        ]
    y = y.numpy()
    temperatures = [best_temperature(logits, labels) for logits, labels in validation]
    density = None
    if jitter is not None:
        density = [gaussian_log_probs(members[0], data, part, jitter) for part in (x, far)]
    T = np.array(temperatures)[:, None, None]
    values = {}
    for prefix, a, b in (("", inside, outside), ("t_", inside / T, outside / T)):
        probs = softmax(a).mean(0)
        if not prefix:
            values["accuracy"] = (probs.argmax(1) == y).mean()
        values[f"{prefix}ece"] = ece(probs, y)
        if model_type == "ensemble":
            m1, m2 = ([f(softmax(part)) for part in (a, b)] for f in (mutual_information, mean_entropy))
            found = {"m1": (m1, "out"), "m2": (m2, "out")}
        else:
            c, d = (a[0], b[0]) if density is None else density
            m1 = [-np.log(np.exp(part - part.max()).sum(1)) - part.max() for part in (c, d)]
            m2 = [mean_entropy(softmax(part)[None]) for part in (c, d)]
            found = {"m1": (m1, "in"), "m2": (m2, "out")}
        for name, ((s, t), positive) in found.items():
            scores, is_ood = np.concatenate([s, t]), np.repeat([0, 1], [len(s), len(t)])
            values[f"{prefix}{name}_auroc"] = roc_auc_score(is_ood, scores)
            values[f"{prefix}{name}_auprc_in"] = average_precision_score(1 - is_ood, -scores)
            values[f"{prefix}{name}_auprc_out"] = average_precision_score(is_ood, scores)
            values[f"{prefix}{name}_auprc"] = values[f"{prefix}{name}_auprc_{positive}"]
    return values, temperatures


def nll(logits, labels, temperature):
    return -softmax(logits / temperature, log=True)[np.arange(len(labels)), labels].mean()


def best_temperature(logits, labels):
    """By a bracketing search in log T, which knows no derivative."""
    options = {"xatol": 1e-12}
    found = minimize_scalar(lambda u: nll(logits, labels, np.exp(u)), bounds=(-3, 3), method="bounded", options=options)
    return float(np.exp(found.x))


def in_batches(network, x):
    """Logits of batches of 64 rows, which the command reads too: a float32 network rounds otherwise in other batches."""
    return torch.cat([network(rows) for rows in x.split(64)]).double().numpy()


def softmax(logits, log=False):
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probs if log else np.exp(log_probs)


def mean_entropy(probs):
    p = probs.mean(0)
    return -(p * np.log(p)).sum(1)


def mutual_information(probs):
    return mean_entropy(probs) + (probs * np.log(probs)).sum(2).mean(0)


def ece(probs, y):
    confidence, correct = probs.max(1), probs.argmax(1) == y
    bins = np.ceil(15 * confidence - 1).astype(int)
    gaps = [abs(correct[bins == k].sum() - confidence[bins == k].sum()) for k in range(15)]
    return sum(gaps) / len(y)


def gaussian_log_probs(network, data, x, jitter):
    train_x, train_y = data.dataset("train").tensors
    f, g = hidden(network, train_x), hidden(network, x)
    columns = []
    for c in range(8):
        rows = f[train_y == c]
        normal = torch.distributions.MultivariateNormal(
            rows.mean(0), torch.cov(rows.T) + jitter * torch.eye(f.shape[1])
        )
        columns.append(normal.log_prob(g))
    return torch.stack(columns, 1).numpy()


def hidden(network, inputs):
    """The input of the last linear layer, by a hook of the test's own."""
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    seen = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for rows in inputs.split(64):
            network(rows)
    handle.remove()
    return torch.cat(seen)


def run(*arguments):
    assert main(["evaluate", *arguments, "--out", "out.json"]) == 0
    return json.loads(Path("out.json").read_text(), parse_constant=pytest.fail)


def fails(capsys, *arguments):
    """The one line on stderr that the command ends with."""
    assert main(["evaluate", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.endswith(".ckpt")] == lines[-1:]
    assert not Path("out.json").exists()
    return lines[-1].removeprefix("lightning-uq: error: ")


DIGITS = ("--data", "digits", "--ood", "8,9")
CLOSE = 1e-6  # the search by hand finds T to 1e-8


# ---------------------------------------------------------------------- the numbers


def test_softmax_over_two_runs(networks, capsys):
    result = run("--run", "0.ckpt", "--run", "2.ckpt", "--module", OURS, *DIGITS, "--data-seeds", "0,1")
    splits = [DigitsDataModule(seed=0), DigitsDataModule(seed=1)]
    expected = [by_hand("softmax", [networks[i]], [d]) for i, d in zip((0, 2), splits, strict=True)]
    assert list(result) == ["mean", "std", "se", "values", "info"]
    assert result["std"] == result["se"]
    named_values = [named("softmax", values) for values, _ in expected]
    assert set(KEYS) < set(named_values[0])
    assert set(result["values"]) == set(named_values[0])
    for key in named_values[0]:
        a, b = (values[key] for values in named_values)
        assert result["values"][key] == pytest.approx([a, b], abs=CLOSE)
        assert result["mean"][key] == pytest.approx((a + b) / 2, abs=CLOSE)
        # The standard error of two is half their difference.
        assert result["se"][key] == pytest.approx(abs(a - b) / 2, abs=CLOSE)
    temperatures = np.array(result["info"]["temperature"])
    assert np.allclose(temperatures, [T for _, T in expected], atol=1e-6)
    grid = np.array(result["info"]["grid_temperature"])
    assert np.allclose(10 * grid, np.round(10 * grid))
    assert 0 < np.abs(grid - temperatures).max() < 0.1
    assert result["info"]["runs"] == [["0.ckpt"], ["2.ckpt"]]
    assert result["info"]["ood_name"] == "digits_8_9"
    table(capsys.readouterr().out, result)


def table(out, result):
    """Check that the output is one table, with each number once, and no codes of a terminal."""
    lines = out.splitlines()
    assert lines[-1] == "Wrote out.json and out.html"
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in out

    def text(name):
        mean, error = result["mean"][name], result["se"][name]
        return f"{mean:.4f}" if error is None else f"{mean:.4f} ±{error:.4f}"

    kind = result["info"]["model_type"]
    names = ["accuracy", "ece", *(f"ood_{k}_{s}" for s in SCORES[kind] for k in ("auroc", "auprc_in", "auprc_out"))]
    rows = [re.split(r"  +", line.strip()) for line in lines[2:-2]]
    assert [row[1] for row in rows] == [text(name) for name in names]
    assert [row[2] for row in rows[1:]] == [text(f"{name}_after_temperature") for name in names[1:]]
    assert [row[0] for row in rows[:3]] == [
        "Accuracy",
        "Expected calibration error, 15 bins",
        f"OOD by {SCORES[kind][0].replace('_', ' ')}: AUROC",
    ]
    assert lines[-2].split()[0] == "Temperature"


def test_one_run_has_no_standard_error(capsys):
    result = run("--run", "0.ckpt", "--module", OURS, *DIGITS)
    assert set(result["se"].values()) == {None}
    assert all(result["values"][key] == [result["mean"][key]] for key in KEYS)
    table(capsys.readouterr().out, result)


def test_without_ood_data_there_is_no_detection(capsys):
    detecting = run("--run", "0.ckpt", "--module", OURS, *DIGITS)
    arguments = ("--run", "0.ckpt", "--module", OURS, "--data", "digits", "--data-args", '{"ood_classes": [8, 9]}')
    result = run(*arguments)
    assert result["mean"] == {key: value for key, value in detecting["mean"].items() if key.endswith(("accuracy", "ece", "ece_after_temperature"))}  # fmt: skip
    assert result["info"]["ood_name"] is None
    capsys.readouterr()
    assert main(["report", "out.json"]) == 0
    assert "OOD" not in capsys.readouterr().out
    page = Path("out.html").read_text()
    assert "temperature-scaled" in page
    assert "out-of-distribution" not in page
    assert "AUROC" not in page


def test_data_are_named_as_in_a_comparison():
    with_dot, with_colon = (
        run("--run", "0.ckpt", "--module", OURS, "--data", f"users_file{mark}FixedTest") for mark in ".:"
    )
    assert with_dot["mean"] == with_colon["mean"]


def test_an_ensembles_members_in_files_or_in_one(networks):
    data = DigitsDataModule(seed=0)
    expected, temperatures = by_hand("ensemble", networks[:2], [data, data])
    apart = run("--run", "0.ckpt", "1.ckpt", "--module", OURS, "--model-type", "ensemble", *DIGITS)
    assert apart["mean"] == pytest.approx(named("ensemble", expected), abs=CLOSE)
    assert apart["info"]["temperature"] == [pytest.approx(temperatures, abs=1e-6)]
    assert expected["m1_auroc"] != expected["t_m1_auroc"]
    save(EnsembleModule.from_checkpoints(["0.ckpt", "1.ckpt"]), "both.ckpt")
    whole = run(
        "--run", "both.ckpt", "--module", "lightning_uq.EnsembleModule", "--model-type", "ensemble", *DIGITS
    )  # fmt: skip
    assert whole["mean"] == pytest.approx(named("ensemble", expected), abs=1e-5)


def test_gmm(networks):
    gmm = ("--model-type", "gmm", "--regularization", "0.01")
    result = run("--run", "0.ckpt", "--module", OURS, *DIGITS, *gmm)
    expected, _ = by_hand("gmm", [networks[0]], [DigitsDataModule(seed=0)], jitter=0.01)
    assert result["mean"] == pytest.approx(named("gmm", expected), abs=CLOSE)
    assert all(result["mean"][f"t_{key}"] == result["mean"][key] for key in DETECTION)
    assert result["mean"]["t_ece"] != result["mean"]["ece"]
    softmax = run("--run", "0.ckpt", "--module", OURS, *DIGITS)
    assert softmax["mean"]["accuracy"] == result["mean"]["accuracy"]
    assert softmax["mean"]["m2_auroc"] != result["mean"]["m2_auroc"]


@pytest.mark.parametrize("name", ["ddu_auroc_of_logits", "ddu_gmm_well_C3_D8"])
def test_scores_are_the_originals(name):
    stored = np.load(REFERENCE / f"{name}.npz")
    kind = "gmm" if "gmm" in name else "softmax"
    inside, outside = ("logp_test", "logp_ood") if kind == "gmm" else ("logits_in", "logits_ood")
    # In float32, as the original has them: entropies of its saturated posterior tie at 0, which in float64 they do not.
    inside, outside = (torch.from_numpy(stored[key]).float() for key in (inside, outside))
    labels = torch.zeros(len(inside), dtype=torch.long)
    outputs = Outputs(inside[None], labels, outside[None], torch.ones(1), inside, outside)
    values = metrics(kind, outputs)
    found = [values[f"{m}_{key}"] for m in ("m1", "m2") for key in ("auroc", "auprc")]
    assert found == pytest.approx(stored["m1_auroc_auprc_m2_auroc_auprc"].tolist(), abs=1e-7)


def test_temperatures_of_each_members_own_split(networks):
    """A data module of one's own: its seed moves the validation data, its test data stay."""
    import users_file

    own = ("--data", "users_file.FixedTest", "--ood", "near", "--module", OURS, "--model-type", "ensemble")
    result = run("--run", "0.ckpt", "1.ckpt", *own, "--data-seeds", "3,4")
    temperatures = []
    for network, seed in zip(networks[:2], (3, 4), strict=True):
        data = users_file.FixedTest(seed)
        data.setup("fit")
        x, y = data.parts["val"]
        with torch.no_grad():
            temperatures.append(best_temperature(network(x).double().numpy(), y.numpy()))
    assert result["info"]["temperature"] == [pytest.approx(temperatures, abs=1e-5)]
    assert result["info"]["data_seeds"] == [[3, 4]]
    assert result["info"]["ood_name"] == "near"


def test_a_density_is_fitted_to_all_training_rows_in_a_loader_that_shuffles_and_drops():
    arguments = ("--run", "0.ckpt", "--module", OURS, "--data", "users_file.FixedTest", "--ood", "near")
    first, second = (run(*arguments, "--model-type", "gmm")["values"] for _ in range(2))
    assert first == second


# ---------------------------------------------------------------------- models


@pytest.mark.filterwarnings("ignore:The checkpoint holds what FitGMM fitted")  # it was fitted again
def test_a_checkpoint_of_the_command_line_names_its_module():
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = [f"--trainer.{name}={str(value).lower()}" for name, value in quiet.items()]
    config = Path(__file__).parents[1] / "configs" / "softmax_digits.yaml"
    fit = ["fit", "--config", str(config), *options, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    assert main(fit) == 0
    (path,) = Path().rglob("best.ckpt")
    softmax = run("--run", str(path), *DIGITS)
    # A density's file names it too.
    fit[2] = str(config.with_name("ddu_digits.yaml"))
    assert main(fit) == 0
    (path,) = Path().rglob("best-uq.ckpt")
    density = run("--run", str(path), *DIGITS, "--model-type", "gmm")
    assert all(key in density["mean"] and key in softmax["mean"] for key in KEYS)


def test_a_users_module_and_a_network_alone(networks):
    import users_file

    lit = users_file.Lit(24)
    for own, trained in zip(lit.net[::2], [m for m in networks[0].modules() if isinstance(m, nn.Linear)], strict=True):
        own.load_state_dict(trained.state_dict())
    save(lit, "lit.ckpt")
    expected = run("--run", "0.ckpt", "--module", OURS, *DIGITS, "--model-type", "gmm")
    width = ("--init-args", '{"width": 24}')
    users = run("--run", "lit.ckpt", "--module", "users_file.Lit", *width, *DIGITS, "--model-type", "gmm")
    assert users["mean"] == pytest.approx(expected["mean"], abs=1e-6)
    alone = ("--network", NETWORK.target, "--init-args", json.dumps(NETWORK.kwargs))
    bare = run("--run", "0.ckpt", *alone, *DIGITS, "--model-type", "gmm")
    assert bare["mean"] == expected["mean"]


def test_a_dirichlet_is_read_by_its_mean():
    module = EvidentialModule(NETWORK)
    save(module, "evidential.ckpt")
    result = run("--run", "evidential.ckpt", "--module", "lightning_uq.EvidentialModule", *DIGITS)
    x, y = DigitsDataModule(seed=0).dataset("test").tensors
    with torch.no_grad():
        probs = module.eval().predict(x).probs.double()
    assert result["mean"]["ece"] == pytest.approx(ece(probs.numpy(), y.numpy()), abs=1e-6)
    assert result["mean"]["accuracy"] == pytest.approx(float((probs.argmax(1) == y).double().mean()))


@pytest.mark.parametrize(("task", "name"), [("regression", "Regression"), ("segmentation", "Segmentation")])
def test_what_is_no_classifier_of_inputs_is_refused_with_its_file(tmp_path, task, name):
    path = tmp_path / "other.ckpt"
    module = DeterministicModule(Factory("torch.nn.Linear", {"in_features": 64, "out_features": 2}), task=task)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    with pytest.raises(InputError, match=rf"other.ckpt' must hold a classifier with one .* task is {name}\("):
        evaluate(Settings([[str(path)]], "digits", "8,9", module="lightning_uq.DeterministicModule"))


def test_load_model_gives_the_module(networks):
    x = torch.rand(3, 64)
    loaded = load_model("1.ckpt", OURS)
    assert isinstance(loaded, DeterministicModule)
    assert torch.equal(loaded.eval()(x)[0], networks[1](x))


# ---------------------------------------------------------------------- refusals


def test_the_file_of_a_plain_module_asks_for_the_network(tmp_path):
    path, x = tmp_path / "plain-uq.ckpt", torch.randn(60, 4)
    model = MLP(4, 2, hidden_sizes=[3])
    gmm = FitGMM(feature_transform="raw").fit(model, [(x, (x[:, 0] > 0).long())])
    save_fitted(path, model, [gmm])
    name = "lightning_uq.networks.mlp.MLP"
    with pytest.raises(
        InputError, match=rf"was written by {name}, which is not a LightningModule\. Pass `network`, the"
    ):
        load_model(path)
    loaded = load_model(path, network=name, init_args={"in_features": 4, "out_features": 2, "hidden_sizes": [3]})
    assert torch.equal(loaded(x), model(x))
    content = torch.load(path, weights_only=True)
    content["lightning_uq_written_by"]["class_path"] = "__main__.Gone"
    torch.save(content, path)
    with pytest.raises(
        InputError, match=r"by __main__\.Gone, which cannot be imported here\. Pass its current import path"
    ):
        load_model(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "0.ckpt"], "'0.ckpt' does not name the LightningModule that wrote it. Pass --module"),
        (["--run", "nowhere.ckpt", "--module", OURS], "--run must name a checkpoint, but nowhere.ckpt cannot be read"),
        (
            ["--run", "0.ckpt", "--module", "lightning_uq.Nothing"],
            "--module must be the import path of a LightningModule",
        ),
        (["--run", "0.ckpt", "--module", "no_such_package.Lit"], "--module must be .* but it is 'no_such_package.Lit'"),
        (["--run", "0.ckpt", "--module", "torch.nn.Linear"], "--module must be the import path of a LightningModule"),
        (
            ["--run", "0.ckpt", "--module", "users_file.Lit"],
            "--run: '0.ckpt' is not a checkpoint of users_file.Lit: .*'width'",
        ),
        (
            ["--run", "0.ckpt", "--network", "torch.nn.Linnear"],
            "--network must be the import path of a class or function",
        ),
        (
            ["--run", "0.ckpt", "--network", "torch.nn.Linear"],
            "--network 'torch.nn.Linear' cannot be built: ",
        ),
        (["--run", "0.ckpt", "--network", "torch.nn.ReLU"], "--run: '0.ckpt' does not hold the weights of ReLU"),
        (
            ["--run", "0.ckpt", "--module", OURS, "--network", NETWORK.target],
            "Pass --module or --network, but not both",
        ),
        (["--run", "0.ckpt", "--init-args", "{}x"], "--init-args must be a JSON object.*, but it is '{}x'"),
        (["--run", "0.ckpt", "--init-args", "[1]"], "--init-args must be a JSON object"),
        (["--run", "0.ckpt", "--init-args", '{"a": 1}'], "--init-args are arguments of --module or --network"),
        (["--run", "0.ckpt", "1.ckpt", "--module", OURS], "--model-type softmax a run must hold one network.* holds 2"),
        (
            ["--run", "0.ckpt", "--module", OURS, "--model-type", "ensemble"],
            "--model-type ensemble .* several members.* '0.ckpt' holds 1",
        ),
        (
            ["--run", "0.ckpt", "1.ckpt", "--module", OURS, "--model-type", "gmm"],
            "--model-type gmm a run must hold one network",
        ),
        (
            ["--run", "0.ckpt", "--model-type", "magic"],
            "--model-type must be one of softmax, ensemble, gmm, but it is 'magic'",
        ),
        (
            ["--run", "0.ckpt", "--regularization", "much"],
            "--regularization must be one of held_out, oas, ddu or a number, but it is 'much'",
        ),
        (
            ["--run", "0.ckpt", "--data-seeds", "1,2,3"],
            r"--data-seeds must hold one seed, one per run \(1\) or one per checkpoint \(1\), but it holds 3",
        ),
        (["--run", "0.ckpt", "--data-seeds", "one"], "--data-seeds must be whole numbers separated by commas"),
        ([], "--run: this option is required"),
    ],
)
def test_models_and_options_are_refused_in_one_line(capsys, arguments, message):
    line = fails(capsys, *arguments, *DIGITS, "--out", "out.json")
    assert re.search(message, line), line
    assert len(line) < 700
    assert_names_an_option(line)


def assert_names_an_option(line):
    """An option as it is written in the command, and none as the Python arguments are."""
    options = inspect.signature(command).parameters
    assert re.search(rf"--({'|'.join(options).replace('_', '-')})\b", line), line
    assert not re.search(rf"`({'|'.join(options)})`", line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet", "--ood", "svhn"], "--data must be one of .*mnist.*, but it is 'imagenet'"),
        (
            ["--data", "digits", "--ood", "svhn"],
            "--ood must be labels that are held out of the data.* but it is 'svhn'",
        ),
        (["--data", "digits", "--ood", "8,12"], "--ood must hold labels .* but it holds 12"),
        (["--data", "mnist", "--ood", "svhn"], "--ood of mnist .*'svhn'"),
        (["--data", "mnist", "--ood", "fashion_mnist"], "--data: The training files of MNIST must be in data"),
        (["--data", "nowhere.npz", "--ood", "1"], "--data: nowhere.npz must be .* but there is no such file"),
        (["--data", "users_file.Lit", "--ood", "near"], "--data must be the import path of a LightningDataModule"),
        (
            ["--data", "users_file.FixedTest", "--ood", "8,9"],
            "--ood must name one of the `ood_dataloaders.*near, far.* but it is '8,9'",
        ),
        (
            ["--data", "digits", "--ood", "8,9", "--data-args", '{"sead": 1}'],
            "DigitsDataModule does not take these --data-args: .*sead",
        ),
        (
            ["--data", "lightning_uq.data.ToyCurveDataModule", "--ood", "x"],
            "--data: .* Give it a method `ood_dataloaders",
        ),
        (
            ["--data", "users_file.FixedTest", "--ood", "near", "--data-args", '{"labelled": false}'],
            "--data: The validation data have no class labels",
        ),
        (["--data", "digits", "--ood", "8,9", "--data-args", '{"batch_size": 0}'], "--data-args: `batch_size` must be"),
        (["--data", "digits", "--ood", "9"], r"--data: .* class labels in \[0, 8\), but their values go from 0 to 8"),
    ],
)
def test_data_are_refused_in_one_line(capsys, arguments, message):
    line = fails(capsys, "--run", "0.ckpt", "--module", OURS, *arguments, "--out", "out.json")
    assert re.search(message, line), line
    assert_names_an_option(line)


def test_a_test_set_that_moves_with_the_seed_is_no_ensembles(capsys):
    members = ("--run", "0.ckpt", "2.ckpt", "--module", OURS, "--model-type", "ensemble", *DIGITS)
    assert "the test set depends on the seed" in fails(capsys, *members, "--data-seeds", "0,1", "--out", "out.json")


def test_out_must_be_a_file_before_anything_is_read(capsys, tmp_path):
    (tmp_path / "there").mkdir()
    line = fails(capsys, "--run", "nowhere.ckpt", "--module", OURS, *DIGITS, "--out", "there")
    assert line == "--out must be a file, but there is a directory."
    line = fails(capsys, "--run", "nowhere.ckpt", "--module", OURS, *DIGITS, "--out", "0.ckpt/out.json")
    assert line == "--out: 0.ckpt is a file, not a directory."


def test_settings_in_python():
    with pytest.raises(InputError, match="at least one run"):
        Settings([], "digits", "8,9")
    with pytest.raises(InputError, match="`accelerator` must be one of"):
        Settings([["0.ckpt"]], "digits", "8,9", accelerator="abacus")
    result = evaluate(Settings([["0.ckpt"]], "digits", "8,9", module=OURS))
    assert math.isfinite(result["mean"]["ece"])
    json.dumps(result, allow_nan=False)
