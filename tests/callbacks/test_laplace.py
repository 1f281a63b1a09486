"""FitLaplace: its numbers from the definition, every kind of output, in and without a Trainer, on one rank and on two."""

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    FitGMM,
    OODDetection,
    TemperatureScaling,
)
from lightning_uq.callbacks.laplace import FitLaplace
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.errors import InputError, NotFiniteError, NotFittedError
from lightning_uq.functional.laplace import precision_candidates
from lightning_uq.networks.factory import Factory
from lightning_uq.predictions import GaussianMixturePrediction
from lightning_uq.tasks import Regression

GENERATOR = torch.Generator().manual_seed(1)
X, HELD, FAR = (torch.randn(n, 3, generator=GENERATOR) for n in (64, 40, 16))
FAR = 30 * FAR
SCALE = (100.0, 20.0)
MEAN = Regression(head="mean", target_scale=SCALE)


def numbers(x):
    return 100 + 20 * torch.stack([x.sum(1), x[:, 0].sin()], 1) + 5 * torch.randn(len(x), 2, generator=GENERATOR)


Y, HELD_Y = numbers(X), numbers(HELD)
LABELS, HELD_LABELS = ((x[:, 0] > 0).long() + (x[:, 1] > 0).long() for x in (X, HELD))
PAIRS, HELD_PAIRS = ((x[:, :2] > 0).float() for x in (X, HELD))
CASES = {  # task, number of outputs, targets
    "means": (MEAN, 2, Y, HELD_Y),
    "gaussians": (Regression(target_scale=SCALE), 4, Y, HELD_Y),
    "log-variances": (Regression(head="mean_log_variance", target_scale=SCALE), 4, Y, HELD_Y),
    "classes": ("classification", 3, LABELS, HELD_LABELS),
    "labels": ("multilabel", 2, PAIRS, HELD_PAIRS),
    "binary": ("binary", 1, PAIRS[:, 0], HELD_PAIRS[:, 0]),
}
each_case = pytest.mark.parametrize("case", CASES)


def loader(x, y, **kwargs):
    return DataLoader(TensorDataset(x, y), batch_size=8, **kwargs)


def network(out, bias=True):
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, out, bias=bias))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def module_of(case, **kwargs):
    task, out, *_ = CASES[case]
    return DeterministicModule(network(out), task=task, optimizer=adam, **kwargs)


def overfitted(case):
    """A module that knows its training rows too well, so that an uncertainty of its weights helps."""
    module = module_of(case)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        module.index_losses(module(X), CASES[case][2]).mean().backward()
        optimizer.step()
    return module


def by_hand(net, task_scale, noise, precision, x):
    """phi^T Sigma phi of one target, by the Hessian that autograd gives of the loss of the last layer's weights."""
    phi = net[:2](X.double())
    phi, at = (torch.cat([f, torch.ones(len(f), 1)], 1) for f in (phi, net[:2](x.double())))
    target = (Y[:, 0].double() - task_scale[0]) / task_scale[1]
    weight = torch.cat([net[2].weight[0], net[2].bias[:1]]).detach()

    def energy(w):
        return ((target - phi @ w).square().sum() / noise + precision * w.square().sum()) / 2

    covariance = torch.autograd.functional.hessian(energy, weight).inverse()
    return task_scale[1] ** 2 * torch.einsum("bp,pq,bq->b", at, covariance, at)


# ---------------------------------------------------------------------- numbers


@torch.no_grad()
def test_the_variance_is_the_inverse_hessians_in_the_units_of_the_targets():
    module = module_of("means").double()
    laplace = FitLaplace(select="marginal_likelihood").fit(module, loader(X.double(), Y.double()))
    posterior = laplace.transform().posteriors[0]
    prediction = laplace.predict(module, HELD.double())
    with torch.enable_grad():
        net = module.network.called_network
        expected = by_hand(net, SCALE, posterior.noise[0], posterior.prior_precision[0], HELD)
    torch.testing.assert_close(prediction.epistemic_variance[:, 0], expected.detach())
    torch.testing.assert_close(prediction.aleatoric_variance[0], SCALE[1] ** 2 * posterior.noise)
    torch.testing.assert_close(prediction.variance, prediction.aleatoric_variance + prediction.epistemic_variance)
    torch.testing.assert_close(prediction.mean, module(HELD.double())[0] * 20 + 100)


