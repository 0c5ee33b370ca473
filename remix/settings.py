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

GRPC_HOST = PREFIX + "GRPC_HOST"


@dataclass(frozen=True)
class Settings:
    """How this process runs. Each field is set by the variable named beside it.

    Args:
        models_dir: where `make models` puts files (`PHILHARMONICS_MODELS`).
        runtime_dir: where the runners on this machine listen, on unix sockets
            (`PHILHARMONICS_RUNTIME_DIR`).
        remote_runners: addresses, `host:port`, of runners that somebody else started
            (`PHILHARMONICS_RUNNER_SEPARATE_STEMS` and so on); calls take turns on the replicas
            that a name stands for, or that are listed: `ipv4:10.0.0.1:4001,10.0.0.2:4001`.
        listen: the Open Inference address of a runner that is started alone
            (`PHILHARMONICS_LISTEN`), `host:port`; empty for a socket in `runtime_dir`.
        grpc_host: where the composer listens for gRPC (`PHILHARMONICS_GRPC_HOST`): where it
            listens for HTTP, if unset.
        grpc_port: and on which port (`PHILHARMONICS_GRPC_PORT`); 0 for no gRPC.
        device: where the models run (`PHILHARMONICS_DEVICE`).
        threads: of one model call (`PHILHARMONICS_THREADS`); half the cores, because a runner
            computes two at once.
        max_queue_rows: windows that a model's queue holds before it refuses
            (`PHILHARMONICS_MAX_QUEUE_ROWS`).
        runner_patience_s: how long a call waits for a runner that is away, such as one that is
            being started again, before it fails (`PHILHARMONICS_RUNNER_PATIENCE_S`).
        window_s: how long the answer to a window may take, beside what a full queue before it would
            (`PHILHARMONICS_WINDOW_S`); then it is asked for once again, and then it fails.
        drain_s: how long requests may still take when the service is told to stop
            (`PHILHARMONICS_DRAIN_S`).
        max_remixes: whole songs at once in one composer (`PHILHARMONICS_MAX_REMIXES`), in requests
            that wait for them, and as many as jobs.
        max_upload_bytes: of a request's body (`PHILHARMONICS_MAX_UPLOAD_BYTES`).
        max_duration_s: of a decoded song (`PHILHARMONICS_MAX_DURATION_S`).
        database: of the jobs (`PHILHARMONICS_DATABASE`): `postgresql://…`; empty for SQLite in
            `data_dir`.
        artifacts: where jobs' files go (`PHILHARMONICS_ARTIFACTS`), a folder or any address that
            `fsspec` knows; empty for a folder in `data_dir`.
        cache: where windows that were computed once are kept (`PHILHARMONICS_CACHE`), likewise.
        cache_bytes: how much of it (`PHILHARMONICS_CACHE_BYTES`); 0 keeps nothing.
        data_dir: for the three above (`PHILHARMONICS_DATA_DIR`).
        max_waiting_jobs: before another one is refused (`PHILHARMONICS_MAX_WAITING_JOBS`).
        retention_s: how long an ended job and its files are kept (`PHILHARMONICS_RETENTION_S`).
        lease_s: how long a composer may be silent before others take over its jobs
            (`PHILHARMONICS_LEASE_S`).
        webhook_hosts: that may be told of ended jobs (`PHILHARMONICS_WEBHOOK_HOSTS`), `host` or
            `host:port`, separated by commas; none if empty.
        webhook_secret: signs what they are told (`PHILHARMONICS_WEBHOOK_SECRET`).
        keys: `on`: only callers with an API key are served; `off`: everybody is
            (`PHILHARMONICS_KEYS`); empty: everybody, and only on a loopback address.
        traces: where spans go (`PHILHARMONICS_TRACES`): `http://host:4317`, an OpenTelemetry
            collector's address for OTLP over gRPC, or `file:PATH`; empty: nowhere.
        trace_share: of the requests, for which spans are written (`PHILHARMONICS_TRACE_SHARE`).
        log: `json`, or `text` for a terminal (`PHILHARMONICS_LOG`).
    """

    models_dir: Path
    runtime_dir: Path
    remote_runners: Mapping[Stage, str] = field(default_factory=dict)
    listen: str = ""
    grpc_host: str = ""
    grpc_port: int = 3001
    device: Device = "cpu"
    threads: int = 1
    max_queue_rows: int = 256
    runner_patience_s: float = 120.0
    window_s: float = 60.0
    drain_s: float = 30.0
    max_remixes: int = 2
    max_upload_bytes: int = 200_000_000
    max_duration_s: float = 600.0
    database: str = ""
    artifacts: str = ""
    cache: str = ""
    cache_bytes: int = 0
    data_dir: Path = Path(".data")
    max_waiting_jobs: int = 64
    retention_s: float = 86_400.0
    lease_s: float = 10.0
    webhook_hosts: tuple[str, ...] = ()
    webhook_secret: str = ""
    keys: Literal["on", "off", ""] = ""
    traces: str = ""
    trace_share: float = 1.0
    log: Literal["json", "text"] = "json"

    @property
    def database_url(self) -> str:
        """Of the jobs."""
        return self.database or f"sqlite:///{self.data_dir.resolve() / 'jobs.db'}"

    @property
    def artifacts_url(self) -> str:
        """Of the jobs' files."""
        return self.artifacts or str(self.data_dir.resolve() / "artifacts")

    @property
    def cache_url(self) -> str:
        """Of the windows."""
        return self.cache or str(self.data_dir.resolve() / "cache")

    def runner_address(self, stage: Stage) -> str:
        """The gRPC target of a stage's runner."""
        return self.remote_runners.get(stage) or f"unix:{self.runtime_dir / stage}.sock"


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `PHILHARMONICS_*` variables; what is unset or empty keeps its default.

    A secret can come from a file instead: `PHILHARMONICS_DATABASE_FILE` names one whose content is
    taken for `PHILHARMONICS_DATABASE`; the same for each of them but the runners' addresses.

    A wrong value ends the process with a line that names it: no server should start on one.
    """

    def read(name: str, default: str) -> str:
        if file := environment.get(f"{PREFIX}{name}_FILE"):
            try:
                return Path(file).read_text().strip() or default
            except OSError as error:
                raise SystemExit(f"{PREFIX}{name}_FILE is {file!r}: {error.strerror}.") from error
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
    keys = read("KEYS", "")
    if keys not in ("on", "off", ""):
        raise SystemExit(f"{PREFIX}KEYS is {keys!r}; it must be on, off or empty.")
    traces = read("TRACES", "")
    if traces and not traces.startswith(("file:", "http://", "https://")):
        raise SystemExit(
            f"{PREFIX}TRACES is {traces!r}; it must be file:PATH, http://HOST:PORT or empty."
        )
    log = read("LOG", "json")
    if log not in ("json", "text"):
        raise SystemExit(f"{PREFIX}LOG is {log!r}; it must be json or text.")
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
        grpc_host=read("GRPC_HOST", ""),
        grpc_port=int(number("GRPC_PORT", 3001, 0)),
        device="cuda" if device == "cuda" else "cpu",
        threads=int(number("THREADS", max(1, len(os.sched_getaffinity(0)) // 2), 1)),
        max_queue_rows=int(number("MAX_QUEUE_ROWS", 256, 1)),
        runner_patience_s=number("RUNNER_PATIENCE_S", 120.0, 0),
        window_s=number("WINDOW_S", 60.0, 0),
        drain_s=number("DRAIN_S", 30.0, 0),
        max_remixes=int(number("MAX_REMIXES", 2, 1)),
        max_upload_bytes=int(number("MAX_UPLOAD_BYTES", 200_000_000, 1)),
        max_duration_s=number("MAX_DURATION_S", 600.0, 1),
        database=read("DATABASE", ""),
        artifacts=read("ARTIFACTS", ""),
        cache=read("CACHE", ""),
        cache_bytes=int(number("CACHE_BYTES", 8e9, 0)),
        data_dir=Path(read("DATA_DIR", str(root / ".data"))),
        max_waiting_jobs=int(number("MAX_WAITING_JOBS", 64, 1)),
        retention_s=number("RETENTION_S", 86_400.0, 0),
        lease_s=number("LEASE_S", 10.0, 1),
        webhook_hosts=tuple(filter(None, read("WEBHOOK_HOSTS", "").split(","))),
        webhook_secret=read("WEBHOOK_SECRET", ""),
        keys="on" if keys == "on" else "off" if keys == "off" else "",
        traces=traces,
        trace_share=min(1.0, number("TRACE_SHARE", 1.0, 0)),
        log="text" if log == "text" else "json",
    )
