"""Two processes compute what one does, at an uneven number of rows and where one rank has none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES_FILE = Path(__file__).with_name("cases.py")
spec = importlib.util.spec_from_file_location("metric_cases", CASES_FILE)
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CASES_FILE), str(rank), "2", str(folder / "init"), str(folder / f"{rank}.json")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "layout"),
    # "joint_sampled" numbers its draws per rank where rows come without an index (documented)
    [
        (n, layout)
        for n in cases.CASES
        for layout in ("spread", "one_rank")
        if (n, layout) != ("joint_sampled", "spread")
    ],
)
def test_two_ranks_equal_one(results, name, layout):
    alone = cases.feed(cases.make(name), name, cases.Data(), torch.arange(cases.ROWS)).compute().item()
    for rank in range(2):
        together, after_reset = results[rank][f"{layout}/{name}"]
        assert together == pytest.approx(alone, abs=1e-6)
        assert after_reset == pytest.approx(alone, abs=1e-9)