def test_a_linear_model_has_the_predictive_density_of_bayesian_regression():
    """Its trained weights are the posterior's mode, so the moments are exact."""
    x, y = X.double(), Y[:, :1].double()
    laplace = FitLaplace(select="marginal_likelihood", task=Regression(head="mean"))
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).double()
    phi = torch.cat([x, torch.ones(64, 1)], 1)
    with torch.no_grad():
        solved = torch.linalg.lstsq(phi, y).solution
        model[1].weight.copy_(solved[:3].T)
        model[1].bias.copy_(solved[3])
    prediction = laplace.fit(model, [(x, y)]).predict(model, HELD.double())
    noise, precision = (getattr(laplace.transform().posteriors[0], name)[0] for name in ("noise", "prior_precision"))
    covariance = (phi.T @ phi / noise + precision * torch.eye(4)).inverse()
    at = torch.cat([HELD.double(), torch.ones(40, 1)], 1)
    torch.testing.assert_close(prediction.variance[:, 0], noise + torch.einsum("bp,pq,bq->b", at, covariance, at))
    density = torch.distributions.Normal(prediction.mean, prediction.variance.sqrt()).log_prob(HELD_Y[:, :1])
    torch.testing.assert_close(prediction.log_prob(HELD_Y[:, :1].double()), density[:, 0])


@torch.no_grad()
def test_rows_of_a_network_with_a_variance_count_by_its_inverse():
    module = module_of("gaussians").double()
    laplace = FitLaplace().fit(module, loader(X.double(), Y.double()))
    net = module.network.called_network
    phi, at = (torch.cat([net[:2](x.double()), torch.ones(len(x), 1)], 1) for x in (X, HELD))
    inverse = 400 / module.prediction(module(X.double())).member_variance[0, :, 1]  # in the network's units
    precision = (phi * inverse[:, None]).T @ phi + laplace.transform().posteriors[0].prior_precision[1] * torch.eye(7)
    expected = 400 * torch.einsum("bp,pq,bq->b", at, precision.inverse(), at)
    before, after = module.prediction(module(HELD.double())), module.predict(HELD.double())
    torch.testing.assert_close(after.epistemic_variance[:, 1], expected)
    torch.testing.assert_close(after.aleatoric_variance, before.aleatoric_variance)


def test_missing_targets_are_left_out():
    module = module_of("means").double()
    x, gaps = X.double(), Y.double().clone()
    gaps[::4, 1] = math.nan
    laplace = FitLaplace(select="marginal_likelihood").fit(module, loader(x, gaps))
    noise = laplace.transform().posteriors[0].noise
    torch.testing.assert_close(
        noise[0],
        FitLaplace(select="marginal_likelihood").fit(module, loader(x, Y.double())).transform().posteriors[0].noise[0],
    )
    known = FitLaplace(select="marginal_likelihood").fit(
        module, loader(x[~gaps[:, 1].isnan()], gaps[~gaps[:, 1].isnan()])
    )
    assert noise[1] == pytest.approx(float(known.transform().posteriors[0].noise[1]), rel=0.05)
    with pytest.raises(InputError, match="one target is missing in all"):
        FitLaplace(select="marginal_likelihood").fit(module, loader(x, gaps * torch.tensor([1.0, math.nan])))


