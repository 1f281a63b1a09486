"""How fast the service answers, and what its monitor takes of that: `python measure.py runs`."""

import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from monitor_file import MonitorFile
from predictor import Predictor
from train import digits

PORT = 8123


def milliseconds(call: Callable[[], object], num: int) -> list[float]:
    """The times of single calls, ascending."""
    found = []
    for _ in range(num):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return sorted(found)


def post(connection: http.client.HTTPConnection, body: str) -> None:
    """One request on a connection that stays open."""
    connection.request("POST", "/predict", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read())
    answer.read()


def processor_seconds(pid: int) -> float:
    """What a process has used so far, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connect() -> http.client.HTTPConnection:
    """A connection to the service, once it has started."""
    for _ in range(300):
        connection = http.client.HTTPConnection("127.0.0.1", PORT)
        try:
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            return connection
        except ConnectionRefusedError:
            time.sleep(0.2)
    raise RuntimeError("The service did not start within a minute.")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as copy:
        folder = shutil.copytree(sys.argv[1], Path(copy) / "runs", ignore=shutil.ignore_patterns("worker-*"))
        command = [sys.executable, "-m", "uvicorn", "service:app", "--port", str(PORT), "--no-access-log"]
        service = subprocess.Popen(command, env={**os.environ, "FOLDER": str(folder), "WORKER": "1"})
        try:
            connection = connect()
            predictor = Predictor(folder / "model.onnx")
            with MonitorFile(folder, "worker-0", seed=0) as drift:
                for num_rows in (1, 32):
                    rows = digits("test").tensors[0][:num_rows].tolist()
                    body, scores = json.dumps({"rows": rows}), predictor(rows)[1]
                    found, used = [], processor_seconds(service.pid)
                    for _ in range(7):
                        taken = milliseconds(lambda body=body: post(connection, body), 500)
                        graph = milliseconds(lambda rows=rows: predictor(rows), 500)
                        monitor = milliseconds(lambda scores=scores: drift.update(scores), 500)
                        found.append((500_000 / sum(taken), taken[250], taken[475], graph[250], monitor[250]))
                    used = 1000 * (processor_seconds(service.pid) - used) / (7 * 500)
                    rate, p50, p95, graph_ms, monitor_ms = map(statistics.median, zip(*found, strict=True))
                    print(
                        f"{num_rows} rows: {rate:.0f} requests/s, p50 {p50:.2f} ms, p95 {p95:.2f} ms; "
                        f"processor {used:.2f} ms, of which graph {graph_ms:.2f} ms, monitor {monitor_ms:.2f} ms"
                    )
        finally:
            service.terminate()
            service.wait()
