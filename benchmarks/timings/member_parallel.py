"""Trainings of one ensemble on two processes, beside one process and beside two that know nothing of each other."""

import multiprocessing
import os
import socket
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Contender, Work
from benchmarks.timings.training import trainer_for
from lightning_uq import EnsembleModule, MemberParallelStrategy
from lightning_uq.networks import MLP
from lightning_uq.networks.backbones import LeNet

TITLE = "Members of an ensemble on two processes"
ABOUT = """Whole calls of `trainer.fit` with four members that run in a loop, on one thread per process and over batches of 128 rows. `MemberParallelStrategy`
trains two members on each of two processes; the trained probabilities are compared with those of one process. Two processes that each train two members for
themselves, without a word to one another, show what two cores can do at most. A ratio below 1 says how much faster that row is. Lightning makes all
processes agree at each step whether one of them was told to stop, so a step takes as long as the slower process, and short steps gain nothing."""
PROCESSES = 2

MEMBERS, BATCH, ROWS = 4, 128, 20 * 128
NETWORKS = {"LeNet": LeNet, "MLP 512-512": partial(MLP, 64, 10, hidden_sizes=[512, 512]), "MLP": partial(MLP, 64, 10)}


def works(device: str) -> Iterator[Work]:
    """A training that computes much, and trainings of small networks."""
    for name, steps in {"LeNet": 200, "MLP 512-512": 400, "MLP": 800}.items():
        run = partial(Processes, name, steps, device)
        yield Work(
            f"{name}, M = 4, {steps} steps",
            [
                Contender("MemberParallelStrategy, 2 processes", partial(run, 2, MEMBERS)),
                Contender("1 process", partial(run, 1, MEMBERS)),
                Contender("2 processes of 2 members each", partial(run, 2, MEMBERS // 2), agrees=False),
            ],
            rtol=1e-2,
            atol=1e-3,
            calls=1,
            has_peak=False,
        )


class Processes:
    """Processes that are started and wait; a call lets them train, and returns the probabilities of the first one."""

    def __init__(self, name: str, steps: int, device: str, number: int, members: int) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        self.pipes: list[Connection] = []
        started = []
        for rank in range(number):
            mine, theirs = context.Pipe()
            # Two processes train the members of one ensemble, or each an ensemble of its own.
            world = number if members == MEMBERS else 1
            process = context.Process(
                target=work, args=(theirs, name, steps, device, world, rank, members, port), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            started.append(process)
        for pipe in self.pipes:
            pipe.recv()
        weakref.finalize(self, lambda: [process.kill() for process in started])

    def __call__(self) -> Tensor:
        for pipe in self.pipes:
            pipe.send("train")
        first, *_ = [pipe.recv() for pipe in self.pipes]
        return torch.tensor(first)


def work(pipe: Connection, name: str, steps: int, device: str, world: int, rank: int, members: int, port: int) -> None:
    """Prepare a training, say so, and train when told to."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}
    generator = torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if name == "LeNet" else (64,)
    x = torch.randn(ROWS, *shape, generator=generator)
    y = torch.randint(10, (ROWS,), generator=generator)
    optimizer = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    module = EnsembleModule(NETWORKS[name], num_members=members, seed=0, execution="loop", optimizer=optimizer)
    options = {"devices": world, "strategy": MemberParallelStrategy()} if world > 1 else {}
    trainer = trainer_for(device, steps, **options)
    pipe.send("ready")
    while pipe.recv() == "train":
        trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH))
        pipe.send(module.predict(x[:64].to(module.device)).probs.tolist())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
