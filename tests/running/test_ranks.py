from types import SimpleNamespace

import pytest
import torch

from lightning_uq.running.ranks import gather_rows, raise_on_all_ranks, raising_on_all_ranks


def test_one_process_raises_its_own_error():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        raise_on_all_ranks(error, SimpleNamespace(world_size=1))
    assert caught.value is error
    raise_on_all_ranks(None)
    with pytest.raises(ZeroDivisionError), raising_on_all_ranks():
        _ = 1 / 0
    rows = torch.arange(3)
    assert gather_rows(rows, SimpleNamespace(world_size=1)) is rows


TWO_RANKS = """
import json, os
from datetime import timedelta
import torch
import torch.multiprocessing as mp
from types import SimpleNamespace
from lightning_uq.running.ranks import gather_rows, raise_on_all_ranks, raising_on_all_ranks
from lightning_uq.errors import InputError, NotFittedError

def main(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    trainer = SimpleNamespace(world_size=2)
    found = [gather_rows(torch.arange(float(rank), 5, 2), trainer).tolist()]
    raise_on_all_ranks(None, trainer)
    for kind in (NotFittedError, KeyError):
        try:
            with raising_on_all_ranks(trainer):
                if rank == 1:
                    raise kind("on rank 1")
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    try:
        with raising_on_all_ranks(trainer):
            raise InputError(f"on rank {rank}")
    except InputError as error:
        found.append(str(error))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.barrier()
    os._exit(0)  # at once: see tests/conftest.py

if __name__ == "__main__":
    folder = os.path.dirname(out)
    mp.spawn(main, (folder,), nprocs=2)
    json.dump([json.load(open(f"{folder}/{rank}.json")) for rank in range(2)], open(out, "w"))
"""


def test_two_ranks_raise_one_error(run_script):
    first, second = run_script(TWO_RANKS)
    assert first == second
    assert first[0] == [0.0, 1.0, 2.0, 3.0, 4.0]  # as the rows were shared, and one rank has one more
    assert first[1] == ["NotFittedError", "on rank 1"]
    assert first[2] == ["RuntimeError", "KeyError: 'on rank 1'"]
    assert first[3] == "on rank 0"