@torch.no_grad()
def test_held_out_rows_choose_the_noise_that_suits_them():
    module = module_of("means").double()
    held_out = loader(HELD.double(), HELD_Y.double() + 200)
    fits = {
        s: FitLaplace(select=s, held_out=held_out).fit(module, loader(X.double(), Y.double()))
        for s in ("auto", "held_out")
    }
    own = FitLaplace(select="marginal_likelihood").fit(module, loader(X.double(), Y.double()))
    nll = {
        s: -one.predict(module, HELD.double()).log_prob(HELD_Y.double() + 200).mean()
        for s, one in {**fits, "own": own}.items()
    }
    assert nll["held_out"] <= nll["auto"] + 1e-9 < nll["own"]
    ratios = [p.prior_precision * p.noise for p in (one.transform().posteriors[0] for one in (fits["auto"], own))]
    torch.testing.assert_close(*ratios)
    assert fits["auto"].transform().posteriors[0].noise.min() > 5 * own.transform().posteriors[0].noise.max()


def test_a_few_held_out_rows_do_not_choose():
    module = module_of("means")
    few = [(HELD[:10], HELD_Y[:10] + 500)]
    laplace = FitLaplace(held_out=few).fit(module, loader(X, Y))
    own = FitLaplace(select="marginal_likelihood").fit(module, loader(X, Y))
    torch.testing.assert_close(laplace.state_dict()["tensors"]["0.noise"], own.state_dict()["tensors"]["0.noise"])


@torch.no_grad()
def test_draws_of_logits_have_the_variance_and_are_the_same_for_all_inputs():
    module = module_of("classes").double()
    laplace = FitLaplace(select="marginal_likelihood", num_samples=4000, seed=3).fit(module, loader(X.double(), LABELS))
    logits = laplace.predict(module, HELD.double()).logits
    assert logits.shape == (4000, 40, 3)
    features = module.network.called_network[:2](HELD.double())
    torch.testing.assert_close(logits.var(0), laplace.transform().variance(features[None])[0], rtol=0.15, atol=0)
    torch.testing.assert_close(logits[:, 5:9], laplace.predict(module, HELD.double()[5:9]).logits, rtol=1e-6, atol=1e-6)
    again = FitLaplace(select="marginal_likelihood", num_samples=4000, seed=4).fit(module, loader(X.double(), LABELS))
    assert not torch.equal(again.predict(module, HELD.double()).logits, logits)


@torch.no_grad()
def test_the_probit_link_is_close_to_the_mean_of_the_draws():
    for case, targets in (("classes", LABELS), ("labels", PAIRS), ("binary", PAIRS[:, 0])):
        module = module_of(case).double()
        fit = [
            FitLaplace(select="marginal_likelihood", link=link, num_samples=4000).fit(
                module, loader(X.double(), targets)
            )
            for link in ("samples", "probit")
        ]
        draws, probit = (one.predict(module, HELD.double()) for one in fit)
        assert probit.num_indices == 1
        torch.testing.assert_close(draws.probs, probit.probs, atol=0.03, rtol=0)


# ---------------------------------------------------------------------- every kind of output


@each_case
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_every_precision_under_a_trainer_and_far_inputs_are_less_certain(case, precision, make_trainer):
    _, _, y, held = CASES[case]
    module, laplace = module_of(case), FitLaplace(weights="last")
    wide = (lambda t: t.double() if t.is_floating_point() else t) if precision == "64-true" else (lambda t: t)
    trainer = make_trainer(callbacks=[laplace], max_epochs=2, precision=precision)
    trainer.fit(module, loader(wide(X), wide(y)), loader(wide(HELD), wide(held)))
    (near,) = trainer.predict(module, DataLoader(wide(HELD), batch_size=40))
    (far,) = trainer.predict(module, DataLoader(wide(FAR), batch_size=40))
    name = "epistemic_variance" if case in ("means", "gaussians", "log-variances") else "mutual_information"
    assert near.score(name).isfinite().all()
    assert far.score(name).mean() > near.score(name).mean()
    assert (
        laplace.score(module, [wide(FAR).to(module.dtype)]).mean()
        > laplace.score(module, [wide(HELD).to(module.dtype)]).mean()
    )


