"""Imports what a server of a role imports, and compiles that, and nothing else.

    python compile_used.py composer|runner|all

Compiled code of every package is 86 MB, of what is imported half of it. Compiled by hash, not by
time: the same sources give the same files.
"""

from __future__ import annotations

import importlib
import py_compile
import sys
from pathlib import Path

BOTH = """
    bentoml bentoml_cli.cli bentoml_cli.serve bentoml_cli._internal.start bentoml.metrics
    _bentoml_impl.server _bentoml_impl.server.app _bentoml_impl.server.serving
    _bentoml_impl.worker.service
    circus.arbiter uvicorn uvicorn.lifespan.on uvicorn.protocols.http.h11_impl uvicorn.loops.asyncio
    grpc.aio grpc_health.v1.health tritonclient.grpc google.rpc.status_pb2 numpy
    scipy.signal scipy.fft scipy.ndimage prometheus_client.multiprocess prometheus_client.exposition
    multiprocessing.spawn multiprocessing.resource_tracker concurrent.futures.process
    urllib.request pydantic aiohttp httpx yaml
    opentelemetry.sdk.trace.export opentelemetry.trace.propagation.tracecontext pynvml
    opentelemetry.exporter.otlp.proto.grpc.trace_exporter
    """.split()

COMPOSER = """
    av soundfile scipy.io.wavfile mido fastapi fastapi.openapi.docs python_multipart
    matplotlib.figure matplotlib.backends.backend_agg sqlalchemy sqlalchemy.dialects.postgresql
    sqlalchemy.dialects.sqlite sqlalchemy.dialects.postgresql.psycopg psycopg dbos
    fsspec.implementations.local
    grpc_reflection.v1alpha.reflection google.rpc.error_details_pb2
    """.split()

RUNNER = ["onnxruntime", "fluidsynth"]

ROLES = {"composer": BOTH + COMPOSER, "runner": BOTH + RUNNER, "all": BOTH + COMPOSER + RUNNER}


def main() -> None:
    """Compile; what cannot be imported is said and left."""
    for name in ROLES[sys.argv[1]]:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - the server's own start is what proves it
            sys.stderr.write(f"{name}: {error!r}\n")
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path.endswith(".py") and path.startswith(sys.prefix) and Path(path).is_file():
            py_compile.compile(
                path, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )


if __name__ == "__main__":
    main()
