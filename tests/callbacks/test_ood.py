import json
import pickle
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_uq import EnsembleModule
from lightning_uq.callbacks.ood import DEFAULT_SCORES, OODDetection
from lightning_uq.callbacks.ood_scores import OODScorer, detection_metrics
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.ood import auroc
from lightning_uq.functional.scores import SCORES
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.ensemble import EnsembleNetwork

METRICS = ("ood_auroc", "ood_auprc_out", "ood_auprc_in", "ood_fpr95")


def data(n, shift=0.0, seed=0, size=7, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator) + shift
    return DataLoader(TensorDataset(x, torch.randint(3, (n,), generator=generator)), batch_size=size, **kwargs)


def inputs(loader):
    return loader.dataset.tensors[0]


# The steps here make their own input, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*calls its `forward` with an input other")


class Plain(LightningModule):
    """A classifier that knows nothing of this package, and whose test step is random and careless."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.head.weight.mul_(3)
        self.rows = 0

    def forward(self, x):
        return self.head(self.layer(x))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.rows += len(x)
        self.log("loss", F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y), prog_bar=True)
        x.zero_()


class Mapped(Plain):
    def test_step(self, batch, batch_idx):
        super().test_step((batch["input"], batch.pop("target")), batch_idx)


class Named(torch.utils.data.Dataset):
    def __init__(self, loader):
        self.tensors = loader.dataset.tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return {"input": self.tensors[0][i], "target": self.tensors[1][i]}


def logits_of(module, x):
    module.eval()
    with torch.no_grad():
        return module(x.clone()).unsqueeze(0)


def definition(inside, outside, fpr95_positive="in"):
    """The four numbers, by counting pairs and thresholds one at a time."""
    inside, outside = inside.double().tolist(), outside.double().tolist()
    wins = sum((o > i) + 0.5 * (o == i) for o in outside for i in inside)

    def precision_area(positive, negative):
        area, found = 0.0, 0
        for t in sorted(set(positive), reverse=True):
            now = sum(p >= t for p in positive)
            area += (now - found) / len(positive) * now / (now + sum(n >= t for n in negative))
            found = now
        return area

    found, others = (inside, outside) if fpr95_positive == "in" else ([-o for o in outside], [-i for i in inside])
    threshold = next(t for t in sorted(found) if sum(f <= t for f in found) >= 0.95 * len(found) - 1e-9)
    return {
        "ood_auroc": wins / len(inside) / len(outside),
        "ood_auprc_out": precision_area(outside, inside),
        "ood_auprc_in": precision_area([-i for i in inside], [-o for o in outside]),
        "ood_fpr95": sum(o <= threshold for o in others) / len(others),
    }


def expected(module, inside, outsides, scores=DEFAULT_SCORES):
    reference = logits_of(module, inside)
    return {
        f"{metric}/{name}/{score}": value
        for name, x in outsides.items()
        for score in scores
        for metric, value in definition(SCORES[score](reference), SCORES[score](logits_of(module, x))).items()
    }


def ood_part(result):
    return {name: value for name, value in result.items() if name.startswith("ood_")}


@pytest.mark.parametrize("inference_mode", [True, False])
def test_logs_what_the_definitions_give(make_trainer, inference_mode):
    module, inside = Plain(), data(30)
    ood = {"near": data(17, 0.5, 1, drop_last=True), "far": data(9, 3.0, 2, shuffle=True)}
    trainer = make_trainer(callbacks=OODDetection(ood), inference_mode=inference_mode)
    (result,) = trainer.test(module, inside, verbose=False)
    wanted = expected(module, inputs(inside), {name: inputs(loader) for name, loader in ood.items()})
    assert len(wanted) == 2 * 3 * 4
    assert ood_part(result) == pytest.approx(wanted, abs=1e-12)
    assert module.rows == 30  # the test step saw the test set alone


@pytest.mark.parametrize("positive", ["in", "out"])
def test_either_kind_may_be_the_positive_one_of_the_false_positive_rate(make_trainer, positive):
    module, inside, outside = Plain(), data(60), data(40, 0.5, 1)
    ood = OODDetection({"near": outside}, "energy", fpr95_positive=positive)
    (result,) = make_trainer(callbacks=ood).test(module, inside, verbose=False)
    scores = [SCORES["energy"](logits_of(module, inputs(loader))) for loader in (inside, outside)]
    wanted = {kind: definition(*scores, kind)["ood_fpr95"] for kind in ("in", "out")}
    assert result["ood_fpr95/near/energy"] == pytest.approx(wanted[positive], abs=1e-12)
    assert wanted["in"] != wanted["out"]


def test_the_users_run_is_the_same_with_and_without(make_trainer):
    def run(*callbacks):
        torch.manual_seed(5)
        module = Plain()
        (result,) = make_trainer(callbacks=[*callbacks]).test(module, data(30), verbose=False)
        return result["loss"], torch.rand(3).tolist(), {k: v.tolist() for k, v in module.state_dict().items()}

    assert run(OODDetection({"far": data(9, 3.0, shuffle=True)})) == run()


@pytest.mark.parametrize("module", [Plain, Mapped])
def test_tuple_and_mapping_batches(make_trainer, module):
    inside, outside = data(30), data(9, 2.0, 1)
    loaders = inside, outside
    if module is Mapped:
        loaders = [DataLoader(Named(loader), batch_size=7) for loader in loaders]
    module = module()
    (result,) = make_trainer(callbacks=OODDetection({"a": loaders[1]})).test(module, loaders[0], verbose=False)
    assert ood_part(result) == pytest.approx(expected(module, inputs(inside), {"a": inputs(outside)}), abs=1e-12)


class InPlace(Plain):
    def forward(self, x):
        return super().forward(x.mul_(2))


def test_a_forward_that_writes_into_its_input_is_scored_once(make_trainer):
    module, inside, outside = InPlace(), data(30), data(9, 2.0, 1)
    (result,) = make_trainer(callbacks=OODDetection({"a": data(9, 2.0, 1)})).test(module, data(30), verbose=False)
    wanted = expected(module, inputs(inside), {"a": inputs(outside)})
    assert ood_part(result) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_scores_what_the_test_step_would_see(make_trainer, precision):
    module, inside, outside = Plain(), data(30), data(9, 2.0, 1)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    (result,) = make_trainer(callbacks=OODDetection({"a": outside}), precision=precision).test(
        module, inside, verbose=False
    )
    module.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        wanted = {
            name: [logits_of(module, inputs(loader)[i : i + 7].to(dtype)) for i in range(0, len(inputs(loader)), 7)]
            for name, loader in (("in", inside), ("out", outside))
        }
    for score in DEFAULT_SCORES:
        scores = [SCORES[score](torch.cat(wanted[name], 1)) for name in ("in", "out")]
        assert scores[0].dtype == (torch.float64 if precision == "64-true" else torch.float32)
        for metric, value in definition(*scores).items():
            assert result[f"{metric}/a/{score}"] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("in_distribution", "used"), [(0, [0]), (1, [1]), (None, [0, 1])])
def test_several_test_loaders(make_trainer, in_distribution, used):
    class Two(Plain):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            super().test_step(batch, batch_idx)

    module, loaders, outside = Two(), [data(30), data(13, 1.0, 4)], data(9, 2.0, 1)
    callback = OODDetection({"a": outside}, in_distribution=in_distribution)
    results = make_trainer(callbacks=callback).test(module, loaders, verbose=False)
    wanted = expected(module, torch.cat([inputs(loaders[i]) for i in used]), {"a": inputs(outside)})
    for i, result in enumerate(results):
        assert ood_part(result) == pytest.approx(wanted, abs=1e-12)
        assert f"loss/dataloader_idx_{i}" in result


@pytest.mark.parametrize(("limit", "batches"), [({"limit_test_batches": 2}, (2, 2)), ({"fast_dev_run": True}, (1, 1))])
def test_batch_limits_hold_for_both(make_trainer, limit, batches):
    module, inside, outside = Plain(), data(30), data(20, 2.0, 1)
    (result,) = make_trainer(callbacks=OODDetection({"a": outside}), **limit).test(module, inside, verbose=False)
    wanted = expected(module, inputs(inside)[: 7 * batches[0]], {"a": inputs(outside)[: 7 * batches[1]]})
    assert ood_part(result) == pytest.approx(wanted, abs=1e-12)


class WithOOD(LightningDataModule):
    def test_dataloader(self):
        return data(30)

    def ood_dataloaders(self):
        return {"a": data(9, 2.0, 1)}


def test_loaders_may_come_later(make_trainer):
    module = Plain()
    (given,) = make_trainer(callbacks=OODDetection({"a": data(9, 2.0, 1)})).test(module, data(30), verbose=False)
    (made,) = make_trainer(callbacks=OODDetection(lambda: {"a": data(9, 2.0, 1)})).test(module, data(30), verbose=False)
    (found,) = make_trainer(callbacks=OODDetection()).test(module, datamodule=WithOOD(), verbose=False)
    assert ood_part(given) == ood_part(made) == ood_part(found) != {}


def test_a_second_test_starts_anew(make_trainer):
    trainer, module = make_trainer(callbacks=(callback := OODDetection({"a": data(9, 2.0, 1)}))), Plain()
    (first,) = trainer.test(module, data(30), verbose=False)
    (second,) = trainer.test(module, data(30), verbose=False)
    assert ood_part(first) == ood_part(second)
    assert callback._inside is None  # nothing of the data is kept


def test_loggers_get_clean_names(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer(callbacks=OODDetection({"a": data(9, 2.0, 1)}, "energy"), logger=logger).test(
        Plain(), data(30), verbose=False
    )
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert {name for name in header.split(",") if "ood" in name} == {f"{metric}/a/energy" for metric in METRICS}


def test_transfer_hooks_see_the_test_stage(make_trainer):
    stages = []

    class Hooked(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append(self.trainer.state.stage.value)
            return [batch[0] * 2, batch[1]]

    module, inside, outside = Hooked(), data(30), data(9, 2.0, 1)
    (result,) = make_trainer(callbacks=OODDetection({"a": outside})).test(module, inside, verbose=False)
    assert stages == ["test"] * (5 + 2)
    wanted = expected(module, 2 * inputs(inside), {"a": 2 * inputs(outside)})
    assert ood_part(result) == pytest.approx(wanted, abs=1e-12)


def test_a_forward_that_logs_logs_once(make_trainer):
    class Logs(Plain):
        def forward(self, x):
            self.log("mean", x.mean())
            return super().forward(x)

    (with_callback,) = make_trainer(callbacks=OODDetection({"a": data(9, 99.0)})).test(Logs(), data(30), verbose=False)
    (without,) = make_trainer().test(Logs(), data(30), verbose=False)
    assert with_callback["mean"] == pytest.approx(without["mean"], abs=0.2)  # the test step adds noise
    assert {k for k in with_callback if not k.startswith("ood_")} == set(without)


def test_a_compiled_module(make_trainer):
    module, inside, outside = Plain(), data(28), data(14, 2.0, 1)
    compiled = torch.compile(module, backend="aot_eager")
    (result,) = make_trainer(callbacks=OODDetection({"a": outside})).test(compiled, inside, verbose=False)
    wanted = expected(module, inputs(inside), {"a": inputs(outside)})
    assert ood_part(result) == pytest.approx(wanted, abs=1e-6)


# ---------------------------------------------------------------------- scores


def spread(logits):
    return logits.std(2).mean(0)


@pytest.mark.parametrize(
    ("scores", "names"),
    [
        (None, DEFAULT_SCORES),
        ("energy", ["energy"]),
        (["max_logit", "max_softmax"], ["max_logit", "max_softmax"]),
        (spread, ["spread"]),
        (("energy", spread), ["energy", "spread"]),
        ({"H": "predictive_entropy", "-s/2": lambda logits: -spread(logits) / 2}, ["H", "-s/2"]),
    ],
)
def test_scores_by_name_function_and_mapping(scores, names):
    module, loader = Plain().eval(), data(9)
    found = OODDetection(scores=scores).score(module, loader)
    logits = logits_of(module, inputs(loader))
    functions = {**SCORES, "spread": spread, "H": SCORES["predictive_entropy"], "-s/2": lambda x: -spread(x) / 2}
    assert list(found) == list(names)
    for name, value in found.items():
        torch.testing.assert_close(value, functions[name](logits))


def test_a_module_of_ours_is_scored_by_its_own_score(make_trainer):
    class Ensemble(UncertaintyModule):
        ood_score = "mutual_information"

        def __init__(self):
            super().__init__(EnsembleNetwork([nn.Linear(4, 3) for _ in range(3)]))

    for module, score in (
        (Ensemble(), "mutual_information"),
        (DeterministicModule(nn.Linear(4, 3)), "predictive_entropy"),
    ):
        (result,) = make_trainer(callbacks=OODDetection({"a": data(9, 2.0, 1)})).test(module, data(30), verbose=False)
        assert set(ood_part(result)) == {f"{metric}/a/{score}" for metric in METRICS}
        with torch.no_grad():
            scores = [SCORES[score](module(inputs(loader))) for loader in (data(30), data(9, 2.0, 1))]
        wanted = {f"{metric}/a/{score}": value for metric, value in definition(*scores).items()}
        assert ood_part(result) == pytest.approx(wanted, abs=1e-12)


class FeatureNorm(Callback):
    """Scores by the norm of a layer's output, seen while the model runs once."""

    def __init__(self, *names):
        self.ood_score_names = names
        self.calls = 0

    @contextmanager
    def ood_scores(self, model):
        features = []
        handle = model.layer.register_forward_hook(lambda module, args, output: features.append(output))
        try:
            yield lambda logits: {name: features[0].norm(dim=1) for name in self.ood_score_names}
        finally:
            self.calls += len(features)
            handle.remove()