@each_case
@pytest.mark.parametrize("link", ["samples", "probit"])
def test_the_preview_has_the_type_and_size_of_what_is_predicted(case, link):
    module = module_of(case)
    laplace = FitLaplace(select="marginal_likelihood", link=link, num_samples=5)
    before = module.predict(HELD)
    laplace.fit(module, loader(X, CASES[case][2]))
    seen, after = laplace.preview(before), module.predict(HELD)
    assert type(seen) is type(after)
    assert seen.num_indices == after.num_indices
    assert set(seen.to_dict()) == set(after.to_dict())


@each_case
def test_an_ensemble_has_one_posterior_per_member(case):
    task, out, y, _ = CASES[case]
    make = Factory("tests.callbacks.test_laplace.network", {"out": out})
    ensemble = EnsembleModule(make, num_members=3, task=task, seed=0).double()
    x, y = X.double(), y.double() if y.is_floating_point() else y
    laplace = FitLaplace(select="marginal_likelihood", num_samples=6).fit(ensemble, loader(x, y))
    prediction = laplace.predict(ensemble, HELD.double())
    if case not in ("means", "gaussians", "log-variances"):
        assert prediction.num_indices == 6
        return
    alone = []
    for i in range(3):
        member = DeterministicModule(ensemble.network.member(i), task=task)
        alone.append(FitLaplace(select="marginal_likelihood").fit(member, loader(x, y)).predict(member, HELD.double()))
    expected = torch.stack([one.epistemic_variance for one in alone]).mean(0)
    means = torch.stack([one.mean for one in alone])
    torch.testing.assert_close(prediction.epistemic_variance, expected + means.var(0, correction=0))
    torch.testing.assert_close(
        prediction.aleatoric_variance, torch.stack([one.aleatoric_variance for one in alone]).mean(0)
    )


def test_a_horizon_is_so_many_targets():
    class Steps(nn.Sequential):
        def forward(self, x):
            return super().forward(x).unflatten(1, (3, -1))

    target = Y.unsqueeze(1) + torch.arange(3.0)[:, None]
    for head, out in (("mean", 6), ("mean_variance", 12)):
        model = Steps(*network(out))
        given = {"held_out": loader(HELD, HELD_Y.unsqueeze(1).repeat(1, 3, 1))} if head == "mean" else {}
        laplace = FitLaplace(task=Regression(head=head), **given)
        prediction = laplace.fit(model, loader(X, target)).predict(model, HELD)
        assert prediction.epistemic_variance.shape == prediction.mean.shape == (40, 3, 2)
        features = nn.Sequential(*list(model)[:2])(HELD)
        first = laplace.transform().variance(features[None])[0, :, 3]  # of step 1, target 1
        torch.testing.assert_close(prediction.epistemic_variance[:, 1, 1], first.float())


def test_a_layer_without_a_bias():
    model = network(1, bias=False)
    laplace = FitLaplace(task=Regression(head="mean")).fit(model, loader(X, Y[:, :1]))
    assert laplace.state_dict()["tensors"]["0.eigenvalues"].shape == (1, 6)
    assert laplace.predict(model, torch.zeros(1, 3)).epistemic_variance.shape == (1, 1)


def test_many_classes():
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 300))
    x = torch.randn(200, 64)
    prediction = (
        FitLaplace(num_samples=4, held_out=[(x, torch.arange(200))])
        .fit(model, [(x, torch.arange(200))])
        .predict(model, x[:5])
    )
    assert prediction.logits.shape == (4, 5, 300)


# ---------------------------------------------------------------------- under a Trainer


