"""Trainings of ensembles: classifiers beside torch-uncertainty's routine and a plain loop, regressors beside deep-ensembles-pytorch."""

import copy
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Call, Contender, Work
from lightning_uq import EnsembleModule
from lightning_uq.networks import MLP, TabularNetwork
from lightning_uq.networks.backbones import LeNet

TITLE = "Training of ensembles"
ABOUT = """Whole calls of `trainer.fit`, its start included, and of the peers' own loops. The classifiers take steps of SGD with momentum over batches of 128 rows in
one order, from the same initial weights; the trained probabilities are compared, within 0.001 and 1 %, which rounding takes up over so many steps. The regressors (13-100-100-1, mean and variance) take 200 steps of Adam
with a cosine schedule, a moving average and clipping, in batches of 100 rows; deep-ensembles-pytorch draws its own weights and batches, so only the
RMSEs on the training data are compared, which must agree within 0.1 target standard deviations or so (0.07).
Lightning's loop, its `self.log` and the loader take the same time for one member and for many, so short steps of few members gain least: `Lightning's loop alone`
is a module with one weight and one logged number. The products of matrices, most of the rest, are those of the plain loop."""

BATCH, EPOCH, TABULAR_STEPS, LR = 128, 10, 200, 0.05
FEATURES, ROWS, TABULAR_BATCH = 13, 2000, 100


def works(device: str) -> Iterator[Work]:
    """Classifiers, then regressors."""
    generator = torch.Generator().manual_seed(0)
    table, images = (
        torch.randn(EPOCH * BATCH, 64, generator=generator),
        torch.randn(EPOCH * BATCH, 1, 28, 28, generator=generator),
    )
    target = torch.randint(10, (EPOCH * BATCH,), generator=generator)
    for name, network, x, members, steps in [
        ("MLP, M = 5, 100 steps", partial(MLP, 64, 10), table, 5, 100),
        ("MLP, M = 10, 100 steps", partial(MLP, 64, 10), table, 10, 100),
        ("LeNet, M = 5, 20 steps", LeNet, images, 5, 20),
    ]:
        module = EnsembleModule(
            network, num_members=members, seed=0, optimizer=partial(torch.optim.SGD, lr=LR, momentum=0.9)
        )
        loader = DataLoader(TensorDataset(x, target), batch_size=BATCH)
        contenders = [
            Contender("lightning-uq", partial(ours, module, loader, steps, device)),
            Contender("ClassificationRoutine", partial(routine, module, loader, steps, device), "torch-uncertainty"),
            Contender("plain loop", partial(loop, module, loader, steps, device)),
            Contender("Lightning's loop alone", partial(bare, loader, steps, device), agrees=False),
        ]
        yield Work(name, contenders, rtol=1e-2, atol=1e-3, calls=1, has_peak=False)
    for adversarial in (False, True):
        for members in (5, 10, 20):
            arguments = members, adversarial, device
            contenders = [
                Contender("lightning-uq", partial(tabular, *arguments)),
                Contender("Trainer", partial(tabular_peer, *arguments), "deep-ensembles-pytorch"),
            ]
            name = f"regressor, M = {members}{', FGSM' if adversarial else ''}"
            yield Work(name, contenders, rtol=0, atol=0.07, calls=1, has_peak=False)


def trainer_for(device: str, steps: int, **kwargs: object) -> Trainer:
    options = {
        "accelerator": "cpu" if device == "cpu" else "gpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tempfile.gettempdir(),
    }
    return Trainer(**{**options, **kwargs})


# ------------------------------------------------------------------------------------------------ classifiers


def ours(module: EnsembleModule, loader: DataLoader, steps: int, device: str) -> Call:
    module, trainer = copy.deepcopy(module), trainer_for(device, steps)

    def call() -> Tensor:
        trainer.fit(module, loader)
        return module.predict(first_rows(loader, module.device)).probs

    return call