def test_another_callback_contributes(make_trainer):
    module, inside, outside = Plain(), data(30), data(9, 2.0, 1)
    other = FeatureNorm("norm")
    assert isinstance(other, OODScorer)
    assert not isinstance(OODDetection(), OODScorer)
    (result,) = make_trainer(callbacks=[OODDetection({"a": outside}), other]).test(module, inside, verbose=False)
    with torch.no_grad():
        scores = [module.eval().layer(inputs(loader)).norm(dim=1) for loader in (inside, outside)]
    wanted = expected(module, inputs(inside), {"a": inputs(outside)})
    wanted.update({f"{metric}/a/norm": value for metric, value in definition(*scores).items()})
    assert ood_part(result) == pytest.approx(wanted, abs=1e-12)
    assert other.calls == 5 + 2
    assert not module.layer._forward_hooks

    (only,) = make_trainer(callbacks=[other, OODDetection({"a": outside}, "norm")]).test(module, inside, verbose=False)
    assert ood_part(only) == pytest.approx({k: v for k, v in wanted.items() if k.endswith("norm")}, abs=1e-12)


def test_a_contributed_score_stands_for_the_one_of_its_name(make_trainer):
    class Own(DeterministicModule):
        ood_score_names = ("predictive_entropy",)

        @contextmanager
        def ood_scores(self, model):
            yield lambda logits: {"predictive_entropy": logits[0, :, 0]}

    module, loader = Own(nn.Linear(4, 3)), data(9)
    torch.testing.assert_close(
        OODDetection().score(module, loader)["predictive_entropy"], module(inputs(loader))[0, :, 0].detach()
    )


