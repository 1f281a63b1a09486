import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import EvidentialModule, Factory, OODDetection, TemperatureScaling
from lightning_uq.callbacks.ood import DEFAULT_SCORES
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.compare.training.evaluation import ood_score
from lightning_uq.data import DigitsDataModule
from lightning_uq.errors import InputError
from lightning_uq.functional import dirichlet
from lightning_uq.losses import EvidentialLoss, FisherEvidentialLoss, MaxNormLoss, RelaxedEvidentialLoss, clamped_exp
from lightning_uq.metrics.unpredicted import UnpredictedClasses
from lightning_uq.networks.mlp import MLP
from lightning_uq.predictions import DirichletPrediction
from lightning_uq.tasks import EvidentialClassification, Progress

NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 2, "out_features": 3, "hidden_sizes": [8]})


def blobs(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centers = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return centers[y] + 0.3 * torch.randn(n, 2, generator=generator), y


def loader(n=60, batch_size=20, seed=0):
    return DataLoader(TensorDataset(*blobs(n, seed)), batch_size=batch_size)


def evidential(network=NETWORK, **fields):
    return EvidentialModule(network, task=EvidentialClassification(**fields))


class Factors(Callback):
    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.logged.append(float(trainer.callback_metrics["reg_factor"]))


class Fixed(nn.Module):
    """Returns what it is told, whatever it sees."""

    def __init__(self, raw):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(raw))

    def forward(self, x):
        return self.raw.expand(len(x), *self.raw.shape)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("loss", ["evidential", "nll", "cross_entropy", "maxnorm", "r_edl", "re_edl", "i_edl"])
def test_it_learns_three_blobs(make_trainer, loss):
    module = EvidentialModule(
        NETWORK,
        loss=loss,
        task=EvidentialClassification(annealing_steps=30),
        optimizer=lambda p: torch.optim.Adam(p, 0.02),
    )
    trainer = make_trainer(max_epochs=40)
    trainer.fit(module, loader())
    (result,) = trainer.test(module, loader(seed=1), verbose=False)
    assert result["test_accuracy"] > 0.95
    inside = module.predict(blobs()[0]).vacuity
    assert inside.median() < 0.5


@pytest.mark.parametrize(
    ("loss", "kind", "factor"),
    [
        ("evidential", EvidentialLoss, 1.0),
        ("nll", EvidentialLoss, 1.0),
        ("cross_entropy", EvidentialLoss, 1.0),
        ("maxnorm", MaxNormLoss, 0.1),
        ("r_edl", RelaxedEvidentialLoss, 1.0),
        ("re_edl", RelaxedEvidentialLoss, 0.0),
        ("i_edl", FisherEvidentialLoss, 1.0),
    ],
)
def test_each_name_is_a_loss_with_a_final_factor(loss, kind, factor):
    module = EvidentialModule(NETWORK, loss=loss)
    assert module.task.loss == loss
    assert module.task.final_reg_factor == module.task.reg_factor() == factor
    raw, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    risk = {"risk": loss} if loss in ("nll", "cross_entropy") else {}
    expected = kind("clamped_exp", factor, **risk)(raw, y)
    torch.testing.assert_close(module.index_losses(raw[None], y), expected[None])


def test_the_factor_rises_by_steps_and_is_logged(make_trainer):
    factors = Factors()
    module = EvidentialModule(NETWORK, task=EvidentialClassification(annealing_steps=4, max_reg_factor=0.5))
    make_trainer(max_epochs=2, callbacks=[factors]).fit(module, loader())
    assert factors.logged == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])
    assert module.task.reg_factor() == 0.5  # outside a training
    assert module.task.reg_factor(Progress(step=3, epoch=0)) == 0.375


def test_accumulated_gradients_are_one_step(make_trainer):
    factors = Factors()
    module = EvidentialModule(NETWORK, task=EvidentialClassification(annealing_steps=2))
    make_trainer(callbacks=[factors], accumulate_grad_batches=2).fit(module, loader(120))
    assert factors.logged == pytest.approx([0, 0, 0.5, 0.5, 1, 1])