class OneWeight(LightningModule):
    """A module with nothing to compute, which logs its loss as ours do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.weight.square()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)


def bare(loader: DataLoader, steps: int, device: str) -> Call:
    module, trainer = OneWeight(), trainer_for(device, steps)

    def call() -> Tensor:
        trainer.fit(module, loader)
        return torch.zeros(())

    return call


def members_of(module: EnsembleModule) -> list[nn.Module]:
    return copy.deepcopy(module.network.unstacked().feature_networks())


def routine(module: EnsembleModule, loader: DataLoader, steps: int, device: str) -> Call:
    from torch_uncertainty.methods import deep_ensembles
    from torch_uncertainty.routines import ClassificationRoutine
    from torch_uncertainty.transforms import RepeatTarget

    networks = members_of(module)
    model = deep_ensembles(networks, task="classification")
    # Its loss is the mean over members, ours their sum: M times the step makes the same training.
    trained: LightningModule = ClassificationRoutine(
        model,
        num_classes=10,
        loss=nn.CrossEntropyLoss(),
        is_ensemble=True,
        format_batch_fn=RepeatTarget(len(networks)),
        optim_recipe=torch.optim.SGD(model.parameters(), lr=LR * len(networks), momentum=0.9),
    )
    trainer = trainer_for(device, steps)

    def call() -> Tensor:
        trainer.fit(trained, loader)
        return pooled(networks, first_rows(loader, trained.device))

    return call


def loop(module: EnsembleModule, loader: DataLoader, steps: int, device: str) -> Call:
    networks = [network.to(device).train() for network in members_of(module)]
    optimizers = [torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9) for network in networks]

    def call() -> Tensor:
        for _ in range(steps // len(loader)):
            for x, y in loader:
                x, y = x.to(device), y.to(device)
                for network, optimizer in zip(networks, optimizers, strict=True):
                    optimizer.zero_grad()
                    cross_entropy(network(x), y).backward()
                    optimizer.step()
        return pooled(networks, first_rows(loader, device))

    return call


def first_rows(loader: DataLoader, device: torch.device | str) -> Tensor:
    return loader.dataset.tensors[0][:BATCH].to(device)


@torch.no_grad()
def pooled(networks: list[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([network.to(x.device).eval()(x).softmax(-1) for network in networks]).mean(0)


# ------------------------------------------------------------------------------------------------ regressors


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, x[:, :1].sin() + 0.1 * torch.randn(ROWS, 1, generator=generator)


def tabular(members: int, adversarial: bool, device: str) -> Call:
    module = EnsembleModule(
        partial(TabularNetwork, in_features=FEATURES, out_features=1, heads="gaussian"),
        num_members=members,
        task="regression",
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=TABULAR_STEPS * TABULAR_BATCH // ROWS),
        adversarial_epsilon=0.01 if adversarial else None,
        adversarial_scale="absolute",
        seed=0,
    )
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=TABULAR_BATCH, shuffle=True)
    last = LastWeightsError(x, y)
    average = EMAWeightAveraging(decay=0.995, update_every_n_steps=10)
    trainer = trainer_for(device, TABULAR_STEPS, gradient_clip_val=1.0, callbacks=[last, average])

    def call() -> Tensor:
        trainer.fit(module, loader)
        return last.rmse

    return call


class LastWeightsError(Callback):
    """The RMSE before the averaged weights take the place of the last ones: the peers' averages begin differently."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.rmse = rmse(module.predict(self.x.to(module.device)).mean, self.y)


def tabular_peer(members: int, adversarial: bool, device: str) -> Call:
    import deep_ensembles_pytorch as peer

    ensemble = peer.DeepEnsemble(FEATURES, num_members=members, use_adversarial_training=adversarial)
    x, y = data()
    trainer = peer.Trainer(
        ensemble,
        peer.TensorDataset(x, y),
        train_batch_size=TABULAR_BATCH,
        train_num_steps=TABULAR_STEPS,
        results_folder=tempfile.gettempdir(),
        save_every=10**9,  # never
    )

    def call() -> Tensor:
        trainer.train()
        with torch.no_grad():
            return rmse(ensemble.eval()(x.to(trainer.device)).mean, y)

    return call


def rmse(mean: Tensor, y: Tensor) -> Tensor:
    return (mean.detach().cpu() - y).square().mean().sqrt()
