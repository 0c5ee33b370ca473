"""The composing service: every call of HTTP and of gRPC, over the five runners.

    bentoml serve service:Remix     the composer, and beside it every runner that no
                                    PHILHARMONICS_RUNNER_* variable says is elsewhere

BentoML brings health (`/livez`, `/readyz`) and the server; the routes are a FastAPI app
(`http_api`), because BentoML's own cannot speak of media types, streams and problems.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import Any, cast

import bentoml
import click
from bentoml._internal.configuration.containers import BentoMLContainer

from grpc_service import GrpcService, check_port
from http_api.app import build_app
from http_api.guard import Guard
from http_api.observed import Observed
from http_api.problems import problem
from jobs.database import Database, open_database
from jobs.desk import WORK_S, Desk
from jobs.door import check_address
from jobs.files import Files
from jobs.jobs import Jobs
from jobs.keys import KeyStore
from jobs.stage_cache import StageCache
from remix.composer import warm_up
from remix.manifest import read_manifest
from remix.settings import GRPC_HOST
from runners.beside import beside, settings_with_runtime_dir
from runners.ingress import Draining, Ingress
from runners.processes import end_with_first
from runners.remote_stages import Runners
from runners.runner import QUIET_MALLOC, SERVICE
from telemetry.composer import ObservedComposer
from telemetry.logs import start_logging
from telemetry.process import ProcessWatch
from telemetry.traces import start_tracing

SWITCH_S = 0.0005
"""After which a thread of Python that mixes or draws gives way to the event loop; Python's own 5 ms
are too many for what is to be refused within 100."""

_settings = settings_with_runtime_dir()
_ingress = Ingress(_settings.drain_s)
_desk = Desk(_settings)


@bentoml.service(
    name="remix",
    envs=QUIET_MALLOC,
    workers=1,  # slots and progress are counted in this process; more composers are more replicas
    traffic={"timeout": 2 * WORK_S},  # the routes have limits of their own, with better answers
    endpoints={"livez": "/livez", "readyz": "/readyz"},
    metrics=SERVICE["metrics"],
    tracing=SERVICE["tracing"],
    logging=SERVICE["logging"],
)
@bentoml.asgi_app(build_app(_desk))
class Remix:
    """Composes the stages."""

    separate_stems = beside("separate_stems", _settings)
    transcribe_notes = beside("transcribe_notes", _settings)
    generate_notes = beside("generate_notes", _settings)
    convert_voice = beside("convert_voice", _settings)
    synthesize_audio = beside("synthesize_audio", _settings)

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def refuse_to_start_open() -> None:
        """Before anything listens: BentoML's own default is every address of the machine."""
        command = click.get_current_context(silent=True)
        host = command.params.get("host") if command is not None else None
        host = host or BentoMLContainer.http.host.get()
        check_address(host, _settings)
        if _settings.grpc_port:
            # The workers, who are not told where they listen, inherit it.
            os.environ[GRPC_HOST] = grpc_host = _settings.grpc_host or host
            check_address(grpc_host, _settings)
            check_port(grpc_host, _settings.grpc_port)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def open(self) -> None:
        """Warm up, prepare the channels to the runners, and take requests."""
        end_with_first()
        sys.setswitchinterval(SWITCH_S)
        start_logging("composer", _settings)
        self._end_tracing = start_tracing("composer", _settings)
        self._watch = ProcessWatch("composer")
        self._watch.start()
        await asyncio.to_thread(warm_up)
        self._database = Database(await asyncio.to_thread(open_database, _settings.database_url))
        _desk.keys = KeyStore(self._database)
        if _desk.door.asks_for_keys:
            await _desk.door.open(_desk.keys.list)
        manifest = dict(read_manifest())  # the composer adds enrolled voices, for all who have it
        self._runners = Runners(_settings, manifest)
        _ingress.heed_signals()
        self._cache = StageCache(
            Files(_settings.cache_url), _settings.cache_bytes, manifest, _settings.models_dir
        )
        composer = ObservedComposer(
            _settings, manifest, lambda: self._cache.for_song(self._runners.for_song())
        )
        self._jobs = Jobs(
            _settings, composer, _desk.estimator, self._database, self._cache.give_way
        )
        await self._jobs.start()
        _ingress.on_stop(lambda: self._jobs.drain(_settings.drain_s))
        _desk.open(composer, self._jobs, self._runners.unavailable)
        self._grpc = GrpcService(_desk, _settings, self._is_ready)
        if _settings.grpc_port:
            await self._grpc.start()
            _ingress.on_stop(self._grpc.drain)
        # Python's collector stops every thread while it looks through all objects: 0.2 s for those
        # of the modules, which stay anyhow. From now on it passes over them.
        gc.collect()
        gc.freeze()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def close(self) -> None:
        """Take no more requests, and close the channels."""
        await self._grpc.stop()
        _desk.open(None)
        await _desk.door.close()
        await self._jobs.stop()
        await self._cache.close()
        await self._runners.close()
        await self._watch.stop()
        self._database.close()
        self._end_tracing()  # not on a thread of the loop's: dbos has taken them with it

    async def __is_ready__(self) -> bool:
        """What `/readyz` says."""
        return self._is_ready()

    def _is_ready(self) -> bool:
        """Whether every runner is ready, and requests are taken."""
        return not _ingress.is_stopping and not self._runners.unavailable()


# `bentoml.service` makes a Service of the class; its stub says it leaves it a class.
cast(Any, Remix).add_asgi_middleware(Observed)
cast(Any, Remix).add_asgi_middleware(Draining, ingress=_ingress, answer=problem)
cast(Any, Remix).add_asgi_middleware(
    Guard, door=_desk.door, max_body_bytes=_settings.max_upload_bytes
)