def test_the_factor_rises_by_epochs(make_trainer):
    factors = Factors()
    module = EvidentialModule(NETWORK, task=EvidentialClassification(annealing_steps=1, annealing_epochs=2))
    make_trainer(max_epochs=4, callbacks=[factors]).fit(module, loader(batch_size=30))
    assert factors.logged == pytest.approx([0, 0, 0.5, 0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("arguments", [{"annealing_steps": 0}, {"annealing_epochs": 0}])
def test_no_annealing(make_trainer, arguments):
    factors = Factors()
    make_trainer(callbacks=[factors]).fit(evidential(**arguments), loader())
    assert factors.logged == [1, 1, 1]


@pytest.mark.parametrize("arguments", [{"annealing_steps": 8}, {"annealing_epochs": 3}])
def test_a_resumed_training_anneals_on(make_trainer, tmp_path, arguments):
    def fit(epochs, ckpt_path=None):
        torch.manual_seed(0)
        module, factors = evidential(**arguments), Factors()
        trainer = make_trainer(max_epochs=epochs, callbacks=[factors])
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, factors.logged

    whole, factors = fit(4)
    _, first = fit(2)
    resumed, rest = fit(4, tmp_path / "2.ckpt")
    assert first + rest == pytest.approx(factors)
    assert rest[0] > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_training_uses_the_present_factor_and_evaluation_the_final_one(make_trainer):
    module = EvidentialModule(
        Fixed([1.0, 0.5, -1.0]),
        task=EvidentialClassification(annealing_steps=1000),
        optimizer=lambda p: torch.optim.SGD(p, 0.0),
    )
    trainer = make_trainer()
    trainer.fit(module, loader(batch_size=60), loader(batch_size=60))
    x, y = blobs()
    raw = module(x)[0]
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["train_loss"], EvidentialLoss()(raw, y).detach())
    torch.testing.assert_close(logged["val_loss"].float(), EvidentialLoss(reg_factor=1.0)(raw, y).detach())


def test_a_batch_s_own_weights_normalise_the_loss():
    module = EvidentialModule(NETWORK)
    x, y = blobs(12)
    weight = torch.rand(12)
    each = EvidentialLoss(reg_factor=1.0, reduction="none")(module(x)[0], y)
    loss = module.training_loss(x, y, {"input": x, "target": y, "weight": weight})
    torch.testing.assert_close(loss, (weight * each).sum() / weight.sum())


# ---------------------------------------------------------------------- predictions


def test_the_forward_is_raw_and_the_prediction_a_dirichlet():
    raw = [3.0, 0.0, -20.0]
    module = EvidentialModule(Fixed(raw))
    x = torch.zeros(2, 2)
    assert module(x).shape == (1, 2, 3)
    torch.testing.assert_close(module(x)[0, 0], torch.tensor(raw))
    prediction = module.predict(x)
    assert isinstance(prediction, DirichletPrediction)
    alpha = clamped_exp(torch.tensor(raw)) + 1
    torch.testing.assert_close(prediction.concentration[0, 0], alpha)
    torch.testing.assert_close(prediction.probs[0], (alpha / alpha.sum()).double(), rtol=1e-6, atol=0)
    assert not torch.allclose(prediction.probs[0].float(), torch.tensor(raw).softmax(0), atol=0.01)
    torch.testing.assert_close(prediction.vacuity[0], (3 / alpha.sum()).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("evidence", ["clamped_exp", "softplus", "relu", torch.exp])
def test_evidence_functions(evidence):
    module = EvidentialModule(Fixed([1.0, 0.0, -1.0]), task=EvidentialClassification(evidence=evidence))
    function = {"clamped_exp": torch.exp, "softplus": nn.functional.softplus, "relu": torch.relu}.get(
        evidence, evidence
    )
    alpha = function(torch.tensor([1.0, 0.0, -1.0])) + 1
    torch.testing.assert_close(module.predict(torch.zeros(1, 2)).concentration[0, 0], alpha)


def test_mutual_information_holds_its_digits_on_large_evidence():
    alpha = torch.tensor([[2e4, 1e4, 1e4]])
    information = DirichletPrediction(alpha[None]).mutual_information
    # To first order (C - 1) / (2 S).
    torch.testing.assert_close(information, torch.tensor([2 / (2 * 4e4)]).double(), rtol=1e-3, atol=0)


def test_a_relaxed_prior_is_a_prior_in_the_vacuity():
    module = EvidentialModule(
        Fixed([-50.0, -50.0, -50.0]), loss="re_edl", task=EvidentialClassification(evidence="softplus")
    )
    prediction = module.predict(torch.zeros(2, 2))
    torch.testing.assert_close(prediction.prior, torch.tensor(0.1))
    torch.testing.assert_close(prediction.concentration, torch.full((1, 2, 3), 0.1))
    torch.testing.assert_close(prediction.vacuity, torch.ones(2).double())
    both = DirichletPrediction.cat([prediction, prediction]).to(torch.float64)
    torch.testing.assert_close(both.vacuity, torch.ones(4).double())


def test_maps_have_their_classes_at_axis_two(make_trainer):
    network = nn.Conv2d(2, 3, 1)
    x = torch.randn(6, 2, 4, 5)
    y = x.sum(1).gt(0).long()
    data = DataLoader(TensorDataset(x, y), batch_size=3)
    module = EvidentialModule(network, task=EvidentialClassification(annealing_steps=0))
    trainer = make_trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, data)
    (result,) = trainer.test(module, data, verbose=False)
    prediction = DirichletPrediction.cat(trainer.predict(module, data))
    assert module(x).shape == (1, 6, 3, 4, 5)
    assert prediction.vacuity.shape == prediction.label.shape == (6, 4, 5)
    assert result["test_accuracy"] == pytest.approx(float((prediction.label == y).float().mean()))
    torch.testing.assert_close(module.prediction(module(x)).probs.sum(1), torch.ones(6, 4, 5).double())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(make_trainer, precision):
    module = EvidentialModule(NETWORK, task=EvidentialClassification(annealing_steps=2))
    trainer = make_trainer(precision=precision, max_epochs=2)
    trainer.fit(module, loader())
    prediction = DirichletPrediction.cat(trainer.predict(module, loader()))
    assert prediction.concentration.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert (prediction.vacuity <= 1).all()
    (result,) = trainer.test(module, loader(), verbose=False)
    assert result["test_accuracy"] == pytest.approx(float((prediction.label == blobs()[1]).float().mean()))


# ---------------------------------------------------------------------- metrics


def test_metrics_are_of_the_dirichlet_s_mean_and_without_a_joint_log_loss(make_trainer):
    module = EvidentialModule(NETWORK)
    (result,) = make_trainer().test(module, loader(), verbose=False)
    x, y = blobs()
    probs = module.predict(x).probs.detach()
    assert result["test_nll"] == pytest.approx(float(-probs.gather(1, y[:, None]).log().mean()))
    brier = (probs - nn.functional.one_hot(y)).square().sum(1).mean()
    assert result["test_brier"] == pytest.approx(float(brier))
    assert set(result) == {
        "test_loss",
        "test_accuracy",
        "test_nll",
        "test_ece",
        "test_brier",
        "test_unpredicted_classes",
    }


def test_it_warns_of_a_class_that_is_never_predicted(make_trainer):
    module = EvidentialModule(Fixed([1.0, 0.0, -1.0]), task=EvidentialClassification(annealing_steps=4))
    with pytest.warns(UserWarning, match=r"Classes \[1, 2\] .*are never predicted.*smaller `max_reg_factor` than 1"):
        (result,) = make_trainer().validate(module, loader(), verbose=False)
    assert result["val_unpredicted_classes"] == 2
    with warnings.catch_warnings():  # while the factor rises, a class may just not have been learnt yet
        warnings.simplefilter("error", UserWarning)
        make_trainer(max_epochs=1).fit(module, loader(), loader())
    with pytest.warns(UserWarning, match="are never predicted"):
        make_trainer(max_epochs=2).fit(module, loader(), loader())
    epochs = EvidentialModule(Fixed([1.0, 0.0, -1.0]), task=EvidentialClassification(annealing_epochs=1))
    with pytest.warns(UserWarning, match="are never predicted"):
        make_trainer(max_epochs=2).fit(epochs, loader(), loader())


def test_max_norm_collapses_at_the_original_s_factor_and_not_at_ours(make_trainer):
    accuracy = {}
    network = Factory(
        "lightning_uq.networks.mlp.MLP", {"in_features": 64, "out_features": 8, "hidden_sizes": [128, 128]}
    )
    for factor in (1.0, None):
        torch.manual_seed(0)
        data = DigitsDataModule(ood_classes=(8, 9), seed=0, batch_size=128)
        module = EvidentialModule(
            network,
            loss="maxnorm",
            task=EvidentialClassification(annealing_steps=140, max_reg_factor=factor),
            optimizer=lambda p: torch.optim.Adam(p, 2e-3),
        )
        trainer = make_trainer(max_epochs=25, check_val_every_n_epoch=25)
        expected = pytest.warns(UserWarning, match="are never predicted") if factor else warnings.catch_warnings()
        with expected:
            trainer.fit(module, data)
        accuracy[factor] = float(trainer.callback_metrics["val_accuracy"])
    assert accuracy[1.0] < 0.85
    assert accuracy[None] > 0.95


def test_a_class_without_labels_need_not_be_predicted():
    metric = UnpredictedClasses()
    metric.update(DirichletPrediction(torch.eye(4)[None, [0, 0, 2]] + 1), torch.tensor([0, 1, 0]))
    assert metric.compute() == 1
    assert metric.classes() == [1]
    metric.update(DirichletPrediction(torch.eye(4)[None, [1]] + 1), torch.tensor([0]))
    assert metric.classes() == []


# ---------------------------------------------------------------------- scores


def test_scores_are_the_dirichlet_s_and_never_a_softmax_s(make_trainer):
    torch.manual_seed(1)
    module = EvidentialModule(NETWORK)
    x, _ = blobs()
    prediction = module.predict(x)
    assert list(OODDetection().score(module, [x])) == [module.ood_score] == ["vacuity"]
    scores = OODDetection(scores=module.task.score_names).score(module, [x])
    assert next(iter(scores)) == "vacuity"
    assert set(scores) == {
        "vacuity",
        "mutual_information",
        "differential_entropy",
        "predictive_entropy",
        "expected_entropy",
        "max_softmax",
        "gen",
    }
    for name in ("vacuity", "mutual_information", "differential_entropy", "predictive_entropy", "expected_entropy"):
        torch.testing.assert_close(scores[name], getattr(prediction, name))
    torch.testing.assert_close(scores["max_softmax"], 1 - prediction.confidence)
    torch.testing.assert_close(
        scores["predictive_entropy"],
        dirichlet.dirichlet_predictive_entropy(prediction.concentration[0]),
        atol=1e-6,
        rtol=1e-6,
    )
    (result,) = make_trainer(callbacks=[OODDetection({"far": [10 + x]})]).test(module, loader(), verbose=False)
    assert "ood_auroc/far/vacuity" in result


def test_every_reader_gets_the_same_scores():
    module = EvidentialModule(NETWORK)
    x, _ = blobs()
    prediction = module.predict(x)
    torch.testing.assert_close(ood_score("vacuity", prediction), prediction.vacuity)
    # What a `predict_fn` gives is logits, which know no evidence any more.
    mean = OODDetection(predict_fn=lambda model, x: model.predict(x).log_probs).score(module, [x])
    assert set(mean) == set(DEFAULT_SCORES) - {"energy"}  # of which log-probabilities have none
    torch.testing.assert_close(mean["max_softmax"].double(), 1 - prediction.confidence, atol=1e-6, rtol=0)
    with pytest.raises(
        InputError, match=r"for EvidentialClassification\(\), names from vacuity, .*, but it holds 'energy'"
    ):
        OODDetection(scores=["energy"]).score(module, [x])


def test_a_temperature_tempers_the_mean_alone(make_trainer):
    module = EvidentialModule(NETWORK, task=EvidentialClassification(annealing_steps=0))
    temperature = TemperatureScaling()
    trainer = make_trainer(max_epochs=3, callbacks=[temperature])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), loader(seed=1))
    prediction = DirichletPrediction.cat(trainer.predict(module, loader()))
    temperature.handle.remove()
    plain = DirichletPrediction.cat(make_trainer().predict(module, loader()))
    torch.testing.assert_close(prediction.vacuity, plain.vacuity)
    assert not torch.allclose(prediction.probs, plain.probs, atol=1e-4)