class Users(LightningModule):
    """A regressor of somebody who has never heard of this package."""

    def __init__(self):
        super().__init__()
        self.net = network(2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def test_an_unmodified_regressor_is_left_alone_or_predicts_gaussians(make_trainer):
    for given, kind in (
        ({}, torch.Tensor),
        ({"attach": True, "task": Regression(head="mean")}, GaussianMixturePrediction),
    ):
        laplace, module = FitLaplace(weights="last", **given), Users()
        trainer = make_trainer(callbacks=[laplace], max_epochs=1)
        trainer.fit(module, loader(X, Y), loader(HELD, HELD_Y))
        (predicted,) = trainer.predict(module, DataLoader(HELD, batch_size=40))
        assert isinstance(predicted, kind)
        assert isinstance(laplace.predict(module, HELD), GaussianMixturePrediction)


def test_it_persists_with_the_best_weights_and_its_score_is_logged(make_trainer, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss")
    laplace, module = FitLaplace(), module_of("means")
    trainer = make_trainer(callbacks=[laplace, keep], max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, loader(X, Y), loader(HELD, HELD_Y))
    assert set(fitted_states(laplace.uq_ckpt_path)) == {"FitLaplace"}
    fresh, other = FitLaplace(), module_of("means")
    detection = OODDetection({"far": loader(FAR, numbers(FAR))}, scores=["laplace"])
    trainer = make_trainer(callbacks=[fresh, detection])
    (tested,) = trainer.test(other, loader(HELD, HELD_Y), ckpt_path=keep.best_model_path, verbose=False)
    assert tested["ood_auroc/far/laplace"] > 0.95
    best = laplace.predict(other, HELD)
    torch.testing.assert_close(fresh.predict(other, HELD).variance, best.variance, rtol=0, atol=0)
    torch.testing.assert_close(other.predict(HELD).variance, best.variance, rtol=0, atol=0)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    for use in (lambda: other.predict(HELD), lambda: fresh.predict(other, HELD)):
        with pytest.raises(NotFittedError, match="other weights"):
            use()


@pytest.mark.parametrize("case", ["gaussians", "classes"])
def test_the_metrics_of_a_test_are_those_of_the_changed_predictions(case, make_trainer):
    _, _, y, held = CASES[case]
    module, laplace = overfitted(case), FitLaplace(weights="last")
    make_trainer(callbacks=[laplace], max_epochs=1).fit(module, loader(X, y), loader(HELD, held))
    (tested,) = make_trainer(callbacks=[laplace]).test(module, loader(HELD, held), verbose=False)
    with torch.no_grad():
        expected = -module.predict(HELD).log_prob(held).mean()
    assert tested["test_nll"] == pytest.approx(float(expected), rel=1e-5)
    laplace.handle.remove()
    (before,) = make_trainer().test(module, loader(HELD, held), verbose=False)
    assert abs(before["test_nll"] - tested["test_nll"]) > 1e-4


def test_a_temperature_acts_on_the_draws_whatever_the_order(make_trainer):
    results = []
    for order in (1, -1):
        torch.manual_seed(0)
        for scope in ("pooled", "shared"):
            module = module_of("classes")
            callbacks = [FitLaplace(weights="last"), TemperatureScaling(weights="last", scope=scope)][::order]
            make_trainer(callbacks=[*callbacks, FitGMM(weights="last", feature_transform="raw")], max_epochs=2).fit(
                module, loader(X, LABELS), loader(HELD, HELD_LABELS)
            )
            laplace, scaling = callbacks[::order]
            with laplace.transform().observing(module) as change:
                raw = module.prediction(module(HELD))
            expected = scaling.transform().apply(change(raw))
            torch.testing.assert_close(module.predict(HELD).probs, expected.probs)
            assert module.predict(HELD).log_density.shape == (40,)
            results.append(module.predict(HELD).probs)
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_copies_and_settings():
    module = module_of("classes")
    held_out = loader(HELD, HELD_LABELS)
    laplace = FitLaplace(held_out=held_out).fit(module, loader(X, LABELS))
    expected = module.predict(HELD).logits
    other = FitLaplace()
    other.load_state_dict(laplace.state_dict())
    for one in (other, pickle.loads(pickle.dumps(laplace))):
        torch.testing.assert_close(one.predict(module, HELD).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(module).predict(HELD).logits, expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="select"):
        FitLaplace(select="marginal_likelihood").load_state_dict(laplace.state_dict())
    with pytest.raises(NotFittedError, match="is not fitted"):
        FitLaplace().predict(module, HELD)


TWO_RANKS = """
import json, torch
from torch import nn
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq import DeterministicModule, FitLaplace, Regression
torch.manual_seed(0)
x = torch.randn(61, 4).double()  # two ranks have other batches than one, so everything is in float64
held = torch.randn(33, 4).double()
few = [(held[:5].repeat(5, 1), held[:5, :2].repeat(5, 1))]  # one batch: the second rank has none
data = {Regression(head="mean"): lambda x: x[:, :2].sin(), "classification": lambda x: (x[:, 0] > 0).long() + (x[:, 1] > 0).long()}
def main():
    gaps = []
    for task, target in data.items():
        make = lambda: [FitLaplace(weights="last"), FitLaplace(weights="last", name="held", select="held_out")]
        if task != "classification":
            more = make
            make = lambda: [*more(), FitLaplace(weights="last", name="few", held_out=few, dataloader=few)]
        module = DeterministicModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3 if task == "classification" else 2)), task=task,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        loaders = [DataLoader(TensorDataset(rows, target(rows)), batch_size=4) for rows in (x, held)]
        callbacks = make()
        Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=1, precision="64-true",
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=".", callbacks=callbacks, use_distributed_sampler=True).fit(module, *loaders)
        for fitted, one in zip(callbacks, make()):
            if one.held_out.given is None and one.name != "few":
                one.held_out.given = loaders[1]
            one.fit(module, few if one.name == "few" else loaders[0])
            a, b = (c.predict(module, held).to_dict() for c in (fitted, one))
            gaps.append(max(float((a[k] - b[k]).abs().max()) for k in a))
    everyones = [None, None]
    torch.distributed.all_gather_object(everyones, gaps)
    if torch.distributed.get_rank() == 0:
        json.dump(everyones, open(out, "w"))
if __name__ == "__main__":
    main()
"""


def test_two_ranks_give_what_one_gives(run_script):
    gaps = run_script(TWO_RANKS)
    assert [len(one) for one in gaps] == [5, 5]
    assert max(map(max, gaps)) < 1e-5  # draws of weights are rounded to float32


# ---------------------------------------------------------------------- what is refused


def refused(model, match, y=Y, **given):
    laplace = FitLaplace(**given)
    with pytest.raises(InputError, match=match):
        laplace.fit(model, loader(X, y))
    assert not laplace.fitted


def test_outputs_that_the_layer_does_not_make_are_refused():
    mean = Regression(head="mean")
    not_those = "but '2' does not.* as `feature_layer`"
    refused(nn.Sequential(*network(2), nn.Softplus()), not_those, task=mean)
    refused(nn.Sequential(*network(2), nn.Hardtanh(-1e-4, 1e-4)), not_those, task=mean)
    refused(nn.Sequential(*network(1), nn.Softplus()), not_those, y=PAIRS[:, 0], task="binary")
    refused(nn.Sequential(*network(3), nn.Softplus()), not_those, y=LABELS)
    refused(network(2), "but '0' does not", task=mean, feature_layer="0")
    refused(
        DropoutModule(nn.Sequential(*network(2)[:2], nn.Dropout(0.5), nn.Linear(6, 2)), task=MEAN),
        "but '3' does not",
    )
    refused(
        nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), nn.Flatten()),
        "needs a linear layer .* is a Conv1d",
        task=mean,
    )
    # A softmax may lack a number that all logits share.
    model = nn.Sequential(*network(3), nn.LogSoftmax(1))
    FitLaplace(held_out=loader(HELD, HELD_LABELS), output="log_probs").fit(model, loader(X, LABELS))


