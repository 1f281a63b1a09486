"""One drift monitor over all worker processes: `python merge.py runs` once, or `--every 10 --port 9100` for Prometheus."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from monitor_file import MonitorFile
from prometheus_client import CollectorRegistry, start_http_server


def main(argv: Sequence[str] | None = None) -> None:
    """Merge once, or again and again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the FOLDER of the workers")
    parser.add_argument("--every", type=float, help="seconds between two merges; without it, merge once")
    parser.add_argument("--port", type=int, help="the port of /metrics; only with --every")
    args = parser.parse_args(argv)

    with MonitorFile(args.folder, "merged", seed=0) as merged:
        if args.port is not None:
            metrics = CollectorRegistry()
            metrics.register(merged)
            start_http_server(args.port, registry=metrics)
        while True:
            merged.merge(sorted(args.folder.glob("worker-*.json")))
            one = merged.monitor
            print(f"{one.num_rows} rows, log10 evidence {one.log10_evidence:.2f}, drift at row {one.drift_row}")
            if args.every is None:
                return
            time.sleep(args.every)


if __name__ == "__main__":
    main()
