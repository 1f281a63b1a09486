"""Quantile regression, conformal intervals, ensembles and dropout beside lightning-uq-box."""

import copy
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from benchmarks.harness import Call, Contender, Work
from benchmarks.timings.training import trainer_for
from lightning_uq import ConformalIntervals, DeterministicModule, DropoutModule, EnsembleModule
from lightning_uq.networks import MLP
from lightning_uq.tasks import Regression

TITLE = "Beside lightning-uq-box"
ABOUT = """Perceptrons with two hidden layers of 128 units. The trainings take 100 steps of SGD over batches of 128 rows in one order, from the same weights; compared are the quantiles
for 128 rows. The conformal intervals are fitted to 10,000 rows in batches of 500, the network's pass included, and compared on 1,000 others, within 0.001: lightning-uq-box takes the score after
the one of the definition. The probabilities of five members with the same weights are compared too; it reads these weights from their files at each call. Dropout draws
its masks, so its probabilities are not compared."""

LEVELS, ALPHA, LR = (0.05, 0.5, 0.95), 0.1, 0.05
FEATURES, BATCH, STEPS, EPOCH = 64, 128, 100, 10
TEST, CLASSES, MEMBERS, SAMPLES, RATE = 1000, 10, 5, 100, 0.1


def works(device: str) -> Iterator[Work]:
    """Training, a fit after it, and predictions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, FEATURES, generator=generator)
    y = x[:, :1].sin() + 0.1 * torch.randn(len(x), 1, generator=generator)
    test = torch.randn(TEST, FEATURES, generator=generator).to(device)
    torch.manual_seed(0)
    network = MLP(FEATURES, len(LEVELS))
    with torch.no_grad():  # quantiles in order: ours are sorted, theirs are not
        list(network.parameters())[-1].copy_(torch.tensor([-1.0, 0.0, 1.0]))
    rows = TensorDataset(x[: EPOCH * BATCH], y[: EPOCH * BATCH])
    yield Work(
        f"quantile regression, {STEPS} steps",
        [
            Contender("lightning-uq", partial(quantiles, network, rows, device)),
            Contender("QuantileRegression", partial(peer_quantiles, network, rows, device), "lightning-uq-box"),
        ],
        rtol=1e-3,
        calls=1,
    )
    intervals = [
        Contender("lightning-uq", partial(conformal, network, TensorDataset(x, y), test)),
        Contender("ConformalQR", partial(peer_conformal, network, TensorDataset(x, y), test), "lightning-uq-box"),
    ]
    yield Work("conformal quantile regression, fit and prediction", intervals, atol=1e-3, calls=1)
    ensemble = EnsembleModule(partial(MLP, FEATURES, CLASSES), num_members=MEMBERS, seed=0).to(device).eval()
    probabilities = [
        Contender("lightning-uq", lambda: lambda: ensemble.predict(test).probs),
        Contender("DeepEnsembleClassification", partial(peer_ensemble, ensemble, test), "lightning-uq-box"),
    ]
    yield Work(f"ensemble, M = {MEMBERS}, 1,000 predictions", probabilities)
    with_dropout = MLP(FEATURES, CLASSES, dropout=RATE).to(device)
    module = DropoutModule(with_dropout, num_eval_samples=SAMPLES).to(device).eval()
    draws = [
        Contender("lightning-uq", lambda: lambda: module.predict(test).probs),
        Contender(
            "MCDropoutClassification", partial(peer_dropout, with_dropout, test), "lightning-uq-box", agrees=False
        ),
    ]
    yield Work(f"dropout, Z = {SAMPLES}, 1,000 predictions", draws)


def quantile_module(network: nn.Module) -> DeterministicModule:
    return DeterministicModule(
        copy.deepcopy(network),
        task=Regression(head="quantiles", levels=LEVELS),
        optimizer=partial(torch.optim.SGD, lr=LR),
    )


def peer_module(network: nn.Module) -> nn.Module:
    from lightning_uq_box.uq_methods import QuantileRegression

    optimizer = partial(torch.optim.SGD, lr=LR)
    return QuantileRegression(copy.deepcopy(network), quantiles=list(LEVELS), optimizer=optimizer)


def named(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as lightning-uq-box takes it."""
    return dict(zip(("input", "target"), default_collate(rows), strict=True))


def quantiles(network: nn.Module, rows: TensorDataset, device: str) -> Call:
    module, loader, trainer = quantile_module(network), DataLoader(rows, batch_size=BATCH), trainer_for(device, STEPS)

    def call() -> Tensor:
        trainer.fit(module, loader)
        return module.predict(rows.tensors[0][:BATCH].to(module.device)).quantiles.flatten(1)

    return call


def peer_quantiles(network: nn.Module, rows: TensorDataset, device: str) -> Call:
    module, trainer = peer_module(network), trainer_for(device, STEPS)
    loader = DataLoader(rows, batch_size=BATCH, collate_fn=named)

    def call() -> Tensor:
        trainer.fit(module, loader)
        return module(rows.tensors[0][:BATCH].to(module.device))

    return call


def conformal(network: nn.Module, rows: TensorDataset, test: Tensor) -> Call:
    module = quantile_module(network).to(test.device).eval()
    loader = DataLoader(rows, batch_size=500)

    def call() -> Tensor:
        fitted = ConformalIntervals(alpha=ALPHA, method="cqr").fit(module, loader)
        return torch.cat(fitted.intervals(module.predict(test)), 1)

    return call


def peer_conformal(network: nn.Module, rows: TensorDataset, test: Tensor) -> Call:
    from lightning_uq_box.uq_methods import ConformalQR

    device = "cpu" if test.device.type == "cpu" else "cuda"
    model = ConformalQR(peer_module(network), quantiles=list(LEVELS), alpha=ALPHA)
    loader, trainer = DataLoader(rows, batch_size=500, collate_fn=named), trainer_for(device, -1, max_epochs=1)

    def call() -> Tensor:
        trainer.fit(model, loader)
        found = model.to(test.device).predict_step(test)
        return torch.stack([found["lower_quant"], found["upper_quant"]], 1)

    return call


def peer_ensemble(ensemble: EnsembleModule, test: Tensor) -> Call:
    from lightning_uq_box.uq_methods import DeepEnsembleClassification

    folder, members = tempfile.TemporaryDirectory(), []
    for i, network in enumerate(ensemble.network.unstacked().feature_networks()):
        path = Path(folder.name) / f"{i}.ckpt"
        torch.save({"state_dict": network.state_dict()}, path)
        members.append({"base_model": network, "ckpt_path": path})
    model = DeepEnsembleClassification(members, num_classes=CLASSES)

    def call() -> Tensor:
        assert folder.name  # which is deleted with this function
        return model.predict_step(test)["pred"]

    return call


def peer_dropout(network: nn.Module, test: Tensor) -> Call:
    from lightning_uq_box.uq_methods import MCDropoutClassification

    model = MCDropoutClassification(copy.deepcopy(network), SAMPLES, nn.CrossEntropyLoss()).to(test.device)
    return lambda: model.predict_step(test)["pred"]
