"""One prediction type from every method on every kind of batch: averaged, calibrated, with a density; cat, to, to_dict."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq import (
    CategoricalPrediction,
    DeterministicModule,
    DirichletPrediction,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    EvidentialModule,
    EvidentialRegressionModule,
    FitGMM,
    GaussianMixturePrediction,
    StudentTPrediction,
    TemperatureScaling,
)

N, C = 45, 3  # five rows in the last batch of eight
Y = torch.arange(N) % C
GENERATOR = torch.Generator().manual_seed(1)
SIGNAL = nn.functional.one_hot(Y, C).float()


class MeanOverTime(nn.Module):
    """[B, T, D] -> [B, D], at any length T."""

    def forward(self, x):
        return x.mean(1)


class Masked(nn.Module):
    """[B, T, D] and a mask [B, T] in a mapping, as of tokens, to [B, D]."""

    def forward(self, x):
        mask = x["mask"].unsqueeze(-1)
        return (x["tokens"] * mask).sum(1) / mask.sum(1)


def head(outputs: int, in_features: int = 4) -> list[nn.Module]:
    return [nn.Linear(in_features, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, outputs)]


def flat(outputs: int = C) -> nn.Sequential:
    return nn.Sequential(*head(outputs))


def convolutional(outputs: int = C) -> nn.Sequential:
    body = [nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, *head(outputs))


def recurrent(outputs: int = C) -> nn.Sequential:
    """Dropout at every step: its masks are of the batch's length."""
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1), MeanOverTime(), *head(outputs))


def masked(outputs: int = C) -> nn.Sequential:
    return nn.Sequential(Masked(), *head(outputs))


VECTORS = torch.cat([SIGNAL, torch.zeros(N, 1)], 1) + 0.7 * torch.randn(N, 4, generator=GENERATOR)
IMAGES = SIGNAL.reshape(N, C, 1, 1) + torch.randn(N, C, 6, 6, generator=GENERATOR)


def sequence(length: int, rows: slice) -> torch.Tensor:
    return VECTORS[rows].unsqueeze(1) + 0.5 * torch.randn(len(Y[rows]), length, 4, generator=GENERATOR)


LENGTHS = (3, 7, 1, 5, 5, 2)  # of each batch
SEQUENCES = [sequence(length, slice(8 * i, 8 * i + 8)) for i, length in enumerate(LENGTHS)]
TOKENS = [{"tokens": x, "mask": (torch.rand(x.shape[:2], generator=GENERATOR) > 0.4).float()} for x in SEQUENCES]
for tokens in TOKENS:
    tokens["mask"][:, 0] = 1

INPUTS = {  # the network, and the inputs of each batch
    "vectors": (flat, VECTORS.split(8)),
    "images": (convolutional, IMAGES.split(8)),
    "lengths": (recurrent, SEQUENCES),
    "mappings": (masked, TOKENS),
}
ADAM = functools.partial(torch.optim.Adam, lr=0.02)
CLASSIFIERS = {
    "deterministic": lambda net: DeterministicModule(net, optimizer=ADAM),
    "ensemble": lambda net: EnsembleModule(net, num_members=3, optimizer=ADAM),
    "vmap": lambda net: EnsembleModule(net, num_members=3, optimizer=ADAM, execution="vmap"),
    "epinet": lambda net: EpinetModule(net, num_eval_samples=10, optimizer=ADAM),
    "dropout": lambda net: DropoutModule(net, num_eval_samples=10, optimizer=ADAM),
    "dropout_rows": lambda net: DropoutModule(net, mask="per_example", num_eval_samples=10, optimizer=ADAM),
    "evidential": lambda net: EvidentialModule(net, optimizer=ADAM),
}


def containers(inputs) -> dict[str, list]:
    """The same batches as tensors, tuples, mappings, and mappings without a target."""
    y = Y.split(8)
    return {
        "bare": list(inputs),
        "tuple": list(zip(inputs, y, strict=True)),
        "mapping": [{"input": x, "target": t} for x, t in zip(inputs, y, strict=True)],
        "unlabelled": [{"input": x} for x in inputs],
    }


def as_loader(batches: list) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def loaders(name: str, inputs) -> dict[str, DataLoader]:
    """Loaders of ready batches; of tensors also those that collate rows, in other batches."""
    made = {
        kind: as_loader(batches) for kind, batches in containers(inputs).items() if (name, kind) != ("mappings", "bare")
    }
    if name in ("vectors", "images"):
        x = torch.cat(list(inputs))
        made["collated"] = DataLoader(TensorDataset(x, Y), batch_size=22)  # one row in the last
    return made


CASES = [(method, name) for method in CLASSIFIERS for name in INPUTS if method != "vmap" or name == "mappings"]