# ---------------------------------------------------------------------- checkpoints and arguments


def test_a_checkpoint_remembers_everything(make_trainer, tmp_path):
    module = EvidentialModule(
        NETWORK,
        task=EvidentialClassification(
            loss="maxnorm",
            evidence="softplus",
            annealing_epochs=2,
            max_reg_factor=0.3,
            class_weights=[1.0, 2.0, 3.0],
            loss_arguments={"p_norm": 2, "fisher": "paper"},
        ),
    )
    trainer = make_trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, "best", monitor="val_nll")])
    trainer.fit(module, loader(), loader())
    loaded = EvidentialModule.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert loaded.task == module.task
    assert loaded.task.loss == "maxnorm"
    assert loaded.task.loss_arguments == {"p_norm": 2, "fisher": "paper"}
    assert loaded.task.final_reg_factor == 0.3
    assert loaded.task.class_weights == (1.0, 2.0, 3.0)
    x, y = blobs()
    assert torch.equal(loaded.predict(x).concentration, module.predict(x).concentration)
    assert torch.equal(loaded.index_losses(loaded(x), y), module.index_losses(module(x), y))


def test_a_lambda_has_to_be_passed_again(make_trainer, tmp_path):
    module = EvidentialModule(NETWORK, task=EvidentialClassification(evidence=lambda x: x.exp() * 2))
    trainer = make_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="does not hold argument `task`: a .*EvidentialClassification.*Pass it to"):
        EvidentialModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_outputs_are_picked():
    class Dictionary(MLP):
        def forward(self, x):
            return {"evidence": super().forward(x)}

    module = EvidentialModule(Dictionary(2, 3), output=lambda out: out["evidence"])
    assert module.predict(torch.zeros(2, 2)).concentration.shape == (1, 2, 3)