def test_before_the_training(make_trainer):
    def fit(module, **given):
        make_trainer(callbacks=[FitLaplace(**given)], max_epochs=1).fit(module, loader(X, Y), loader(HELD, HELD_Y))

    module = DeterministicModule(nn.Sequential(*network(2), nn.Tanh()), task=MEAN)
    with pytest.raises(InputError, match="needs the layer that makes the outputs"):
        fit(module)
    quantiles = DeterministicModule(network(6), task=Regression(head="quantiles"))
    with pytest.raises(InputError, match="supports outputs that are means, .* makes a QuantilePrediction"):
        fit(quantiles)
    with pytest.raises(InputError, match="held-out rows from argument `held_out` cannot be read"):
        fit(module_of("means"), held_out=[torch.zeros(3, 3)])
    for one in (module, quantiles):
        assert one.trainer.global_step == 0
    needs = (
        "needs rows that the network was not trained on.*, but there is no validation loader. Pass argument `held_out`"
    )
    with pytest.raises(InputError, match=needs):
        make_trainer(callbacks=[FitLaplace(select="held_out")]).fit(module_of("means"), loader(X, Y))
    with pytest.raises(InputError, match=needs):
        make_trainer(callbacks=[FitLaplace()]).fit(module_of("classes"), loader(X, LABELS))