@pytest.mark.filterwarnings("ignore:.*The likelihood has no finite positive temperature")
@pytest.mark.parametrize(("method", "name"), CASES)
def test_one_type_averaged_calibrated_and_with_a_density(make_trainer, method, name):
    network, inputs = INPUTS[name]
    module = CLASSIFIERS[method](network)
    temperature = TemperatureScaling(weights="last")
    gmm = FitGMM(weights="last", covariance="tied", regularization=1e-2)
    trainer = make_trainer(callbacks=[temperature, gmm], max_epochs=2)
    training = as_loader(containers(inputs)["tuple"])
    trainer.fit(module, training, training)
    kind = DirichletPrediction if method == "evidential" else CategoricalPrediction
    found = {}
    for container, loader in loaders(name, inputs).items():
        predictions = trainer.predict(module, loader)
        assert {type(prediction) for prediction in predictions} == {kind}, container
        assert len(predictions) == len(loader)
        assert_consistent(predictions)
        found[container] = kind.cat(predictions)
    whole = found["tuple"]
    assert len(whole) == N

    # Averaged over the hypotheses, then calibrated.
    module.eval()
    with torch.no_grad():
        outputs = torch.cat([module(x) for x in inputs], 1)
    if method == "evidential":
        alpha = module.prediction(outputs).concentration[0].double()
        mean = alpha / alpha.sum(1, keepdim=True)
    else:
        mean = outputs.double().softmax(2).mean(0)
    T = temperature.temperature.item()
    assert T != 1
    expected = torch.softmax(mean.log() / T, 1)
    torch.testing.assert_close(whole.probs.double(), expected, rtol=1e-4, atol=1e-6)
    # On the features of the same weights.
    torch.testing.assert_close(whole.ood_score.double(), gmm.score(module, training), rtol=1e-4, atol=1e-4)

    # The container changes nothing, nor does the size of a batch (but for masks that each row draws by its place).
    for container, other in found.items():
        if method == "dropout_rows" and container == "collated":
            continue
        for key, values in whole.to_dict().items():
            message = f"{container}: {key}"
            if key == "label":
                assert torch.equal(values, other.label), message
            else:
                torch.testing.assert_close(other.to_dict()[key], values, rtol=1e-3, atol=1e-4, msg=message)


def assert_consistent(predictions) -> None:
    """``cat``, ``to`` and ``to_dict`` of batches agree with one another."""
    kind = type(predictions[0])
    whole = kind.cat(predictions)
    assert len(whole) == sum(map(len, predictions))
    named = whole.to_dict()
    assert {"log_density", "probs", "label"} <= named.keys() or "mean" in named
    for name, values in named.items():
        assert values.shape[:1] == (len(whole),), name
        assert values.isfinite().all(), name
        parts = torch.cat([prediction.to_dict()[name] for prediction in predictions])
        torch.testing.assert_close(values, parts, rtol=1e-5, atol=1e-6, msg=name)
    moved = whole.to("cpu")
    assert type(moved) is kind
    assert list(moved.to_dict()) == list(named)
    assert all(torch.equal(values, named[name]) for name, values in moved.to_dict().items())
    wide = whole.to(torch.float64).to_dict()
    for name, values in named.items():
        if name != "label":
            torch.testing.assert_close(wide[name], values.double(), rtol=1e-4, atol=1e-5, msg=name)


REGRESSORS = {
    "deterministic": lambda net: DeterministicModule(lambda: net(4), task="regression", optimizer=ADAM),
    "ensemble": lambda net: EnsembleModule(lambda: net(4), num_members=3, task="regression", optimizer=ADAM),
    "epinet": lambda net: EpinetModule(lambda: net(4), task="regression", num_eval_samples=10, optimizer=ADAM),
    "dropout": lambda net: DropoutModule(lambda: net(4), task="regression", num_eval_samples=10, optimizer=ADAM),
    "evidential": lambda net: EvidentialRegressionModule(lambda: net(8), optimizer=ADAM),
}


@pytest.mark.parametrize("method", REGRESSORS)
def test_one_type_of_regression(make_trainer, method):
    targets = VECTORS[:, :2].split(8)
    kind = StudentTPrediction if method == "evidential" else GaussianMixturePrediction
    for name, (network, inputs) in INPUTS.items():
        module = REGRESSORS[method](network)
        trainer = make_trainer()
        trainer.fit(module, as_loader(list(zip(inputs, targets, strict=True))))
        found = {}
        for container, loader in loaders(name, inputs).items():
            predictions = trainer.predict(module, loader)
            assert {type(prediction) for prediction in predictions} == {kind}, (name, container)
            found[container] = kind.cat(predictions).to_dict()
        assert_consistent(predictions)
        assert found["tuple"]["mean"].shape == (N, 2)
        for container, named in found.items():
            for key, values in found["tuple"].items():
                torch.testing.assert_close(named[key], values, rtol=1e-3, atol=1e-4, msg=f"{name}, {container}: {key}")
