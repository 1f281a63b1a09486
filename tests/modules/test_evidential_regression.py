import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import EvidentialRegressionModule, Factory, OODDetection, StudentTPrediction
from lightning_uq.data import ToyCurveDataModule
from lightning_uq.errors import InputError
from lightning_uq.losses import EvidentialRegressionLoss, split_nig
from lightning_uq.tasks import EvidentialRegression

LOSSES = ["amini", "scaled", "meinert"]


def network(loss="amini", targets=1):
    outputs = targets * (3 if loss == "meinert" else 4)
    return Factory(
        "lightning_uq.networks.mlp.MLP", {"in_features": 1, "out_features": outputs, "hidden_sizes": [32, 32]}
    )


def data(n=40, targets=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator)
    return DataLoader(TensorDataset(x, torch.randn(n, targets, generator=generator)), batch_size=16)


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_a_curve(make_trainer, loss):
    module = EvidentialRegressionModule(network(loss), loss=loss, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    trainer = make_trainer(max_epochs=40)
    trainer.fit(module, ToyCurveDataModule(batch_size=50))
    (result,) = trainer.test(module, ToyCurveDataModule(), verbose=False)
    assert result["test_rmse"] < 0.2  # the target's standard deviation is 1, the noise's .12
    assert result["test_nll"] < 0
    assert 0.85 < result["test_coverage_95"] <= 1
    assert 0 < result["test_crps"] < 0.12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targets", [1, 3])
def test_metrics_are_the_student_t_s(make_trainer, loss, targets):
    module = EvidentialRegressionModule(network(loss, targets), loss=loss, task=EvidentialRegression(reg_factor=0.3))
    loader = data(targets=targets)
    (result,) = make_trainer().test(module, loader, verbose=False)
    x, y = loader.dataset.tensors
    raw = module(x)[0].detach()
    assert module(x).shape == (1, 40, targets * (3 if loss == "meinert" else 4))
    location, nu, alpha, beta = (p.double().numpy() for p in split_nig(raw, loss))
    t = stats.t(2 * alpha, location, (beta * (1 + nu) / (nu * alpha)) ** 0.5)
    assert result["test_nll"] == pytest.approx(-t.logpdf(y.double().numpy()).sum(1).mean(), rel=1e-5)
    assert result["test_rmse"] == pytest.approx(((location - y.numpy()) ** 2).mean() ** 0.5, rel=1e-5)
    inside = abs(t.cdf(y.numpy()) - 0.5) <= 0.475
    assert result["test_coverage_95"] == pytest.approx(inside.mean())
    crps = StudentTPrediction(*split_nig(raw[None], loss)).crps(y).mean()
    assert result["test_crps"] == pytest.approx(float(crps), rel=1e-6)
    # Batches are of 16, 16 and 8; the loss is the mean over all rows.
    assert result["test_loss"] == pytest.approx(float(EvidentialRegressionLoss(loss, 0.3)(raw, y)), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_s_own_weights_normalise_the_loss(loss):
    module = EvidentialRegressionModule(network(loss, 2), loss=loss)
    x, y = data(targets=2).dataset.tensors
    weight = torch.rand(len(x))
    each = [EvidentialRegressionLoss(loss, 0.01)(module(x)[0, i : i + 1], y[i : i + 1]) for i in range(len(x))]
    value = module.training_loss(x, y, {"input": x, "target": y, "weight": weight})
    torch.testing.assert_close(value, (weight * torch.stack(each)).sum() / weight.sum())


def test_predictions_join(make_trainer):
    module = EvidentialRegressionModule(network())
    prediction = StudentTPrediction.cat(make_trainer().predict(module, data()))
    assert len(prediction) == 40
    torch.testing.assert_close(prediction.mean, module.predict(data().dataset.tensors[0]).mean)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(make_trainer, precision):
    module = EvidentialRegressionModule(network())
    trainer = make_trainer(precision=precision)
    trainer.fit(module, data())
    (result,) = trainer.test(module, data(), verbose=False)
    assert torch.tensor(list(result.values())).isfinite().all()


def test_scores(make_trainer):
    module = EvidentialRegressionModule(network())
    x = data().dataset.tensors[0]
    assert list(OODDetection().score(module, [x])) == [module.ood_score] == ["epistemic_variance"]
    scores = OODDetection(scores=module.task.score_names).score(module, [x])
    prediction = module.predict(x)
    torch.testing.assert_close(scores["epistemic_variance"], prediction.epistemic_variance[:, 0])
    torch.testing.assert_close(scores["inverse_nu"], prediction.uncertainties("meinert")[1][:, 0] ** 2)
    (result,) = make_trainer(callbacks=[OODDetection({"far": [x + 100]})]).test(module, data(), verbose=False)
    assert "ood_auroc/far/epistemic_variance" in result


def test_a_checkpoint_remembers_everything(make_trainer, tmp_path):
    module = EvidentialRegressionModule(network("meinert"), loss="meinert", task=EvidentialRegression(reg_factor=0.2))
    trainer = make_trainer()
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = EvidentialRegressionModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.task == module.task == EvidentialRegression(loss="meinert", reg_factor=0.2)
    x = data().dataset.tensors[0]
    assert torch.equal(loaded.predict(x).scale, module.predict(x).scale)


def test_bad_input(make_trainer):
    with pytest.raises(
        InputError, match=r"EvidentialRegression\(\) must return \[B, 4 D\], .* but it returned shape \[2, 3\]"
    ):
        EvidentialRegressionModule(nn.Linear(1, 3)).predict(torch.zeros(2, 1))
    with pytest.raises(InputError, match="`loss` must be one of 'amini', 'scaled', 'meinert'"):
        EvidentialRegressionModule(network(), loss="nig")
    loader = DataLoader(TensorDataset(torch.zeros(16, 1), torch.zeros(16, 3)), batch_size=16)
    with pytest.raises(InputError, match=r"but they have \[16, 3\]"):
        make_trainer().fit(EvidentialRegressionModule(network()), loader)
