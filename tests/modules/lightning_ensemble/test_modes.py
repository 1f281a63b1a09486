"""Train and eval modes of members around an evaluation are those that each would have alone."""

import pytest
import torch

from lightning_uq.modules.ensemble import EnsembleModule
from tests.modules.lightning_ensemble.cases import SEED, Lit, alone, difference, loader


class Records(Lit):
    """Writes down in which modes its steps run."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.seen = []

    def modes(self):
        return [module.training for module in self.modules()]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.append(("validation", self.modes()))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch[0]).square().mean())
        self.seen.append(("test", self.modes()))

    def predict_step(self, batch, batch_idx):
        return self.net[4](torch.zeros(8, 16))  # an ensemble predicts by `forward` instead

    def on_predict_start(self):
        self.seen.append(("predict", self.modes()))

    def on_train_epoch_end(self):
        self.seen.append(("train", self.modes()))


class SamplesDropout(Records):
    """Keeps its dropout on, as MC dropout does."""

    def sample(self):
        self.eval()
        self.net[3].train()

    on_validation_model_eval = on_test_model_eval = on_predict_model_eval = sample


class StaysInTraining(Records):
    """Leaves every module in training mode, BatchNorm included."""

    def on_validation_model_eval(self):
        pass

    on_test_model_eval = on_predict_model_eval = on_validation_model_eval


class StaysInEval(Records):
    """Puts another mode back than Lightning would."""

    def on_validation_model_train(self):
        self.train()
        self.net[1].eval()

    on_test_model_train = on_validation_model_train


class CallsSuper(Records):
    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.net[3].train()

    def on_validation_model_train(self):
        super().on_validation_model_train()


class FreezesStatistics(Records):
    """Overrides none of the hooks; the modes that it has chosen itself must come back after a validation."""

    def on_train_start(self):
        self.net[1].eval()


@pytest.mark.parametrize("kind", [SamplesDropout, StaysInTraining, StaysInEval, CallsSuper, FreezesStatistics])
def test_members_have_the_modes_that_they_would_have_alone(kind, make_trainer):
    ensemble = EnsembleModule(kind, num_members=2, seed=SEED)
    trainer = make_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(ensemble, loader(), loader(20))
    logged = dict(trainer.callback_metrics)
    trainer.test(ensemble, loader(20), verbose=False)
    trainer.predict(ensemble, loader(20))
    for i, member in enumerate(ensemble.members.modules):
        single, single_trainer = alone(i, kind, make_trainer, max_epochs=2, num_sanity_val_steps=0)
        assert logged[f"member_{i}/val_loss"] == single_trainer.callback_metrics["val_loss"]
        single_trainer.test(single, loader(20), verbose=False)
        single_trainer.predict(single, loader(20))
        assert member.seen == single.seen
        assert member.modes() == single.modes()
        assert difference(ensemble, i, single) == 0.0  # BatchNorm in training mode moves once per batch


def test_the_ensemble_outside_its_members_evaluates_and_comes_back(make_trainer):
    class Outside(StaysInEval):
        def validation_step(self, batch, batch_idx):
            inside.append((ensemble.training, ensemble.network.training))

    inside = []
    ensemble = EnsembleModule(Outside, num_members=2, seed=SEED)
    make_trainer(num_sanity_val_steps=0).fit(ensemble, loader(), loader(8))
    assert inside == [(False, False)] * len(inside)
    assert ensemble.training
    assert ensemble.network.training


def test_metrics_of_the_ensemble_are_those_of_its_predictions(make_trainer):
    """Whatever modes members choose for their own steps, the ensemble as a whole runs in eval mode, as `predict` does."""
    ensemble = EnsembleModule(SamplesDropout, num_members=2, seed=SEED)
    (results,) = make_trainer().test(ensemble, loader(50), verbose=False)
    x, y = loader(50).dataset.tensors
    nll = -ensemble.predict(x).log_probs[torch.arange(50), y].mean()
    assert results["ensemble/test_nll"] == pytest.approx(nll.item(), rel=1e-5)


def test_members_keep_gradients_before_a_validation_where_they_would_alone(make_trainer):
    class Keeps(Lit):
        kept = None

        def on_validation_model_zero_grad(self):
            pass

        def on_validation_start(self):
            self.kept = self.net[0].weight.grad is not None

    class Clears(Keeps):
        on_validation_model_zero_grad = Lit.on_validation_model_zero_grad

    for kind, kept in ((Keeps, True), (Clears, False)):
        ensemble = EnsembleModule(kind, num_members=2, seed=SEED)
        make_trainer(num_sanity_val_steps=0).fit(ensemble, loader(), loader(8))
        assert [member.kept for member in ensemble.members.modules] == [kept] * 2
        assert alone(0, kind, make_trainer, num_sanity_val_steps=0)[0].kept == kept