def test_held_out_rows_that_nothing_would_read():
    held_out = loader(HELD, HELD_Y)
    refused(
        module_of("gaussians"),
        "would not be used: for Regression.*, select='auto' chooses the prior by the",
        held_out=held_out,
    )
    FitLaplace(select="held_out", held_out=held_out).fit(module_of("gaussians"), loader(X, Y))


@pytest.mark.parametrize("case", ["gaussians", "classes", "labels", "binary"])
def test_held_out_rows_choose_the_prior_that_suits_them(case):
    """Under the probit link, whose likelihood is the one that chooses; no other candidate is better."""
    _, _, y, held = CASES[case]
    module = overfitted(case).double()
    y, held = (one.double() if one.is_floating_point() else one for one in (y, held))
    given = {"select": "held_out", "held_out": loader(HELD.double(), held), "link": "probit"}
    laplace = FitLaplace(**given).fit(module, loader(X.double(), y))
    state = laplace.state_dict()
    chosen = state["tensors"]["0.prior_precision"]
    options = precision_candidates(laplace.transform().posteriors[0], laplace.transform().outputs.per_decade)

    def nll(factor):
        other = copy.deepcopy(state)
        other["tensors"]["0.prior_precision"] = (factor * chosen).clamp(options[0], options[-1])
        laplace.load_state_dict(other)
        prediction = laplace.predict(module, HELD.double())
        target = held.long() if case == "binary" else held
        return float(-prediction.log_prob(target).mean())

    assert all(nll(1.0) <= nll(10**step) + 1e-12 for step in (-4, -2, -1, -0.5, 0.5, 1, 2))
    assert nll(1.0) < 0.99 * max(nll(1e-12), nll(1e12))  # and it matters


def test_bad_numbers_and_arguments():
    module = module_of("means")
    refused(module, "fitting data does not fit|hold NaN", y=Y * math.inf)
    with pytest.raises(InputError, match="hold NaN or infinity"):
        FitLaplace().fit(module, loader(X * math.nan, Y))
    with pytest.raises(InputError, match="fitting data are empty"):
        FitLaplace().fit(module, [])
    laplace = FitLaplace(nonfinite="inf").fit(module, loader(X, Y))
    bad = HELD.clone()
    bad[3] = math.nan
    with pytest.raises(NotFiniteError):
        module.predict(bad)
    prediction = laplace.predict(module, bad)
    assert prediction.score("variance")[3] == math.inf
    assert prediction.score("variance").isinf().sum() == 1
    assert laplace.score(module, [bad])[3] == math.inf
    for given in ({"select": "best"}, {"link": "exact"}, {"num_samples": 0}, {"pool": "positions"}):
        with pytest.raises(InputError, match=next(iter(given))):
            FitLaplace(**given)
    with pytest.raises(InputError, match="`held_out` cannot be used with"):
        FitLaplace(select="marginal_likelihood", held_out=[1])
