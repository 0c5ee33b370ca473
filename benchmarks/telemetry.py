"""What it costs to be seen: processor time of a window's metrics and spans, and of a song's.

    python -m benchmarks.telemetry [--rounds 15]

A window has spans on both sides of the hop (window; infer, queue, compute) and is counted on both:
three observations at the composer, five of the batcher. Measured are all of them, one after another
in one process, with the metrics in files as a server has them. Writes
benchmarks/results/telemetry.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from remix.settings import Settings

RESULT = Path(__file__).parent / "results/telemetry.json"

WINDOWS = 300
"""In a round: about as many as two songs of a minute have."""

WINDOWS_OF_A_MINUTE = 154
"""28 windows in the demo song of 10.9 s."""


def spans_of_a_window() -> None:
    """Composer and runner."""
    from telemetry import traces

    with traces.window("convert_voice", "voice-starter", 1):
        header = traces.traceparent()
    with traces.serving("infer", header) as span:
        traces.past_part("compute", traces.past_part("queue", time.time_ns(), 0.01), 0.1)
        span.set_attributes({"model": "voice-starter", "batch_windows": 1})


def metrics_of_a_window() -> None:
    """Composer and runner."""
    from runners import adaptive_batcher as batcher
    from runners.remote_stages import STAGE_SECONDS

    for part in ("queue", "compute", "transfer"):
        STAGE_SECONDS.labels("convert_voice", part).observe(0.1)
    model = "voice-starter"
    batcher.QUEUE_SECONDS.labels(model).observe(0.01)
    batcher.COMPUTE_SECONDS.labels(model).observe(0.1)
    batcher.BATCH_WINDOWS.labels(model).observe(1)
    batcher.PADDING_WINDOWS.labels(model).inc(0)
    batcher.WINDOWS.labels(model, "computed").inc()
    batcher.REQUESTS.labels(model, "done").inc()
    for gauge in (batcher.QUEUE_WINDOWS, batcher.QUEUE_AGE_SECONDS, batcher.COMPUTING_WINDOWS):
        gauge.labels(model).set(0)
        gauge.labels(model).set(1)


def cpu_us(work: Callable[[], None]) -> float:
    """Processor time of one call, in microseconds, what other threads do for it with it."""
    start_s = time.process_time()
    for _ in range(WINDOWS):
        work()
    return 1e6 * (time.process_time() - start_s) / WINDOWS


def measure(rounds: int) -> dict[str, object]:
    """All sides, in turn."""
    from telemetry import traces

    found: dict[str, list[float]] = {"metrics": [], "spans_not_written": [], "spans_to_a_file": []}
    with tempfile.TemporaryDirectory() as folder:
        file = f"file:{folder}/spans"
        for _ in range(rounds):
            found["metrics"].append(cpu_us(metrics_of_a_window))
            for name, where in (("spans_not_written", ""), ("spans_to_a_file", file)):
                end = traces.start_tracing("composer", Settings(Path(), Path(), traces=where))
                start_s = time.process_time()
                for _ in range(WINDOWS):
                    spans_of_a_window()
                end()  # writing the last of them counts too
                found[name].append(1e6 * (time.process_time() - start_s) / WINDOWS)
    medians = {name: round(statistics.median(times), 1) for name, times in found.items()}
    return {
        "what": "processor time of what is told of a window, on both sides of the hop",
        "rounds": rounds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "us_a_window": medians,
        "ms_a_song_of_60_s": {
            name: round(us * WINDOWS_OF_A_MINUTE / 1000, 1) for name, us in medians.items()
        },
    }


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # before prometheus_client is imported
        result = measure(rounds)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
