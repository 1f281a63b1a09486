import functools
import json
import sys

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional import entropy
from lightning_uq.functional.joint import joint_log_loss
from lightning_uq.losses.gaussian import split_gaussian
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.dropout import DropoutModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks import EpistemicNetwork, GaussianIndexer
from lightning_uq.networks.ensemble import EnsembleNetwork
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import CategoricalPrediction, GaussianMixturePrediction
from lightning_uq.tasks import Classification, Regression

X = torch.randn(45, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TARGET = X[:, :1] + 0.1 * X[:, 1:2]
LINEAR = Factory("torch.nn.Linear", {"in_features": 4, "out_features": 3})


def loader(y: torch.Tensor = Y, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size=batch_size)


class GaussianLogits(EpistemicNetwork):
    """Logits that are linear in z: an infinite index set."""

    def __init__(self) -> None:
        super().__init__(GaussianIndexer(3))
        self.linear = nn.Linear(4, 3)

    def forward(self, x, index):
        return self.linear(x) + index.unsqueeze(1)


def test_a_classifier_learns_and_its_test_metrics_are_recomputed(make_trainer):
    module = DeterministicModule(LINEAR, optimizer=functools.partial(torch.optim.Adam, lr=0.1))
    trainer = make_trainer(max_epochs=5)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    with torch.no_grad():
        logits = module.network.network(X).double()
    log_probs = logits.log_softmax(1)
    probs = log_probs.exp()
    expected = {
        "test_loss": -log_probs[torch.arange(45), Y].mean(),
        "test_nll": -log_probs[torch.arange(45), Y].mean(),
        "test_accuracy": (probs.argmax(1) == Y).double().mean(),
        "test_brier": (probs - nn.functional.one_hot(Y, 3)).square().sum(1).mean(),
        "test_joint_log_loss": joint_log_loss(logits.unsqueeze(0), Y),
    }
    assert set(result) == {*expected, "test_ece"}
    for name, value in expected.items():
        assert result[name] == pytest.approx(float(value), rel=1e-5), name
    assert result["test_accuracy"] > 0.7


def test_a_regressor_learns_and_its_test_metrics_are_recomputed(make_trainer):
    module = DeterministicModule(
        nn.Linear(4, 2), task="regression", optimizer=functools.partial(torch.optim.Adam, lr=0.05)
    )
    trainer = make_trainer(max_epochs=10)
    trainer.fit(module, loader(TARGET), loader(TARGET))
    (result,) = trainer.test(module, loader(TARGET), verbose=False)
    with torch.no_grad():
        mean, variance = split_gaussian(module.network.network(X))
    nll = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(TARGET).mean()
    assert result["test_nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert result["test_rmse"] == pytest.approx((mean - TARGET).square().mean().sqrt().item(), rel=1e-5)
    assert set(result) == {"test_loss", "test_nll", "test_rmse", "test_crps", "test_coverage_95"}
    prediction = trainer.predict(module, loader(TARGET))[0]
    assert isinstance(prediction, GaussianMixturePrediction)
    assert prediction.mean.shape == (8, 1)


def test_metrics_start_afresh_in_every_epoch_and_every_test(make_trainer):
    module = DeterministicModule(LINEAR, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    trainer = make_trainer(max_epochs=3)
    trainer.fit(module, loader(), loader())
    value = trainer.callback_metrics["val_accuracy"].item()
    first = trainer.test(module, loader(), verbose=False)[0]
    assert trainer.test(module, loader(), verbose=False)[0] == first
    assert first["test_accuracy"] == pytest.approx(value)


def test_several_loaders_are_kept_apart(make_trainer):
    module = DeterministicModule(LINEAR)
    other = DataLoader(TensorDataset(X[:10], Y[:10]), batch_size=4)
    both = make_trainer().test(module, [loader(), other], verbose=False)
    for i, single in enumerate((loader(), other)):
        (alone,) = make_trainer().test(module, single, verbose=False)
        assert both[i] == pytest.approx({f"{k}/dataloader_idx_{i}": v for k, v in alone.items()})


@pytest.mark.parametrize(
    "batches",
    [
        X,
        TensorDataset(X, Y),
        [{"input": x, "target": y} for x, y in zip(X, Y, strict=True)],
        [{"input": x} for x in X],
        TensorDataset(X, Y, torch.arange(45)),
    ],
)
def test_predict_takes_tensors_tuples_and_mappings(make_trainer, batches):
    module = DeterministicModule(LINEAR)
    predictions = make_trainer().predict(module, DataLoader(batches, batch_size=8))
    whole = CategoricalPrediction.cat(predictions)
    with torch.no_grad():
        torch.testing.assert_close(whole.probs, module.network.network(X).softmax(1))


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true", "64-true"])
def test_every_precision(make_trainer, precision):
    module = DeterministicModule(LINEAR)
    trainer = make_trainer(precision=precision)
    trainer.fit(module, loader(), loader())
    (result,) = trainer.test(module, loader(), verbose=False)
    exact = make_trainer(precision="64-true").test(module.double(), loader(), verbose=False)[0]
    assert result["test_nll"] == pytest.approx(exact["test_nll"], rel=2e-2)


def test_an_infinite_index_set_is_evaluated_with_fixed_draws_and_pooled_beyond_32(make_trainer):
    module = UncertaintyModule(GaussianLogits(), num_eval_samples=40, num_train_samples=4)
    make_trainer().fit(module, loader())
    assert torch.equal(module(X), module(X))
    assert module(X).shape == (40, 45, 3)
    with pytest.raises(InputError, match="return_members = True"):
        _ = module.predict(X).logits
    full = module.predict(X)
    module.return_members = True
    assert module.predict(X).logits.shape == (40, 45, 3)
    torch.testing.assert_close(full.mutual_information, module.predict(X).mutual_information, rtol=1e-3, atol=1e-5)
    module.return_members, module.num_eval_samples = None, 32
    assert module.predict(X).logits.shape == (32, 45, 3)


def test_regression_is_pooled_too_beyond_32_members_or_on_request():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    module = DropoutModule(network, task="regression", num_eval_samples=33).eval()
    full = GaussianMixturePrediction(*split_gaussian(module(X)))
    for module.return_members, module.num_eval_samples in ((None, 33), (False, 33)):
        pooled = module.predict(X)
        with pytest.raises(InputError, match="return_members = True"):
            _ = pooled.member_mean
        assert sum(tensor.numel() for tensor in pooled.to_dict(None).values()) < 10 * 45
        torch.testing.assert_close(pooled.mean, full.mean)
        torch.testing.assert_close(pooled.epistemic_variance, full.epistemic_variance)
        torch.testing.assert_close(pooled.aleatoric_variance, full.aleatoric_variance)
    for module.return_members, module.num_eval_samples in ((None, 32), (True, 33)):
        assert module.predict(X).member_mean.shape == (module.num_eval_samples, 45, 1)


def test_a_finite_set_is_trained_whole():
    network = EnsembleNetwork([nn.Linear(4, 3) for _ in range(5)])
    module = UncertaintyModule(network, num_train_samples=1)
    loss = module.training_loss(X, Y, (X, Y))
    each = [nn.functional.cross_entropy(network.member(i)(X), Y) for i in range(5)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_an_evaluation_batch_is_pooled_once_and_seldom_read(make_trainer, monkeypatch):
    pooled, reads = [], []
    original = entropy.mean_log_probs

    def mean_log_probs(*args):
        pooled.append(1)
        return original(*args)

    for place in [place for name, place in sys.modules.items() if name.startswith("lightning_uq")]:
        if getattr(place, "mean_log_probs", None) is original:
            monkeypatch.setattr(place, "mean_log_probs", mean_log_probs)

    class Reads(Callback):
        """Counts how often a test step asks a tensor for its value, which waits for a GPU."""

        def on_test_batch_start(self, *_):
            for name in ("__bool__", "item", "tolist", "__int__", "__float__"):
                method = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda self, method=method: (reads.append(1), method(self))[1])

        def on_test_batch_end(self, *_):
            patch.undo()

    module = EnsembleModule(lambda: nn.Linear(4, 3), num_members=5)
    with pytest.MonkeyPatch.context() as patch:
        make_trainer(callbacks=[Reads()]).test(module, loader(batch_size=5), verbose=False)
    assert len(pooled) == 9  # batches
    assert len(reads) < 6 * 9


def test_a_checkpoint_loads_bare_where_the_factory_has_a_name(make_trainer, tmp_path):
    task = Classification(num_classes=3, label_smoothing=0.1)
    module = DeterministicModule(LINEAR, task=task, optimizer=functools.partial(torch.optim.SGD, lr=0.3))
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DeterministicModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(loaded(X), module(X))
    assert loaded.configure_optimizers().defaults["lr"] == 0.3
    assert loaded.task == task


def test_a_network_without_a_name_is_asked_for(make_trainer, tmp_path):
    module = DeterministicModule(nn.Linear(4, 3))
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"argument `network`: a torch.nn.modules.linear.Linear.*network=\.\.\."):
        DeterministicModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded = DeterministicModule.load_from_checkpoint(tmp_path / "a.ckpt", network=nn.Linear(4, 3), weights_only=True)
    assert torch.equal(loaded(X), module(X))


def test_resuming_gives_the_uninterrupted_run(make_trainer, tmp_path):
    def fit(epochs, ckpt_path=None):
        seed_everything(3, verbose=False)
        module = DeterministicModule(LINEAR)
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, trainer

    whole, _ = fit(4)
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    assert torch.equal(resumed.network.network.weight, whole.network.network.weight)


def test_a_plateau_scheduler_follows_the_validation_loss(make_trainer):
    module = DeterministicModule(
        LINEAR,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, threshold=1e9, patience=0),
    )
    trainer = make_trainer(max_epochs=4)
    trainer.fit(module, loader(), loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1


def test_two_ranks_count_each_sample_once(run_script):
    code = """
import json, sys, torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import Factory
torch.manual_seed(0)
x, y = torch.randn(21, 4), torch.randint(0, 3, (21,))
module = DeterministicModule(Factory("torch.nn.Linear", {"in_features": 4, "out_features": 3}))
trainer = Trainer(accelerator="cpu", devices=DEVICES, strategy="ddp" if DEVICES > 1 else "auto", logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision="64-true")
(result,) = trainer.test(module, DataLoader(TensorDataset(x, y), batch_size=4), verbose=False)
if trainer.is_global_zero:
    json.dump(result, open(out, "w"))
"""
    one, two = (run_script(code.replace("DEVICES", str(n))) for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-6), json.dumps([one, two])


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (X.clone().index_fill_(0, torch.tensor([2]), float("nan")), Y, "1 of 8 rows of batch 0 hold NaN"),
        (X, Y + 1, r"class labels in \[0, 3\), but their values go from 1 to 3"),
        (X, Y - 1, r"class labels in \[0, 3\), but their values go from -1 to 1"),
        (X, Y.float(), "integer class labels, but they are torch.float32"),
        (X, Y == 0, "integer class labels, but they are torch.bool"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_bad_batches_are_named(make_trainer, x, y, match, stage):
    with pytest.raises(InputError, match=match):
        getattr(make_trainer(), stage)(DeterministicModule(LINEAR), DataLoader(TensorDataset(x, y), batch_size=8))


def test_a_batch_without_a_target_is_named(make_trainer):
    with pytest.raises(InputError, match="holds an input without a target"):
        make_trainer().fit(DeterministicModule(LINEAR), DataLoader(X, batch_size=8))


@pytest.mark.parametrize("loss", [None, lambda output, y: (output[:, :1] - y).square().mean()])
def test_a_target_never_broadcasts(make_trainer, loss):
    module = DeterministicModule(nn.Linear(4, 2), task="regression", loss=loss)
    x = torch.randn(8, 4)
    flat, column = (
        module.index_losses(module(x), target) for target in (torch.arange(8.0), torch.arange(8.0).unsqueeze(1))
    )
    torch.testing.assert_close(flat, column)
    with pytest.raises(
        InputError, match=r"targets must have shape \[8, 1\].* but they have \[8, 8\]; .* would broadcast"
    ):
        module.index_losses(module(x), torch.zeros(8, 8))


@pytest.mark.parametrize("shapes", [((8,), (8, 1)), ((8, 1), (8,)), ((8,), (8,))])
def test_a_loss_of_the_users_own_sees_a_mean_and_its_target_in_one_shape(shapes):
    seen = []

    def loss(output, y):
        seen.append((output.shape, y.shape))
        return (output - y).square().mean()

    module = DeterministicModule(nn.Linear(4, 1), task=Regression(head="mean"), loss=loss)
    output, y = torch.randn(1, *shapes[0]), torch.randn(shapes[1])
    found = module.index_losses(output, y)
    torch.testing.assert_close(found[0], (output.reshape(8) - y.reshape(8)).square().mean())
    assert seen[0][0] == seen[0][1]


@pytest.mark.parametrize(
    ("network", "y", "match"),
    [
        (nn.Linear(4, 3), Y + 1, r"class labels in \[0, 3\), but their values go from 1 to 3"),
        (nn.Linear(4, 3), Y.unsqueeze(1), r"class labels must have shape \[8\].* but they have \[8, 1\]"),
        (nn.Unflatten(1, (4, 1, 1)), Y, r"returned \[8, 4, 1, 1\].*Pass .*a function .*as `output`"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_labels_that_do_not_fit_the_output_are_named_without_num_classes(make_trainer, network, y, match, stage):
    module = DeterministicModule(network, optimizer=lambda parameters: torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(InputError, match=match):
        getattr(make_trainer(), stage)(module, loader(y))


def test_infinite_targets_are_refused(make_trainer):
    target = TARGET.clone()
    target[0] = float("inf")
    with pytest.raises(InputError, match="targets must be finite"):
        make_trainer().fit(DeterministicModule(nn.Linear(4, 2), task="regression"), loader(target))


@pytest.mark.parametrize(
    ("network", "kwargs", "match"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), {}, 'output="probs"'),
        (nn.Linear(4, 7), {"task": Classification(num_classes=3)}, r"3 logits \(`num_classes` of the task\)"),
        (nn.Linear(4, 3), {"task": "regression"}, r"\[B, 2 D\]"),
    ],
)
def test_what_the_network_returns_is_checked_at_the_first_batch(network, kwargs, match):
    with pytest.raises(InputError, match=match):
        DeterministicModule(network, **kwargs)(X)


def test_probabilities_and_dicts_are_read_where_they_are_declared():
    logits = nn.Linear(4, 3)
    softmax = DeterministicModule(nn.Sequential(logits, nn.Softmax(1)), output="probs")
    torch.testing.assert_close(softmax.predict(X).probs, DeterministicModule(logits).predict(X).probs)

    class InADict(nn.Module):
        def forward(self, x):
            return {"logits": logits(x)}

    wrapped = DeterministicModule(InADict(), output=lambda out: out["logits"])
    torch.testing.assert_close(wrapped.predict(X).probs, DeterministicModule(logits).predict(X).probs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"network": {"unsaved": "x.<lambda>"}}, r"argument `network`: a x.<lambda>"),
        ({"task": "ranking"}, "`task` must be a Task, or one of 'classification', .*, but it is 'ranking'"),
        ({"task": nn.Linear(4, 3)}, "`task` must be a Task"),
        ({"task": "regression", "output": "probs"}, r"Regression\(\) needs the network's raw outputs.*'probs'"),
        ({"output": "softmax"}, "`output`"),
    ],
)
def test_wrong_arguments_are_named(kwargs, match):
    with pytest.raises(InputError, match=match):
        DeterministicModule(**{"network": LINEAR, **kwargs})


def test_a_loss_of_ones_own(make_trainer):
    calls = []

    def hinge(output, target):
        calls.append(output.shape)
        return nn.functional.multi_margin_loss(output, target)

    make_trainer().fit(DeterministicModule(LINEAR, loss=hinge), loader())
    assert calls[0] == (8, 3)


def test_a_loss_of_any_shape_is_averaged():
    x, y = torch.randn(4, 3, 2, 5), torch.randint(3, (4, 2, 5))

    def flat(output, target):
        rows = output.movedim(1, -1).reshape(-1, 3)
        return nn.functional.cross_entropy(rows, target.reshape(-1), reduction="none")

    expected = nn.functional.cross_entropy(x, y)
    for loss in (flat, lambda output, target: flat(output, target)[None], nn.CrossEntropyLoss(reduction="none")):
        module = DeterministicModule(nn.Identity(), task="segmentation", loss=loss)
        torch.testing.assert_close(module.training_loss(x, y, (x, y)), expected)
    batch = {"input": x, "target": y, "weight": torch.ones(4)}
    torch.testing.assert_close(module.training_loss(x, y, batch), expected)
    module = DeterministicModule(nn.Identity(), task="segmentation", loss=flat)
    with pytest.raises(InputError, match=r"returned shape \[40\], but samples with weights need one loss each: \[4\]"):
        module.training_loss(x, y, batch)


class OfTwo(torch.nn.Module):
    """A network of two inputs, the second of which is added as a mask would be."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x, mask):
        return self.linear(x) + mask.exp()


def test_one_of_several_inputs_is_looked_at_too(make_trainer):
    """In any batch: a training would go on with weights that are NaN."""

    def batches_with(value, name):
        inputs = {"x": torch.randn(8, 4), "mask": torch.zeros(8, 3)}
        bad = {**inputs, name: inputs[name].clone()}
        bad[name][5, 1] = value
        return DataLoader([{"input": one, "target": torch.arange(8) % 3} for one in (inputs, bad)], batch_size=None)

    for value, name in ((float("nan"), "x"), (float("inf"), "x"), (float("nan"), "mask")):
        module = DeterministicModule(OfTwo())
        with pytest.raises(InputError, match="input must be finite, but 1 of 8 rows of batch 1"):
            make_trainer().fit(module, batches_with(value, name))
        with pytest.raises(InputError, match="input must be finite, but 1 of 8 rows of batch 1"):
            make_trainer().predict(module, batches_with(value, name))
    make_trainer().fit(DeterministicModule(OfTwo()), batches_with(-float("inf"), "mask"))


def test_an_input_of_another_dtype_is_named(make_trainer):
    module = DeterministicModule(torch.nn.Linear(4, 3))
    whole = DataLoader(TensorDataset(torch.ones(8, 4, dtype=torch.long), torch.arange(8) % 3), batch_size=8)
    with pytest.raises(InputError, match=r"does not take an input of shape \[8, 4\] and torch.int64: .*dtype"):
        make_trainer().fit(module, whole)


def test_an_error_of_ours_is_not_taken_for_a_wrong_shape():
    class Refusing(nn.Module):
        def forward(self, x):
            raise UnsupportedError("this size is unsupported")

    with pytest.raises(UnsupportedError, match="^this size is unsupported$"):
        DeterministicModule(Refusing()).predict(X)


@pytest.mark.parametrize("argument", ["num_train_samples", "num_eval_samples"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "a"])
def test_numbers_of_indices_are_checked_at_once(argument, value):
    with pytest.raises(InputError, match=rf"`{argument}` must be an integer of at least 1, but it is {value!r}"):
        DropoutModule(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)), **{argument: value})


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.5)])
def test_predict_after_a_fit_is_what_the_trainer_gives(make_trainer, layer):
    module = DeterministicModule(nn.Sequential(nn.Linear(4, 3), layer))
    module.network.network[0].weight.data.copy_(torch.eye(3, 4))
    rows = [(X, (X[:, :3] + 0.5 * torch.randn(45, 3)).argmax(1))]
    trainer = make_trainer(callbacks=[TemperatureScaling(dataloader=rows, weights="last")])
    trainer.fit(module, loader(), loader())
    module.train()  # as a training leaves it, or a user
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):
        prediction = module.predict(X[:8])
    assert module.training
    assert module.network.network[1].training
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    by_trainer = trainer.predict(module, loader())[0]
    assert torch.allclose(prediction.probs, by_trainer.probs)
    assert torch.equal(prediction.temperature, by_trainer.temperature)
