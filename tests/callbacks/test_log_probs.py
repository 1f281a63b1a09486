"""A network that ends in ``log_softmax``: its probabilities are right, but nothing is left in its energy."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, InputError, OODDetection, TemperatureScaling

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
FAR = {"far": DataLoader(TensorDataset(X + 9, Y), 8)}
LOADER = DataLoader(TensorDataset(X, Y), 8)
SENTENCE = "look like log-probabilities, such as those of `log_softmax`"


class Logits(LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return 4 * self.net(x)

    def training_step(self, batch, batch_idx):
        return F.nll_loss(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class LogProbs(Logits):
    """As many tutorials have it, for `nll_loss`."""

    def forward(self, x):
        return F.log_softmax(super().forward(x), 1)


class Probs(Logits):
    def forward(self, x):
        return super().forward(x).softmax(1)


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_uq.guessing.rank_zero_info", lines.append)
    return lines


def scores_of(tested):
    return {name.rsplit("/", 1)[1] for name in tested if name.startswith("ood_auroc")}


@pytest.mark.parametrize(
    ("module", "output"), [(LogProbs, "logits"), (LogProbs, "log_probs"), (Probs, "probs"), (Logits, "logits")]
)
def test_scores_that_need_logits_are_left_out_or_refused(make_trainer, told, module, output):
    trainer = make_trainer(callbacks=[OODDetection(FAR, output=output)])
    (tested,) = trainer.test(module(), LOADER, verbose=False)
    lacks = module is not Logits
    assert scores_of(tested) == {"predictive_entropy", "max_softmax", *(() if lacks else ("energy",))}
    assert sum(SENTENCE in line for line in told) == (module is LogProbs and output == "logits")
    for name in ("energy", "max_logit"):
        ood = OODDetection(FAR, scores=["max_softmax", name], output=output)
        if not lacks:
            assert ood.score(module(), LOADER)[name].unique().numel() > 1
            continue
        message = rf"holds '{name}', which needs logits: these outputs are log-probabilities"
        with pytest.raises(InputError, match=message):
            ood.score(module(), LOADER)
        with pytest.raises(InputError, match=message):
            make_trainer(callbacks=[ood]).test(module(), LOADER, verbose=False)


def test_it_is_told_with_what_to_pass(told):
    first, second = LogProbs(), LogProbs()
    for model in (first, first, second):
        TemperatureScaling().fit(model, LOADER)
    found = [line for line in told if SENTENCE in line]
    assert len(found) == 2
    assert "The outputs of LogProbs look like" in found[0]
    assert (
        'Predictions are the same, but energy and max_logit would be meaningless. Pass `output="log_probs"`' in found[0]
    )
    told.clear()
    TemperatureScaling(output="log_probs").fit(LogProbs(), LOADER)
    assert not told


def test_the_temperature_is_that_of_the_logits(told):
    fits = [TemperatureScaling().fit(model, LOADER).temperature for model in (Logits(), LogProbs())]
    torch.testing.assert_close(*fits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_of_this_package_tell_it_too(told, dtype):
    for make in (DeterministicModule, lambda network: EnsembleModule(lambda: LogProbs(None), num_members=2, seed=0)):
        module = make(LogProbs()).to(dtype)
        module.predict(X.to(dtype))
        assert sum(SENTENCE in line for line in told) == 1
        with pytest.raises(InputError, match="which needs logits"):
            OODDetection(scores="energy").score(module, [X.to(dtype)])
        told.clear()
    DeterministicModule(Logits()).predict(X)
    DeterministicModule(LogProbs(), output="log_probs").predict(X)
    assert not any(SENTENCE in line for line in told)


def test_maps_are_looked_at_in_every_position(told):
    class Map(LogProbs):
        def forward(self, x):
            return super().forward(x)[..., None, None].expand(-1, -1, 2, 2)

    assert OODDetection(task="segmentation", scores="max_softmax").score(Map(), LOADER)
    assert sum(SENTENCE in line for line in told) == 1


def test_logits_that_happen_to_be_negative_are_logits(told):
    class Negative(Logits):
        def forward(self, x):
            return super().forward(x) - 100

    assert "energy" in OODDetection().score(Negative(), LOADER)
    assert not any(SENTENCE in line for line in told)
