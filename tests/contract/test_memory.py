"""Ten rounds of training, testing and predicting in one process: nothing piles up."""

import gc

import psutil
import pytest
import torch

from tests.contract.cases import UsersModule, loader
from tests.contract.running import TEST, TRAIN, VAL

ROUNDS, WARM_UP = 10, 3
ALLOWED = 16 * 2**20  # bytes: the allocator's noise


def held():
    """Live tensors, open files, and resident bytes."""
    gc.collect()
    process = psutil.Process()
    tensors = sum(1 for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))
    return tensors, process.num_fds(), process.memory_info().rss


def assert_flat(trainer, module, task):
    before = None
    for number in range(1, ROUNDS + 1):
        trainer.fit_loop.max_epochs = number
        trainer.fit(module, loader(task, TRAIN, shuffle=True), loader(task, VAL, 1))
        trainer.test(module, loader(task, TEST, 2), verbose=False)
        trainer.predict(module, loader(task, TEST, 2))
        gc.collect()  # or the peak depends on when Python collects cycles, such as those of figures
        if number == WARM_UP:
            before = held()
    after = held()
    assert trainer.current_epoch == ROUNDS
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < ALLOWED


@pytest.mark.axis("memory")
@pytest.mark.represented_by("Ensemble, loop", "Epinet")  # metrics, optimizers and indices that are kept
def test_modules(make_trainer, module_case):
    assert_flat(make_trainer(), module_case.build(), module_case.task)


@pytest.mark.axis("memory")
@pytest.mark.represented_by("FitGMM", "OODDetection")  # a fitted state; scores that are gathered
def test_callbacks(make_trainer, callback_case, tmp_path):
    trainer = make_trainer(callbacks=[callback_case.build()], enable_checkpointing=True)
    assert_flat(trainer, UsersModule(), "classification")