def test_it_is_registered():
    known = methods()
    assert known["evidential"].ood_score == known["maxnorm"].ood_score == "vacuity"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "edl"}, "`loss` must be one of 'evidential', 'nll'"),
        ({"evidence": "exp"}, "`evidence` must be one of 'clamped_exp', 'softplus', 'relu'"),
        ({"annealing_steps": -1}, "`annealing_steps` must be at least 0, but it is -1"),
        ({"annealing_epochs": -1}, "`annealing_epochs` must be at least 0, but it is -1"),
        ({"max_reg_factor": -0.1}, "`max_reg_factor` must be at least 0, but it is -0.1"),
        ({"loss_arguments": {"p_norm": 4}}, "`loss_arguments` must hold arguments of EvidentialLoss: .*p_norm"),
        ({"loss_arguments": {"weight": [1.0]}}, "`loss_arguments` must not hold 'weight': the task has a field for it"),
        ({"class_weights": [1.0], "num_classes": 3}, "`class_weights` must hold 3 numbers, .* but it holds 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        evidential(**arguments)


def test_bad_arguments_of_the_module():
    with pytest.raises(InputError, match=r"EvidentialClassification\(\) needs the network's raw outputs, .* 'probs'"):
        EvidentialModule(NETWORK, output="probs")
    with pytest.raises(InputError, match="`loss` must be one of 'evidential', 'nll'"):
        EvidentialModule(NETWORK, loss="edl")
    with pytest.raises(InputError, match="`task` must be an EvidentialClassification, but it is Classification"):
        EvidentialModule(NETWORK, task="classification")
    x, y = blobs()
    module = evidential(class_weights=[1.0])
    with pytest.raises(InputError, match="`class_weights` must hold 3 numbers, .* of the network's output, .* holds 1"):
        module.index_losses(module(x), y)


def test_bad_outputs_and_labels(make_trainer):
    with pytest.raises(InputError, match="The network must return 4 logits"):
        evidential(num_classes=4).predict(torch.zeros(2, 2))
    x, y = blobs()
    with pytest.raises(InputError, match=r"class labels in \[0, 3\), but their values go from 1 to 3"):
        make_trainer().fit(EvidentialModule(NETWORK), DataLoader(TensorDataset(x, y + 1), batch_size=60))


def test_classes_of_all_ranks_decide():
    theirs = {"labelled": torch.tensor([1, 2]), "predicted": torch.tensor([1])}
    states = iter(list(theirs) * 2)  # gathered by compute, then by classes
    metric = UnpredictedClasses(
        dist_sync_fn=lambda mine, group=None: [mine, theirs[next(states)]],
        distributed_available_fn=lambda: True,
    )
    metric.update(DirichletPrediction(torch.eye(3)[None, [0, 0]] + 1), torch.tensor([0, 1]))
    assert metric.compute() == 1
    assert metric.classes() == [2]
    assert torch.cat(metric.labelled).tolist() == [0, 1]  # this rank's own again


@pytest.mark.slow
def test_two_ranks_count_their_predictions_together(run_script):
    out = run_script(
        """
import json, warnings
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq import EvidentialModule
from lightning_uq.tasks import EvidentialClassification

if __name__ == "__main__":
    # Each rank predicts one class, together they predict both; class 2 has labels and nobody predicts it.
    x = 3 * torch.eye(3)[[0, 1, 0, 1]]
    data = DataLoader(TensorDataset(x, torch.tensor([0, 1, 2, 2])), batch_size=2)
    module = EvidentialModule(nn.Identity())
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (result,) = trainer.validate(module, data, verbose=False)
    if trainer.is_global_zero:
        texts = [str(w.message) for w in caught if "never predicted" in str(w.message)]
        json.dump([result["val_unpredicted_classes"], texts], open(out, "w"))
"""
    )
    assert out[0] == 1
    assert len(out[1]) == 1
    assert "Classes [2] of the validation data are never predicted" in out[1][0]