def test_two_callbacks_with_one_name_are_an_error(make_trainer):
    trainer = make_trainer(callbacks=[FeatureNorm("norm"), FeatureNorm("norm"), OODDetection({"a": data(9)})])
    with pytest.raises(InputError, match=r"Several callbacks provide the scores \['norm'\]"):
        trainer.test(Plain(), data(30), verbose=False)


def test_a_scorer_that_nobody_asked_for_does_not_run(make_trainer):
    other = FeatureNorm("norm")
    trainer = make_trainer(callbacks=[OODDetection({"a": data(9)}, "energy"), other])
    assert set(ood_part(trainer.test(Plain(), data(30), verbose=False)[0])) == {f"{m}/a/energy" for m in METRICS}
    assert other.calls == 0


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ("energy", {"energy": "energy"}),
        (["energy", "max_logit"], {"energy": "energy", "max_logit": "max_logit"}),
        (["lightning_uq.functional.scores.energy"], {"energy": SCORES["energy"]}),
        ({"H": "predictive_entropy"}, {"H": "predictive_entropy"}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's calls of jsonargparse
def test_the_command_line_builds_it(tmp_path, monkeypatch, scores, expected):
    monkeypatch.setattr("sys.argv", ["main"])
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)}
    entry = {"class_path": "lightning_uq.callbacks.OODDetection", "init_args": {"scores": scores}}
    cli = LightningCLI(
        Plain,
        run=False,
        seed_everything_default=False,
        args={"trainer": {**config, "callbacks": [entry]}},
        save_config_callback=None,
    )
    (callback,) = (one for one in cli.trainer.callbacks if isinstance(one, OODDetection))
    assert callback.scores == expected
    assert pickle.loads(pickle.dumps(callback)).scores == expected


