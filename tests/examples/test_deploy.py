"""The example of deployment: its commands as README.md shows them, and the service under FastAPI's test client.

`make test-deploy` runs all of it. Without the extra `deploy` the tests of the service are skipped.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq import DriftMonitor, InputError, load_fitted

SOURCE = Path(__file__).parents[2] / "examples" / "deploy"
README = (SOURCE / "README.md").read_text()
BLOCK = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)[0]
COMMANDS = re.findall(r"^python (\w+\.py .*?)(?: +#.*)?$", BLOCK, flags=re.MULTILINE)


def run(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A copy of the example in which the commands of its page have run."""
    folder = tmp_path_factory.mktemp("project") / "deploy"
    shutil.copytree(SOURCE, folder)
    for command in COMMANDS[:3]:
        run(folder, *command.split())
    return folder


@pytest.fixture
def example(made, project):
    """A directory with what the commands wrote, in which the example's own modules can be imported."""
    for path in made.glob("*.py"):
        shutil.copy(path, project)
    shutil.copytree(made / "runs", project / "runs")
    return project


@pytest.fixture
def start(example, monkeypatch):
    """Starts the service in this process, as a worker with a number."""
    for name in ("fastapi", "uvicorn", "prometheus_client", "onnxruntime"):
        pytest.importorskip(name)
    from fastapi.testclient import TestClient

    def start(worker=0):
        monkeypatch.setenv("FOLDER", "runs")
        monkeypatch.setenv("WORKER", str(worker))
        sys.modules.pop("service", None)
        return TestClient(importlib.import_module("service").app)

    return start


def digits(part):
    return importlib.import_module("train").digits(part).tensors


@torch.no_grad()
def reference(x):
    return load_fitted("runs/model-uq.ckpt", nonfinite="inf")(x)


def send(client, x):
    answer = client.post("/predict", json={"rows": x.tolist()})
    assert answer.status_code == 200, answer.text
    return answer.json()


def metrics(client):
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_the_service_is_short_enough_to_read():
    assert len((SOURCE / "service.py").read_text().splitlines()) <= 60


def test_the_page_shows_the_commands_that_run_here():
    assert [command.split()[0] for command in COMMANDS] == ["train.py", "fit.py", "export.py", "merge.py"]


@pytest.mark.slow
def test_the_graph_gives_what_the_checkpoint_gives(example):
    onnxruntime = pytest.importorskip("onnxruntime")
    x, y = digits("test")
    x[0, 3] = torch.nan
    expected = reference(x)
    graph = onnxruntime.InferenceSession("runs/model.onnx")
    found = dict(zip(expected, graph.run(None, {"x": x.numpy()}), strict=True))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-5)
    assert (expected["probs"].argmax(1) == y)[1:].double().mean() > 0.9


@pytest.mark.slow
def test_rows_in_distribution_get_answers(start):
    with start() as client:
        x, y = digits("test")
        answers = send(client, x)
        expected = reference(x)
        assert [one["label"] for one in answers] == expected["probs"].argmax(1).tolist()
        np.testing.assert_allclose([one["probabilities"] for one in answers], expected["probs"], rtol=1e-4, atol=1e-5)
        for name in ("ood_score", "ood_p_value", "ood_alarm"):
            np.testing.assert_allclose([one[name] for one in answers], expected[name], rtol=1e-4)
        found = metrics(client)
        assert found["rows_total"] == found["drift_rows"] == found["predict_seconds_count"] * len(x) == len(x)
        assert found["alarms_total"] == expected["ood_alarm"].sum() < 0.1 * len(x)
        assert (found["drifted"], found["nonfinite_total"]) == (0, 0)
        assert found["drift_log10_evidence"] < 1
        assert client.get("/healthz").json() == {"status": "ok", "drift_rows": len(x)}


@pytest.mark.slow
def test_rows_of_unknown_classes_are_a_drift(start):
    with start() as client:
        send(client, digits("test")[0])
        assert metrics(client)["drifted"] == 0
        for rows in digits("unknown")[0].split(16):
            answers = send(client, rows)
            if metrics(client)["drifted"]:
                break
        found = metrics(client)
        assert found["drifted"] == 1
        assert found["drift_log10_evidence"] > np.log10(20)
        assert found["drift_rows"] < len(digits("test")[0]) + 100
        assert any(one["ood_alarm"] for one in answers)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["null", "NaN", "-Infinity", "1e300"])
