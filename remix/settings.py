"""The one place that reads the environment; everything else is handed its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from remix.stages import STAGES, Stage

Device = Literal["cpu", "cuda"]

PREFIX = "PHILHARMONICS_"


@dataclass(frozen=True)
class Settings:
    """How this process runs. Each field is set by the variable named beside it.

    Args:
        models_dir: where `make models` puts files (`PHILHARMONICS_MODELS`).
        runtime_dir: where the runners on this machine listen, on unix sockets
            (`PHILHARMONICS_RUNTIME_DIR`).
        remote_runners: addresses, `host:port`, of runners that somebody else started
            (`PHILHARMONICS_RUNNER_SEPARATE_STEMS` and so on).
        listen: the Open Inference address of a runner that is started alone
            (`PHILHARMONICS_LISTEN`), `host:port`; empty for a socket in `runtime_dir`.
        device: where the models run (`PHILHARMONICS_DEVICE`).
        threads: of one model call (`PHILHARMONICS_THREADS`); half the cores, because a runner
            computes two at once.
        max_queue_rows: windows that a model's queue holds before it refuses
            (`PHILHARMONICS_MAX_QUEUE_ROWS`).
        max_remixes: whole songs at once in one composer (`PHILHARMONICS_MAX_REMIXES`).
        max_upload_bytes: of a request's body (`PHILHARMONICS_MAX_UPLOAD_BYTES`).
        max_duration_s: of a decoded song (`PHILHARMONICS_MAX_DURATION_S`).
    """

    models_dir: Path
    runtime_dir: Path
    remote_runners: Mapping[Stage, str] = field(default_factory=dict)
    listen: str = ""
    device: Device = "cpu"
    threads: int = 1
    max_queue_rows: int = 256
    max_remixes: int = 2
    max_upload_bytes: int = 200_000_000
    max_duration_s: float = 600.0

    def runner_address(self, stage: Stage) -> str:
        """The gRPC target of a stage's runner."""
        return self.remote_runners.get(stage) or f"unix:{self.runtime_dir / stage}.sock"


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `PHILHARMONICS_*` variables; what is unset or empty keeps its default.

    A wrong value ends the process with a line that names it: no server should start on one.
    """

    def read(name: str, default: str) -> str:
        return environment.get(PREFIX + name) or default

    def number(name: str, default: float, least: float) -> float:
        text = read(name, str(default))
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise SystemExit(f"{PREFIX}{name} is {text!r}; it must be a number from {least:g} up.")
        return value

    device = read("DEVICE", "cpu")
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"{PREFIX}DEVICE is {device!r}; it must be cpu or cuda.")
    root = Path(__file__).resolve().parent.parent
    return Settings(
        models_dir=Path(read("MODELS", str(root / ".models"))),
        runtime_dir=Path(read("RUNTIME_DIR", str(root / ".cache" / "run"))),
        remote_runners={
            stage: environment[variable]
            for stage in STAGES
            if environment.get(variable := f"{PREFIX}RUNNER_{stage.upper()}")
        },
        listen=read("LISTEN", ""),
        device="cuda" if device == "cuda" else "cpu",
        threads=int(number("THREADS", max(1, len(os.sched_getaffinity(0)) // 2), 1)),
        max_queue_rows=int(number("MAX_QUEUE_ROWS", 256, 1)),
        max_remixes=int(number("MAX_REMIXES", 2, 1)),
        max_upload_bytes=int(number("MAX_UPLOAD_BYTES", 200_000_000, 1)),
        max_duration_s=number("MAX_DURATION_S", 600.0, 1),
    )