# ---------------------------------------------------------------------- without a Trainer


def test_score_without_a_trainer_keeps_the_samples_order_and_the_model():
    module = Plain().train()
    loader = data(23, size=5, shuffle=True, drop_last=True)
    state = torch.get_rng_state()
    found = OODDetection(scores=["energy", "predictive_entropy"]).score(module, loader)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(value.requires_grad for value in found.values())
    for name, value in found.items():
        torch.testing.assert_close(value, SCORES[name](logits_of(module, inputs(loader))))
    double = OODDetection(scores="energy").score(Plain().double(), [inputs(loader)])["energy"]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), found["energy"])


@pytest.mark.parametrize("loader", [[], DataLoader(TensorDataset(torch.zeros(0, 4)), batch_size=2)])
def test_an_empty_loader_has_no_scores(loader):
    with pytest.raises(InputError, match=re.escape("`loader` must hold samples, but it is empty.")):
        OODDetection().score(Plain(), loader)


# ---------------------------------------------------------------------- errors


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


class ReturnsDict(Plain):
    def forward(self, x):
        return {"scores": super().forward(x)}

    def test_step(self, batch, batch_idx):
        pass


class ReturnsProbs(ReturnsDict):
    def forward(self, x):
        return super().forward(x)["scores"].softmax(1)


