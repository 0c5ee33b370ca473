"""What the five runners share: load, warm up, listen, drain."""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import bentoml
import grpc
from prometheus_client import Gauge

from remix.errors import InvalidModel, NotFound
from remix.manifest import expected_sha256, installed, read_manifest
from remix.settings import Settings, read_settings
from remix.stages import Stage
from runners.adaptive_batcher import Workers
from runners.front import front
from runners.inference_protocol import SERVER_OPTIONS, InferenceServer, ServedModel
from runners.open_graph import check_device
from runners.processes import (
    be_first,
    be_known,
    composers_gone,
    end_with_first,
    forget_the_dead,
)
from telemetry.logs import start_logging
from telemetry.process import ProcessWatch
from telemetry.traces import start_tracing

OVERTIME_S = 10.0
"""How much later than the composers beside it a stopping runner stops, at the latest."""

QUIET_MALLOC = [{"name": "MALLOC_ARENA_MAX", "value": "2"}]
"""With glibc's default of eight arenas a core, the large arrays of a remix leave holes in all of
them: 1,637 MB after 3 remixes grew to 1,755 MB after 43; with two arenas it stays at 1,586 MB."""

LARGE_ARRAYS_MALLOC = [*QUIET_MALLOC, {"name": "MALLOC_MMAP_THRESHOLD_", "value": "1048576"}]
"""Arrays from 1 MB on, each a mapping of its own, leave no holes at all: three songs of 20 s
through HTDemucs had a peak of 1,007 MB so, of 1,494 MB with two arenas alone, of 1,922 MB with
neither. In every process it made a remix 8 % slower: it is for the one with the largest arrays."""

MODEL_INFO = Gauge(
    "philharmonics_model_info",
    "1: this model is in use; its file has this checksum",
    ["stage", "model", "sha256"],
    multiprocess_mode="livemax",
)

SERVICE: dict[str, Any] = {
    "envs": QUIET_MALLOC,
    "workers": 1,  # a second worker would split the queue; replicas share it by the balancer
    "traffic": {"timeout": 3600},
    "endpoints": {"livez": "/livez", "readyz": "/readyz"},
    # BentoML's metrics have a series for every path that was asked for: ours are in `telemetry`,
    # and traces and logs too.
    "metrics": {"enabled": False},
    "tracing": {"excluded_urls": ".*"},
    "logging": {"access": {"enabled": False}},
}
"""BentoML's configuration of a runner."""


def verify_models(stage: Stage) -> None:
    """Refuse to start on a file that is not the manifest's.

    What ends here, before any worker is there, ends with a message; a worker that fails is
    started again and again.
    """
    be_first()
    settings = read_settings()
    try:
        entries = installed(read_manifest(), stage, settings.models_dir)
        if not entries:
            raise NotFound(
                f"No model for {stage} is installed in {settings.models_dir}: run `make models`."
            )
        for entry in entries:
            for file in entry.files:
                entry.verified_path(settings.models_dir, file)
        check_device(entries, settings)
    except (InvalidModel, NotFound) as error:
        raise SystemExit(f"The runner {stage} does not start. {error}") from error


class Runner:
    """Base of a runner: a BentoML service whose work goes over the Open Inference Protocol.

    BentoML's HTTP port serves health (`/livez`, `/readyz`) and `/metrics`; it has no method
    that takes a body.
    """

    stage: ClassVar[Stage]
    workers: ClassVar[int] = min(2, len(os.sched_getaffinity(0)))
    """Batches computed at once, with half the cores for each (`Settings.threads`): on two cores a
    song of 60 s took 9.9 s; 10.8 s when one batch at a time had both (benchmarks/remix.py)."""

    @abstractmethod
    def load(self, settings: Settings) -> Iterator[ServedModel]:
        """Every installed model of the stage, the default first."""

    def __init_subclass__(cls) -> None:
        """Have BentoML verify the stage's files once, in its parent process; refuse the rest."""
        super().__init_subclass__()
        bentoml.asgi_app(front, path="/")(cls)
        cls.verify = bentoml.on_deployment(partial(verify_models, cls.stage))  # type: ignore[attr-defined]

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Load and warm the models, then listen.

        Raises:
            InvalidModel: a file is not what the manifest says; the runner does not start.
        """
        end_with_first()
        forget_the_dead()
        self._settings = settings = read_settings()
        start_logging(self.stage, settings)
        self._end_tracing = start_tracing(self.stage, settings)
        self._inference = InferenceServer(
            self.stage,
            settings.max_queue_rows,
            Workers(self.workers),
            is_near=not settings.listen,
        )
        for model in await asyncio.to_thread(self._load_warm, settings):
            self._inference.add(model)
        self._watch = ProcessWatch(
            self.stage, uses_gpu=settings.device == "cuda", also=self._inference.show_queues
        )
        self._watch.start()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._inference.add_to(self._server)
        if not settings.listen:
            settings.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._server.add_insecure_port(settings.listen or settings.runner_address(self.stage))
        await self._server.start()
        if not settings.listen:  # else whoever started it alone looks after it
            self._known = be_known(settings.runtime_dir, self.stage)

    def _load_warm(self, settings: Settings) -> list[ServedModel]:
        manifest, models = read_manifest(), list(self.load(settings))
        for model in models:
            model.warm_up()
            file = manifest[model.name].files[0]
            sha256 = expected_sha256(settings.models_dir, file)
            MODEL_INFO.labels(self.stage, model.name, sha256).set(1)
        return models

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Take nothing new, end what has begun; clients are told to go elsewhere (GOAWAY).

        Composers on this machine are told to stop at the same moment. What they have let in they
        need their runners for, so these wait for them.
        """
        limit_s = self._settings.drain_s
        if not self._settings.listen:
            await composers_gone(self._settings.runtime_dir, limit_s + OVERTIME_S)
            self._known.close()
        self._inference.is_ready = False
        await self._server.stop(limit_s)
        await self._watch.stop()
        await asyncio.to_thread(self._end_tracing)

    async def __is_ready__(self) -> bool:
        """BentoML's `/readyz` asks this."""
        return self._inference.is_ready