def test_a_row_that_is_not_finite_has_an_alarm_and_no_probabilities(start, value):
    with start() as client:
        good, bad = ", ".join(["0.5"] * 64), ", ".join([value, *["0.5"] * 63])
        content = f'{{"rows": [[{good}], [{bad}]]}}'
        answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
        alone, broken = answer.json()
        assert alone == send(client, torch.full((1, 64), 0.5))[0]
        assert broken == {
            "probabilities": None, "label": None, "ood_score": None, "ood_p_value": 0.0, "ood_alarm": True
        }  # fmt: skip
        assert (metrics(client)["nonfinite_total"], metrics(client)["rows_total"]) == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"rows": [[1, 2, 3]]}', "Each row must have 64 numbers, but there is a row of 3."),
        (f'{{"rows": [{[0.5] * 64}, []]}}', "Each row must have 64 numbers, but there is a row of 0."),
        ('{"rows": []}', "rows: List should have at least 1 item"),
        (f'{{"rows": {[[]] * 10_001}}}', "rows: List should have at most 10000 items"),
        ('{"row": [[NaN]]}', "rows: Field required"),
        ('{"rows": [[NaN, "many"]]}', "Input should be a valid number"),
        ('{"rows": [', "JSON decode error"),
    ],
)
def test_a_wrong_body_is_refused_in_a_sentence(start, body, words):
    with start() as client:
        answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
        assert metrics(client)["rows_total"] == metrics(client)["drift_rows"] == 0
        assert len(answer.text) < 300


@pytest.mark.slow
def test_a_restart_goes_on_with_the_monitor(start):
    rows = digits("test")[0]
    with start() as client:
        send(client, rows[:200])
        before = metrics(client)["drift_log10_evidence"]
    with start() as client:
        found = metrics(client)
        assert (found["drift_rows"], found["rows_total"]) == (200, 0)
        assert found["drift_log10_evidence"] == pytest.approx(before, abs=1e-9)
        send(client, rows[200:])
        assert metrics(client)["drift_rows"] == 300


@pytest.mark.slow
def test_the_state_is_saved_on_the_way_and_never_in_part(start, monkeypatch):
    state = Path("runs/worker-0.json")
    with start() as client:
        rows = digits("test")[0]
        send(client, rows[:99])
        assert not state.exists()
        send(client, rows[99:101])
        before = state.read_text()
        assert DriftMonitor.from_json(before).num_rows == 101
        send(client, rows[101:200])
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", kill)
            with pytest.raises(InterruptedError):
                send(client, rows[200:])
        assert state.read_text() == before
    assert DriftMonitor.from_json(state.read_text()).num_rows == 300


def kill(*_):
    raise InterruptedError


@pytest.mark.slow
def test_threads_lose_no_row(start):
    rows = digits("test")[0]
    with start() as client:
        threads = [threading.Thread(target=lambda: [send(client, rows[:7]) for _ in range(30)]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = metrics(client)
        assert found["rows_total"] == found["drift_rows"] == 2 * 30 * 7
        assert found["predict_seconds_count"] == 60


@pytest.mark.slow
def test_two_processes_need_two_numbers(start):
    with (
        start(),
        pytest.raises(RuntimeError, match="Another process holds runs/worker-0.json. Start each one with its"),
    ):
        start().__enter__()


@pytest.mark.slow
def test_the_state_of_another_model_is_refused(start):
    with start() as client:
        send(client, digits("test")[0])
    Path("runs/monitor.json").write_text(DriftMonitor(torch.randn(500)).to_json())
    with pytest.raises(RuntimeError, match="belongs to another alarm than monitor.json. Move the old states away."):
        start().__enter__()
    Path("runs/worker-0.json").unlink()
    with start() as client:  # the refused one holds nothing
        assert metrics(client)["drift_rows"] == 0


@pytest.mark.slow
def test_workers_merge_each_row_once(start, capsys):
    rows, unknown = digits("test")[0], digits("unknown")[0]
    for worker in range(3):
        with start(worker) as client:
            send(client, rows[worker::3])
    merge = importlib.import_module("merge").main
    for _ in range(2):  # the second time nothing is new
        merge(["runs"])
        assert re.match(r"300 rows, log10 evidence -?0\.\d+, drift at row None$", capsys.readouterr().out)
    states = [json.loads(Path(f"runs/worker-{worker}.json").read_text()) for worker in range(3)]
    assert len({state["id"] for state in states}) == len({state["seed"] for state in states}) == 3
    for worker in range(2):
        with start(worker) as client:
            send(client, unknown[worker::2])
    assert run(".", "merge.py", "runs").startswith(f"{300 + len(unknown)} rows")
    merged = DriftMonitor.from_json(Path("runs/merged.json").read_text())
    assert 300 < merged.drift_row < 400


@pytest.mark.slow
def test_an_earlier_state_of_a_worker_is_not_merged(start):
    merge = importlib.import_module("merge").main
    state = Path("runs/worker-0.json")
    with start() as client:
        send(client, digits("test")[0])
    early = state.read_text()
    with start() as client:
        send(client, digits("test")[0])
    merge(["runs"])
    state.write_text(early)
    with pytest.raises(InputError, match="earlier state"):
        merge(["runs"])
    assert DriftMonitor.from_json(Path("runs/merged.json").read_text()).num_rows == 600
