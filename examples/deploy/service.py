"""Predictions, alarms and a drift monitor over HTTP: `FOLDER=runs WORKER=0 uvicorn service:app`. README.md says more."""

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monitor_file import MonitorFile
from predictor import Predictor
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

FOLDER, WORKER = Path(os.environ["FOLDER"]), int(os.environ.get("WORKER", "0"))
predictor, metrics = Predictor(FOLDER / "model.onnx"), CollectorRegistry()
total, alarms, nonfinite = (Counter(name, "In all", registry=metrics) for name in ("rows", "alarms", "nonfinite"))
STEPS = [2.0**i / 1000 for i in range(10)]
latency = Histogram("predict_seconds", "From a parsed request to its answer", buckets=STEPS, registry=metrics)
Rows = Annotated[list[list[float | None]], Body(embed=True, min_length=1, max_length=10_000)]


@asynccontextmanager
async def lifespan(app: FastAPI):
    with MonitorFile(FOLDER, f"worker-{WORKER}", seed=WORKER) as app.state.drift:
        metrics.register(app.state.drift)
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(RequestValidationError)
def refuse(request: Request, error: RequestValidationError) -> Response:
    # In a sentence. FastAPI repeats the input instead, and fails if that holds NaN.
    return JSONResponse({"detail": "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()[:3])}, 422)


@app.post("/predict")
def predict(rows: Rows) -> Response:
    with latency.time():
        try:
            answers, scores = predictor(rows)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        app.state.drift.update(scores)
        total.inc(len(rows))
        alarms.inc(sum(one["ood_alarm"] for one in answers))
        nonfinite.inc(sum(one["label"] is None for one in answers))
        return JSONResponse(answers)


@app.get("/metrics")
def read_metrics() -> Response:
    return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)


@app.get("/healthz")
def check_health() -> dict[str, str | int]:
    return {"status": "ok", "drift_rows": app.state.drift.monitor.num_rows}