class NaNForLarge(Plain):
    def forward(self, x):
        return super().forward(x).where(x[:, :1] < 50, torch.nan)


class TakesIterator(Plain):
    def test_step(self, dataloader_iter):
        next(dataloader_iter)


def spoilt(n):
    loader = data(n)
    loader.dataset.tensors[0][3] = torch.nan
    return loader


@pytest.mark.parametrize(
    ("make", "module", "inside", "message"),
    [
        (lambda: OODDetection(), Plain, None, r"no loaders. Pass `ood={'name': loader}`.*`ood_dataloaders`"),
        (
            lambda: OODDetection(lambda: [data(3)]),
            Plain,
            None,
            "What `ood` returns must be a mapping .*but it is of type list",
        ),
        (lambda: OODDetection(lambda: {"a": data(3).dataset}), Plain, None, r"`ood\['a'\]` must be .*TensorDataset"),
        (
            lambda: OODDetection({"a": DataLoader(Empty())}),
            Plain,
            None,
            r"`ood\['a'\]` must hold samples, but it is empty",
        ),
        (
            lambda: OODDetection({"a": DataLoader(TensorDataset(torch.zeros(0, 4)))}),
            Plain,
            None,
            r"`ood\['a'\]` must hold samples, but it is empty",
        ),
        (lambda: OODDetection({"a": data(3)}), ReturnsDict, None, r"dict with keys \['scores'\].*argument `output`"),
        (lambda: OODDetection({"a": data(3)}), ReturnsProbs, None, 'probabilities .*Pass `output="probs"`'),
        (
            lambda: OODDetection({"a": data(3, 99.0)}),
            NaNForLarge,
            None,
            r"Score 'predictive_entropy' is NaN for 3 of 3 inputs of `ood\['a'\]`",
        ),
        (lambda: OODDetection({"a": data(3)}), Plain, spoilt(30), "is NaN for 1 of 30 inputs of the test set"),
        (
            lambda: OODDetection({"a": data(3)}, ["energy", "entropy"]),
            Plain,
            None,
            "`scores` must hold functions or, for Classification.., names from predictive_entropy, .*, but it holds 'entropy'",
        ),
        (
            lambda: OODDetection({"a": data(3)}, {"mine": lambda logits: logits.mean()}),
            Plain,
            None,
            r"Score 'mine' must be a floating-point tensor \[B\] = \[7\], but it is torch.float32 of shape \[\]",
        ),
        (
            lambda: OODDetection({"a": data(3)}, {"mine": lambda logits: 1.0}),
            Plain,
            None,
            r"Score 'mine' must be .* but it is of type float",
        ),
        (
            lambda: OODDetection({"a": data(3)}, in_distribution=1),
            Plain,
            None,
            "index of one of the 1 test loaders or None, but it is 1",
        ),
        (
            lambda: OODDetection({"a": data(3)}, "energy"),
            lambda: DeterministicModule(nn.Linear(4, 2), task="regression"),
            None,
            r"for Regression\(\), names from variance, .*, but it holds 'energy'",
        ),
    ],
)
def test_one_clear_error(make_trainer, make, module, inside, message):
    callback = make()
    with pytest.raises(InputError, match=message):
        make_trainer(callbacks=callback).test(module(), inside or data(30), verbose=False)
    assert callback._inside is None


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_without_its_batch_is_refused(make_trainer):
    with pytest.raises(UnsupportedError, match=re.escape("`test_step(dataloader_iter)`")):
        make_trainer(callbacks=OODDetection({"a": data(3)})).test(TakesIterator(), data(30), verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ood": {}}, "Argument `ood` must be a mapping from names to data loaders, but it is empty"),
        ({"ood": [1]}, "Argument `ood` must be a mapping from names to data loaders, but it is of type list"),
        ({"ood": {1: [torch.zeros(2, 4)]}}, "from names to data loaders"),
        (
            {"ood": {"a": torch.zeros(3)}},
            "`ood['a']` must be a DataLoader or an iterable of batches, but its type is Tensor",
        ),
        ({"scores": 3}, "`scores` must be names or functions, but its type is int"),
        ({"scores": []}, "`scores` must hold names or functions, but it is empty"),
        ({"scores": {"a": 1}}, "`scores` must hold names or functions, but it holds an object of type int"),
        ({"scores": [lambda x: x]}, "must have different names"),
        ({"scores": ["energy", "energy"]}, "must have different names"),
        ({"predict_fn": 1}, "`predict_fn` must be a function or its import path, but its type is int"),
        ({"output": "softmax"}, "`output` must be"),
        ({"fpr95_positive": "ood"}, "`fpr95_positive` must be one of 'in', 'out', but it is 'ood'"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        OODDetection(**arguments)


def test_the_helpers_agree_with_the_definitions():
    inside, outside = torch.randint(6, (40,)).float(), torch.randint(2, 8, (23,)).float()  # many ties
    found = {name: value.item() for name, value in detection_metrics(inside, outside).items()}
    assert found == pytest.approx(definition(inside, outside), abs=1e-12)
    assert json.dumps(found)


# ---------------------------------------------------------------------- two ranks

RANKS = """
import json, sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from lightning_uq.callbacks import OODDetection
from lightning_uq.errors import InputError

warnings.filterwarnings("ignore")

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3, bias=False)
        nn.init.eye_(self.net.weight)

    def forward(self, x):
        return 3 * self.net(x)

    def test_step(self, batch, batch_idx):
        return None

def data(n, shift, seed, **kwargs):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) + shift
    return DataLoader(TensorDataset(x), batch_size=3, **kwargs)

def test(inside, ood, devices, **kwargs):
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=OODDetection(ood, ["energy", "max_softmax"]),
        **kwargs
    )
    try:
        (result,) = trainer.test(Plain(), inside, verbose=False)
        return trainer, dict(result)
    except InputError as error:
        return trainer, str(error)

def spoilt(n, row):
    loader = data(n, 0, 7)
    loader.dataset.tensors[0][row] = torch.nan
    return loader

loaders = {
    "odd": lambda: (data(13, 0, 0), {"a": data(11, 1, 1), "b": data(6, 2, 2, shuffle=True, drop_last=True)}),
    "one": lambda: (data(1, 0, 0), {"a": data(1, 1, 1)}),
    "subset": lambda: (
        data(20, 0, 0, sampler=[3, 1, 8, 12, 7]),  # Lightning lets the ranks shuffle a random one each on its own
        {"a": data(20, 1, 1, sampler=SubsetRandomSampler([2, 9, 5]))},
    ),
    "double": lambda: (data(13, 0, 0), {"a": data(1, 1, 1)}),
    "spoilt_test_set": lambda: (spoilt(12, 5), {"a": data(5, 1, 1)}),
    "spoilt_ood": lambda: (data(12, 0, 0), {"a": spoilt(9, 3)}),
    "empty": lambda: (data(12, 0, 0), {"a": data(0, 0, 0)}),
    "raises": lambda: (
        data(12, 0, 0),
        {"a": DataLoader(TensorDataset(torch.zeros(6, 4)), batch_size=3), "b": [torch.zeros(2, 4), torch.zeros(2, 5, 4)]},
    ),
}

if __name__ == "__main__":
    found = {}
    for name, make in loaders.items():
        precision = "64-true" if name == "double" else "32-true"
        trainer, two = test(*make(), 2, precision=precision)
        found[name] = {"two": two}
        if trainer.is_global_zero:
            found[name]["one"] = test(*make(), 1, precision=precision)[1]
        trainer.strategy.barrier()
    with open(out if trainer.is_global_zero else out + "1", "w") as file:
        json.dump(found, file)
    trainer.strategy.barrier()
"""


def test_two_ranks_give_what_one_gives(run_script, tmp_path):
    found = run_script(RANKS)
    second = json.loads((tmp_path / "out.json1").read_text())
    for name in ("odd", "one", "subset", "double"):
        assert set(found[name]["one"]) == {
            f"{m}/{o}/{s}"
            for m in METRICS
            for o in found[name]["one"] and (("a", "b") if name == "odd" else ("a",))
            for s in ("energy", "max_softmax")
        }
        assert found[name]["two"] == pytest.approx(found[name]["one"], abs=1e-12), name
        assert second[name]["two"] == found[name]["two"]
    for name, message in {
        "spoilt_test_set": "Score 'energy' is NaN for 1 of 12 inputs of the test set",
        "spoilt_ood": r"Score 'energy' is NaN for 1 of 9 inputs of `ood\['a'\]`",
        "empty": r"`ood\['a'\]` must hold samples, but it is empty",
        "raises": r"The network returned \[2, 5, 3\], a map of logits, but the task is Classification",
    }.items():
        print(name, found[name], second[name])
        assert re.match(message, found[name]["two"])
        assert found[name]["two"] == found[name]["one"] == second[name]["two"]


# ---------------------------------------------------------------------- regression


def test_a_regressor_is_scored_by_its_variances(make_trainer):
    """The default score is the method's own: an ensemble's spread of means, a single network's variance."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    test = DataLoader(TensorDataset(x, x[:, :1]), batch_size=5)
    far = DataLoader(TensorDataset(20 * x), batch_size=5)
    network = lambda: nn.Linear(4, 2)  # noqa: E731
    ensemble = EnsembleModule(network, num_members=3, task="regression", seed=0)
    (found,) = make_trainer(callbacks=[OODDetection({"far": far})]).test(ensemble, test, verbose=False)
    assert "ood_auroc/far/epistemic_variance" in found
    inside, outside = (ensemble.predict(rows).epistemic_variance.mean(1) for rows in (x, 20 * x))
    expected = auroc(torch.cat([inside, outside]), torch.arange(24) >= 12)
    assert found["ood_auroc/far/epistemic_variance"] == pytest.approx(expected.item(), abs=1e-6)
    alone = DeterministicModule(network(), task="regression")
    (found,) = make_trainer(callbacks=[OODDetection({"far": far})]).test(alone, test, verbose=False)
    assert "ood_auroc/far/variance" in found
